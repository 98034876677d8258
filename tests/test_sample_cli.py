"""sample.py from the outside: images, replay, and one line for every mistake, before weights are read."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

import moma
import sample
from moma import RELEASE, Bundle, SampleConfig, find_mask, load_segmenter, open_image
from moma.app.options import SCENES, parse_args, request_of_args
from moma.app.record import read_record
from moma.inputs.segment import Segmenter
from moma.methods.moma.feature_decoder import FeatureDecoder
from tests import recipe
from tests.fake_sam import SMALL, FlatSAM
from tests.helpers import ROOT, first_version, only, pixels
from tests.helpers import run_sample as run
from tests.tiny import TinyConfig, build_tiny_bundle

CAT = ROOT / "examples" / "cat.png"
FAST = ["--steps", "3", "--dtype", "fp32"]
QUICK = [*FAST, "--prompt", "a cat on the beach at sunset"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    build_tiny_bundle(folder)
    return folder


@pytest.fixture
def cat(tmp_path) -> Path:
    return Path(shutil.copy(CAT, tmp_path / "cat.png"))


def command(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "sample.py"), *map(str, args)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


# --- images ----------------------------------------------------------------------------------------


def test_command_in_a_new_process_and_its_replay(tmp_path, weights, cat, monkeypatch):
    """The same image comes out of this process, elsewhere, from the PNG alone."""
    done = command("--ref", cat, "--weights", weights, "--out", "a", "--seed", 7, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "GB" in done.stdout and "3/3" in done.stderr  # peak memory; the progress bar
    first = only(tmp_path / "a", "a-cat-on-the-beach-at-sunset-seed7.png")
    assert only(tmp_path / "a", "*sheet.png").name == "cat-sheet.png"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run("--replay", first, "--ref", cat, "--weights", weights, "--out", "b") == 0
    second = only(elsewhere / "b", "*seed7.png")
    assert np.array_equal(pixels(first), pixels(second)) and pixels(first).std() > 10
    assert read_record(first) == read_record(second)


@pytest.mark.slow  # a process of its own
def test_mistake_in_a_new_process_is_one_line(tmp_path):
    done = command("--ref", "no.png", "--subject", "cat", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "sample.py: error: image 'no.png': no such file\n"


@pytest.mark.parametrize("preset", ["default", "release", pytest.param("paper", marks=pytest.mark.slow)])
def test_every_preset_draws_and_replays(tmp_path, weights, cat, preset):
    """The release draws its reference noise from the global generator: it is seeded with the rest."""
    out = tmp_path / "out"
    torch.manual_seed(1)
    assert run("--ref", cat, "--weights", weights, "--preset", preset, "--num", 2, "--out", out, *QUICK) == 0
    first = only(out, "*-seed1.png")
    torch.manual_seed(2)
    assert run("--replay", first, "--ref", cat, "--weights", weights, "--out", tmp_path / "again") == 0
    assert os.listdir(tmp_path / "again") == ["a-cat-on-the-beach-at-sunset-seed1.png"]
    assert np.array_equal(pixels(first), pixels(only(tmp_path / "again", "*-seed1.png")))
    assert len(read_record(first).batch) == (1 if preset == "release" else 2)


@pytest.mark.parametrize("size", [1, 2])
def test_a_given_batch_size_holds_where_images_change_each_other(weights, cat, size):
    line = f"--ref {cat} --preset release --batch-size {size}"
    request = request_of_args(parse_args(line.split()), Bundle.open(weights))
    assert request.sample.batch_size == size


def test_the_releases_reference_noise_is_of_seed_zero(tmp_path, weights, cat):
    options = ["--ref", cat, "--weights", weights, "--preset", "release", "--seed", 5]
    assert run(*options, "--out", tmp_path / "out", *QUICK) == 0
    pipe, given = moma.load(weights, device="cpu", dtype="fp32").with_config(RELEASE), open_image(cat)
    torch.manual_seed(0)
    subject = pipe.encode_subject(given, find_mask(given).mask, "cat")
    (drawn,) = pipe.sample(subject, QUICK[-1], seeds=[5], config=SampleConfig(steps=3))
    assert np.array_equal(pixels(only(tmp_path / "out", "*-seed5.png")), np.asarray(drawn))


def test_several_scenes_when_none_is_asked_for(tmp_path, weights, cat):
    assert run("--ref", cat, "--weights", weights, "--out", tmp_path, *FAST) == 0
    names = {path.name for path in tmp_path.glob("a-cat-*-seed0.png")}
    assert names == {f"a-cat-{scene.replace(' ', '-')}-seed0.png" for scene in SCENES}


def test_prompts_seeds_and_names(tmp_path, weights, cat):
    lines = tmp_path / "prompts.txt"
    text = "\ufeffA cat, made of Glass!\r\n\n  two\u2028CATS  \n# a dog\na cat in the snow\n"
    lines.write_text(text, encoding="utf-8", newline="")
    out = tmp_path / "out"
    args = ["--ref", cat, "--weights", weights, "--prompt", "a cat in the snow", "--prompts", lines]
    args += ["--num", 2, "--seed", 5, "--size", "136x72", "--out", out, "--debug", *FAST]
    assert run(*args) == 0
    prompts = {"a-cat-in-the-snow", "a-cat-made-of-glass", "two-cats"}
    names = {f"{prompt}-seed{seed}.png" for prompt in prompts for seed in (5, 6)}
    names |= {"cat-sheet.png", "cat-mask.png"}
    assert set(os.listdir(out)) == names
    assert Image.open(out / "two-cats-seed6.png").size == (136, 72)
    record = read_record(out / "two-cats-seed6.png")
    assert (record.prompt, record.seed, record.method_name) == ("two CATS", 6, "moma")
    assert not np.array_equal(pixels(out / "two-cats-seed5.png"), pixels(out / "two-cats-seed6.png"))
    # One row for the reference, one (images beside their masks) for each of three prompts.
    assert Image.open(out / "cat-sheet.png").size == (12 + 4 * 268, 12 + 302 + 3 * (302 - 120))

    kept = {name: (out / name).read_bytes() for name in names}
    assert run(*args) == 0  # again: new names, old files as they were
    assert len(os.listdir(out)) == 2 * len(names)
    assert all((out / name).read_bytes() == content for name, content in kept.items())


def test_seeds_do_not_depend_on_the_run(tmp_path, weights, cat):
    """Seed 6 of two images from seed 5 is seed 6 asked for by itself."""
    options = ["--ref", cat, "--weights", weights, "--batch-size", 1, *QUICK]
    assert run(*options, "--num", 2, "--seed", 5, "--out", tmp_path / "two") == 0
    assert run(*options, "--seed", 6, "--out", tmp_path / "one") == 0
    assert np.array_equal(
        pixels(only(tmp_path / "two", "*-seed6.png")), pixels(only(tmp_path / "one", "*-seed6.png"))
    )


@pytest.mark.slow  # nine drawings
def test_options_reach_the_image(tmp_path, weights, cat):
    variants = [[], ["--guidance", 2], ["--strength", 0], ["--solver", "dpm"], ["--negative", "a dog"],
                ["--steps", 4], ["--set", "m_gen_threshold=0.6"], ["--guidance-interval", 300, 600],
                ["--subject", "ginger cat", "--prompt", "a ginger cat"]]  # fmt: skip
    results = []
    for i, options in enumerate(variants):
        out = tmp_path / str(i)
        given = FAST if "--prompt" in options else QUICK
        assert run("--ref", cat, "--weights", weights, "--out", out, *given, *options) == 0
        results.append(pixels(only(out, "*-seed0.png")))
    for other in results[1:]:
        assert not np.array_equal(results[0], other)


def test_guidance_interval_is_recorded_and_replayed(tmp_path, weights, cat):
    options = ["--ref", cat, "--weights", weights, "--guidance-interval", 300, 600, *QUICK]
    assert run(*options, "--out", tmp_path / "a") == 0
    first = only(tmp_path / "a", "*-seed0.png")
    assert read_record(first).sample.guidance_interval == (300, 600)
    assert run("--replay", first, "--ref", cat, "--weights", weights, "--out", tmp_path / "b") == 0
    assert np.array_equal(pixels(first), pixels(only(tmp_path / "b", "*-seed0.png")))


def test_stream_and_cache_change_no_bit(tmp_path, weights, cat, monkeypatch, capsys):
    """The MLLM resident, streamed or not there at all: the same images. It goes before the UNet comes."""
    load_decoder, load, decoders = FeatureDecoder.load, sample.load_pipeline, []

    def watched_decoder(*args: object) -> object:
        decoders.append(weakref.ref(decoder := load_decoder(*args)))
        return decoder

    def watched_load(*args: object) -> object:
        assert all(decoder() is None for decoder in decoders)
        return load(*args)

    monkeypatch.setattr(FeatureDecoder, "load", watched_decoder)
    monkeypatch.setattr(sample, "load_pipeline", watched_load)

    def draw(name: str, *options: object) -> tuple[np.ndarray, str]:
        args = ["--ref", cat, "--weights", weights, "--prompt", "a cat", "--num", 2, *QUICK, *options]
        assert run(*args, "--out", tmp_path / name) == 0
        files = sorted((tmp_path / name).glob("*seed?.png"))
        assert len(files) == 4
        return np.stack([pixels(file) for file in files]), capsys.readouterr().out

    kept = tmp_path / "kept"
    first, printed = draw("off", "--stream", "off", "--cache", "off")
    assert "resident" in printed and not kept.exists()
    streamed, printed = draw("on", "--stream", "on", "--cache", kept)
    assert "streamed" in printed and len(list(kept.iterdir())) == 2
    again, printed = draw("again", "--cache", kept)
    assert str(kept) in printed and len(decoders) == 2
    automatic, printed = draw("auto")
    assert "resident" in printed and len(decoders) == 3
    for other in (streamed, again, automatic):
        assert np.array_equal(first, other)


@pytest.mark.slow  # four drawings
def test_tiles_on_request(tmp_path, weights, cat):
    """Near the whole image, but not the same; the small one has no tiles."""
    results = {}
    for size in ("136x64", "128"):
        for choice in ("on", "off"):
            out = tmp_path / size / choice
            args = ["--ref", cat, "--weights", weights, "--out", out, "--size", size, *QUICK]
            assert run(*args, "--tiles", choice, "--cuda-graph", "off") == 0
            results[size, choice] = pixels(only(out, "*-seed0.png"))
    assert not np.array_equal(results["136x64", "on"], results["136x64", "off"])
    assert np.array_equal(results["128", "on"], results["128", "off"])


def test_no_weights_at_all(tmp_path, cat, monkeypatch, capsys):
    monkeypatch.setattr(sample, "WEIGHTS", [tmp_path / "none"])
    assert run("--ref", cat, "--out", tmp_path / "out", *QUICK) == 2
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method", ["text", pytest.param("reference-attention", marks=pytest.mark.slow), "half-mask"]
)
def test_other_methods_draw_and_replay(tmp_path, weights, cat, method):
    options = ["--ref", cat, "--weights", weights, "--method", method, *QUICK]
    assert run(*options, "--out", tmp_path / "a") == 0
    assert run(*options[:4], "--out", tmp_path / "moma", *QUICK) == 0
    first = only(tmp_path / "a", "*-seed0.png")
    assert read_record(first).method_name == method
    assert run("--replay", first, "--ref", cat, "--weights", weights, "--out", tmp_path / "b") == 0
    assert np.array_equal(pixels(first), pixels(only(tmp_path / "b", "*-seed0.png")))
    assert not np.array_equal(pixels(first), pixels(only(tmp_path / "moma", "*-seed0.png")))


def test_text_alone_needs_no_subject(tmp_path, weights):
    options = ["--weights", weights, "--method", "text", "--prompt", "on the beach", *FAST]
    assert run(*options, "--out", tmp_path / "a") == 0
    first = only(tmp_path / "a", "on-the-beach-seed0.png")
    assert run("--replay", first, "--weights", weights, "--out", tmp_path / "b") == 0
    assert np.array_equal(pixels(first), pixels(only(tmp_path / "b", "on-the-beach-seed0.png")))


def test_an_older_record_is_replayed(tmp_path, weights, cat):
    """Before there were several methods a record named none, and the seed of the reference's noise was 0."""
    assert run("--ref", cat, "--weights", weights, "--out", tmp_path / "a", *QUICK) == 0
    first = only(tmp_path / "a", "*-seed0.png")
    image = Image.open(first)
    settings = json.loads(first_version(image.info["moma"]))
    for name in ("method_name",):
        del settings[name]
    del settings["method"]["m_gen_share"]
    settings |= {
        "seed": 2**40,
        "batch": [[settings["prompt"], 2**40]],
    }  # drawn as 0, which alone is allowed now
    for seed, status in ((0, 0), (3, 2)):
        info = PngInfo()
        info.add_itxt("moma", json.dumps(settings | {"subject_seed": seed}))
        image.save(tmp_path / "old.png", pnginfo=info)
        assert (
            run(
                "--replay",
                tmp_path / "old.png",
                "--ref",
                cat,
                "--weights",
                weights,
                "--out",
                tmp_path / f"b{seed}",
            )
            == status
        )
    assert np.array_equal(pixels(first), pixels(only(tmp_path / "b0", f"*-seed{2**40}.png")))


