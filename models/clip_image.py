"""Preprocessing of CLIP's images: the constants and steps of transformers' CLIPImageProcessor.

Letters: S side of the square input in pixels.
"""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Channel statistics of CLIP's training images, used by all public CLIP and OpenCLIP weights.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# The middle of a longer image is all that a square crop needs, with room for the filter.
ASPECT = 8
PADDED = 10_000  # pixels a side; larger images are scaled to it before they are padded


def clip_image(image: Image.Image, size: int, *, pad: bool = False) -> Tensor:
    """Resize the shorter edge to S (bicubic), crop the centre square, normalise.

    Args:
        image: of any size and mode.
        size: S, pixels.
        pad: pad to a square with the mean colour first, so that nothing is cropped (LLaVA's "pad").

    Returns: (3, S, S) float32.
    """
    image = image.convert("RGB")
    if pad:
        image = _pad_to_square(image)
    image = resize_short(image, size)
    w, h = image.size
    return normalised(crop(image, size, (w - size) // 2, (h - size) // 2), MEAN, STD)


def resize_short(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter edge to `size` pixels (bicubic), the longer one in proportion, rounded down.

    The ends of an image more than `ASPECT` times as long as wide are cut off first.
    """
    short = min(image.size)
    image = ImageOps.crop(image, tuple(max(0, side - ASPECT * short) // 2 for side in image.size))
    w, h = image.size
    return image.resize((size * w // short, size * h // short), Image.Resampling.BICUBIC)


def crop(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    """The square of `size` pixels whose upper left corner is (left, top)."""
    return image.crop((left, top, left + size, top + size))


def normalised(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """RGB image -> (3, H, W) float32, values in [0, 1] standardised by channel."""
    x = np.asarray(image, dtype=np.float32) / 255  # (H, W, 3) in [0, 1]
    x = (x - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()  # (3, H, W)


def normalise(x: Tensor) -> Tensor:
    """Values in [0, 1], (..., 3, H, W), standardised as CLIP's."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (x - mean) / std


def _pad_to_square(image: Image.Image) -> Image.Image:
    """Centre an RGB image on a square of its longer edge; an odd pixel goes to the right or the bottom."""
    image.thumbnail((PADDED, PADDED), Image.Resampling.BICUBIC)
    w, h = image.size
    side = max(w, h)
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in MEAN))
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    return square
