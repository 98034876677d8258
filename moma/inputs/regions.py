"""Regions of an image as boolean arrays: connected parts, small holes and specks, outlines.

Letters: H, W pixels. A pixel has four neighbours: left, right, above and below.
"""

from collections.abc import Sequence

import numpy as np


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Label the connected parts of a mask: bool (H, W) -> labels int64 (H, W), 0 outside; their number.

    Labels start at 1 and go from the top down. The rows are cut into runs; all runs that touch are joined at
    once, in a few passes whatever the shapes.
    """
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]  # (H, W)
    runs = np.cumsum(starts).reshape(mask.shape) * mask  # (H, W) int64
    meet = mask[1:] & mask[:-1]  # (H-1, W)
    meet &= ~np.pad(meet, ((0, 0), (1, 0)))[:, :-1]  # one pixel per pair of touching runs
    above, below = runs[:-1][meet], runs[1:][meet]
    root = np.arange(starts.sum() + 1)  # per run: the first run it is known to touch, at any remove
    while (root[above] != root[below]).any():
        ends = root[above], root[below]
        np.minimum.at(root, np.maximum(*ends), np.minimum(*ends))
        while (root[root] != root).any():
            root = root[root]
    parts, number = np.unique(root, return_inverse=True)  # the background stays 0
    return number[runs], len(parts) - 1


def tidied(mask: np.ndarray, share: float, points: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """Remove specks and fill holes.

    Args:
        mask: bool (H, W).
        share: of the mask's area; parts and holes below it go. The largest part stays in any case, and a gap
            at the edge of the image is not a hole.
        points: (row, column); the parts there stay, however small.
    Returns:
        bool (H, W).
    """
    least = share * mask.sum()
    labels, count = components(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]  # (parts,)
    keep = np.append(False, (sizes >= least) | (sizes == sizes.max(initial=0)))
    keep[[labels[point] for point in points if mask[point]]] = True
    mask = keep[labels]
    labels, count = components(~mask)
    holes = np.bincount(labels.ravel(), minlength=count + 1) < least  # (gaps + 1,)
    holes[labels[frame(mask.shape)]] = False
    holes[0] = False  # the mask itself
    return mask | holes[labels]


def frame(shape: tuple[int, int]) -> np.ndarray:
    """The outermost pixels of an image; bool (H, W)."""
    edge = np.ones(shape, bool)
    edge[1:-1, 1:-1] = False
    return edge


def eroded(mask: np.ndarray) -> np.ndarray:
    """The pixels whose four neighbours are in the mask too; outside the image nothing is."""
    wide = np.pad(mask, 1)
    return mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The outermost `width` pixels of a mask; bool (H, W)."""
    inner = mask
    for _ in range(width):
        inner = eroded(inner)
    return mask & ~inner


def middle(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of a pixel deepest inside a mask, by its number of steps to the edge."""
    assert mask.any()
    while (inner := eroded(mask)).any():
        mask = inner
    y, x = np.argwhere(mask)[mask.sum() // 2]
    return int(x), int(y)
