"""From an image to SAM's input, and from SAM's masks to the image (segment-anything: ResizeLongestSide).

Letters: S side of SAM's square input in pixels, H and W the image's size.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Channel statistics of ImageNet, RGB in 0..255, used by all public SAM weights.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Placement:
    """An image in the upper left corner of SAM's input; the rest is padding."""

    side: int  # S
    image: tuple[int, int]  # H, W
    inside: tuple[int, int]  # height and width in the input, pixels; the longer one is S


def placement(height: int, width: int, side: int) -> Placement:
    """Scale an image of height x width pixels so that its longer edge becomes `side`."""
    scale = side / max(height, width)
    # half pixels go up, as in segment-anything
    inside = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    return Placement(side, (height, width), inside)


def preprocess(image: Image.Image, side: int) -> tuple[Tensor, Placement]:
    """Image of any size and mode -> (1, 3, S, S) float32, normalised, padded with zeros; S = `side`."""
    where = placement(image.height, image.width, side)
    height, width = where.inside
    image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = normalised(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])  # (1, 3, height, width)
    return F.pad(pixels, (0, side - width, 0, side - height)), where  # (1, 3, S, S)


def normalised(images: Tensor) -> Tensor:
    """Standardise by channel: uint8 (B, 3, h, w) -> float32."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def to_input(points: Tensor, where: Placement) -> Tensor:
    """Map points (..., 2), x and y, from pixels of the image to pixels of SAM's input; float32."""
    (height, width), (inside_h, inside_w) = where.image, where.inside
    return points.float() * torch.tensor([inside_w / width, inside_h / height], device=points.device)


def to_image(logits: Tensor, where: Placement) -> Tensor:
    """Mask logits (..., h, w) of SAM's input -> (..., H, W) of the image; float32, bilinear."""
    x = logits.float().reshape(1, -1, *logits.shape[-2:])  # (1, K, h, w)
    x = F.interpolate(x, (where.side, where.side), mode="bilinear", align_corners=False)  # (1, K, S, S)
    x = x[..., : where.inside[0], : where.inside[1]]
    x = F.interpolate(x, where.image, mode="bilinear", align_corners=False)  # (1, K, H, W)
    return x.view(*logits.shape[:-2], *where.image)
