"""Cosines with known answers and against loops in numpy, and their averages."""

import math

import numpy as np
import pytest
import torch

from moma.evaluate.scores import Average, Score, averages, prompt_similarity, real_similarity, similarity
from tests.recipe import normal


def unit(key: str, count: int, size: int = 7) -> torch.Tensor:
    x = torch.from_numpy(normal(key, (count, size)))
    return x / x.norm(dim=1, keepdim=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(a**2) * sum(b**2)))


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in a plane."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def score(**changes: object) -> Score:
    values = {"method": "moma", "subject": "dog", "label": "dog", "kind": "context", "prompt": "a dog"}
    return Score(**(values | {"number": 0, "file": "a.png", "values": {}} | changes))


# --- known answers ---------------------------------------------------------------------------------------


def test_known_angles() -> None:
    found = similarity(at(0, 90, 180), at(0, 60))
    # cosines with 0 and 60 degrees: 1 and 1/2; 0 and cos 30; -1 and cos 120
    wanted = [0.75, math.sqrt(3) / 4, -0.75]
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert prompt_similarity(at(0, 10), at(60, 100)).tolist() == pytest.approx([0.5, 0], abs=1e-6)


def test_identical_and_orthogonal_images() -> None:
    same, axes = at(33, 33, 33), torch.eye(4)
    assert similarity(same, same).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert real_similarity(same).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert similarity(axes, axes).tolist() == [0.25] * 4, "all real images count, itself too"
    assert real_similarity(axes).tolist() == [0] * 4, "never with itself"


def test_real_images_are_compared_with_the_others() -> None:
    # 0, 60, 120 degrees: pairs at 60, 60 and 120
    found = real_similarity(at(0, 60, 120))
    assert found.tolist() == pytest.approx([0, 0.5, 0], abs=1e-6)
    assert found.mean().item() == pytest.approx((0.5 + 0.5 - 0.5) / 3, abs=1e-6)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="1 real image"):
        real_similarity(at(0))
    with pytest.raises(ValueError, match="real image"):
        similarity(at(0), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        prompt_similarity(at(0, 1), at(0))


# --- against loops ---------------------------------------------------------------------------------------


def test_against_loops() -> None:
    images, real, prompts = unit("pictures", 5), unit("real", 3), unit("prompts", 5)
    p, r, t = (x.double().numpy() for x in (images, real, prompts))
    mean = [sum(cosine(a, b) for b in r) / len(r) for a in p]
    assert similarity(images, real).tolist() == pytest.approx(mean, abs=1e-6)
    own = [cosine(a, b) for a, b in zip(p, t, strict=True)]
    assert prompt_similarity(images, prompts).tolist() == pytest.approx(own, abs=1e-6)
    pairs = [cosine(p[i], p[j]) for i in range(5) for j in range(i)]
    assert real_similarity(images).mean().item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    for i in range(5):
        others = [cosine(p[i], p[j]) for j in range(5) if j != i]
        assert real_similarity(images)[i].item() == pytest.approx(sum(others) / 4, abs=1e-6)


def test_an_image_does_not_depend_on_the_others() -> None:
    images, real = unit("pictures", 4), unit("real", 3)
    for i in range(4):
        assert similarity(images[i : i + 1], real).item() == pytest.approx(
            similarity(images, real)[i].item(), abs=1e-6
        )


# --- averages ---------------------------------------------------------------------------------------------


def test_averages() -> None:
    scores = [
        score(values={"DINO": 0.5, "CLIP-T": 0.25}),
        score(values={"DINO": 1.0, "CLIP-T": 0.5}, kind="texture"),
        score(values={"DINO": 0.75, "CLIP-T": 0.75}, subject="cat"),
        score(values={"DINO": 0.25}, method="real", kind="real"),
    ]
    rows = averages(scores, "method", "kind")
    assert rows == {
        ("moma", "context"): Average({"DINO": 0.625, "CLIP-T": 0.5}, 2),
        ("moma", "texture"): Average({"DINO": 1.0, "CLIP-T": 0.5}, 1),
        ("real", "real"): Average({"DINO": 0.25}, 1),
    }
    assert list(rows) == [("moma", "context"), ("moma", "texture"), ("real", "real")]
    assert averages(scores[:3], "subject") == {
        ("dog",): Average({"DINO": 0.75, "CLIP-T": 0.375}, 2),
        ("cat",): Average({"DINO": 0.75, "CLIP-T": 0.75}, 1),
    }
    assert averages([], "method") == {}


def test_every_image_counts_alike() -> None:
    """Three images of one subject and one of another: the mean is over images, not over subjects."""
    scores = [score(values={"DINO": 0.5})] * 3 + [score(values={"DINO": 0.1}, subject="cat")]
    assert averages(scores, "method")["moma",].values["DINO"] == pytest.approx(0.4)