def test_trained_weights_come_first(tmp_path, weights, monkeypatch):
    places = [tmp_path / "moma", tmp_path / "mini"]
    monkeypatch.setattr(sample, "WEIGHTS", places)
    for place in reversed(places):
        place.mkdir()
        assert sample.find_weights(sample.parse_args(["--ref", "x.png"]), None) == place
    asked = sample.parse_args(["--ref", "x.png", "--weights", str(weights)])
    assert sample.find_weights(asked, None) == weights


def test_mask_file_is_used_and_replayed(tmp_path, weights):
    photo = Image.fromarray(recipe.u8("photo", (90, 120, 3)))
    photo.save(tmp_path / "dog.png")
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).ellipse((30, 20, 90, 80), fill=255)
    mask.save(tmp_path / "m.png")
    args = ["--ref", tmp_path / "dog.png", "--weights", weights, "--prompt", "a dog in the snow", *FAST]
    assert run(*args, "--mask", tmp_path / "m.png", "--out", tmp_path / "a") == 0
    first, given = only(tmp_path / "a", "*seed0.png"), args[:4]
    assert run("--replay", first, *given, "--mask", tmp_path / "m.png", "--out", tmp_path / "b") == 0
    assert np.array_equal(pixels(first), pixels(only(tmp_path / "b", "*seed0.png")))
    (tmp_path / "m.png").rename(tmp_path / "n.png")
    assert run("--replay", first, *given, "--out", tmp_path / "c") == 2
    assert run("--replay", first, *given, "--out", tmp_path / "c", "--mask", tmp_path / "n.png") == 0


