"""train.py from the outside: a run, its continuation and export, and one line for every mistake."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw

import train
from models.weights.loading import read_checkpoint
from moma.training.config import DataConfig
from moma.training.log import read_log
from moma.weights.bundle import Bundle
from tests.tiny import build_tiny_bundle

QUICK = ["--steps", "2", "--batch-size", "1", "--dtype", "fp32", "--device", "cpu", "--workers", "0"]
QUICK += ["--set", "validation_samples=2", "--set", "warmup=1", "--set", "save_every=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny bundle, and data of four samples."""
    folder = tmp_path_factory.mktemp("train")
    build_tiny_bundle(folder / "tiny")
    (folder / "data").mkdir()
    lines = []
    for i, colour in enumerate(("red", "green", "blue", "black")):
        image, mask = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64))
        for shown, fill in ((image, colour), (mask, 255)):
            ImageDraw.Draw(shown).ellipse((10, 10, 40 + 4 * i, 50), fill)
        image.save(folder / "data" / f"{i}.png")
        mask.save(folder / "data" / f"{i}-mask.png")
        sample = {"image": f"{i}.png", "mask": f"{i}-mask.png", "label": "cat", "caption": "a cat on a table"}
        lines.append(json.dumps(sample))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def train_decoder(place: Path, out: Path, *more: object) -> int:
    where = ["--bundle", place / "tiny", "--data", place / "data", "--out", out]
    return train.run(["moma:stage1", *map(str, where), *QUICK, "--train", "new", *map(str, more)])


def export(place: Path, run: Path, *more: object) -> int:
    return train.run(["export", str(run), "--bundle", str(place / "tiny"), *map(str, more)])


@pytest.fixture(scope="module")
def trained(place) -> Path:
    assert train_decoder(place, place / "run") == 0
    return place / "run"


