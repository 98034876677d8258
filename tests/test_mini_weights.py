"""The bundle that is shipped: MoMA-mini, as `python sample.py --ref examples/cat.png` meets it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from moma.app import options as cli
from moma.inputs.preprocess import find_mask, open_image
from moma.inputs.regions import middle
from moma.load import load, load_segmenter
from moma.mini import SOURCE
from moma.mini.segmenting import hints
from moma.sampling.config import SampleConfig
from moma.weights.bundle import SAMPLING, Bundle
from moma.world.classifiers import classify, classify_views, load_probes, stacked
from moma.world.measures import iou
from moma.world.pairs import render_pairs
from moma.world.scenes import PLACES, SCENES
from moma.world.world import CLASSES, render
from tests.helpers import MINI, ROOT

LIMIT = 32 * 2**20  # bytes: what a clone should have to carry at most


def test_whole_and_small() -> None:
    bundle = Bundle.open(MINI)
    assert set(SAMPLING) <= set(bundle.networks) and bundle.networks["unet"]["source"] == SOURCE
    assert sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file()) <= LIMIT


def test_is_used_by_default_and_draws_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The shipped classifiers see a cat in the four scenes."""
    monkeypatch.setattr(sample, "WEIGHTS", sample.WEIGHTS[1:])  # whatever else lies there
    given = ["--ref", str(ROOT / "examples" / "cat.png"), "--steps", "15", "--out", str(tmp_path)]
    assert sample.run(given) == 0
    assert "MoMA-mini" in capsys.readouterr().out
    names = {scene: f"a-cat-{scene.replace(' ', '-')}-seed0.png" for scene in cli.SCENES}
    images = [np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in names.values()]
    seen = classify(load_probes(MINI / "probes.safetensors"), stacked(images)).truth
    assert [CLASSES[i] for i in seen.label] == ["cat"] * len(names)
    assert [PLACES[SCENES[i]].phrase for i in seen.scene] == [*names]


@pytest.mark.slow  # 16 images
def test_its_sam_finds_unseen_subjects() -> None:
    segmenter, found, true = load_segmenter(MINI, "cpu"), [], []
    for i in range(16):
        shown = render(i, "test")
        found.append(torch.from_numpy(np.asarray(segmenter.subject_mask(Image.fromarray(shown.image))) > 0))
        true.append(torch.from_numpy(shown.mask > 127))
    assert iou(torch.stack(found), torch.stack(true)).mean() >= 0.9


def test_its_sam_takes_what_is_pointed_at() -> None:
    """In every corner the background, in the middle of the subject the subject."""
    segmenter, shown = load_segmenter(MINI, "cpu"), render(3, "test")
    image, true = Image.fromarray(shown.image), shown.mask > 127
    side = image.width - 1
    for point in ((0, 0), (side, 0), (0, side), (side, side), middle(true)):
        found = np.asarray(segmenter.subject_mask(image, point=point)) > 0
        wanted = true if true[point[1], point[0]] else ~true
        assert found[point[1], point[0]] and (found & wanted).sum() / (found | wanted).sum() >= 0.9


@pytest.mark.parametrize("hint", ["point", "box"])
def test_its_sam_tells_two_subjects_apart(hint: str) -> None:
    segmenter, found, true = load_segmenter(MINI, "cpu"), [], []
    two = render_pairs(range(6), "test")
    for image, masks in zip(two["image"], torch.from_numpy(two["masks"]) > 127, strict=True):
        for mask in masks:
            given = dict(zip(("box", "point"), hints(mask), strict=True))[hint]
            seen = segmenter.subject_mask(Image.fromarray(image), **{hint: given})
            found.append(torch.from_numpy(np.asarray(seen) > 0))
            true.append(mask)
    assert iou(torch.stack(found), torch.stack(true)).mean() >= 0.8


def test_its_sam_sees_nothing_in_an_empty_image() -> None:
    empty = np.full((64, 64, 3), (120, 160, 200), np.uint8)
    empty[::2] += 3  # as compression leaves it
    with pytest.raises(ValueError):
        load_segmenter(MINI, "cpu").objects(Image.fromarray(empty))


def test_an_image_without_transparency_needs_no_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sample, "WEIGHTS", sample.WEIGHTS[1:])
    whole = Image.open(ROOT / "examples" / "cat.png")
    whole.convert("RGB").save(tmp_path / "cat.png")
    given = ["--ref", str(tmp_path / "cat.png"), "--prompt", "a cat in the snow", "--steps", "2"]
    assert sample.run([*given, "--out", str(tmp_path / "out")]) == 0
    assert "mask from SAM" in capsys.readouterr().out
    masks = [Image.open(tmp_path / "out" / "cat-mask.png"), whole.getchannel("A")]
    found, true = (torch.from_numpy(np.asarray(mask) > 127)[None] for mask in masks)
    assert iou(found, true).item() >= 0.9


@pytest.mark.slow  # draws
def test_strength_brings_the_subjects_colours() -> None:
    """The same noise without and with the subject: the second is nearer to the reference."""
    pipe, seen = load(MINI), open_image(ROOT / "examples" / "cat.png")
    subject = pipe.encode_subject(seen, find_mask(seen).mask, "cat")
    config = SampleConfig(steps=15)
    drawn = [
        pipe.sample(subject, "a cat on the beach", seeds=[0], strength=beta, config=config)[0]
        for beta in (0.0, 1.0)
    ]
    probes = load_probes(MINI / "probes.safetensors")
    white = subject.reference.white.resize(drawn[0].size)
    colours = classify(probes, stacked([white, *drawn])).truth.colours[:, :3]  # (3, 3)
    plain, shown = (colours[1:] - colours[0]).abs().mean(dim=1).tolist()
    assert shown < plain


def test_the_next_base_draws_two_subjects() -> None:
    folder = MINI.with_name("mini-next")
    config = SampleConfig(steps=10, solver="dpm", height=64, width=96)
    images = load(folder, "text").sample((), "a cat and a teapot in the snow", range(4), config=config)
    seen, there = classify_views(load_probes(folder / "probes.safetensors"), stacked(images), 0.08)
    classes = [{CLASSES[i] for i in two} for two in seen.truth.label.view(-1, 2).tolist()]
    assert there.all() and sum(two == {"cat", "teapot"} for two in classes) >= 3
