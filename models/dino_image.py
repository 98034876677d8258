"""Preprocessing of DINO's images: the official eval transform (torchvision's Resize, CenterCrop, Normalize).

Letters: S side of the square input in pixels.
"""

from PIL import Image
from torch import Tensor

from models.clip_image import crop, normalised, resize_short

# Channel statistics of ImageNet.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SHORT, CROP = 256, 224  # pixels: the shorter edge, and the square cropped from it


def dino_image(image: Image.Image, size: int = CROP) -> Tensor:
    """Image of any size and mode -> (3, S, S) float32, normalised, S = `size`.

    The shorter edge becomes 256 pixels (for other S in the same ratio), then the centre square is cropped.
    """
    image = resize_short(image.convert("RGB"), size * SHORT // CROP)
    w, h = image.size
    # torchvision rounds half to even, CLIP's processor rounds down
    left, top = round((w - size) / 2), round((h - size) / 2)
    return normalised(crop(image, size, left, top), MEAN, STD)
