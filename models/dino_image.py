"""An image as DINO was evaluated: the official eval transform (torchvision's Resize, CenterCrop, Normalize).

Letters: S side of the square input in pixels.
"""

from PIL import Image
from torch import Tensor

from models.clip_image import cut, normalised, resize_short

# Channel statistics of ImageNet.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SHORT, CROP = 256, 224  # pixels: the shorter edge, and the square that is cut of it


def dino_image(image: Image.Image, size: int = CROP) -> Tensor:
    """Image of any size and mode -> (3, S, S) float32, normalised, S = `size`.

    The shorter edge becomes 256 pixels (bicubic; in the same ratio for other S), the centre square is cut.
    """
    image = resize_short(image.convert("RGB"), size * SHORT // CROP)
    w, h = image.size
    # torchvision rounds an odd rest half to even, where CLIP's processor rounds down
    left, top = round((w - size) / 2), round((h - size) / 2)
    return normalised(cut(image, size, left, top), MEAN, STD)
