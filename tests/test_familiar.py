"""Which images MoMA-mini knows, and what it does with others."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

import moma
import sample
from convert_weights import convert
from models.weights.loading import save_tensors
from moma import Bundle
from moma.evaluate.draw import Run
from moma.evaluate.options import parse
from moma.evaluate.plan import open_references
from moma.evaluate.protocol import Subject, Task
from moma.inputs.familiar import FILE, Familiar, statistics
from moma.inputs.preprocess import open_image
from moma.mini.config import FamiliarTraining
from moma.mini.familiar import fit_familiar
from moma.sampling.config import SampleConfig
from moma.sampling.interface import Export, Runtime
from moma.training.common import write_export
from moma.weights.bundle import COMPANIONS
from moma.world.world import DEFAULT, render
from tests import recipe
from tests.helpers import MINI, ROOT


def photo(seed: int, side: int = 160) -> Image.Image:
    """Soft light and fine grain, as a camera sees them, and a thing on it."""
    soft = Image.fromarray(recipe.u8(f"photo {seed}", (5, 5, 3))).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    ImageDraw.Draw(soft).ellipse((40, 30, 120, 130), fill=(120, 90, 60))
    grain = recipe.ints(f"grain {seed}", (side, side, 1), -14, 15)
    blurred = np.asarray(soft.filter(ImageFilter.GaussianBlur(2))).astype(int)
    return Image.fromarray((blurred + grain).clip(0, 255).astype(np.uint8))


def test_mini_knows_its_world_and_the_examples() -> None:
    known = Bundle.open(MINI).familiar
    shown = [render(i, "test") for i in range(25)]
    assert all(known.knows(Image.fromarray(one.image)) for one in shown)
    assert all(known.knows(Image.fromarray(np.dstack([one.image, one.mask]))) for one in shown)
    assert all(
        known.knows(open_image(ROOT / "examples" / f"{name}.png")) for name in ("cat", "dog", "car", "teapot")
    )


@pytest.mark.parametrize("change", ["as it is", "small", "grey", "cut out"])
def test_mini_does_not_know_photos(change: str) -> None:
    known = Bundle.open(MINI).familiar
    for seed in range(6):
        image = photo(seed)
        if change == "small":
            image = image.resize((64, 64), Image.Resampling.BOX)
        if change == "grey":
            image = image.convert("L").convert("RGB")
        if change == "cut out":
            image.putalpha(
                Image.fromarray(recipe.ellipse(160, 160, 80, 80, 50, 40)[0, 0].astype(np.uint8) * 255)
            )
        assert not known.knows(image)


@pytest.mark.slow  # draws
def test_the_recipe_fits_it() -> None:
    fitted = fit_familiar(DEFAULT, FamiliarTraining(renders=150, large=4, large_side=128))
    assert sum(fitted.knows(Image.fromarray(render(i, "val").image)) for i in range(20)) >= 18
    assert not any(fitted.knows(photo(seed)) for seed in range(6))


def test_distances_are_those_of_the_nearest_distribution(tmp_path: Path) -> None:
    groups = [[photo(seed, side) for seed in range(20)] for side in (136, 160)]
    fitted = Familiar.fit(groups)
    values = np.stack([statistics(image) for image in groups[1]])
    new = photo(77, 160)
    scale = values.std(axis=0) + 0.01
    away = (statistics(new) - values.mean(axis=0)) / scale
    expected = away @ np.linalg.solve(np.cov((values / scale).T) + 0.1 * np.eye(len(away)), away)
    assert fitted.distance(new) <= expected * 1.001
    alone = Familiar(fitted.mean[1:], fitted.precision[1:], fitted.limit)
    assert alone.distance(new) == pytest.approx(expected, rel=1e-3)
    fitted.save(tmp_path)
    again = Familiar.read(tmp_path)
    assert again.distance(new) == fitted.distance(new) and again.limit == fitted.limit


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    assert Familiar.read(tmp_path) is None
    known = Bundle.open(MINI).familiar
    for wrong in (replace(known, mean=known.mean[:, :3]), replace(known, limit=torch.zeros(2))):
        save_tensors(tmp_path, Path(FILE).stem, vars(wrong))
        with pytest.raises(ValueError, match=FILE):
            Familiar.read(tmp_path)
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=FILE):
        Familiar.read(tmp_path)


@pytest.mark.parametrize("kind", ["photo", "plain", "render"])
def test_the_command_says_so_and_looks_for_a_plain_background_first(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    image = photo(3) if kind == "photo" else Image.fromarray(render(3, "test").image)
    if kind == "plain":
        image = Image.new("RGB", (160, 160), "white")
        image.paste(
            photo(3),
            mask=Image.fromarray(recipe.ellipse(160, 160, 80, 80, 50, 40)[0, 0].astype(np.uint8) * 255),
        )
    image.save(tmp_path / "cat.png")

    def stop(*_: object) -> None:
        raise ValueError("so far")

    monkeypatch.setattr(sample, "precompute", stop)
    options = ["--ref", tmp_path / "cat.png", "--weights", MINI, "--out", tmp_path / "out", "--device", "cpu"]
    assert sample.run([str(option) for option in options]) == 2
    said = capsys.readouterr().out
    assert ("resemble" in said) == (kind != "render")
    assert ("plain background" in said) == (kind == "plain") and ("SAM" in said) == (kind != "plain")


def test_a_new_bundle_knows_what_its_unet_does(tmp_path: Path) -> None:
    """As do the scorers that lie beside the networks, unless one of theirs is another."""
    mini = Bundle.open(MINI)
    for name in ("adapter", "unet"):
        write_export(tmp_path / "export", Export({name: (mini.config(name), mini.state(name))}))
        convert([tmp_path / "export"], tmp_path / name, mini, say=lambda _: None)
    for file, networks in COMPANIONS.items():
        assert (tmp_path / "adapter" / file).read_bytes() == (MINI / file).read_bytes()
        assert (tmp_path / "unet" / file).exists() == ("unet" not in networks)


def test_bundles_without_it_know_everything(tmp_path: Path) -> None:
    shutil.copytree(MINI, tmp_path / "mini", ignore=lambda *_: [FILE])
    assert Bundle.open(tmp_path / "mini").familiar is None


@pytest.mark.parametrize("kind", ["photo", "render"])
def test_the_api_warns(kind: str) -> None:
    pipe = moma.load(MINI, "text", device="cpu")
    image = photo(3) if kind == "photo" else Image.fromarray(render(3, "test").image)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pipe.encode_subject(image, Image.linear_gradient("L").resize(image.size), "cat")
    assert any("resemble" in str(one.message) for one in found) == (kind == "photo")


def test_an_evaluation_names_references_that_weights_do_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    photos = []
    for name, image in (("photo", photo(3)), ("render", Image.fromarray(render(3, "test").image))):
        photos.append(tmp_path / "cat" / f"{name}.png")
        photos[-1].parent.mkdir(exist_ok=True)
        image.save(photos[-1])
        mask = recipe.ellipse(image.height, image.width, image.width // 2, image.height // 2, 30, 30)[0, 0]
        (tmp_path / "masks" / "cat").mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "masks" / "cat" / f"{name}.png")
    tasks = [Task(Subject("cat", "cat", (path,), ()), "a cat", "context", 0) for path in photos]
    words = ["--out", tmp_path / "out", "--world", "--method", f"text={MINI}"]
    options = parse([str(word) for word in words], "")
    runtime = Runtime.choose(Bundle.open(MINI), "cpu")
    config = runtime.weights.method_config("text")
    run = Run("text", tmp_path, runtime, config, SampleConfig(), options.protocol, tasks, {})
    open_references(options, tmp_path / "masks", [run])
    said = capsys.readouterr().err
    assert str(photos[0]) in said and str(photos[1]) not in said
