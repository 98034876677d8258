"""The page to draw with: what it does without a browser, and by clicks in a headless Chromium.

Pages need Gradio (`pip install -e .[demo]`) and a Chromium (`tests/browser.py`).
"""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from moma import METHODS, Runtime, SampleConfig
from moma.app.record import Segmented, read_record, save_png
from moma.demo.__main__ import check_address
from moma.demo.studio import Event, Form, Studio, Subject, lines_of
from moma.weights.bundle import MANIFEST, Bundle
from tests.browser import chromium
from tests.helpers import MINI, ROOT, image, mask

PROMPT, WAIT = "a cat in the snow", 240_000  # milliseconds that a slow machine may take
QUICK = SampleConfig(steps=2)


@pytest.fixture
def studio(folder: str, tmp_path: Path) -> Studio:
    return Studio(Runtime.choose(Bundle.open(folder), "cpu", "fp32"), tmp_path)


def form(tmp_path: Path, **change: Any) -> Form:
    file = tmp_path / "photo.png"
    image(0).save(file)
    cat = Subject(file, Segmented.of(mask(30), "painted"), "cat")
    return Form((cat,), (PROMPT,), "", 3, 1, "moma", QUICK)._replace(**change)


def drawn(studio: Studio, form: Form, strip: bool = False) -> list[Event]:
    return list(studio.draw(studio.requests(form, strip), threading.Event()))


def replay(saved: Path, asked: Form, weights: str | Path) -> None:
    """With sample.py."""
    options = ["--ref", asked.subjects[0].file, "--weights", weights, "--out", saved.parent / "again"]
    assert sample.run(["--replay", str(saved), "--device", "cpu", *map(str, options)]) == 0


# --- without a browser -------------------------------------------------------------------------------


def test_what_is_drawn_is_what_sample_py_replays(studio: Studio, folder: str, tmp_path: Path, capsys) -> None:
    asked = form(tmp_path, count=2)
    saved = [event.saved for event in drawn(studio, asked) if event.saved]
    assert [read_record(path).seed for path in saved] == [3, 4]
    replay(saved[1], asked, folder)
    assert "identical" in capsys.readouterr().out


def test_the_releases_reference_noise_is_sample_pys(folder: str, tmp_path: Path, capsys) -> None:
    """Of the global generator, in whatever state that was."""
    weights = Path(shutil.copytree(folder, tmp_path / "weights"))
    settings = json.loads((weights / MANIFEST).read_text())
    settings["method"] = {"reference_noise": "global"}
    (weights / MANIFEST).write_text(json.dumps(settings))
    studio, asked = Studio(Runtime.choose(Bundle.open(weights), "cpu", "fp32"), tmp_path), form(tmp_path)
    torch.manual_seed(1)
    (saved,) = [event.saved for event in drawn(studio, asked) if event.saved]
    replay(saved, asked, weights)
    assert "identical" in capsys.readouterr().out


def test_the_form_is_filled_by_what_was_drawn(studio: Studio, tmp_path: Path) -> None:
    asked = form(tmp_path, negative="rain", sample=replace(QUICK, strength=0.4, guidance=3.0))
    studio.remember(asked.subjects[0].file)
    (saved,) = [event.saved for event in drawn(studio, asked) if event.saved]
    found, notes = studio.replay(saved)
    assert found._replace(sample=asked.sample) == asked and not notes
    assert (found.sample.strength, found.sample.guidance, found.sample.steps) == (0.4, 3.0, 2)
    (saved,) = [e.saved for e in drawn(studio, asked._replace(sample=replace(QUICK, width=96))) if e.saved]
    assert len(studio.replay(saved)[1]) == 1  # the page has no width
    studio.known.clear()
    found, notes = studio.replay(saved)
    assert found.subjects[0].mask is None and "photo.png" in notes[0]


def test_a_strip_of_strengths_starts_from_one_noise(studio: Studio, tmp_path: Path) -> None:
    requests = studio.requests(form(tmp_path), strip=True)
    assert [one.sample.strength for one in requests] == list(studio.cfg.strengths)
    assert {one.images for one in requests} == {((PROMPT, 3),)}


def test_steps_are_shown_and_a_stopped_drawing_ends(studio: Studio, tmp_path: Path) -> None:
    studio.cfg = replace(studio.cfg, preview=0.0)
    events = drawn(studio, form(tmp_path, method="moma"))
    shares = [event.done for event in events]
    assert shares == sorted(shares) and shares[-1] == 1
    assert events[-1].m_gen is not None and any(event.preview and not event.saved for event in events)
    stop = threading.Event()
    after = studio.draw(studio.requests(form(tmp_path, count=8)), stop)
    for event in after:
        if event.done:
            stop.set()
    assert event.text == "stopped" and sum(1 for _ in studio.out.glob("seed*")) < 6


