"""What MM-Diff's image encoders see: whole pictures, and faces in one position.

Letters: H, W pixels of an image, S side of the encoder's input.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip_image import MEAN, STD, normalise, normalised
from models.weights.loading import read_checkpoint

# Eyes, nose and corners of the mouth as ArcFace has them in an image of 112 pixels: x, y.
TEMPLATE = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)
)  # fmt: skip
TEMPLATE_SIDE = 112


@dataclass(frozen=True, eq=False)
class Face:
    """A face: its embedding by ArcFace (w600k_r50) and five landmarks."""

    embedding: Tensor  # float32 (512,)
    landmarks: Tensor = field(repr=False)  # float32 (5, 2): x, y in pixels; left eye first, as seen

    @classmethod
    def read(cls, path: Path, dim: int) -> "Face":
        """A .safetensors file with `embedding` (dim,) and `landmarks` (5, 2); ValueError for another."""
        tensors = read_checkpoint(path)
        for name, shape in (("embedding", (dim,)), ("landmarks", (len(TEMPLATE), 2))):
            found = tensors[name].shape if name in tensors else None
            if found != shape:
                raise ValueError(f"{path}: {name} is {found}, expected {shape}")
        values = [tensors[name].read().float() for name in ("embedding", "landmarks")]
        if not all(value.isfinite().all() for value in values) or not values[0].any():
            raise ValueError(f"{path}: an embedding of zeros, or a value that is no number")
        return cls(*values)


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


def similarity(landmarks: Tensor, side: int) -> np.ndarray:
    """The rotation, scale and shift that bring landmarks nearest to the template (Umeyama, 1991).

    Args:
        landmarks: (5, 2) in pixels.
        side: of the square that the template is scaled to.

    Returns:
        float64 (2, 3), image -> square.
    """
    source = landmarks.double().numpy()  # (5, 2)
    target = np.array(TEMPLATE) * side / TEMPLATE_SIDE  # (5, 2)
    a, b = source - source.mean(axis=0), target - target.mean(axis=0)
    u, sizes, vt = np.linalg.svd(b.T @ a / len(a))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])  # no mirror image
    rotation = u @ np.diag(signs) @ vt
    scale = (sizes * signs).sum() / a.var(axis=0).sum()
    shift = target.mean(axis=0) - scale * rotation @ source.mean(axis=0)  # (2,)
    return np.hstack([scale * rotation, shift[:, None]])


def aligned(image: Image.Image, landmarks: Tensor, side: int) -> Image.Image:
    """The face in the template's position, a square of `side` pixels: bilinear, black outside the image.

    Args:
        image: with the face.
        landmarks: (5, 2) in pixels.
        side: of the square.

    Raises:
        ValueError: for landmarks that lie in one place.
    """
    if not landmarks.isfinite().all() or (landmarks.amax(dim=0) - landmarks.amin(dim=0)).max() < 1:
        raise ValueError("the face's landmarks lie in one place: expected eyes, nose and mouth")
    matrix = similarity(landmarks, side)
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]  # square -> image
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), [1]), axis=-1)[:, :, 0]  # (S, S, 3)
    places = torch.from_numpy(grid @ back.T).float()  # (S, S, 2): x, y in pixels
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    sizes = torch.tensor([pixels.shape[3], pixels.shape[2]])
    places = 2 * (places + 0.5) / sizes - 1  # pixels' centres in grid_sample's [-1, 1]
    crop = F.grid_sample(pixels, places[None], align_corners=False)[0].round()  # (3, S, S)
    return Image.fromarray(crop.clamp(0, 255).byte().permute(1, 2, 0).numpy())


def face_pixels(image: Image.Image, face: Face, size: int) -> Tensor:
    """The aligned face as the image encoder takes it, (3, S, S) float32."""
    return normalised(aligned(image, face.landmarks, size), MEAN, STD)
