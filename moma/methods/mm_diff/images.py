"""What MM-Diff's image encoders see: whole images, and faces in one position.

Letters: H, W pixels of an image, S side of the encoder's input.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip_image import MEAN, STD, normalise, normalised
from moma.inputs.faces import Face, aligned


def padded(image: Image.Image, size: int) -> Tensor:
    """An RGB image on a black square, scaled to S: (3, S, S) float32, normalised.

    As the release does it: bilinear with antialias on bytes; where the sides differ by an odd number, the
    square is one pixel short and squashed.
    """
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()  # (3, H, W)
    h, w = x.shape[1:]
    left, top = (max(h, w) - w) // 2, (max(h, w) - h) // 2
    x = F.pad(x, (left, left, top, top))[None]  # (1, 3, ·, ·)
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)[0]
    return normalise(x / 255)


def face_pixels(image: Image.Image, face: Face, size: int) -> Tensor:
    """The aligned face as the image encoder takes it, (3, S, S) float32."""
    return normalised(aligned(image, face.landmarks, size), MEAN, STD)
