"""Ways to damage a file of weights, for the fuzzer."""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def damaged(rng: random.Random, content: bytes) -> tuple[str, int, bytes]:
    """How and where a file was changed, and what became of it; "cut", "empty" and "other" must be refused."""
    data = bytearray(content)
    way = rng.choice(["flip", "cut", "zeros", "insert", "empty", "other"])
    head = rng.choice([64, 4096, len(data)])  # damage near the start hits the header
    at = rng.randrange(min(head, len(data)))
    match way:
        case "flip":
            data[at] ^= 1 << rng.randrange(8)
        case "cut":
            del data[at:]
        case "zeros":
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        case "insert":
            data[at:at] = rng.randbytes(rng.randrange(1, 99))
        case "empty":
            data = bytearray()
        case "other":
            data = bytearray(rng.choice([b"<html>", b"{}", b"PK\3\4", b"\x80\2", bytes(99), b"["]))
    return way, at, bytes(data)


def edited(
    rng: random.Random, content: Mapping[str, Tensor], keys: Sequence[str]
) -> tuple[dict[str, Tensor], str, str, bool]:
    """Tensors of which one is another or gone: all of them, its name, how, whether they must be refused.

    Args:
        rng: decides.
        content: the tensors.
        keys: those that may be changed.
    """
    tensors, key = dict(content), rng.choice(keys)
    values = tensors[key]
    edits: dict[str, Callable[[], Tensor]] = {
        "flat": lambda: values.reshape(-1)[: max(1, values.numel() - 1)],
        "scalar": lambda: values.reshape(-1)[:1].reshape(()),
        "int8": lambda: values.to(torch.int8),
        "bytes": lambda: values.to(torch.uint8),
        "bool": lambda: values > 0,
        "nan": lambda: values.clone().fill_(math.nan),
        "inf": lambda: values.clone().fill_(math.inf),
        "wide": lambda: torch.cat([values.reshape(-1), values.reshape(-1)]),
        "float8": lambda: values.float().to(torch.float8_e5m2),
    }
    way = rng.choice([*edits, "drop", "rename"])
    if way in edits:
        tensors[key] = edits[way]().contiguous()
    else:
        del tensors[key]
    if way == "rename":
        tensors[f"{key}x"] = values
    # A number without a dimension is a vector of one, and a vector may lose nothing by losing its shape.
    return tensors, key, way, not (way in ("flat", "scalar") and values.numel() < 2)
