"""`python -m moma.evaluate` as a whole: on MoMA-mini's world, on photos, and on others' images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moma.evaluate import __main__ as evaluate
from moma.evaluate import draw as drawing
from moma.evaluate import plan as planning
from moma.evaluate import world as evaluation
from moma.evaluate.options import parse
from moma.evaluate.protocol import limited, open_dataset, tasks_of
from moma.evaluate.scorers import load_scorers
from moma.evaluate.world import WorldEvaluation, mini_scorers, photos_of, write_world
from moma.inputs.segment import Segmenter
from moma.methods import METHODS, Entry
from moma.methods.text import TextToImage
from moma.sampling.interface import Runtime
from moma.weights.bundle import Bundle
from moma.world.classifiers import draw_all
from moma.world.words import words_of
from moma.world.world import DEFAULT, SCENES, prompt, spec
from tests.helpers import MINI, image, mask
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_scorers

FEW = ["--prompts", "2", "1", "--per-prompt", "1", "--device", "cpu", "--dtype", "fp32"]


def command(out: Path, *more: str) -> int:
    return evaluate.run(["--out", str(out), *FEW, *more])


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "scores.json").read_text())


def rows(out: Path) -> list[dict[str, Any]]:
    return results(out)["scores"]


# --- MoMA-mini's world -------------------------------------------------------------------------------


def test_the_world_as_a_dataset(tmp_path: Path) -> None:
    cfg = WorldEvaluation(subjects=9, photos=3)
    subjects, masks = write_world(tmp_path, cfg)
    shown = [photos_of(i, cfg) for i in range(9)]
    numbers = {(what.label, what.number) for specs in shown for what in specs}
    assert (
        len(numbers) == 9 and [s.word for s in subjects[:2]] == ["cat", "dog"] and subjects[8].word == "cat"
    )
    assert all(number >= DEFAULT.identities + DEFAULT.unseen_identities for _, number in numbers), (
        "test split"
    )
    assert all(len({what.scene for what in specs}) == 3 for specs in shown)
    for subject, specs in zip(subjects, shown, strict=True):
        own = [p.text for p in subject.prompts if p.kind == "context"]
        assert prompt(subject.word, specs[0].scene) not in own and len(own) == len(SCENES) - 1
        material = next(p.text for p in subject.prompts if p.kind == "texture")
        assert material == prompt(subject.word, specs[0].scene, "wooden")
        for photo in subject.photos:
            cover = Image.open(masks / subject.name / photo.name)
            assert Image.open(photo).size == cover.size == (64, 64) and cover.getextrema()[1] == 255
    with pytest.raises(ValueError, match="5000 subjects"):
        write_world(tmp_path, WorldEvaluation(subjects=5000))


def test_the_small_scorers_know_the_world() -> None:
    """CLIP finds the caption of an image, by the projections that it was trained with; the judge, twins."""
    judge, clip = mini_scorers(Bundle.open(MINI))
    specs = [spec(i, "test") for i in range(24)]
    images = [Image.fromarray(array) for array in draw_all(specs)[0].permute(0, 2, 3, 1).numpy()]
    words = [words_of(what).rich for what in specs]
    seen, read = clip.embed_images(images), clip.embed_texts(words)
    assert torch.allclose(seen.norm(dim=1), torch.ones(24)) and torch.allclose(
        read.norm(dim=1), torch.ones(24)
    )
    assert ((seen @ read.T).argmax(dim=1) == torch.arange(24)).float().mean() > 0.9
    twins = [what for i in range(12) for what in photos_of(i, WorldEvaluation(photos=2))]
    images = [Image.fromarray(array) for array in draw_all(twins)[0].permute(0, 2, 3, 1).numpy()]
    first, second = judge.embed_images(images).view(12, 2, -1).unbind(1)
    assert ((first @ second.T).argmax(dim=1) == torch.arange(12)).float().mean() > 0.9
    large = judge.embed_images([image.resize((128, 128), Image.Resampling.NEAREST) for image in images[:2]])
    assert torch.allclose(large, judge.embed_images(images[:2]), atol=1e-4)


def test_the_world_is_evaluated_and_goes_on_where_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--world", "--bundle", str(MINI), "--subjects", "2", "--steps", "2", "--method", "moma"]
    given += ["--method", "text", "--batch-size", "2"]
    saved = []

    def save(*args: Any, **more: Any) -> None:
        if len(saved) == 9:
            raise KeyboardInterrupt
        saved.append(args)
        save_png(*args, **more)

    save_png = drawing.save_png
    monkeypatch.setattr(drawing, "save_png", save)
    out = tmp_path / "out"
    assert command(out, *given) == 130
    drawn = {path: path.stat().st_mtime_ns for path in out.glob("*/*-450*/a*.png")}
    assert len(drawn) == 9 and not (out / "scores.json").exists()
    monkeypatch.setattr(drawing, "save_png", save_png)
    assert command(out, *given) == 0
    assert len(list(out.glob("*/*-450*/a*.png"))) == 2 * 2 * 3
    assert all(path.stat().st_mtime_ns == time for path, time in drawn.items())
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert names == {"index.html", "scores.json", "scores.csv", "table.md", "subjects.png"}
    assert sorted(path.name for path in (out / "text").iterdir()) == ["cat-4500", "dog-4500", "settings.json"]

    table = (out / "table.md").read_text()
    assert "| identity judge | CLIP-I MoMA-mini | CLIP-T MoMA-mini |" in table and "| Real images |" in table
    assert table in capsys.readouterr().out
    assert {"text", "method moma", "method text"} < set(results(out)["facts"])
    found = rows(out)
    assert [row["kind"] for row in found[:3]] == ["context", "context", "texture"] and len(found) == 12
    row = found[5]
    judge, clip = mini_scorers(Bundle.open(MINI))
    image = Image.open(out / row["file"])
    photos = [Image.open(path) for path in sorted((out / "world/photos" / row["subject"]).iterdir())]
    likeness = [(judge.embed_images([image]) @ judge.embed_images([p]).T).item() for p in photos]
    told = (clip.embed_images([image]) @ clip.embed_texts([row["prompt"]]).T).item()
    assert row["values"]["identity judge"] == pytest.approx(sum(likeness) / 5, abs=1e-4)
    assert row["values"]["CLIP-T MoMA-mini"] == pytest.approx(told, abs=1e-4)

    theirs = tmp_path / "theirs"
    for path in (out / "moma").glob("*/*.png"):  # somebody else's images, as JPEG would be
        (theirs / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).save(theirs / path.parent.name / f"{path.stem}.webp", lossless=True)
    again = tmp_path / "again"
    few = ["--world", "--subjects", "2", "--bundle", str(MINI)]
    assert command(again, *few, "--images", f"their method={theirs}") == 0
    scores = [row["values"] for row in rows(again)]
    assert scores == [pytest.approx(row["values"], abs=1e-4) for row in found[:6]]
    assert {row["method"] for row in rows(again)} == {"their method"}
    facts = set(results(again)["facts"])
    assert "prompts" in facts and not facts & {"reference", "strength", "text"}
    assert not (again / "moma").exists() and (again / rows(again)[0]["file"]).exists()
    next(theirs.glob("*/*.webp")).unlink()
    capsys.readouterr()
    assert command(again, *few, "--images", f"theirs={theirs}") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "1 of 6 images" in error[0]


# --- photos ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with tiny scorers, two subjects of two photos each, and their masks."""
    folder, cfg = tmp_path_factory.mktemp("place"), TinyConfig()
    build_tiny_bundle(folder / "tiny", cfg=replace(cfg, networks=cfg.networks | tiny_scorers()))
    for i, name in enumerate(("hat", "my_cat")):
        for kind, make in (("data", image), ("masks", lambda n: mask(20 + n))):
            (folder / kind / name).mkdir(parents=True)
            for n in range(2):
                make(2 * i + n).save(folder / kind / name / f"{n}.png")
    (folder / "data" / "subjects.json").write_text('{"my_cat": "cat", "hat": "top hat"}')
    return folder