def test_a_closed_page_stops_its_drawing(studio: Studio, tmp_path: Path) -> None:
    stop = threading.Event()
    events = studio.draw(studio.requests(form(tmp_path, count=8)), stop)
    next(events)
    events.close()  # as Gradio does
    assert stop.is_set() and threading.active_count() < 8
    assert sum(1 for _ in studio.out.glob("seed*")) < 8


@pytest.mark.parametrize("change", [
    {"prompts": ("a dog",)}, {"prompts": ()}, {"count": 9}, {"count": 0}, {"seed": -1},
    {"seed": 2**32}, {"seed": 2**32 - 1, "count": 2}, {"method": "ip-adapter"},
    {"sample": replace(QUICK, guidance=-1.0)}, {"sample": replace(QUICK, height=60)},
    {"subjects": (), "method": "text", "prompts": ("a {subject} at sea",)},
    {"method": "reference-attention", "sample": replace(QUICK, strength=0.4)},
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_before_weights_load(
    studio: Studio, tmp_path: Path, no_weights: None, change: dict
) -> None:
    with pytest.raises(ValueError):
        studio.requests(form(tmp_path, **change))


def test_a_strip_needs_a_method_with_strengths(studio: Studio, tmp_path: Path, no_weights: None) -> None:
    with pytest.raises(ValueError, match="reference-attention"):
        studio.requests(form(tmp_path, method="reference-attention"), strip=True)


def test_prompts_take_the_subjects_words(studio: Studio, tmp_path: Path) -> None:
    (cat,) = form(tmp_path).subjects
    asked = form(tmp_path, prompts=("a {subject} at sea",), seed=2**32 - 1)
    (request,) = studio.requests(asked)
    assert request.images == (("a cat at sea", 2**32 - 1),)
    (request,) = studio.requests(asked._replace(subjects=(cat._replace(word="axe"), cat)))
    assert request.images[0][0] == "an axe and a cat at sea"


def test_a_fault_of_the_program_ends_the_drawing_in_words(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = studio.requests(form(tmp_path))
    monkeypatch.setattr("moma.demo.studio.load_pipeline", lambda *_: {}["lost"])
    event = list(studio.draw(requests, threading.Event()))[-1]
    assert event.error and "lost" in event.text


def test_a_panorama_is_shown_and_painted(studio: Studio, tmp_path: Path) -> None:
    """WebP, in which Gradio sends what is shown, has no more than 16383 pixels in a row."""
    file, wide = tmp_path / "wide.png", np.full((200, 17_000, 3), 255, np.uint8)
    wide[50:150, 500:900] = 40
    Image.fromarray(wide).save(file)
    layer = np.zeros((*studio.small(file).size[::-1], 4), np.uint8)
    layer[:, 100:200] = 255
    found = studio.painted(file, [Image.fromarray(layer)])
    assert found.image().size == (17_000, 200)
    studio.shown(file, found).save(tmp_path / "shown.webp")


def test_a_subject_needs_mask_and_word(studio: Studio, tmp_path: Path) -> None:
    (cat,) = form(tmp_path).subjects
    for subject in (cat._replace(mask=None), cat._replace(word="")):
        with pytest.raises(ValueError, match=r"photo\.png"):
            studio.requests(form(tmp_path, subjects=(subject,)))


def test_advice_names_no_options(studio: Studio, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with pytest.raises(ValueError) as error:
        studio.find(tmp_path / "noise.png")
    assert "--" not in str(error.value)


def test_painted_strokes_are_the_mask(studio: Studio, tmp_path: Path) -> None:
    (cat,) = form(tmp_path).subjects
    layer = np.zeros((90, 120, 4), np.uint8)
    layer[10:20, 30:60] = (230, 159, 0, 255)
    found = studio.painted(cat.file, [Image.fromarray(layer)])
    assert found.image().getbbox() == (30, 10, 60, 20)
    assert studio.painted(cat.file, [Image.new("RGBA", (120, 90))]) is None
    dim = np.array(studio.shown(cat.file, found), dtype=int)
    assert (dim[10:20, 30:60] == np.array(image(0))[10:20, 30:60]).all() and dim[40:].max() < 80


def test_of_a_deleted_upload_the_copy_is_taken(studio: Studio, tmp_path: Path) -> None:
    first, copy = tmp_path / "first.png", tmp_path / "copy.png"
    for file in (first, copy):
        image(0).save(file)
    assert studio.remember(first) == first == studio.remember(copy)
    first.unlink()
    assert studio.remember(copy) == copy


def test_the_mask_is_of_the_image_that_is_drawn(studio: Studio, tmp_path: Path) -> None:
    """Whoever draws before the mask of the next image is found does not draw with that of the last."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demo]")
    from moma.demo.page import form_of

    (cat,) = form(tmp_path).subjects
    image(1).save(tmp_path / "next.png")
    rest = [None, "", None, PROMPT, 0, 1, 1.0, "", "moma", 2, 7.5, "ddim"]
    for file, found in ((cat.file, cat.mask), (tmp_path / "next.png", None)):
        asked = form_of(studio, [str(file), "cat", (cat.file, cat.mask), *rest])
        assert asked.subjects == ((file, found, "cat"),)


def test_an_address_that_is_taken_or_none_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("127.0.0.1", 99_999), ("256.0.0.1", port)):
            with pytest.raises(ValueError, match=f"{host} --port {number}"):
                check_address(host, number)
    check_address("127.0.0.1", port)


def test_images_survive_a_deleted_folder(studio: Studio, tmp_path: Path) -> None:
    studio.out = tmp_path / "out"
    assert not studio.out.exists() and drawn(studio, form(tmp_path))[-1].saved.is_file()


def test_prompts_are_lines() -> None:
    assert lines_of(" a cat \n\na  dog\na cat") == ("a cat", "a  dog")


# --- in a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server with MoMA-mini, and its folder of images."""
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demo]")
    out, port = tmp_path_factory.mktemp("demo"), 7871
    command = [
        sys.executable,
        "-m",
        "moma.demo",
        "--weights",
        str(MINI),
        "--port",
        str(port),
        "--out",
        str(out),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            assert str(port) in line
            yield f"http://127.0.0.1:{port}", out
        finally:
            server.terminate()


def opened(browser: Any, address: str, width: int = 1440) -> Any:
    page = browser.new_context(viewport={"width": width, "height": 1000}, accept_downloads=True).new_page()
    page.set_default_timeout(WAIT)
    foreign: list[str] = []
    page.on(
        "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else foreign.append(r.url)
    )
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    page.foreign = foreign
    return page


def prepare(page: Any, prompts: str = "a cat on the beach", steps: int = 3) -> None:
    page.set_input_files("#image-1 input[type=file]", str(ROOT / "examples" / "cat.png"))
    page.wait_for_selector("#mask-1 img")
    page.fill("#prompt textarea", prompts)
    page.get_by_text("More settings").click()
    field = "#steps input[type=number]"

    def kept() -> bool:
        """What is typed while the settings still unfold is lost."""
        page.fill(field, str(steps))
        page.keyboard.press("Tab")
        page.wait_for_timeout(300)
        return page.input_value(field) == str(steps)

    until(page, kept)


def until(page: Any, done: Any) -> None:
    end = time.monotonic() + WAIT / 1000
    while not done():
        assert time.monotonic() < end
        page.wait_for_timeout(200)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_upload_click_draw_and_replay(address: tuple[str, Path], width: int) -> None:
    url, out = address
    before = set(out.glob("*.png"))
    with chromium() as browser:
        page = opened(browser, url, width)
        prepare(page)
        assert page.input_value("#word-1 textarea, #word-1 input") == "cat"
        shown = page.get_attribute("#mask-1 img", "src")
        page.locator("#image-1 img").click(position={"x": 60, "y": 60})
        until(page, lambda: page.get_attribute("#mask-1 img", "src") != shown)
        page.get_by_role("button", name="Draw", exact=True).click()
        until(page, lambda: "done" in page.inner_text("#status"))
        (saved,) = set(out.glob("*.png")) - before
        assert read_record(saved).sample.steps == 3
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        again = opened(browser, url, width)
        again.set_input_files("#replay input[type=file]", str(saved))
        until(again, lambda: "filled" in again.inner_text("#status"))
        assert again.input_value("#prompt textarea") == "a cat on the beach"
        again.get_by_role("button", name="Draw", exact=True).click()
        until(again, lambda: "done" in again.inner_text("#status"))
        assert not page.foreign and not again.foreign
    (copy,) = set(out.glob("*.png")) - before - {saved}
    assert np.array_equal(np.array(Image.open(saved)), np.array(Image.open(copy)))


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_painting_is_the_mask_again_and_again(address: tuple[str, Path], width: int) -> None:
    with chromium() as browser:
        page = opened(browser, address[0], width)
        prepare(page)
        page.get_by_text("Paint the mask").first.click()
        canvas = page.locator("canvas").first
        canvas.scroll_into_view_if_needed()
        for share in (0.4, 0.6):
            shown, box = page.get_attribute("#mask-1 img", "src"), canvas.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * share
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 40, y, steps=3)
            page.mouse.up()
            until(page, lambda shown=shown: page.get_attribute("#mask-1 img", "src") != shown)
        mask = Image.open(BytesIO(page.request.get(page.get_attribute("#mask-1 img", "src")).body()))
        bright = np.array(mask.convert("L")) > 90
        assert 0.005 < bright.mean() < 0.1 and bright[bright.shape[0] // 2 :].any()


@pytest.mark.slow
def test_a_strip_of_two_subjects_with_previews(address: tuple[str, Path]) -> None:
    url, out = address
    before = set(out.glob("*.png"))
    with chromium() as browser:
        page = opened(browser, url)
        page.get_by_role("tab", name="Subject 2").click()
        page.set_input_files("#image-2 input[type=file]", str(ROOT / "examples" / "teapot.png"))
        page.wait_for_selector("#mask-2 img")
        page.get_by_role("tab", name="Subject 1").click()
        prepare(page, "a {subject} on the beach")
        page.get_by_role("button", name="β strip").click()
        page.wait_for_selector("#previews img >> nth=1")
        until(page, lambda: "done" in page.inner_text("#status"))
        page.wait_for_selector("#results .grid-wrap img >> nth=6")
        page.locator("#results .grid-wrap img").nth(3).click()
        with page.expect_download() as download:
            page.locator("#results [aria-label=Download]").first.click()
        kept = read_record(download.value.path())
    records = [read_record(path) for path in set(out.glob("*.png")) - before]
    assert sorted(one.sample.strength for one in records) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    assert {(one.prompt, one.seed) for one in records} == {("a cat and a teapot on the beach", 0)}
    assert kept.sample.strength == 0.6 and [one.word for one in kept.subjects] == ["cat", "teapot"]


@pytest.mark.slow
def test_hostile_files_are_refused_in_words(address: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = address
    (tmp_path / "evil.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"<script>alert(1)</script>" * 9)
    save_png(tmp_path / "plain.png", image(1))
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")  # a few kilobytes
    (tmp_path / "large.png").write_bytes(bytes(33 * 2**20))
    with chromium() as browser:
        page = opened(browser, url)
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        page.set_input_files("#image-1 input[type=file]", str(tmp_path / "evil.png"))
        page.wait_for_selector("text=is not an image")
        page.set_input_files("#replay input[type=file]", str(tmp_path / "plain.png"))
        page.wait_for_selector("text=no settings in it")
        for name, words in (("bomb.png", "12000x12000"), ("large.png", "maximum allowed size")):
            page.set_input_files("#image-1 input[type=file]", str(tmp_path / name))
            page.wait_for_selector(f"text={words}")
        assert page.locator("#mask-1 img").count() == 0


@pytest.mark.slow
def test_two_tabs_draw_in_turn_and_each_can_be_stopped(address: tuple[str, Path]) -> None:
    """The others wait for the first; cancelling ends one, closing ends the others, waiting or not."""
    url, out = address
    before = set(out.glob("*.png"))
    with chromium() as browser:
        first, second, closed = (opened(browser, url) for _ in range(3))
        for page in (first, second, closed):
            prepare(page, steps=200)
            page.get_by_role("button", name="Draw", exact=True).click()
        until(first, lambda: "step" in first.inner_text("#status"))
        assert "step" not in second.inner_text("#status") and "waiting" in closed.inner_text("#status")
        second.get_by_role("button", name="Cancel").click()
        until(second, lambda: "stopped" in second.inner_text("#status"))
        for page in (closed, first):
            page.context.close()
        third = opened(browser, url)
        prepare(third)
        third.get_by_role("button", name="Draw", exact=True).click()
        until(third, lambda: "done" in third.inner_text("#status"))
    (only,) = set(out.glob("*.png")) - before
    assert read_record(only).sample.steps == 3


def test_every_method_is_a_choice() -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e .[demo]")
    from moma.demo.page import build

    studio = Studio(Runtime.choose(Bundle.open(MINI), "cpu", "fp32"), Path("out"))
    text = json.dumps(build(studio).get_config_file(), default=str)
    assert all(f'"{name}"' in text for name in METHODS)
