"""Reading the recorded outputs of the official code (tests/golden/README.md)."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

CARRIED = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("MOMA_GOLDEN", CARRIED))


def golden(case: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{case}.safetensors")


def excerpt(full: Tensor, recorded: Tensor) -> Tensor:
    """The entries of `full` that `recorded` holds: every n-th along each axis."""
    assert full.dim() == recorded.dim(), f"{tuple(full.shape)} against {tuple(recorded.shape)}"
    strides = [-(-a // b) for a, b in zip(full.shape, recorded.shape, strict=True)]
    part = full[tuple(slice(None, None, n) for n in strides)]
    assert part.shape == recorded.shape, f"{tuple(full.shape)} has no regular subset {tuple(recorded.shape)}"
    return part


def assert_recorded(full: Tensor, recorded: Tensor, atol: float) -> None:
    """|full - recorded| <= atol wherever `recorded` has an entry."""
    torch.testing.assert_close(excerpt(full.float(), recorded), recorded, rtol=0, atol=atol)
