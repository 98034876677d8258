"""Files that appear under their names only when they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to; rename it on success, delete it on failure.

    A killed process leaves at most `.<name>.part`, which the next write to the same path replaces.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
