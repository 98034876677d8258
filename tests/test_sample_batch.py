"""Many references in one run: each as its own run draws it, checked first, and resumed."""

import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

import sample
from moma.app.record import read_record
from moma.inputs.segment import Segmenter
from moma.sampling.pipeline import Pipeline
from tests.browser import chromium
from tests.fake_sam import SMALL, FlatSAM
from tests.helpers import ROOT, exit_status, fork, image, only, pixels
from tests.helpers import run_sample as run
from tests.tiny import TinyConfig, build_tiny_bundle

FAST = ["--steps", "2", "--dtype", "fp32", "--cache", "off", "--size", "64", "--prompt", "a {subject} at sea"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    build_tiny_bundle(folder)
    return folder


@pytest.fixture
def refs(tmp_path: Path) -> Path:
    """A cat, a teapot, and a folder of an axe."""
    folder = tmp_path / "refs"
    (folder / "axe").mkdir(parents=True)
    for name, there in (("cat", "cat"), ("teapot", "teapot"), ("dog", "axe/1")):
        shutil.copy(ROOT / "examples" / f"{name}.png", folder / f"{there}.png")
    (folder / ".hidden").touch()
    return folder


@pytest.fixture
def draw(refs: Path, weights: Path, tmp_path: Path) -> Any:
    line = ["--batch-refs", refs, "--weights", weights, "--out", tmp_path / "out", *FAST]
    return lambda *more: run(*line, *more)


def drawn(folder: Path) -> dict[str, int]:
    """Images with settings -> when they were written."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*-seed*.png")
    }


def test_each_subject_is_what_its_own_run_draws(draw, refs, weights, tmp_path, capsys):
    assert draw("--num", 2) == 0
    out = tmp_path / "out"
    assert set(drawn(out)) == {
        f"{word}/{a}-{word}-at-sea-seed{i}.png" for a, word in (("a", "cat"), ("a", "teapot"), ("an", "axe"))
        for i in range(2)
    }  # fmt: skip
    more = ["--weights", weights, "--out", tmp_path / "own", *FAST[:-1], "a teapot at sea", "--num", 2]
    assert run("--ref", refs / "teapot.png", *more) == 0
    for i in range(2):
        own, other = (
            only(tmp_path / "own", f"*-seed{i}.png"),
            only(out / "teapot", f"*-seed{i}.png"),
        )
        assert np.array_equal(pixels(own), pixels(other)) and read_record(own) == read_record(other)
    page = (out / "index.html").read_text()
    for word in ("cat", "teapot", "axe"):
        assert f'src="{word}/{word}-sheet.png"' in page and (out / word / f"{word}-sheet.png").is_file()


def test_what_is_there_stays_and_other_settings_are_drawn(draw, refs, tmp_path, monkeypatch):
    assert draw() == 0
    out = tmp_path / "out"
    first = drawn(out)
    sheet = (out / "cat" / "cat-sheet.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sample, "load_pipeline", None)  # nothing to draw
        assert draw() == 0 and drawn(out) == first
        (out / "cat" / "cat-sheet.png").unlink()
        assert draw() == 0 and (out / "cat" / "cat-sheet.png").read_bytes() == sheet
    shutil.copy(ROOT / "examples" / "car.png", refs / "cat.png")  # another image under the same name
    (out / "axe" / "an-axe-at-sea-seed0.png").write_bytes(b"damaged")
    assert draw() == 0
    second = drawn(out)
    assert set(second) - set(first) == {"cat/a-cat-at-sea-seed0-2.png", "axe/an-axe-at-sea-seed0-2.png"}
    assert draw("--strength", 0.4) == 0 and len(drawn(out)) == len(second) + 3
    assert (out / "cat" / "cat-sheet.png").read_bytes() != sheet


def test_goes_on_where_it_was_killed(draw, tmp_path, monkeypatch):
    """Killed after three of six images, with a batch of two half there."""
    out, save, count = tmp_path / "out", sample.save_new, iter(range(100))

    def killed(*args: Any) -> Path:
        if next(count) == 3:
            os.kill(os.getpid(), 9)
        return save(*args)

    def start() -> None:
        monkeypatch.setattr(sample, "save_new", killed)
        draw("--num", 2)

    assert exit_status(fork(start)) == -9
    first = drawn(out)
    assert len(first) == 3
    rows, run_ = [], Pipeline.run

    def counted(self: Pipeline, jobs: Any, *args: Any) -> Any:
        rows.append([(job.prompt, job.seed) for job in jobs])
        return run_(self, jobs, *args)

    monkeypatch.setattr(Pipeline, "run", counted)
    assert draw("--num", 2) == 0
    monkeypatch.undo()
    assert (
        len(drawn(out)) == 6 and first.items() <= drawn(out).items() and [len(row) for row in rows] == [2, 2]
    )


def test_one_damaged_file_is_told_and_the_others_are_drawn(draw, refs, tmp_path, capsys):
    (refs / "bad<b>.png").write_text("no image")
    Image.new("RGB", (64, 64), "white").save(refs / "blank.png")  # no subject in it
    assert draw() == 2
    assert len(drawn(tmp_path / "out")) == 3
    error = capsys.readouterr().err
    assert "2 of 5" in error and "bad<b>" in error and "blank" in error
    page = (tmp_path / "out" / "index.html").read_text()
    assert "bad&lt;b&gt;" in page and "<b>" not in page


@pytest.mark.slow
def test_the_page_in_a_browser(draw, refs, tmp_path):
    """Names that mean something to a browser, or are wider than a phone."""
    (refs / "cat.png").rename(refs / "<img src=x onerror=alert(1)>&%23#?\"'.png")
    (refs / "teapot.png").rename(refs / f"{'Teapot' * 20}.png")
    (refs / "<script>alert(1)</script>.png".replace("/", "")).write_text("no image")
    assert draw("--subject", "cat") == 2
    with chromium() as browser:
        for width in (390, 1440):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("dialog", lambda dialog: pytest.fail(dialog.message))
            page.goto((tmp_path / "out" / "index.html").as_uri())
            for shown in page.locator("img").all():
                shown.scroll_into_view_if_needed()
            page.wait_for_function("[...document.images].every(image => image.naturalWidth)")
            assert page.locator("img").count() == 3 and page.locator("script").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            links = page.locator("a").evaluate_all("all => all.map(one => one.href)")
            assert len(links) == 6 and all(Path(unquote(urlsplit(link).path)).is_file() for link in links)


@pytest.mark.parametrize(
    ("more", "value"),
    [
        (["--ref", "cat.png"], "--ref"),
        (["--point", "3,4"], "--point"),
        (["--subject", "cat", "--subject", "dog"], "--subject"),
        (["--mask", "{}/cat.png"], "--mask"),
        (["--debug"], "--debug"),
        (["--mask", "{}"], "could not"),
        (["--steps", "0"], "steps"),
        (["--batch-refs", "{}/cat.png"], "--batch-refs"),
        (["--batch-refs", "{}/axe/no"], "--batch-refs"),
    ],
)
def test_mistakes_before_weights_are_read(draw, refs, more, value, no_weights, capsys):
    if more[-1] == "{}":  # masks without the folder's
        shutil.rmtree(refs / "axe")
        more = ["--mask", str(refs), "--prompt", "a dog"]
    assert draw(*(part.replace("{}", str(refs)) for part in more)) == 2
    captured = capsys.readouterr()
    assert value in captured.err + captured.out


def test_names_must_differ(draw, refs, no_weights, capsys):
    shutil.copy(refs / "cat.png", refs / "Cat.webp")
    assert draw() == 2 and "Cat.webp" in capsys.readouterr().err


def test_sam_is_loaded_once_and_only_after_the_checks(tmp_path, monkeypatch, capsys):
    build_tiny_bundle(tmp_path / "w", cfg=TinyConfig(networks=TinyConfig().networks | {"sam": SMALL}))
    refs, loads = tmp_path / "refs", []
    refs.mkdir()
    for i, word in enumerate(("cat", "dog")):
        image(i).resize((64, 64)).save(refs / f"{word}.png")
    (refs / "zebra.png").write_text("no image")

    def load(*_: Any) -> Segmenter:
        assert "zebra" in capsys.readouterr().out
        loads.append(1)
        return Segmenter(FlatSAM())

    monkeypatch.setattr(Segmenter, "load", load)
    line = ["--batch-refs", refs, "--weights", tmp_path / "w", "--out", tmp_path / "out", *FAST]
    assert run(*line) == 2 and len(drawn(tmp_path / "out")) == 2 and len(loads) == 1
    record = read_record(only(tmp_path / "out" / "dog", "*-seed0.png"))
    assert record.subjects[0].images[0].segmented


def test_other_formats_are_not_there_yet(draw, tmp_path):
    assert draw() == 0 and draw("--format", "webp") == 0
    out = tmp_path / "out"
    assert len(drawn(out)) == 3 and len([*out.rglob("*-seed0.webp")]) == 3
    assert read_record(only(out / "cat", "*.webp")) == read_record(only(out / "cat", "*-seed0.png"))
