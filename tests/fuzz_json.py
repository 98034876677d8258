"""Edits of JSON values for `tests.fuzz`."""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

DELETED = object()
# What takes the place of a value: other types, other sizes, and what a terminal or a reader trips over.
VALUES = (
    None, True, False, 0, 1, -1, 3.7, 10**30, -(10**30), math.nan, math.inf, "", "x", "7", "NaN",
    "a\x1b[2J\ud800", "x" * 5000, [], [1], ["x"], {}, {"a": 1}, [[[[]]]], [None] * 99,
)  # fmt: skip


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a JSON value, the whole included."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from nodes(value[key], (*path, key))


def replaced(value: Any, path: Sequence[Any], new: Any) -> Any:
    """A JSON value with another one at a place; `DELETED` takes it out."""
    if not path:
        return new
    key, *rest = path
    value = copy.copy(value)
    if not rest and new is DELETED:
        del value[key]
    else:
        value[key] = replaced(value[key] if key in value or isinstance(value, list) else None, rest, new)
    return value


def senseless(old: Any, new: Any) -> bool:
    """Whether no field that holds the old value can hold the new one, by its type alone."""
    if old is None or (isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool)):
        return False
    return type(old) is not type(new) or (isinstance(new, float) and not math.isfinite(new))
