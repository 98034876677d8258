"""An image as CLIP's image encoder wants it: the constants and steps of transformers' CLIPImageProcessor.

Letters: S side of the square input in pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Channel statistics of CLIP's training images; all public CLIP weights, OpenCLIP's included, use them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# LLaVA pads with the mean colour, so that the border is about zero after normalisation.
PAD_COLOUR = tuple(int(255 * m) for m in MEAN)


def clip_image(image: Image.Image, size: int, *, pad: bool = False) -> Tensor:
    """Image of any size and mode -> (3, S, S) float32, normalised, S = `size`.

    pad=False: resize the shorter edge to S (bicubic), cut the centre square (CLIP's own way).
    pad=True: pad to a square with the mean colour first, so that nothing is cut (LLaVA's "pad").
    """
    image = image.convert("RGB")
    if pad:
        image = pad_to_square(image)
    image = resize_short(image, size)
    w, h = image.size
    return normalised(cut(image, size, (w - size) // 2, (h - size) // 2), MEAN, STD)


def resize_short(image: Image.Image, size: int) -> Image.Image:
    """The shorter edge made `size` pixels (bicubic), the longer one in proportion, rounded down."""
    w, h = image.size
    short = min(w, h)
    return image.resize((size * w // short, size * h // short), Image.Resampling.BICUBIC)


def cut(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    """The square of `size` pixels whose upper left corner is (left, top)."""
    return image.crop((left, top, left + size, top + size))


def normalised(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """RGB image -> (3, H, W) float32: [0, 1] less the channel's mean, over its deviation."""
    x = np.asarray(image, dtype=np.float32) / 255  # (H, W, 3) in [0, 1]
    x = (x - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()  # (3, H, W)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int] = PAD_COLOUR) -> Image.Image:
    """RGB image centred on a square of its longer edge; an odd rest goes to the right or the bottom."""
    w, h = image.size
    side = max(w, h)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    return square
