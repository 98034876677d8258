"""Arithmetic of the report: hits, overlaps and how sure their averages are.

Letters: N pictures, K distractors, E embedding, h w cells of a mask.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = 1.959964  # 95% of a normal distribution lie within so many deviations
RESAMPLES = 2000  # of the bootstrap: its 2.5% tails hold 50 each


class Estimate(NamedTuple):
    """An average with its 95% interval."""

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Tensor) -> Estimate:
    """values (N,): of bools their share with Wilson's interval, of floats their mean with the bootstrap's."""
    given, n, z = values.double().numpy(), len(values), NORMAL_95
    mean = float(given.mean())
    if values.dtype == torch.bool:
        middle, width = mean + z * z / (2 * n), z * (mean * (1 - mean) / n + (z / (2 * n)) ** 2) ** 0.5
        low, high = ((middle + side * width) / (1 + z * z / n) for side in (-1, 1))
    else:
        drawn = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))  # the same in every report
        low, high = np.quantile(given[drawn].mean(axis=1), (0.025, 0.975)).tolist()
    return Estimate(mean, low, high, n)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks, bool (N, h, w) each -> (N,); 0 where both are empty."""
    both, either = (x.flatten(1).sum(dim=1) for x in (a & b, a | b))
    return both / either.clamp_min(1)


def retrieved(query: Tensor, gallery: Tensor) -> Tensor:
    """Whether a picture is nearer to its own identity than to all others; chance is 1 of K + 1.

    query (N, E); gallery (N, 1 + K, E), its own first; all of unit length -> bool (N,). A tie is a miss.
    """
    nearness = (query[:, None] * gallery).sum(dim=2)  # (N, 1 + K)
    return nearness[:, 0] > nearness[:, 1:].amax(dim=1)
