"""Averages with confidence intervals. Letters: N images, G groups of images."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NORMAL_95 = 1.959964  # half width of the 95% interval of a normal distribution, in standard deviations
RESAMPLES = 2000  # of the bootstrap; each 2.5% tail holds 50


class Estimate(NamedTuple):
    """An average with its 95% interval."""

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of N values: with Wilson's interval for bools, with the bootstrap's for floats and groups.

    Args:
        values: (N,), bool or float.
        groups: N names. Whole groups are resampled, because errors of images of one subject are
            correlated. A single group says nothing about others: the ends are nan.
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
        drawn = np.random.default_rng(0).integers(
            len(index), size=(RESAMPLES, len(index))
        )  # always the same draws
        means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
        low, high = np.quantile(means, (0.025, 0.975)).tolist()
        if groups is not None and len(index) == 1:
            low = high = float("nan")
    return Estimate(mean, low, high, n)


def crossed_estimate(values: Tensor, first: Sequence[Hashable], second: Sequence[Hashable]) -> Estimate:
    """The mean of N values that two sorts of groups share, such as raters and subjects.

    Both are resampled, each whole and independently (Owen, "The pigeonhole bootstrap", 2007).

    Args:
        values: (N,).
        first: N names.
        second: N names.
    """
    given, rng = values.double().numpy(), np.random.default_rng(0)  # always the same draws
    weights = np.ones((RESAMPLES, len(given)))
    for names in (first, second):
        index = {name: i for i, name in enumerate(dict.fromkeys(names))}
        drawn = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), RESAMPLES)
        weights *= drawn[:, [index[name] for name in names]]
    sums = weights.sum(axis=1)
    means = (weights @ given)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return Estimate(float(given.mean()), low, high, len(given))
