"""Files that others wrote, read within bounds, and files that appear under their names only when complete."""

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

TEXT_BYTES = 2**25  # of a text or JSON file: the largest public ones, vocabularies, take 2**22
DEPTH = 64  # of nested lists and objects in JSON; public files have 8
UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks that Windows shells write
MEMORY_BYTES = 2**30  # of remembered hashes, some 150 of them for each file
HASHERS = 8  # threads that hash files
UNSETTLED = 2 * 10**9  # nanoseconds in which a file may change again and keep its time of change
PART = re.compile(r"\.[0-9a-f]{16}\.part")  # temporary names
# What operating systems put into folders and archives.
SYSTEM = re.compile(r"\._.*|\.DS_Store|__MACOSX|Thumbs\.db|desktop\.ini", re.IGNORECASE)

# --- reading -----------------------------------------------------------------------------------------


def check_file(path: Path) -> None:
    """ValueError, with the reason, unless there is a regular file."""
    if path.is_file():
        return
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a file")
    if path.is_symlink():
        raise ValueError(f"{path}: a link to {os.readlink(path)}, which is not there")
    raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")


def read_bytes(path: str | Path, limit: int = TEXT_BYTES) -> bytes:
    """A whole file; ValueError (one line) if it cannot be read or has more than `limit` bytes."""
    path = Path(path)
    check_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise ValueError(f"{path}: more than {limit:,} bytes, too large for what it should be")
    return data


def read_text(path: str | Path, limit: int = TEXT_BYTES) -> str:
    r"""Text in UTF-8, or UTF-16 with its byte order mark. Lines end with "\n" alone, without a mark.

    Split it with `split("\n")`: `splitlines` also breaks at characters that may stand within a line.
    ValueError as `read_bytes`, and for other encodings.
    """
    data = read_bytes(path, limit)
    try:
        text = data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 (byte {error.start}: {error.reason})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, limit: int = TEXT_BYTES) -> Any:
    """What a JSON file holds; ValueError (one line) as `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit), str(path))


def read_object(path: str | Path, limit: int = TEXT_BYTES) -> dict[str, Any]:
    """As `read_json`, for a file that must hold an object."""
    data = read_json(path, limit)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, {{...}}")
    return data


def parse_json(text: str | bytes, name: str) -> Any:
    """What a JSON text holds; ValueError (one line), beginning with `name`, if it is damaged or too deep."""
    try:
        data = json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    except RecursionError:
        raise ValueError(f"{name}: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from None
    level = [data] if isinstance(data, list | dict) else []  # of lists and objects, level by level
    for _ in range(DEPTH):
        inside = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for children in inside for child in children if isinstance(child, list | dict)]
    if level:
        raise ValueError(f"{name}: nested deeper than {DEPTH}")
    return data


def visible(folder: Path) -> list[Path]:
    """What is in a folder, without what operating systems put there."""
    return sorted(path for path in folder.iterdir() if not SYSTEM.fullmatch(path.name))


# --- what files hold -----------------------------------------------------------------------------------


class Hashes:
    """Hashes of files, remembered with size and times of change, so that a file is read once.

    What lies beside a file is not believed: only what this has computed itself.
    """

    def __init__(self, memory: Path | None) -> None:
        """memory: file to keep them in, such as one in the user's own folder; None = this object alone."""
        self.memory, self.known = memory, {}
        if memory is not None and memory.is_file():
            with suppress(ValueError):
                self.known = read_object(memory, MEMORY_BYTES)

    @classmethod
    def below(cls, folder: Path) -> Self:
        """For the files in a folder, remembered in this user's cache."""
        cache, name = user_cache(), hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()
        return cls(None if cache is None else cache / "hashes" / f"{name[:16]}.json")

    def of(self, paths: Sequence[Path]) -> list[str]:
        """sha256 of each file, "" where there is none; OSError if one cannot be read."""
        before = dict(self.known)
        with ThreadPoolExecutor(HASHERS) as pool:  # Python's lock is released while a file is hashed
            found = list(pool.map(self._one, paths))
        if self.memory is not None and self.known != before:
            with suppress(OSError):
                self.memory.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self.memory) as part:
                    part.write_text(json.dumps(self.known), encoding="utf-8")
        return found

    def _one(self, path: Path) -> str:
        if not path.is_file():
            return ""
        stat, name = path.stat(), str(path.absolute())
        now = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]  # a copy may bring its own time of change
        known = self.known.get(name)
        if isinstance(known, list) and known[:-1] == now:
            return known[-1]
        with naming(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - stat.st_mtime_ns > UNSETTLED:
            self.known[name] = [*now, digest]
        return digest


def user_cache() -> Path | None:
    """This user's folder for what can be computed again; None for a user without a home."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moma"
    return None


# --- writing -----------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to; rename it on success, delete it on failure.

    Its name is random and was free, so that no link that lies there is followed; a link at `path` is
    replaced. A killed process leaves at most a `.<random>.part` (`remove_parts`).
    """
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    part.touch(exist_ok=False)
    try:
        with naming(path):
            yield part
            flush(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, such as that of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left below a folder that no other process writes to."""
    for path in folder.rglob(".*.part"):
        if PART.fullmatch(path.name):
            path.unlink()


def append_text(path: Path, text: str) -> None:
    """Add to a text file, which need not exist; OSError if it is a link."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    with naming(path), open(path, "a", encoding="utf-8", opener=opener) as file:
        file.write(text)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
