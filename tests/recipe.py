"""Pseudo-random weights and inputs from a name alone, so that golden files need only carry outputs.

The seed of every tensor is the CRC-32 of its key; numpy's Philox makes the same stream on every machine.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn


def _generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(zlib.crc32(key.encode())))


def normal(key: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal, float32, of `shape`."""
    return _generator(key).standard_normal(tuple(shape), dtype=np.float32)


def uniform(key: str, shape: Sequence[int]) -> np.ndarray:
    """Uniform in [0, 1), float32, of `shape`."""
    return _generator(key).random(tuple(shape), dtype=np.float32)


def u8(key: str, shape: Sequence[int]) -> np.ndarray:
    """Uniform in 0..255, uint8, of `shape`."""
    return _generator(key).integers(0, 256, size=tuple(shape), dtype=np.uint8)


def ints(key: str, shape: Sequence[int], low: int, high: int) -> np.ndarray:
    """Uniform in low..high-1, int64, of `shape`."""
    return _generator(key).integers(low, high, size=tuple(shape), dtype=np.int64)


def ellipse(h: int, w: int, cy: float, cx: float, ry: float, rx: float) -> np.ndarray:
    """(1, 1, h, w) float32, 1 inside the ellipse with centre (cy, cx), radii (ry, rx) in pixels, else 0."""
    y, x = np.ogrid[:h, :w]
    inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1  # (h, w)
    return inside.astype(np.float32)[None, None]


def weight(key: str, shape: Sequence[int]) -> np.ndarray:
    """A parameter, float32, of `shape`, scaled so that activations keep their size.

    Matrices and kernels: unit variance over the fan-in. One element (a learnable scale): 0.5 ± 0.1.
    Norm weights (1-D, key ends in "weight"): 1 ± 0.1. Biases and the rest: 0 ± 0.1.
    """
    x = normal(key, shape)
    if len(shape) >= 2:
        return x * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    if tuple(shape) == (1,):
        return np.float32(0.5) + np.float32(0.1) * x
    if key.endswith("weight"):
        return np.float32(1) + np.float32(0.1) * x
    return x * np.float32(0.1)


def fill(module: nn.Module, rename: Callable[[str], str] = lambda key: key) -> None:
    """Load recipe weights into every parameter of `module`; the seed of parameter `key` is rename(key)."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(weight(rename(key), parameter.shape)))