# --- masks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights_with_sam(tmp_path_factory) -> Path:
    """The same weights, and a small SAM that was never trained."""
    folder = tmp_path_factory.mktemp("weights") / "tiny-sam"
    build_tiny_bundle(folder, cfg=TinyConfig(networks=TinyConfig().networks | {"sam": SMALL}))
    return folder


@pytest.fixture
def sams(monkeypatch) -> list[weakref.ref]:
    """A SAM that knows the answers takes the place of the untrained one; those that were loaded."""
    loaded = []

    def load(*args: object) -> Segmenter:
        loaded.append(weakref.ref(sam := FlatSAM()))
        return Segmenter(sam)

    monkeypatch.setattr(Segmenter, "load", load)
    return loaded


@pytest.fixture
def masks_only(monkeypatch) -> None:
    """Runs are stopped, with status 130, as soon as the mask is there."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "precompute", stop)


@pytest.fixture
def street(tmp_path) -> Path:
    """A red disc in the middle of a wall and a floor, a blue one beside it. No alpha, no plain border."""
    image = Image.new("RGB", (160, 120), (90, 90, 90))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 80, 159, 119), fill=(150, 160, 150))
    draw.ellipse((56, 30, 115, 89), fill=(200, 30, 30))
    draw.ellipse((6, 10, 35, 39), fill=(20, 40, 200))
    image.save(tmp_path / "street.png")
    return tmp_path / "street.png"


def colour(path: Path, channel: int) -> np.ndarray:
    """Where red (0) or blue (2) is."""
    seen = pixels(path)
    return seen[..., channel] > 180


def alike(mask: Path, expected: np.ndarray) -> bool:
    found = pixels(mask) > 0
    return (found & expected).sum() / (found | expected).sum() > 0.85


SHOT = ["--subject", "toy", "--prompt", "a toy in the snow", "--dtype", "fp32", "--steps", "3"]


def test_sam_finds_the_subject_and_replay_needs_no_sam(
    tmp_path, weights, weights_with_sam, sams, street, monkeypatch, capsys
):
    """It is gone before other networks come. The image itself keeps the mask, for any other machine."""

    def gone(load):
        def watched(*args: object, **options: object) -> object:
            assert [ref() for ref in sams] == [None]
            return load(*args, **options)

        return watched

    for name in ("precompute", "load_pipeline"):
        monkeypatch.setattr(sample, name, gone(getattr(sample, name)))
    assert run("--ref", street, "--weights", weights_with_sam, "--out", tmp_path / "a", *SHOT) == 0
    mask = tmp_path / "a" / "toy-mask.png"
    assert str(mask) in capsys.readouterr().out
    assert Image.open(mask).size == (160, 120) and alike(mask, colour(street, 0))
    first = only(tmp_path / "a", "*seed0.png")
    kept = read_record(first).subjects[0].images[0].segmented
    assert np.array_equal(np.asarray(kept.image()), pixels(mask)) and kept.how == "its main object"

    mask.unlink()
    assert run("--replay", first, "--ref", street, "--weights", weights, "--out", tmp_path / "b") == 0
    assert len(sams) == 1
    second = only(tmp_path / "b", "*seed0.png")
    assert np.array_equal(pixels(first), pixels(second))
    assert read_record(second).subjects[0].images[0].segmented == kept


@pytest.mark.parametrize("more", [[], ["--point", "20,20"], ["--list-objects"]])
def test_a_blank_image_is_refused_before_sam_is_loaded(tmp_path, weights_with_sam, sams, capsys, more):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("white", "red")]
    frames[0].save(tmp_path / "w.gif", save_all=True, append_images=frames[1:])
    given = ["--ref", tmp_path / "w.gif", "--weights", weights_with_sam, "--out", tmp_path / "out"]
    assert run(*given, *([] if "--list-objects" in more else SHOT), *more) == 2
    error = capsys.readouterr().err
    assert "first of the image's 2 frames is empty" in error and error.count("\n") == 1 and not sams


def test_objects_points_and_boxes(tmp_path, weights_with_sam, sams, masks_only, street, capsys):
    """The list is all that is done; what it numbers, --object takes."""
    given = ["--ref", street, "--weights", weights_with_sam, "--out", tmp_path / "out"]
    assert run(*given, "--list-objects") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(n + 1) for n in range(len(lines))]
    assert "--object N" in last and os.listdir(tmp_path / "out") == ["street-objects.png"]
    assert pixels(tmp_path / "out" / "street-objects.png").shape == (768, 1024, 3)
    boxes = [np.array(line.split()[2].rstrip(",").split(","), int) for line in lines]
    (blue,) = (i for i, box in enumerate(boxes, 1) if np.abs(box - (6, 10, 36, 40)).max() <= 2)
    shots = {
        "object": (["--object", blue], colour(street, 2)),
        "point": (["--point", "20,20"], colour(street, 2)),
        "points": (["--point", "20,20", "--point", "80,60"], colour(street, 0) | colour(street, 2)),
        "box": (["--box", "4,8,38,42"], colour(street, 2)),
    }
    for name, (options, expected) in shots.items():
        assert run(*given[:-1], tmp_path / name, *SHOT, *options) == 130
        assert alike(tmp_path / name / "toy-mask.png", expected)
        how = ", ".join(f"{options[i][2:]} {options[i + 1]}" for i in range(0, len(options), 2))
        assert how in capsys.readouterr().out


def test_which_mask_comes_first(tmp_path, weights_with_sam, sams, masks_only, street):
    """A file, what is pointed at, transparency, SAM."""
    photo = Image.open(street)
    blue = Image.fromarray(np.where(colour(street, 2), 255, 0).astype(np.uint8))
    photo.putalpha(blue)
    photo.save(tmp_path / "cut.png")
    blue.save(tmp_path / "m.png")
    cases = {
        "file": (["--ref", street, "--mask", tmp_path / "m.png"], 2, 0),
        "alpha": (["--ref", tmp_path / "cut.png"], 2, 0),
        "point": (["--ref", tmp_path / "cut.png", "--point", "5,5"], None, 1),
        "sam": (["--ref", street], 0, 1),
    }
    for name, (options, channel, loaded) in cases.items():
        sams.clear()
        args = ["--weights", weights_with_sam, "--out", tmp_path / name, *SHOT]
        assert run(*options, *args) == 130 and len(sams) == loaded
        if channel is not None:
            assert alike(tmp_path / name / "toy-mask.png", colour(street, channel))


def test_sam_of_the_bundle_is_loaded(weights_with_sam):
    segmenter = load_segmenter(weights_with_sam, "cpu")
    assert len(segmenter.candidates(Image.new("RGB", (50, 40)), [(3, 4)], [(2, 2, 30, 30)])) == 7


def test_long_prompt_is_noted(tmp_path, weights, cat, capsys):
    prompt = "a cat " + "and a zebra " * 30
    assert run("--ref", cat, "--weights", weights, "--prompt", prompt, "--out", tmp_path, *QUICK) == 0
    assert "77" in capsys.readouterr().out


def test_help_names_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "pixels" in text and "default: 50" in text and "default: 7.5" in text


def test_interruption_is_clean(monkeypatch, capsys):
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "main", interrupted)
    assert run() == 130
    assert capsys.readouterr().err == "sample.py: stopped\n"


# --- mistakes ----------------------------------------------------------------------------------------


CAT_ALONE, DOG = "--ref {}/cat.png", "--ref {}/dog.png"
MISTAKES = {  # {} = the folder of `files`
    "": "--ref",
    "--ref no.png --subject cat": "'no.png'",
    "--ref {}/empty.txt --subject cat": "empty.txt",
    DOG: "dog.png: where is the subject? The image has neither transparency",
    f"{DOG} --mask no.png": "'no.png'",
    f"{DOG} --mask {{}}/black.png": "mask",
    f"{DOG} --mask {{}}/white.png": "white.png: the mask covers the whole",
    f"{CAT_ALONE} {DOG} --mask - --mask {{}}/black.png": "black.png: the mask is black all over",
    f"{DOG} --mask {{}}/tall.png": "90x120",
    "--ref {}/IMG_1234.png": "--subject",
    "--ref {}/photo.png": "--subject",
    f"{CAT_ALONE} --subject ' '": "subject",
    f"{CAT_ALONE} --prompt ''": "prompt",
    f"{CAT_ALONE} --device cpu --cuda-graph on": "CUDA",
    f"{CAT_ALONE} --prompt 'a dog'": "'cat'",
    f"{CAT_ALONE} --prompt '{'7 ' * 80} cat'": "limit",
    f"{CAT_ALONE} --point 3,4": "SAM",
    f"{CAT_ALONE} --object 1": "SAM",
    f"{CAT_ALONE} --list-objects": "SAM",
    f"{CAT_ALONE} --point 3": "--point",
    f"{CAT_ALONE} --box 1,2,3": "--box",
    f"{CAT_ALONE} --mask {{}}/black.png --point 3,4": "--point",
    f"{CAT_ALONE} --mask {{}}/black.png --object 2": "--object",
    f"{CAT_ALONE} --object 2 --point 3,4": "--point",
    f"{CAT_ALONE} --list-objects --object 2": "--object",
    f"{CAT_ALONE} --list-objects --object 0": "--object",
    f"{CAT_ALONE} --list-objects --prompt 'a cat'": "--list-objects contradicts --prompt",
    f"{CAT_ALONE} --list-objects --num 0": "--list-objects contradicts --num",
    f"{CAT_ALONE} --list-objects --method moma": "--list-objects contradicts --method",
    f"{CAT_ALONE} --list-objects --debug": "--list-objects contradicts --debug",
    f"{CAT_ALONE} --prompts no.txt": "no.txt",
    f"{CAT_ALONE} --prompts {{}}/binary.txt": "binary.txt",
    f"{CAT_ALONE} --prompts {{}}/empty.txt": "empty.txt",
    f"{CAT_ALONE} --size 100": "100",
    f"{CAT_ALONE} --size 0": " 0",
    f"{CAT_ALONE} --size 4": " 4",
    f"{CAT_ALONE} --size 64x24": " 24",
    f"{CAT_ALONE} --size 8": " 8",
    f"{CAT_ALONE} --size 512x16": " 16",
    f"{CAT_ALONE} --num 10001": "40,004",
    f"{CAT_ALONE} --subject ''": "subject",
    f"{CAT_ALONE} --preset ''": "preset ''",
    f"{CAT_ALONE} --device cpu:1": "cpu:1",
    f"{CAT_ALONE} --prompts {{}}/link.txt": "gone.txt",
    f"{CAT_ALONE} --set m_gen_threshold={'[' * 9999}": "m_gen_threshold",
    f"{CAT_ALONE} --set lambda_init=NaN": "lambda_init",
    "--ref {}/DSCF.png": "--subject",
    f"--ref - {CAT_ALONE}": "--ref -",
    "--ref {}/Screenshot.png": "--subject",
    "--ref {}/qXzTeb.png": "--subject",
    "--replay {}/link.png": "gone.png",
    f"{CAT_ALONE} --size 80000": "80000",
    f"{CAT_ALONE} --size big": "big",
    f"{CAT_ALONE} --steps 0": "steps",
    f"{CAT_ALONE} --steps 1001": "steps",
    f"{CAT_ALONE} --steps many": "'many'",
    f"{CAT_ALONE} --num 0": "--num 0",
    f"{CAT_ALONE} --seed -1": "--seed -1",
    f"{CAT_ALONE} --seed {2**32}": "--seed",
    f"{CAT_ALONE} --strength -1": "strength -1",
    f"{CAT_ALONE} --strength nan": "strength nan",
    f"{CAT_ALONE} --guidance inf": "guidance inf",
    f"{CAT_ALONE} --guidance 1e9": "0 to 100",
    f"{CAT_ALONE} --strength 5e9": "0 to 100",
    f"{CAT_ALONE} --method ip-adapter --set scale=5e9": "0 to 100",
    f"{CAT_ALONE} --batch-size 0": "batch size 0",
    f"{CAT_ALONE} --guidance-interval 600 300": "guidance interval 600 300",
    f"{CAT_ALONE} --guidance-interval 0 5000": "5000",
    f"{CAT_ALONE} --guidance-interval 300": "--guidance-interval",
    f"{CAT_ALONE} --solver euler": "'euler'",
    f"{CAT_ALONE} --preset best": "preset 'best'",
    f"{CAT_ALONE} --method mine": "'mine'",
    f"{CAT_ALONE} --method ip-adapter": "ip_adapter",
    f"{CAT_ALONE} --method text --set m_gen_eps=0": "m_gen_eps",
    f"{CAT_ALONE} --method half-mask --set m_gen_share=0.9": "half-mask is m_gen_share=0.5",
    f"{CAT_ALONE} --set lambda_init=5": "training alone",
    f"{CAT_ALONE} --set context_init=ip_adapter": "training alone",
    f"{CAT_ALONE} --preset paper --set subject_init=identity": "training alone",
    "--method text": "--ref",
    "--prompt 'a cat'": "--ref",
    "--method text --prompt ''": "prompt",
    f"{CAT_ALONE} --set geometry": "geometry",
    f"{CAT_ALONE} --set geometry=stretch": "'squash'",
    f"{CAT_ALONE} --set beta=1": "method field 'beta'",
    f"{CAT_ALONE} --set m_gen_layers=[99]": "m_gen_layers [99]",
    f"{CAT_ALONE} --set mllm_layers=99": "mllm_layers 99",
    f"{CAT_ALONE} --dtype int8": "'int8'",
    f"{CAT_ALONE} --device quantum": "device 'quantum'",
    f"{CAT_ALONE} --stepz 3": "--stepz",
    f"{CAT_ALONE} --out {{}}/empty.txt": "empty.txt",
    f"{CAT_ALONE} --cache {{}}/empty.txt": "--cache",
    f"{CAT_ALONE} --stream maybe": "'maybe'",
    f"{CAT_ALONE} --weights {{}}": "config.json",
    "--replay no.png": "no.png",
    "--replay {}/cat.png": "cat.png",
    "--replay {}/cat.png --batch-size 2": "--batch-size",
    "--replay {}/cat.png --point 3,4": "--point",
    "--replay {}/cat.png --list-objects": "--list-objects",
}


@pytest.fixture
def files(tmp_path, cat) -> Path:
    photo = Image.fromarray(recipe.u8("photo", (90, 120, 3)))
    for suffix in ("txt", "png"):
        os.symlink(tmp_path / f"gone.{suffix}", tmp_path / f"link.{suffix}")
    for name in ("dog", "IMG_1234", "photo", "DSCF", "Screenshot", "qXzTeb"):
        photo.save(tmp_path / f"{name}.png")
    for name, size, value in (("black", (120, 90), 0), ("white", (120, 90), 255), ("tall", (90, 120), 255)):
        Image.new("L", size, value).save(tmp_path / f"{name}.png")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    return tmp_path


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_loaded(files, weights, no_weights, capsys, line):
    before = set(files.rglob("*"))
    args = shlex.split(line.replace("{}", str(files)))
    for option, value in (("--weights", weights), ("--out", files / "out")):
        if option not in args:
            args += [option, value]
    assert run(*args) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("sample.py: error: ") and printed.count("\n") == 1 and MISTAKES[line] in printed
    assert set(files.rglob("*")) - before <= {files / "out"}


SAM_MISTAKES = {
    "--point 160,5": "160,5",
    "--box 0,0,200,10": "160x120",
    "--object 0": "0",
    "--object 99": "99",
}


@pytest.mark.parametrize("line", SAM_MISTAKES)
def test_mistakes_with_sam(tmp_path, street, weights_with_sam, sams, no_weights, capsys, line):
    """SAM is not loaded for those that can be seen without it, other networks for none."""
    out = tmp_path / "out"
    args = ["--ref", street, "--weights", weights_with_sam, "--out", out, *SHOT]
    assert run(*args, *line.split()) == 2
    printed = capsys.readouterr().err
    assert (
        printed.startswith("sample.py: error: ")
        and printed.count("\n") == 1
        and SAM_MISTAKES[line] in printed
    )
    assert len(sams) == ("99" in line) and (not out.exists() or not os.listdir(out))


def test_replay_checks_weights_and_files(tmp_path, weights, cat, capsys, monkeypatch):
    assert run("--ref", cat, "--weights", weights, "--out", tmp_path / "a", *QUICK) == 0
    first = only(tmp_path / "a", "*seed0.png")
    build_tiny_bundle(tmp_path / "other", seed=1)

    monkeypatch.setattr("moma.weights.bundle.load_into", None)

    def refused(message: str, *args: object) -> None:
        capsys.readouterr()
        assert run("--replay", first, "--out", tmp_path / "b", *args) == 2
        assert message in capsys.readouterr().err

    refused("other", "--weights", tmp_path / "other")
    incomplete = tmp_path / "incomplete"
    shutil.copytree(tmp_path / "other", incomplete)
    manifest = json.loads((incomplete / "config.json").read_text())
    del manifest["networks"]["adapter"]
    (incomplete / "config.json").write_text(json.dumps(manifest))
    refused("incomplete", "--weights", incomplete)
    refused("mask", "--mask", cat, "--weights", weights)
    refused("--ref", "--ref", first, "--weights", weights)
    refused("--ref", "--weights", weights)
    refused("--weights", "--ref", cat)
    large = tmp_path / "large.png"
    large.touch()
    os.truncate(large, 2**40)
    refused("large.png", "--ref", large, "--weights", weights)


@pytest.fixture
def folder_with_all(tmp_path, weights, cat, monkeypatch) -> Path:
    """The current folder: cat.png, tiny, and out/ with an image drawn from them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(weights, tmp_path / "tiny")
    assert run("--ref", "cat.png", "--weights", "tiny", *QUICK) == 0
    return tmp_path


