"""Files, tables, exit statuses and the argument parser of the commands."""

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from models.weights.files import atomic_write

# What a terminal obeys or reorders instead of showing it: control characters but tab and line feed, other
# line ends, and marks that turn the direction of text.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
OUT_OF_MEMORY = re.compile(  # torch's words, on GPUs and CPUs
    "out of memory|allocate memory|not enough memory|invalid buffer size", re.IGNORECASE
)


class Shown:
    """A text stream for people, which never stops the work that it tells of.

    What a terminal would obey and what the stream's encoding lacks is written as an escape; a carriage return
    at the start of a text, as progress bars write it, stays. When the reader is gone or the disk full, the
    rest goes nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 - as long as the process

    def write(self, text: str) -> int:
        start = text.startswith("\r")
        shown = text[:start] + OBEYED.sub(lambda found: ascii(found[0])[1:-1], text[start:])
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._try(self._stream.write, shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., object], *given: str) -> None:
        try:
            act(*given)
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; what that lacks, in names of files, is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as part:
        part.write_bytes(data)


def counted(count: int, name: str) -> str:
    """Such as "1 image" and "2,000 images"."""
    return f"{count:,} {name}{'s' * (count != 1)}"


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
    with contextlib.redirect_stdout(Shown(sys.stdout)), contextlib.redirect_stderr(Shown(sys.stderr)):
        try:
            main()
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
                raise
            rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
            text = " ".join(str(error).split()) or "out of memory"
            print(f"{command}{rank}: error: {text}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            print(f"{command}: {str(stop) or stopped}", file=sys.stderr)
            return getattr(stop, "status", 130)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # here, where it cannot fail
        return 0


def given_text(text: str) -> str:
    """The type of an option that names a place; argparse's error for an empty text."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty, expected a file or folder")
    return text


def given_path(text: str) -> Path:
    """`given_text` as a path."""
    return Path(given_text(text))


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong options, with one line, instead of ending the process; an option of type
    Path takes no empty text, which would be the current folder."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, given_path)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def check_writable(option: str, folder: Path) -> None:
    """Create a folder; ValueError, naming the option, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = f"a link to {os.readlink(folder)}" if folder.is_symlink() else error.strerror
        raise ValueError(f"{option} {folder}: cannot write there ({why}): choose another folder") from None
