"""Several subjects, and several images of one, from sample.py's command line."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from moma import Bundle
from moma.app.options import parse_args, request_of_args, subjects_of_args
from moma.app.record import read_record
from moma.inputs.faces import EMBEDDING, TEMPLATE
from moma.inputs.segment import Segmenter
from moma.methods.mm_diff.adapter import MMDiffSizes
from moma.methods.mm_diff.method import PATCHES, WORDS
from tests.fake_sam import SMALL, FlatSAM
from tests.helpers import ROOT, image, only, pixels
from tests.helpers import run_sample as run
from tests.tiny import TinyConfig, build_tiny_bundle

CAT = ROOT / "examples" / "cat.png"
FAST = ["--steps", "2", "--dtype", "fp32", "--cache", "off"]


def build(folder: Path, subject: str) -> Path:
    """A tiny bundle with MM-Diff, whose subjects are faces or whole images, and with SAM."""
    networks = TinyConfig().networks
    vision = networks["vision"]
    width = networks["text"].width
    sizes = MMDiffSizes(subject, embed_dim=vision.width, patch_dim=vision.width, text_dims=(width,), tokens=2,
        hidden=16, depth=1, heads=2, head_dim=8, rank=4)  # fmt: skip
    own = {"mm_diff": sizes, WORDS: vision, PATCHES: vision, "sam": SMALL}
    build_tiny_bundle(folder, cfg=TinyConfig(networks=networks | own))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("weights") / "cls", "cls")


@pytest.fixture(scope="module")
def face_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("weights") / "face", "face")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A cat, a folder of two dogs with their masks, and what cannot be used."""
    shutil.copy(CAT, tmp_path / "cat.png")
    for folder in ("dog", "masks", "few", "empty", "old", "twice"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        image(i).save(tmp_path / "dog" / f"{i}.png")
        mask = Image.new("L", image(i).size)
        mask.paste(255, (8, 8, 20, 24))
        mask.save(tmp_path / "masks" / f"{i}.png")
    shutil.copy(tmp_path / "masks" / "0.png", tmp_path / "few" / "0.png")
    for name in ("0.png", "1.bmp", "1.png"):
        shutil.copy(tmp_path / "masks" / "0.png", tmp_path / "twice" / name)
    for name in (".hidden", "Thumbs.db", "desktop.ini"):
        (tmp_path / "dog" / name).touch()
    shutil.copytree(tmp_path / "dog", tmp_path / "old" / "dog")
    (tmp_path / "old" / "dog" / "notes.txt").write_text("not an image")
    for name, value in (("white", 255), ("black", 0)):
        Image.new("L", (40, 32), value).save(tmp_path / f"{name}.png")
    for name, scale in (("face", 1.0), ("outside", 99.0)):
        tensors = {
            "embedding": torch.arange(1.0, EMBEDDING + 1),
            "landmarks": torch.tensor(TEMPLATE) * scale / 9,
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path


PAIR = "--ref {}/cat.png --ref {}/dog --mask - --mask {}/masks"


def line(text: str, files: Path) -> list[str]:
    return shlex.split(text.replace("{}", str(files)))


# --- which option goes to which subject -------------------------------------------------------------


def test_options_go_to_subjects_in_turn(files: Path) -> None:
    options = "--subject 'ginger  cat' --subject - --strength - --strength 0.4 --region 0,0,0.5,1 --region -"
    cat, dog = subjects_of_args(parse_args(line(f"{PAIR} {options}", files)))
    assert (cat.word, cat.strength, cat.region) == ("ginger cat", None, (0.0, 0.0, 0.5, 1.0))
    assert (dog.word, dog.strength, dog.region) == ("dog", 0.4, None)
    assert [(one.file.name, one.mask.name) for one in dog.images] == [("0.png", "0.png"), ("1.png", "1.png")]
    assert [one.mask for one in cat.images] == [None]


def test_points_of_one_subject_and_of_several(files: Path) -> None:
    one, two = "--ref {}/cat.png", "--ref {}/cat.png --ref {}/cat.png"

    def points(text: str) -> list[tuple]:
        return [subject.images[0].pick.points for subject in subjects_of_args(parse_args(line(text, files)))]

    assert points(f"{one} --point 3,4 --point 5,6") == [((3, 4), (5, 6))]
    assert points(f"{one} --point 3,4:5,6") == [((3, 4), (5, 6))]
    assert points(f"{two} --point 3,4:5,6 --point 7,8") == [((3, 4), (5, 6)), ((7, 8),)]
    assert points(f"{two} --point - --point 7,8") == [(), ((7, 8),)]


def test_one_strength_is_for_all(files: Path) -> None:
    two = "--ref {}/cat.png --ref {}/cat.png"
    assert [s.strength for s in subjects_of_args(parse_args(line(f"{two} --strength 0.4", files)))] == [
        None,
        None,
    ]


# --- drawing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["moma", "mm-diff", "reference-attention"])
def test_a_pair_is_drawn_and_replayed(
    files: Path,
    weights: Path,
    method: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images of a batch are what they are alone; the record knows both subjects."""
    args = [*line(PAIR, files), "--weights", weights, "--method", method, *FAST]
    args += ["--prompt", "a house with a cat and a dog in the snow"]
    out, again, alone = (files / name for name in ("out", "again", "alone"))
    assert run(*args, "--num", 3, "--batch-size", 2, "--debug", "--out", out) == 0
    first = only(out, "*-seed1.png")
    assert first.name == "a-house-with-a-cat-and-a-dog-in-the-snow-seed1.png"
    assert only(out, "*sheet.png").name == "cat-and-dog-sheet.png"
    assert len(list(out.glob("dog-mask*.png"))) == 2
    # A row for each of three images with their masks, and one for the drawings.
    assert Image.open(only(out, "*sheet.png")).size == (
        12 + (6 if method == "moma" else 3) * 268,
        12 + 4 * 302,
    )
    cat, dog = read_record(first).subjects
    assert (cat.word, len(cat.images), dog.word, len(dog.images)) == ("cat", 1, "dog", 2)
    assert Path(dog.images[1].file.path).name == Path(dog.images[1].mask.path).name == "1.png"

    files.joinpath("dog").rename(files / "moved")
    given = ["--ref", files / "cat.png", "--ref", files / "moved", "--mask", "-", "--mask", files / "masks"]
    capsys.readouterr()
    assert run("--replay", first, *given, "--weights", weights, "--out", again) == 0
    assert "identical" in capsys.readouterr().out
    monkeypatch.chdir(files)  # where the first record found the cat
    given[given.index("--ref") + 1] = "-"
    assert run("--replay", first, *given, "--weights", weights, "--out", again) == 0
    assert "identical" in capsys.readouterr().out
    args = [str(x).replace(str(files / "dog"), str(files / "moved")) for x in args]
    assert run(*args, "--seed", 1, "--subject", "cat", "--subject", "dog", "--out", alone) == 0
    assert np.abs(pixels(first) - pixels(only(alone, "*-seed1.png"))).max() <= 2


@pytest.mark.parametrize(
    ("refs", "prompt"), [("--ref {}/cat.png", "a cat"), ("--ref {}/cat.png --ref {}/dog", "a cat and a dog")]
)
def test_a_prompt_has_a_place_for_the_subjects(files: Path, weights: Path, refs: str, prompt: str) -> None:
    args = [*line(f"{refs} --method mm-diff", files), "--prompt", "a {subject} at sea", "--seed", "3"]
    request = request_of_args(parse_args(args), Bundle.open(weights))
    assert request.images == ((f"{prompt} at sea", 3),)


def test_prompts_of_two_subjects(files: Path, weights: Path) -> None:
    """Their words are those of file and folder."""
    args = ["--ref", files / "cat.png", "--ref", files / "dog", "--mask", "-", "--mask", files / "masks"]
    assert run(*args, "--weights", weights, "--method", "mm-diff", "--out", files / "out", *FAST) == 0
    assert len(list((files / "out").glob("a-cat-and-a-dog-*-seed0.png"))) == 4


@pytest.mark.slow  # five drawings
def test_strengths_and_images_have_a_say(files: Path, weights: Path) -> None:
    variants = {
        "all": [], "weak": ["--strength", "0.5"], "first": ["--strength", "1", "--strength", "0"],
        "second": ["--strength", "0", "--strength", "1"],
    }  # fmt: skip
    drawn = []
    for name, options in variants.items():
        args = [
            *line(PAIR, files),
            "--weights",
            weights,
            "--method",
            "mm-diff",
            "--prompt",
            "a cat and a dog",
        ]
        assert run(*args, *options, "--out", files / name, *FAST) == 0
        drawn.append(pixels(only(files / name, "*-seed0.png")))
    (files / "dog" / "1.png").unlink()
    assert run(*args, "--out", files / "one", *FAST) == 0
    drawn.append(pixels(only(files / "one", "*-seed0.png")))
    for i, one in enumerate(drawn):
        assert all(not np.array_equal(one, other) for other in drawn[i + 1 :]), i


def test_a_face_from_a_file_is_kept_for_the_replay(
    files: Path, face_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refs = ["--ref", files / "cat.png", "--weights", face_weights]
    args = [*refs, "--method", "mm-diff", "--prompt", "a cat<|subj|> in the snow", *FAST]
    assert run(*args, "--face-file", files / "face.safetensors", "--out", files / "a") == 0
    first = only(files / "a", "*-seed0.png")
    assert "<|" not in capsys.readouterr().out, "it is no syntax of other tools here"
    (files / "face.safetensors").unlink()
    assert run("--replay", first, *refs, "--out", files / "b") == 0
    assert "identical" in capsys.readouterr().out


# --- mistakes ---------------------------------------------------------------------------------------


TWO = f"{PAIR} --method mm-diff"
MISTAKES = {
    f"{PAIR} --method text": "2 images",
    f"{TWO} --subject cat": "--subject: 1",
    f"{TWO} --subject cat --subject dog --subject cow": "--subject: 3",
    f"{TWO} --strength 1 --strength 2 --strength 3": "--strength: 3",
    f"{TWO} --strength 1 --strength -2": "-2",
    f"{TWO} --strength 1 --strength nan": "nan",
    f"{PAIR} --method reference-attention --strength 0.4": "--strength",
    f"{TWO} --region 0,0,1,1 --region -": "region",
    f"{TWO} --region 0,0,1 --region -": "--region",
    f"{TWO} --region 0.5,0,0.5,1 --region -": "--region",
    f"{TWO} --point - --point 3,4": "--point",
    f"{TWO} --object - --object 1": "--object",
    f"{TWO} --prompt 'a cat'": "'dog'",
    f"{TWO} --prompt 'a cat<|subj|> and a dog'": "1 <|subj|>",
    f"{TWO} --face-file - --face-file {{}}/face.safetensors": "--face-file",
    f"{TWO} --face-number 1 --face-number -": "--face-number",
    f"{TWO} --list-objects": "--list-objects",
    "--ref {}/cat.png --ref {}/dog --mask {}/black.png --mask {}/masks --method mm-diff": "mask",
    "--ref {}/cat.png --ref {}/dog --mask - --mask {}/few --method mm-diff": "1.png",
    "--ref {}/cat.png --ref {}/dog --mask - --mask {}/twice --method mm-diff": "2 files for 1.png",
    "--ref {}/cat.png --ref {}/dog --mask - --mask {}/white.png --method mm-diff": "white.png",
    "--ref {}/cat.png --ref {}/dog --mask {}/masks --method mm-diff": "--mask: 1",
    "--ref {}/cat.png --ref {}/empty --method mm-diff": "empty",
    "--ref {}/cat.png --ref {}/old/dog --method mm-diff": "notes.txt",
    "--ref {}/cat.png --ref {}/few --method mm-diff --box - --box 1,2,3,99": "1,2,3,99",
    " ".join(["--ref {}/cat.png"] * 9) + " --method mm-diff": "9 subjects",
    "--ref {}/cat.png --list-objects --ref {}/cat.png": "--list-objects",
    "--list-objects --method text --prompt cat": "--list-objects",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_loaded(
    files: Path, weights: Path, no_weights: None, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert run(*line(text, files), "--weights", weights, "--out", files / "out", *FAST) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("sample.py: error: ") and printed.count("\n") == 1 and MISTAKES[text] in printed
    assert not list((files / "out").glob("*.png"))


FACES = {
    "--face-file {}/outside.safetensors": "outside",
    "--face-file {}/no.safetensors": "no.safetensors",
    "--face-file {}/face.safetensors --face-number 1": "--face-number",
    "--face-file {}/masks": "masks",
}


@pytest.mark.parametrize("text", FACES)
def test_mistakes_about_faces(
    files: Path,
    face_weights: Path,
    no_weights: None,
    capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:
    args = [
        "--ref",
        files / "cat.png",
        "--method",
        "mm-diff",
        "--weights",
        face_weights,
        "--out",
        files / "out",
    ]
    assert run(*args, *line(text, files), *FAST) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and FACES[text] in printed


def test_sam_is_loaded_once_and_after_the_checks(
    files: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = []
    monkeypatch.setattr(Segmenter, "load", lambda *args: loaded.append(args) or Segmenter(FlatSAM()))
    for name in ("car", "boat"):
        street = Image.new("RGB", (160, 120), "grey")
        street.paste((200, 20, 20), (50, 30, 110, 90))
        street.paste((90, 140, 90), (0, 100, 160, 120))
        street.save(files / f"{name}.png")
    args = [
        "--ref",
        files / "car.png",
        "--ref",
        files / "boat.png",
        "--weights",
        weights,
        "--method",
        "mm-diff",
    ]
    args += ["--prompt", "a car and a boat", *FAST]
    assert run(*args, "--mask", "-", "--mask", files / "black.png", "--out", files / "a") == 2
    assert not loaded and "mask" in capsys.readouterr().err
    assert run(*args, "--out", files / "b") == 0 and len(loaded) == 1
    record = read_record(only(files / "b", "*-seed0.png"))
    kept = [subject.images[0].segmented for subject in record.subjects]
    assert kept[0] == kept[1] and kept[0].image().size == (160, 120)