def test_replay_follows_what_lies_in_the_current_folder(folder_with_all, tmp_path, no_weights, capsys):
    """Named paths elsewhere, also by links or by "..", are read only when the user names them."""
    first = only(folder_with_all / "out", "*seed0.png")
    record = read_record(first)
    assert (record.subjects[0].images[0].file.path, record.weights) == ("cat.png", "tiny")
    with pytest.raises(AssertionError, match="weights were read"):
        run("--replay", first)
    kept = tmp_path.parent / f"{tmp_path.name}-elsewhere.png"
    shutil.copy(tmp_path / "cat.png", kept)
    os.symlink(kept, tmp_path / "link.png")
    for path in (str(kept), f"../{kept.name}", "link.png", "~/cat.png", "no.png"):
        data = json.loads(Image.open(first).info["moma"])
        data["subjects"][0]["images"][0]["file"]["path"] = path
        assert run("--replay", edited(first, data, tmp_path / "edited.png")) == 2
        assert "--ref" in capsys.readouterr().err
    kept.unlink()


def edited(source: Path, data: object, target: Path) -> Path:
    """The image with other settings."""
    info = PngInfo()
    info.add_itxt("moma", data if isinstance(data, str) else json.dumps(data))
    Image.open(source).save(target, pnginfo=info)
    return target


