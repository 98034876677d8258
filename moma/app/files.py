"""Files, tables, exit statuses and the argument parser of the commands."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears or changes as a whole."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file; it appears or changes as a whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def exit_status(command: str, main: Callable[[], object]) -> int:
    """Run a command: 0, or 2 and one line for a user's mistake or too little memory."""
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def check_writable(option: str, folder: Path) -> None:
    """Make the folder; ValueError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot write there ({error.strerror})") from None
