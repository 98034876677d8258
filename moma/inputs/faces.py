"""A person's face in an image: given in a file, or found by insightface, a package of its own.

insightface's models (detection and ArcFace) are for non-commercial research only; its package fetches them
when it is first used. A file needs neither.

Letters: S side of a square of pixels.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.weights.loading import read_checkpoint
from moma.inputs.preprocess import on_white

EMBEDDING = 512  # numbers of ArcFace's embedding (w600k_r50)
# Eyes, nose and corners of the mouth as ArcFace has them in an image of 112 pixels: x, y.
TEMPLATE = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)
)  # fmt: skip
TEMPLATE_SIDE = 112
MODELS, MODULES = "buffalo_l", ("detection", "recognition")  # of insightface; the release's
OR_FILE = "sample.py also takes a face from a file (--face-file)"
DETECTION = {"det_thresh": 0.5, "det_size": (640, 640)}


@dataclass(frozen=True, eq=False)
class Face:
    """A face: its embedding by ArcFace, of any length, and five landmarks."""

    embedding: Tensor  # float32 (512,)
    landmarks: Tensor = field(repr=False)  # float32 (5, 2): x, y in pixels; left eye first, as seen

    def check(self, size: tuple[int, int] | None = None) -> None:
        """ValueError for values that are no numbers, an empty embedding, or landmarks in one place or outside
        the image.

        size: of the image, (width, height); None = they may lie anywhere.
        """
        finite = self.embedding.isfinite().all() and self.landmarks.isfinite().all()
        if not finite or not self.embedding.any():
            raise ValueError("the face's embedding is 0, or a value is no finite number: make the file again")
        low, high = self.landmarks.amin(dim=0), self.landmarks.amax(dim=0)  # (2,) each
        if (high - low).max() < 1:
            raise ValueError("the face's landmarks lie in one place: expected eyes, nose and mouth in pixels")
        if size and (low.min() < 0 or (high > torch.tensor(size)).any()):
            raise ValueError(
                f"the face's landmarks reach from {low.tolist()} to {high.tolist()}: expected pixels of the"
                f" image, which is {size[0]}x{size[1]}"
            )

    def mirrored(self, width: int) -> "Face":
        """The face with left and right exchanged in an image of this width."""
        places = self.landmarks[[1, 0, 2, 4, 3]]  # (5, 2)
        return Face(self.embedding, torch.stack([width - 1 - places[:, 0], places[:, 1]], dim=1))

    def to_json(self) -> dict[str, list]:
        return {"embedding": self.embedding.tolist(), "landmarks": self.landmarks.tolist()}

    @classmethod
    def from_json(cls, data: Any, size: tuple[int, int]) -> "Face":
        """What `to_json` gives.

        Args:
            data: of a JSON file.
            size: of the image, (width, height).

        Raises:
            ValueError: for anything else.
        """
        try:
            face = cls(*(torch.tensor(data[name]).float() for name in ("embedding", "landmarks")))
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"its face is {data!r:.60}: expected embedding and landmarks") from None
        if (face.embedding.shape, face.landmarks.shape) != ((EMBEDDING,), (len(TEMPLATE), 2)):
            raise ValueError(
                f"its face has {tuple(face.embedding.shape)} and {tuple(face.landmarks.shape)}:"
                f" expected ({EMBEDDING},) and ({len(TEMPLATE)}, 2)"
            )
        face.check(size)
        return face


def find_face(image: Image.Image, file: Path | None = None, number: int | None = None) -> Face:
    """The face of a person in an image.

    Args:
        image: as `open_image` gives it.
        file: with the face, read by `read_face`; None = insightface looks for it.
        number: of the face among those found, from the largest (1, the default) to the smallest.

    Raises:
        ValueError: for a file that does not fit; without insightface, or without a face of this number.
    """
    if file is not None:
        if number is not None:
            raise ValueError(f"face number {number} and a file of a face: expected one of them")
        return read_face(file, image.size)
    wanted, faces = 1 if number is None else number, load_detector()(image)
    if not 1 <= wanted <= len(faces):
        expected = f"1 to {len(faces)}, the largest first" if faces else "a face that can be seen"
        raise ValueError(f"face {wanted}: the image has {len(faces)}, expected {expected}; {OR_FILE}")
    return faces[wanted - 1]


def read_face(path: Path, size: tuple[int, int]) -> Face:
    """A .safetensors file with `embedding` (512,) and `landmarks` (5, 2).

    Args:
        path: of the file.
        size: of the image, (width, height): the landmarks are its pixels, upright.

    Raises:
        ValueError: for another file.
    """
    tensors = read_checkpoint(path)
    for name, shape in (("embedding", (EMBEDDING,)), ("landmarks", (len(TEMPLATE), 2))):
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != shape:
            raise ValueError(f"{path}: {name} is {found}, expected {shape}")
    face = Face(*(tensors[name].read().float() for name in ("embedding", "landmarks")))
    try:
        face.check(size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return face


def load_detector() -> Callable[[Image.Image], list[Face]]:
    """What finds all faces of an image, the largest first, by insightface; ValueError without it or its
    models."""
    try:
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise ValueError(
            "finding a face needs the package insightface, whose models are for non-commercial research only:"
            f" pip install insightface onnxruntime ({error}); {OR_FILE}"
        ) from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it lists its models
            app = FaceAnalysis(MODELS, allowed_modules=list(MODULES), providers=["CPUExecutionProvider"])
            app.prepare(ctx_id=-1, **DETECTION)
    except Exception as error:  # of the network, the disk, onnxruntime: any kind
        raise ValueError(
            f"insightface cannot load its models {MODELS} ({' '.join(str(error).split())}): see its"
            f" documentation for how to get them; {OR_FILE}"
        ) from None

    def detect(image: Image.Image) -> list[Face]:
        pixels = np.asarray(on_white(image))[..., ::-1]  # (H, W, 3), BGR
        return [
            Face(torch.tensor(one.embedding).float(), torch.tensor(one.kps).float())
            for one in sorted(app.get(np.ascontiguousarray(pixels)), key=_area, reverse=True)
        ]

    return detect


def _area(face: Any) -> float:
    left, top, right, bottom = face.bbox
    return float((right - left) * (bottom - top))


# --- alignment ------------------------------------------------------------------------------------------


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
    """
    matrix = similarity(landmarks, side)
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]  # square -> image
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), [1]), axis=-1)[:, :, 0]  # (S, S, 3)
    places = torch.from_numpy(grid @ back.T).float()  # (S, S, 2): x, y in pixels
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    sizes = torch.tensor([pixels.shape[3], pixels.shape[2]])
    places = 2 * (places + 0.5) / sizes - 1  # pixels' centres in grid_sample's [-1, 1]
    crop = F.grid_sample(pixels, places[None], align_corners=False)[0].round()  # (3, S, S)
    return Image.fromarray(crop.clamp(0, 255).byte().permute(1, 2, 0).numpy())
