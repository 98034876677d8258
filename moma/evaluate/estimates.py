"""Averages and how sure they are. Letters: N images, G groups of them."""

from collections.abc import Hashable, Sequence
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


def estimate(values: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """values (N,): of bools their share with Wilson's interval, of floats their mean with the bootstrap's.

    groups: N names; whole groups are resampled then, for images of one subject err together. A single
    group says nothing about others: the ends are nan.
    """
    given, n, z = values.double().numpy(), len(values), NORMAL_95
    mean = float(given.mean())
    if values.dtype == torch.bool and groups is None:
        middle, width = mean + z * z / (2 * n), z * (mean * (1 - mean) / n + (z / (2 * n)) ** 2) ** 0.5
        low, high = ((middle + side * width) / (1 + z * z / n) for side in (-1, 1))
    else:
        index = {name: i for i, name in enumerate(dict.fromkeys(groups or range(n)))}
        member = np.array([index[name] for name in groups or range(n)])
        sums, sizes = np.bincount(member, given), np.bincount(member)  # (G,)
        drawn = np.random.default_rng(0).integers(len(index), size=(RESAMPLES, len(index)))  # always the same
        means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
        if groups is not None and len(index) == 1:
            low = high = float("nan")
    return Estimate(mean, low, high, n)