def photos(place: Path, *more: str) -> list[str]:
    paths = {"--dataset": "data", "--bundle": "tiny", "--masks": "masks"}
    given = [text for name, path in paths.items() for text in (name, str(place / path))]
    return [*given, "--steps", "1", "--size", "32", *more]


def test_photos_are_evaluated(place: Path, tmp_path: Path) -> None:
    assert command(tmp_path, *photos(place, "--reference", "each", "--no-added")) == 0
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "moma").glob("*/*.png")}
    found = rows(tmp_path)
    assert [row["prompt"] for row in found] == [
        "a top hat in the jungle", "a top hat in the snow", "a red top hat",
        "a cat in the jungle", "a cat in the snow", "a red cat",
    ]  # fmt: skip
    assert list(found[0]["values"]) == ["DINO ViT-S/16", "CLIP-I ViT-B/32", "CLIP-T ViT-B/32"]
    assert found[1]["file"] == "moma/hat/a-top-hat-in-the-snow-0.png"
    facts = results(tmp_path)["facts"]
    assert facts["masks"].startswith("2 ") and "photo of a {subject}. {prompt}" in facts["text"]
    assert "Textual Inversion" not in (tmp_path / "table.md").read_text()
    assert command(tmp_path, *photos(place, "--reference", "each", "--no-added")) == 0
    assert len(drawn) == 6 and all(path.stat().st_mtime_ns == time for path, time in drawn.items())


