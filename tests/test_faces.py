"""Faces: from a file, and from insightface, for which a stand-in of its calls answers here."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from moma.inputs.faces import Face, find_face
from tests.helpers import image

LANDMARKS = torch.tensor([[30.0, 30], [60, 30], [45, 50], [33, 65], [57, 65]])


def embedding(seed: int) -> Tensor:
    return torch.randn(512, generator=torch.Generator().manual_seed(seed))


# --- a file ---------------------------------------------------------------------------------------------


def write(folder: Path, **tensors: Tensor) -> Path:
    given = {"embedding": embedding(0), "landmarks": LANDMARKS, **tensors}
    save_file({name: x for name, x in given.items() if x.numel()}, folder / "face.safetensors")
    return folder / "face.safetensors"


def test_a_file(tmp_path: Path) -> None:
    face = find_face(image(0), write(tmp_path, landmarks=LANDMARKS.double()))
    assert torch.equal(face.embedding, embedding(0)) and torch.equal(face.landmarks, LANDMARKS)
    with pytest.raises(ValueError, match="number 2"):
        find_face(image(0), tmp_path / "face.safetensors", 2)


@pytest.mark.parametrize(
    ("tensors", "field"),
    [
        ({"embedding": torch.ones(511)}, "511"),
        ({"embedding": torch.zeros(512)}, "embedding"),
        ({"embedding": torch.full((512,), torch.nan)}, "finite"),
        ({"embedding": torch.ones(0)}, "embedding is missing"),
        ({"landmarks": torch.ones(4, 2)}, r"\(4, 2\)"),
        ({"landmarks": LANDMARKS * 0 + 5}, "landmarks"),
        ({"landmarks": LANDMARKS / 120}, "landmarks"),  # shares of the image
        ({"landmarks": LANDMARKS + 65}, "120x90"),
        ({"landmarks": LANDMARKS - 31}, "120x90"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor], field: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        find_face(image(0), write(tmp_path, **tensors))
    assert "\n" not in str(error.value) and "face.safetensors" in str(error.value)


def test_in_json() -> None:
    face = Face(embedding(0), LANDMARKS)
    back = Face.from_json(json.loads(json.dumps(face.to_json())), (120, 90))
    assert torch.equal(back.embedding, face.embedding) and torch.equal(back.landmarks, face.landmarks)
    turned = face.mirrored(120)
    assert turned.landmarks[0].tolist() == [59, 30] and turned.landmarks[3].tolist() == [62, 65]
    assert torch.equal(turned.mirrored(120).landmarks, LANDMARKS)


@pytest.mark.parametrize(
    "data", [3, [], {}, {"embedding": [1] * 512}, {"embedding": [1] * 512, "landmarks": [[1, "x"]] * 5},
             {"embedding": [1] * 511, "landmarks": LANDMARKS.tolist()},
             {"embedding": [1] * 512, "landmarks": [[1, 10**400]] * 5},
             {"embedding": [1] * 512, "landmarks": (2 * LANDMARKS).tolist()}],
)  # fmt: skip
def test_other_json_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="face") as error:
        Face.from_json(data, (120, 90))
    assert "\n" not in str(error.value)


# --- insightface ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """As insightface 0.7 and 2.1 have it, of what is read here."""

    bbox: np.ndarray  # (4,)
    kps: np.ndarray  # (5, 2)
    embedding: np.ndarray  # (512,), of any length


class FaceAnalysis:
    """Two faces, the smaller one first, in an image whose first pixel is red."""

    def __init__(self, name: str, root: str = "", allowed_modules: list[str] | None = None, **kwargs: Any):
        assert name == "buffalo_l" and allowed_modules == ["detection", "recognition"]
        print("find model")

    def prepare(self, ctx_id: int, det_thresh: float = 0.5, det_size: tuple[int, int] | None = None) -> None:
        assert (det_thresh, det_size) == (0.5, (640, 640))

    def get(self, img: np.ndarray) -> list[Found]:
        assert img.dtype == np.uint8 and img.flags["C_CONTIGUOUS"]
        sizes = [10, 40] if img[0, 0].tolist() == [0, 0, 255] else []  # BGR
        return [
            Found(
                np.array([5.0, 5, 5 + side, 5 + side], dtype=np.float32),
                LANDMARKS.numpy() + i,
                embedding(i).numpy(),
            )
            for i, side in enumerate(sizes)
        ]


def stand_in(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    package, app = ModuleType("insightface"), ModuleType("insightface.app")
    app.FaceAnalysis = kind
    monkeypatch.setitem(sys.modules, "insightface", package)
    monkeypatch.setitem(sys.modules, "insightface.app", app)


def test_the_largest_or_the_one_with_a_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, FaceAnalysis)
    photo = Image.new("RGB", (120, 90), "red")
    for number, which in ((None, 1), (1, 1), (2, 0)):
        face = find_face(photo, number=number)
        assert isinstance(face, Face) and torch.equal(face.embedding, embedding(which))
        assert torch.equal(face.landmarks, LANDMARKS + which)
    for number in (0, 3, -1):
        with pytest.raises(ValueError, match=rf"face {number}: .* 2"):
            find_face(photo, number=number)
    with pytest.raises(ValueError, match="has 0"):
        find_face(Image.new("RGB", (120, 90), "blue"))
    assert capsys.readouterr().out == ""


def test_without_the_package_or_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoModels:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("Failed downloading\nurl")

    stand_in(monkeypatch, NoModels)
    with pytest.raises(ValueError, match=r"buffalo_l.*; sample\.py also") as error:
        find_face(image(0))
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ValueError, match=r"insightface.*non-commercial.*; sample\.py also") as error:
        find_face(image(0))
    assert "\n" not in str(error.value)