def test_run_resume_export(place, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "run")
    assert train_decoder(place, out, "--resume", "--steps", 3) == 0
    assert [line["step"] for line in read_log(out / "log.jsonl") if "loss" in line] == [1, 2, 3]
    assert export(place, out, "--which", "last", "--to", tmp_path / "last") == 0
    assert "last: step 3, validation loss" in capsys.readouterr().out
    files = [folder / "adapter.safetensors" for folder in (out / "export", tmp_path / "last")]
    assert files[0].read_bytes() == files[1].read_bytes()
    start = read_checkpoint(Bundle.open(place / "tiny").files("adapter")[0])["mapping.up_proj.weight"].read()
    assert not (read_checkpoint(files[0])["mapping.up_proj.weight"].read() == start).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--resume"),
        (["--resume", "--lr", "0.5"], "train.lr"),
        (["--resume", "--batch-size", "2"], "train.samples"),
        (["--resume", "--set", "mllm_layers=1"], "method.mllm_layers"),
        (["--resume", "--set", "lora_rank=2"], "settings.lora_rank"),
        (["--resume", "--steps", "1"], "2 steps"),
        (["--change", "train.lr"], "--change"),
        (["--resume", "--change", "lr"], "--change lr"),
        (["--resume", "--data", "{place}/other"], "data '"),
        (["--data", "{place}/none"], "none"),
        (["--bundle", "{place}/none"], "config.json"),
        (["--set", "colour=red"], "--set colour"),
        (["--set", "stage.seed=1"], "--set stage.seed"),
        (["--set", "seed"], "--set"),
        (["--set", "seed=one"], "seed 'one'"),
        (["--steps", "0"], "steps 0"),
        (["--dtype", "fp16"], "'fp16'"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--out", "{place}/data/metadata.jsonl"], "metadata.jsonl"),
    ],
)
def test_mistakes_before_weights_are_read(place, trained, capsys, no_weights, more, message):
    if not (place / "other").exists():
        shutil.copytree(place / "data", place / "other")
        with open(place / "other" / "metadata.jsonl", "a") as stream:
            stream.write("\n")
    before = sorted(trained.rglob("*"))
    assert train_decoder(place, trained, *(text.format(place=place) for text in more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: error: ") and message in error
    assert sorted(trained.rglob("*")) == before


def test_export_of_nothing(place, tmp_path, capsys):
    assert export(place, tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_export_of_a_damaged_checkpoint(place, trained, tmp_path, capsys):
    """The other one is exported, and that is said."""
    out = shutil.copytree(trained, tmp_path / "run")
    file = out / "checkpoints" / "step-00000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\0" * 8)
    assert export(place, out, "--which", "last", "--to", tmp_path / "last") == 0
    assert "step 1, validation loss" in capsys.readouterr().out


def test_export_reads_what_the_user_names(place, trained, tmp_path, capsys):
    """Another bundle is refused; a file in the run's folder that names others is not looked at."""
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "command.json").write_text(json.dumps(["moma:stage2", "--cache", str(tmp_path / "victim")]))
    build_tiny_bundle(tmp_path / "other", seed=1)
    assert train.run(["export", str(out), "--bundle", str(tmp_path / "other")]) == 2
    assert str(tmp_path / "other") in capsys.readouterr().err
    assert export(place, out, "--to", tmp_path / "to") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run", "to"]


def test_settings_change_by_name(place, trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "run")
    more = ("--resume", "--steps", 3, "--lr", 0.5)
    assert train_decoder(place, out, *more) == 2
    assert "--change train.lr" in capsys.readouterr().err
    assert train_decoder(place, out, *more, "--change", "train.lr") == 0
    assert [line["lr"] for line in read_log(out / "log.jsonl") if "loss" in line][-1] == 0.5
    assert train_decoder(place, out, *more, "--steps", 4) == 0  # from now on it is the run's


@pytest.mark.parametrize("training", ["moma:stage1", "moma:stage2"])
def test_a_small_set_is_refused_before_anything_is_computed(place, tmp_path, capsys, no_weights, training):
    where = ["--bundle", place / "tiny", "--data", place / "data", "--out", tmp_path / "out"]
    where += ["--cache", tmp_path / "cache"] if training == "moma:stage2" else []
    more = ["--device", "cpu", "--set", "validation_samples=4"]
    assert train.run([training, *map(str, where), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "4 samples" in error and "--set validation_samples=N" in error
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("training", ["moma:stage1", "moma:stage2"])
def test_places_that_do_not_serve_are_named_by_their_option(place, tmp_path, capsys, no_weights, training):
    (tmp_path / "file").touch()
    cases = {"--validation": f"--validation '{tmp_path}/none': no such file"}
    if training == "moma:stage2":
        cases["--cache"] = (
            f"--cache {tmp_path}/file/none: cannot write there (Not a directory): choose another"
        )
    for option, message in cases.items():
        where = ["--bundle", place / "tiny", "--data", place / "data", "--out", tmp_path / "out", *QUICK]
        where += ["--workers", 1, option, tmp_path / ("none" if option == "--validation" else "file/none")]
        assert train.run([training, *map(str, where)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_an_export_that_cannot_be_written_is_refused_first(place, trained, capsys, no_weights):
    to = place / "data" / "0.png" / "x"
    assert export(place, trained, "--to", to) == 2
    assert f"--to {to}: cannot write there" in capsys.readouterr().err


def test_a_validation_fits_the_set(place):
    for count, kept in ((2, 1), (4, 1), (30, 3), (640, 64), (700, 64)):
        source = SimpleNamespace(shards=[""], read=lambda shard, count=count: iter(range(count)))
        assert DataConfig().kept(source, "data") == kept


def test_data_that_changed_is_no_continuation(place, trained, tmp_path, capsys):
    """Images exchanged in place; --change takes them, from the beginning of the data."""
    data, out = shutil.copytree(place / "data", tmp_path / "data"), shutil.copytree(trained, tmp_path / "run")
    where = ["moma:stage1", "--bundle", place / "tiny", "--data", data, "--out", out, *QUICK]
    again = [*map(str, where), "--train", "new", "--resume", "--steps", "3"]
    for a, b in (("0.png", "1.png"), ("1.png", "0.png")):
        (data / a).write_bytes((place / "data" / b).read_bytes())
    assert train.run(again) == 2
    assert "--change data" in capsys.readouterr().err
    assert train.run([*again, "--change", "data"]) == 0


def test_each_training_has_a_cache_of_its_own(place):
    where = ["--bundle", str(place / "tiny"), "--data", str(place / "data")]

    def folder(name: str, *more: str) -> str:
        args = train.parse_args([name, *where, *more])
        return train.choices_of(args, Bundle.open(place / "tiny")).data.cache

    names = ("moma:stage2", "moma:several", "ip-adapter", "mm-diff")
    assert len({folder(name) for name in names}) == len(names)
    assert folder("ip-adapter", "--cache", "mine") == folder("mm-diff", "--set", "cache=mine") == "mine"


def test_ambiguous_field(place, capsys):
    where = ["--bundle", str(place / "tiny"), "--data", str(place / "data")]
    assert train.run(["moma:stage2", *where, "--set", "subject_below_t=9"]) == 2
    assert "stage.subject_below_t, method.subject_below_t" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_renamed_trainings_are_refused(place, capsys, name):
    assert train.run([name, "--bundle", "bundle", "--data", "data"]) == 2
    assert f"moma:{name}" in capsys.readouterr().err