def test_pairs_are_evaluated(place: Path, tmp_path: Path) -> None:
    """Likeness is the mean over both subjects, in the contexts of both."""
    given = photos(
        place, "--pairs", "--reference", "each", "--method", "reference-attention", "--method", "text"
    )
    assert command(tmp_path, *given) == 0
    found = rows(tmp_path)
    assert [(row["method"], row["prompt"]) for row in found] == [
        (method, f"a top hat and a cat in the {place}")
        for method in ("reference-attention", "text")
        for place in ("jungle", "snow")
    ]
    assert found[0]["file"] == "reference-attention/hat-and-my_cat/a-top-hat-and-a-cat-in-the-jungle-0.png"
    scorers = load_scorers(Bundle.open(place / "tiny"))
    seen = [Image.open(tmp_path / row["file"]) for row in found]
    for i, column in enumerate(("DINO ViT-S/16", "CLIP-I ViT-B/32")):
        drawn, likeness = scorers[i].embed_images(seen), 0.0
        for name in ("hat", "my_cat"):
            real = [Image.open(path) for path in sorted((place / "data" / name).iterdir())]
            likeness += (drawn @ scorers[i].embed_images(real).T).mean(dim=1) / 2
        assert [row["values"][column] for row in found] == pytest.approx(likeness.tolist(), abs=1e-4)
    table = (tmp_path / "table.md").read_text()
    assert (
        "0.506" in table
        and "| Real images |" in table
        and "hat-and-my_cat" in (tmp_path / "index.html").read_text()
    )


