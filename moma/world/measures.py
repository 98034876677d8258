"""Retrieval, overlap of masks, and sharpness.

Letters: N images, S W sides of an image, K distractors, E embedding, h w cells of a mask.
"""

import torch
import torch.nn.functional as F
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


def sharpness(images: Tensor, masks: Tensor) -> Tensor:
    """Mean absolute Laplacian of the grey values inside each subject: outlines, eyes and patterns; (N,).

    Args:
        images: uint8 (N, 3, S, W).
        masks: of the subjects, bool (N, h, w).
    """
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])[None, None]  # (1, 1, 3, 3)
    edges = F.conv2d(images.float().mean(dim=1, keepdim=True), kernel, padding=1).abs()  # (N, 1, S, W)
    inside = F.interpolate(masks[:, None].float(), size=edges.shape[-2:])  # (N, 1, S, W)
    return (edges * inside).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3)).clamp_min(1)