def test_replay_tells_what_differs(folder_with_all, tmp_path, capsys):
    """It writes the image alone, no second mask and sheet."""
    first = only(folder_with_all / "out", "*seed0.png")
    assert run("--replay", first, "--out", "again") == 0
    assert f"identical to {first}" in capsys.readouterr().out
    assert os.listdir("again") == [first.name]
    changed = Image.open(first)
    changed.putpixel((1, 2), (0, 0, 0))
    data = changed.info["moma"]
    info = PngInfo()
    info.add_itxt("moma", data)
    changed.save("changed.png", pnginfo=info)
    most = np.abs(pixels(first) - pixels(Path("changed.png"))).max()
    assert run("--replay", "changed.png", "--out", "again") == 0
    said = capsys.readouterr().out
    assert f"{1 / pixels(first)[..., 0].size:.2%}" in said and f" {most} of 255" in said
    Path("cut.png").write_bytes(Path("changed.png").read_bytes()[:-3000])
    assert run("--replay", "cut.png", "--out", "again") == 0
    assert "cut.png" in capsys.readouterr().out and len(os.listdir("again")) == 3
    changed.resize((32, 32)).save("small.png", pnginfo=info)
    assert run("--replay", "small.png", "--out", "again") == 0
    assert "(32, 32)" in capsys.readouterr().out


