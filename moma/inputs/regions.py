"""Regions of an image as boolean arrays: their connected parts, small holes and specks, outlines.

Letters: H, W pixels. Neighbours are the pixels to the side, above and below, not those across a corner.
"""

from collections.abc import Sequence

import numpy as np


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The connected parts of a mask: bool (H, W) -> their numbers int64 (H, W), 0 outside; how many.

    Parts are numbered from 1, from the top down. Rows are cut into runs, and runs that meet are joined all
    at once, again and again: a few passes over the runs, whatever the shapes.
    """
    starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]  # (H, W)
    runs = np.cumsum(starts).reshape(mask.shape) * mask  # (H, W) int64
    meet = mask[1:] & mask[:-1]  # (H-1, W)
    meet &= ~np.pad(meet, ((0, 0), (1, 0)))[:, :-1]  # once for each pair of runs
    above, below = runs[:-1][meet], runs[1:][meet]
    root = np.arange(starts.sum() + 1)  # of each run, the first run that it is known to hang together with
    while (root[above] != root[below]).any():
        ends = root[above], root[below]
        np.minimum.at(root, np.maximum(*ends), np.minimum(*ends))
        while (root[root] != root).any():
            root = root[root]
    parts, number = np.unique(root, return_inverse=True)  # 0 stays 0
    return number[runs], len(parts) - 1


def tidied(mask: np.ndarray, share: float, places: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """The mask without specks and holes that are smaller than `share` of it; bool (H, W).

    Its largest part stays in any case, as do those at `places` (row, column). A gap at the edge of the
    image is not a hole.
    """
    least = share * mask.sum()
    labels, count = components(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]  # (parts,)
    keep = np.append(False, (sizes >= least) | (sizes == sizes.max(initial=0)))
    keep[[labels[place] for place in places if mask[place]]] = True
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
    """The pixels whose four neighbours are in the mask, too; beyond the image there is none."""
    wide = np.pad(mask, 1)
    return mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The outermost `width` pixels of a mask; bool (H, W)."""
    inner = mask
    for _ in range(width):
        inner = eroded(inner)
    return mask & ~inner


def middle(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of a pixel of a mask that is as deep inside as any, by steps to the side, up and down."""
    assert mask.any()
    while (inner := eroded(mask)).any():
        mask = inner
    y, x = np.argwhere(mask)[mask.sum() // 2]
    return int(x), int(y)