def test_masks_by_the_bundles_segmenter(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first bundle that has one, loaded once; the second time its masks are there."""
    asked = []

    class Fake:
        def __init__(self, bundle: Bundle, device: str) -> None:
            asked.append((bundle, device))

        def subject_mask(self, image: Image.Image) -> Image.Image:
            asked.append(image.size)
            return mask(25)

    monkeypatch.setattr(Segmenter, "load", Fake)
    monkeypatch.setattr(Bundle, "hashes_of", lambda bundle, name: {"sam.safetensors": "0"})
    options = parse(
        ["--dataset", str(place / "data"), "--bundle", str(place / "tiny"), "--out", str(tmp_path)], ""
    )
    tasks, plain = tasks_of(open_dataset(place / "data"), 1), Bundle.open(place / "tiny")
    segmenting = replace(plain, networks={**plain.networks, "sam": {}})
    runtimes = [Runtime.choose(bundle, "cpu", "fp32") for bundle in (plain, segmenting)]
    runs = [planning.make_run("moma", runtime, options, tasks) for runtime in runtimes]
    for _ in range(2):
        found = planning.open_references(options, None, runs)
        assert asked == [(segmenting, torch.device("cpu")), (120, 90), (120, 90)]
    assert [str(one.mask.relative_to(tmp_path)) for one in found.values()] == [
        "masks/hat/0.png", "masks/my_cat/0.png",
    ]  # fmt: skip
    assert Image.open(next(iter(found.values())).mask).tobytes() == mask(25).tobytes()
    with pytest.raises(ValueError, match="2 of 2 images"):
        planning.open_references(options, None, runs[:1])


def test_real_images_alone(place: Path, tmp_path: Path) -> None:
    """A check of the scorers: no generator takes part."""
    given = ["--dataset", str(place / "data"), "--scorers", str(place / "tiny")]
    assert command(tmp_path / "new" / "out", *given) == 0
    out = tmp_path / "new" / "out"
    assert rows(out) == [] and "| Real images |" in (out / "table.md").read_text()
    assert set(results(out)["facts"]) == {"data", "subjects", "scorers"}, "nothing was asked for or drawn"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dataset", "nowhere"], "nowhere"),
        (["--world"], "--world"),
        (["--bundle", "nowhere"], "nowhere"),
        (["--method", "magic"], "'magic'"),
        (["--method", "ip-adapter"], "ip_adapter"),
        (["--images", "moma"], "NAME=DIR"),
        (["--images", "moma=x"], "moma="),
        (["--images", "Real images=x"], "Real images="),
        (["--images", "a=x", "--images", "a=y"], "--images a: "),
        (["--method", "moma", "--method", "moma=x"], "--method moma: "),
        (["--magic"], "--magic"),
        (["--images", "theirs={}/data"], "6 of 6 images"),
        (["--masks", "{}/data/hat"], "data/hat"),
        (["--scorers", str(MINI)], "dino_s16"),
        (["--subjects", "0"], "0 subjects"),
        (["--per-prompt", "0"], "0 images per prompt"),
        (["--per-prompt", "1000000000"], "1000000000 images per prompt"),
        (["--steps", "1000"], "1000"),
        (["--size", "33"], "33"),
        (["--batch-size", "0"], "batch size 0"),
        (["--context-strength", "-1"], "strength -1"),
        (["--device", "cuda:7"], "cuda:7"),
    ],
)
def test_mistakes_take_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, no_weights: None, more: list[str], words: str
) -> None:
    assert command(tmp_path / "out", *photos(place, *(text.format(place) for text in more))) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("evaluate: error: ") and words in error[0]
    assert not (tmp_path / "out" / "moma").exists()


def test_images_that_cannot_be_read_are_found_first(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, no_weights: None
) -> None:
    """A photo that only scorers would see, and somebody else's image."""
    data = tmp_path / "data"
    shutil.copytree(place / "data", data)
    scoring = ["--dataset", str(data), "--scorers", str(place / "tiny"), "--no-added"]
    theirs = tmp_path / "theirs"
    for task in tasks_of(limited(open_dataset(data), None, (2, 1)), 1):
        (theirs / task.file).parent.mkdir(parents=True, exist_ok=True)
        image(0).save(theirs / task.file)
    for path in (theirs / task.file, data / "my_cat" / "1.png"):
        path.write_bytes(path.read_bytes()[:-200])
        assert command(tmp_path / "out", *scoring, "--images", f"theirs={theirs}") == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and str(path) in error[0] and error[0].startswith("evaluate: error: ")


def test_a_registered_method_is_a_choice(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered by somebody else's file, it is drawn, named and scored."""
    monkeypatch.setitem(METHODS, "fork", Entry(TextToImage, "somebody's"))
    assert command(tmp_path, *photos(place, "--method", "fork", "--no-added")) == 0
    settings = json.loads((tmp_path / "fork" / "settings.json").read_text())
    assert settings["name"] == "fork" and settings["method"]["absent_label"] == "error"
    assert {row["method"] for row in rows(tmp_path)} == {"fork"}


def test_mistaken_limits_write_no_world(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate.run(["--world", "--bundle", str(MINI), "--prompts", "0", "--out", str(out)]) == 2
    assert not out.exists()


def test_a_world_without_its_scorers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command(tmp_path, "--world", "--bundle", str(place / "tiny")) == 2
    assert evaluation.PROBES in capsys.readouterr().err