def test_file_names_that_are_not_utf8(tmp_path, weights, cat):
    """Recorded as they are, for the replay."""
    folder = os.fsencode(tmp_path)
    photo, out = (os.fsdecode(folder + b"/" + name) for name in (b"caf\xe9.png", b"\xe9out"))
    shutil.copy(cat, photo)
    assert run("--ref", photo, "--subject", "cat", "--weights", weights, "--out", out, *QUICK) == 0
    first = only(Path(out), "*seed0.png")
    assert read_record(first).subjects[0].images[0].file.path == "caf\udce9.png"
    assert run("--replay", first, "--ref", photo, "--weights", weights, "--out", out) == 0


def test_names_carry_the_subject(tmp_path, weights, cat):
    """Where the prompt's beginning does not, and within what file systems take."""
    prompt = "beach " * 9 + "cat"
    args = ["--ref", cat, "--weights", weights, "--out", tmp_path / "out", *FAST, "--subject"]
    assert run(*args, "cat", "--prompt", prompt) == 0
    assert only(tmp_path / "out", "*seed0.png").name.startswith("cat-beach-beach")
    name = sample._stem(["𠮷" * 99], "海" * 99)
    assert "𠮷" in name and "海" in name and len(f"{name}-seed4294967295-99.png".encode()) < 256


