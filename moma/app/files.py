"""Files, tables, exit statuses and the argument parser of the commands."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from models.weights.files import atomic_write


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as part:
        part.write_bytes(data)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, with a line break at its end."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ("---",) * len(head), *rows))


def exit_status(command: str, main: Callable[[], object], stopped: str = "stopped") -> int:
    """Run a command and turn its outcome into an exit status.

    Args:
        command: its name.
        main: raises ValueError or OSError, with one line, for a user's mistake.
        stopped: what to say after Ctrl-C.

    Returns:
        0; 2 after one line on stderr for a mistake or too little memory; 130 after Ctrl-C, or the `status` of
        what was raised in its place.
    """
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{command}{rank}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"{command}: {str(stop) or stopped}", file=sys.stderr)
        return getattr(stop, "status", 130)
    return 0


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong options, with one line, instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def check_writable(option: str, folder: Path) -> None:
    """Create a folder; ValueError, naming the option, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot write there ({error.strerror})") from None
