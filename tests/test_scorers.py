"""The scorers of a bundle against its networks, called image by image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip_image import clip_image
from models.dino_image import dino_image
from moma.evaluate.rate import rate_parts
from moma.evaluate.scorers import (
    COLUMNS,
    FaceScorer,
    ImageScorer,
    TextScorer,
    embed,
    load_scorers,
    measure,
    measure_real,
)
from moma.inputs.faces import EMBEDDING, Face
from moma.inputs.segment import Segmenter
from moma.weights.bundle import Bundle
from tests.fake_sam import FlatSAM
from tests.recipe import u8
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_scorers

TEXTS = ["a cat in the snow", "a dog", "", "a vase on the beach at sunset " * 30]


def images_of(count: int) -> list[Image.Image]:
    """Of several sizes and modes."""
    modes = ("RGB", "L", "RGBA", "P")
    sizes = ((40, 64), (90, 50), (32, 32))
    return [
        Image.fromarray(u8(f"scorers/{i}", (*sizes[i % 3], 3))).convert(modes[i % 4]) for i in range(count)
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    cfg = TinyConfig()
    folder = tmp_path_factory.mktemp("scorers") / "tiny"
    build_tiny_bundle(folder, cfg=replace(cfg, networks=cfg.networks | tiny_scorers()))
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def scorers(bundle: Bundle) -> list[ImageScorer]:
    return load_scorers(bundle, batch=3)


def test_what_a_bundle_has(bundle: Bundle, scorers: list[ImageScorer], folder: str) -> None:
    assert [scorer.columns for scorer in scorers] == [
        ("DINO ViT-S/16",),
        ("CLIP-I ViT-B/32", "CLIP-T ViT-B/32"),
    ]
    assert [isinstance(scorer, TextScorer) for scorer in scorers] == [False, True]
    assert all(isinstance(scorer, ImageScorer) for scorer in scorers)
    assert load_scorers(Bundle.open(Path(folder))) == []
    assert len({column for columns in COLUMNS.values() for column in columns}) == 6


@torch.no_grad()
def test_embeddings_are_the_networks(bundle: Bundle, scorers: list[ImageScorer]) -> None:
    """Each image and text alone through the network, its length divided out."""
    dino, clip = bundle.build("dino_s16").eval(), bundle.build("clip_b32").eval()
    tokenizer, images = bundle.clip_tokenizer("clip_b32"), images_of(7)
    alone = [
        [dino(dino_image(image, 32)[None]) for image in images],
        [clip.image_features(clip_image(image, 32)[None]) for image in images],
        [clip.text_features(torch.tensor([tokenizer.encode(text).ids])) for text in TEXTS],
    ]
    found = [*(scorer.embed_images(images) for scorer in scorers), scorers[1].embed_texts(TEXTS)]
    for together, rows in zip(found, alone, strict=True):
        assert together.dtype == torch.float32 and len(together) == len(rows)
        torch.testing.assert_close(together, torch.cat([row / row.norm() for row in rows]), rtol=0, atol=1e-5)
    assert (found[2][0] - found[2][1]).abs().max() > 1e-3, "other texts, other embeddings"


def test_the_batch_does_not_matter(bundle: Bundle, scorers: list[ImageScorer]) -> None:
    images = images_of(5)
    for one, other in zip(scorers, load_scorers(bundle, batch=5), strict=True):
        torch.testing.assert_close(one.embed_images(images), other.embed_images(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            one.embed_images(images)[3:4], one.embed_images(images[3:4]), rtol=0, atol=1e-5
        )


def test_half_precision(bundle: Bundle, scorers: list[ImageScorer]) -> None:
    half = load_scorers(bundle, dtype=torch.bfloat16)
    for one, other in zip(scorers, half, strict=True):
        rounded = other.embed_images(images_of(2))
        assert rounded.dtype == torch.float32
        assert (rounded * one.embed_images(images_of(2))).sum(dim=1).min() > 0.99


def test_measures(scorers: list[ImageScorer]) -> None:
    real, drawn = embed(scorers, images_of(3)), embed(scorers, images_of(6)[3:5])
    rows, alone = measure(scorers, drawn, real, TEXTS[:2]), measure_real(scorers, real)
    assert [list(row) for row in rows] == [[c for scorer in scorers for c in scorer.columns]] * 2
    assert list(alone) == [scorer.columns[0] for scorer in scorers]
    for scorer, ours, theirs in zip(scorers, drawn, real, strict=True):
        for i, row in enumerate(rows):
            cosines = [float(ours[i] @ other) for other in theirs]
            assert row[scorer.columns[0]] == pytest.approx(sum(cosines) / 3, abs=1e-5)
        if isinstance(scorer, TextScorer):
            texts = scorer.embed_texts(TEXTS[:2])
            wanted = [float(a @ b) for a, b in zip(ours, texts, strict=True)]
            assert [row[scorer.columns[1]] for row in rows] == pytest.approx(wanted, abs=1e-5)
        pairs = [float(theirs[i] @ theirs[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert alone[scorer.columns[0]] == pytest.approx(sum(pairs) / 3, abs=1e-5)
    assert measure_real(scorers, [one[:1] for one in real]) == {}


def test_an_image_is_like_itself(scorers: list[ImageScorer]) -> None:
    found = embed(scorers, images_of(2))
    first, second = ([rows[i : i + 1] for rows in found] for i in range(2))
    (own,), (other,) = (measure(scorers, first, real, TEXTS[:1]) for real in (first, second))
    for scorer in scorers:
        assert own[scorer.columns[0]] == pytest.approx(1) and other[scorer.columns[0]] < 0.999


def test_nothing_to_score(scorers: list[ImageScorer]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        scorers[0].embed_images([])


# --- several subjects, and faces ------------------------------------------------------------------------


@dataclass(frozen=True)
class Colour:
    """Likeness of mean colours."""

    columns: tuple[str, ...] = ("colour",)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        means = [np.asarray(image.convert("RGB"), np.float32).mean(axis=(0, 1)) for image in images]
        return F.normalize(torch.tensor(np.stack(means)), dim=1)


def plain(colour: str) -> list[Tensor]:
    return [Colour().embed_images([Image.new("RGB", (8, 8), colour)])]


def test_each_subject_is_compared_with_its_own_object() -> None:
    """One object for each, whichever way the subjects are named; the image where there is no object."""
    street = Image.new("RGB", (160, 120), "grey")
    street.paste((200, 0, 0), (20, 40, 60, 80))
    street.paste((0, 0, 200), (90, 40, 130, 80))
    scorers, segmenter = [Colour()], Segmenter(FlatSAM())
    for colours in (("red", "blue"), ("blue", "red")):
        (value,) = rate_parts(street, [plain(c) for c in colours], scorers, segmenter).values()
        assert value > 0.95
    (value,) = rate_parts(street, [plain("red")] * 2, scorers, segmenter).values()
    assert value < 0.9, "one object cannot be two subjects"
    blank = Image.new("RGB", (160, 120), (200, 0, 0))
    assert list(rate_parts(blank, [plain("red"), plain("blue")], scorers, segmenter).values()) == [
        pytest.approx(0.5)
    ]


def test_an_image_without_a_face_is_like_no_other() -> None:
    faces = {40: [torch.ones(EMBEDDING), torch.zeros(EMBEDDING)], 50: [-3 * torch.ones(EMBEDDING)], 60: []}
    scorer = FaceScorer(lambda image: [Face(x, torch.zeros(5, 2)) for x in faces[image.width]])
    rows = scorer.embed_images([Image.new("RGB", (width, 40)) for width in faces])
    assert (rows @ rows.T).tolist() == [
        pytest.approx(row, abs=1e-5) for row in ([1, -1, 0], [-1, 1, 0], [0, 0, 0])
    ]