def test_a_drawing_that_stops_leaves_images_and_sheet(tmp_path, weights, cat, monkeypatch):
    real = sample.Pipeline.run

    def stops(*args: object) -> object:
        results = real(*args)
        yield next(results)
        raise ValueError("not finite")

    monkeypatch.setattr(sample.Pipeline, "run", stops)
    assert run("--ref", cat, "--weights", weights, "--num", 3, "--out", tmp_path / "out", *QUICK) == 2
    assert (
        len(list((tmp_path / "out").glob("*seed0.png"))) == 1 and (tmp_path / "out/cat-sheet.png").is_file()
    )


def test_what_is_not_read_as_written_is_noted(tmp_path, weights, cat, masks_only, capsys):
    def said(*args: object) -> str:
        capsys.readouterr()
        assert run("--ref", cat, "--weights", weights, "--out", tmp_path / "out", *FAST, *args) == 130
        return "".join(line for line in capsys.readouterr().out.splitlines(True) if line.startswith("note"))

    assert "pseudo-random" in (usual := said("--prompt", "a cat in the snow"))
    assert "77" in said("--prompt", "a cat", "--negative", "zebra " * 80).replace(usual, "")
    assert "(cat:1.2)" in said("--prompt", "a (cat:1.2) <lora:x:1>").replace(usual, "")
    assert "[dog]" in said("--prompt", "a cat", "--negative", "[dog]").replace(usual, "")
