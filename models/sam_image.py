"""An image as SAM wants it, and SAM's masks as the image wants them (segment-anything: ResizeLongestSide).

Letters: S side of SAM's square input in pixels, H and W the image's size.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Channel statistics of ImageNet in 0..255, RGB; all public SAM weights use them.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Placement:
    """Where an image lies in SAM's input: the upper left corner, the rest is padding."""

    side: int  # S
    image: tuple[int, int]  # H, W
    inside: tuple[int, int]  # height and width in the input, pixels; the longer one is S


def placement(height: int, width: int, side: int) -> Placement:
    """Of an image of height x width pixels: its longer edge becomes `side`."""
    scale = side / max(height, width)
    # Half pixels go up, as in segment-anything; `round` would take them to the even number.
    inside = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    return Placement(side, (height, width), inside)


def preprocess(image: Image.Image, side: int) -> tuple[Tensor, Placement]:
    """Image of any size and mode -> (1, 3, S, S) float32, normalised, zero beyond the image; S = side."""
    place = placement(image.height, image.width, side)
    height, width = place.inside
    image = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = normalised(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])  # (1, 3, height, width)
    return F.pad(pixels, (0, side - width, 0, side - height)), place  # (1, 3, S, S)


def normalised(images: Tensor) -> Tensor:
    """uint8 (B, 3, h, w) -> float32."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def to_input(points: Tensor, place: Placement) -> Tensor:
    """Points (..., 2), x and y in pixels of the image -> in pixels of SAM's input; float32."""
    (height, width), (inside_h, inside_w) = place.image, place.inside
    return points.float() * torch.tensor([inside_w / width, inside_h / height], device=points.device)


def to_image(logits: Tensor, place: Placement) -> Tensor:
    """Mask logits (..., h, w) of the whole input -> (..., H, W) of the image alone; float32, bilinear."""
    x = logits.float().reshape(1, -1, *logits.shape[-2:])  # (1, K, h, w)
    x = F.interpolate(x, (place.side, place.side), mode="bilinear", align_corners=False)  # (1, K, S, S)
    x = x[..., : place.inside[0], : place.inside[1]]
    x = F.interpolate(x, place.image, mode="bilinear", align_corners=False)  # (1, K, H, W)
    return x.view(*logits.shape[:-2], *place.image)
