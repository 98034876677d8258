"""Arithmetic of the report: hits and overlaps.

Letters: N images, K distractors, E embedding, h w cells of a mask.
"""

from torch import Tensor


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks, bool (N, h, w) each -> (N,); 0 where both are empty."""
    both, either = (x.flatten(1).sum(dim=1) for x in (a & b, a | b))
    return both / either.clamp_min(1)


def retrieved(query: Tensor, gallery: Tensor) -> Tensor:
    """Whether an image is nearer to its own identity than to all others; chance is 1 of K + 1.

    query (N, E); gallery (N, 1 + K, E), its own first; all of unit length -> bool (N,). A tie is a miss.
    """
    nearness = (query[:, None] * gallery).sum(dim=2)  # (N, 1 + K)
    return nearness[:, 0] > nearness[:, 1:].amax(dim=1)
