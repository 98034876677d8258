"""Retrieval and overlap of masks.

Letters: N images, K distractors, E embedding, h w cells of a mask.
"""

from torch import Tensor


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union (N,) of two bool masks (N, h, w); 0 where both are empty."""
    both, either = (x.flatten(1).sum(dim=1) for x in (a & b, a | b))
    return both / either.clamp_min(1)


def retrieved(query: Tensor, gallery: Tensor) -> Tensor:
    """Whether each image is nearest to its own identity, bool (N,). A tie is a miss; chance is 1 in K + 1.

    Args:
        query: (N, E) of unit length.
        gallery: (N, 1 + K, E) of unit length, the image's own identity first.
    """
    nearness = (query[:, None] * gallery).sum(dim=2)  # (N, 1 + K)
    return nearness[:, 0] > nearness[:, 1:].amax(dim=1)
