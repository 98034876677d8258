"""Resumed drawing: killed anywhere and started again, it leaves the images of an uninterrupted run."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.unet import UNet
from moma import Bundle, Job, Pipeline, Runtime, SampleConfig
from moma.evaluate import draw as drawing
from moma.evaluate.draw import RESUME, SETTINGS, ResumeFile, Run, batches, begun, draw, missing
from moma.evaluate.protocol import Prompt, ProtocolConfig, Subject, tasks_of
from moma.evaluate.references import Masks, find_references
from moma.methods.moma.method import MoMA
from moma.sampling.cuda_graphs import GraphedUNet
from moma.sampling.diffusion import solver_steps
from moma.sampling.sampler import denoise
from moma.training.parallel import Ranks
from tests.helpers import Rerun, image, mask, same, text_only, text_states

ONE = Ranks(0, 1, torch.device("cpu"))
STEPS, BATCH = 5, 2  # the state is kept after steps 2, 4 and 5
CALLS = 2 * STEPS  # of the UNet, for two batches
SMALL = SampleConfig(steps=STEPS, height=32, width=32, batch_size=BATCH)


class Killed(BaseException):
    """Nothing catches it."""


@dataclass
class Counted:
    """A UNet that counts its denoising steps, and the references it reads, and dies at a step."""

    unet: UNet
    left: float = float("inf")
    steps: list[int] = field(default_factory=list)
    references: int = 0

    def __call__(self, x: Tensor, t: Tensor, *more: Any) -> Any:
        if t[0] == 0:
            self.references += 1
        else:
            if self.left == 0:
                raise Killed
            self.left -= 1
            self.steps.append(int(t[0]))
        return self.unet(x, t, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)


@pytest.fixture
def unet(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """Of the pipeline that runs draw with; their bundle is not loaded again."""
    moma, counted = pipe.method, Counted(pipe.base.unet)
    base = replace(moma.base, unet=counted, image_size=64)  # small references, for speed
    method = MoMA(base, moma.adapter, moma.decoder, moma.config)
    monkeypatch.setattr(drawing, "load_pipeline", lambda *_: replace(pipe, method=method))
    return counted


@pytest.fixture
def run(folder: str, tmp_path: Path) -> Run:
    """Two batches of a cat, of two prompts each."""
    photos = tmp_path / "data" / "cat"
    photos.mkdir(parents=True)
    (tmp_path / "masks" / "cat").mkdir(parents=True)
    for i in range(2):
        image(i).save(photos / f"{i}.png")
        mask(20 + i).save(tmp_path / "masks" / "cat" / f"{i}.png")
    prompts = (Prompt("a cat in the snow", "context"), Prompt("a red cat", "texture"))
    cat = Subject("cat", "cat", tuple(sorted(photos.iterdir())), prompts)
    references = find_references(cat.photos, Masks(tmp_path / "masks"), tmp_path / "used", lambda *_: None)
    runtime = Runtime.choose(Bundle.open(folder), "cpu", "fp32")
    return Run(
        "moma", tmp_path / "out" / "moma", runtime, runtime.weights.method_config("moma"), SMALL,
        ProtocolConfig(), tasks_of([cat], 2), references,
    )  # fmt: skip


def files(run: Run) -> dict[str, bytes]:
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in run.folder.glob("*/*.png")}


def left_over(run: Run) -> list[str]:
    return sorted(path.name for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".png")


# --- the sampler -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_a_drawing_goes_on_from_any_step(pipe: Pipeline, solver: str, tmp_path: Path) -> None:
    """Bit for bit, with what was on the disk; with recorded steps to their accuracy."""
    cond, unet = text_only(pipe, text_states(pipe, "", "a cat")), pipe.base.unet
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = solver_steps(pipe.base.schedule, 6, solver)
    steps = list(denoise(unet, cond, schedule, x, 7.5, solver))
    for step in steps:
        file = ResumeFile(tmp_path / f"{step.index}.pt", ("a",), steps=step.index + 1)
        file.keep(step)
        rest = list(denoise(unet, cond, schedule, x, 7.5, solver, after=file.read()))
        assert [one.index for one in rest] == list(range(step.index + 1, 6))
        assert all(torch.equal(one.latents, steps[one.index].latents) for one in rest)
    graphed = GraphedUNet(unet, Rerun)
    *_, last = denoise(graphed, cond, schedule, x, 7.5, solver, after=steps[1])
    same(last.latents, steps[-1].latents, 1e-5)


def test_a_resume_file_is_of_one_batch(pipe: Pipeline, tmp_path: Path) -> None:
    subject = pipe.encode_subject(image(0), mask(30), "cat")
    jobs = [Job(subject, "a cat", seed) for seed in range(3)]
    with pytest.raises(ValueError, match=r"3 images.* 2"):
        pipe.run(jobs, SMALL, resume=ResumeFile(tmp_path / "batch.pt", (), STEPS))


# --- killed runs -------------------------------------------------------------------------------------


@pytest.fixture
def whole(run: Run, unet: Counted) -> dict[str, bytes]:
    """What a run that was not killed leaves."""
    other = replace(run, folder=run.folder.with_name("whole"))
    draw(other, ONE)
    assert len(unet.steps) == CALLS and left_over(other) == [SETTINGS]
    unet.steps.clear()
    return files(other)


@pytest.mark.parametrize(
    ("solver", "points"), [pytest.param("ddim", (3, 6), marks=pytest.mark.slow), ("dpm", (1, 7))]
)
def test_killed_at_any_step(run: Run, unet: Counted, solver: str, points: tuple[int, ...]) -> None:
    """The same images; what is lost is at most as many steps as one image takes."""
    run = replace(run, sample=replace(SMALL, solver=solver))
    draw(run, ONE)
    whole = files(run)
    assert len(whole) == 4 and len(set(whole.values())) == 4
    for at in points:
        other = replace(run, folder=run.folder.with_name(f"killed-{at}"))
        unet.steps.clear()
        unet.left = at
        with pytest.raises(Killed):
            draw(other, ONE)
        assert len(files(other)) == (0 if at < STEPS else BATCH)
        unet.left = float("inf")
        draw(other, ONE)
        lost = len(unet.steps) - CALLS
        assert lost == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}[at % STEPS] and lost * BATCH <= STEPS
        assert files(other) == whole and left_over(other) == [SETTINGS]


@pytest.mark.slow  # many drawings
def test_killed_again_and_again(run: Run, unet: Counted, whole: dict[str, bytes]) -> None:
    lives = 0
    while True:
        unet.left, lives = 3, lives + 1
        try:
            draw(run, ONE)
        except Killed:
            continue
        break
    assert lives == 4 and files(run) == whole  # the first life's third step is lost, and the third one's


@pytest.mark.parametrize("at", [0, 3])
def test_killed_while_writing(
    run: Run, unet: Counted, whole: dict[str, bytes], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is taken twice."""
    written: list[Path] = []

    def save(path: Path, *args: Any, **more: Any) -> None:
        if len(written) == at:
            raise Killed
        written.append(path)
        drawing_save(path, *args, **more)

    drawing_save = drawing.save_png
    monkeypatch.setattr(drawing, "save_png", save)
    with pytest.raises(Killed):
        draw(run, ONE)
    monkeypatch.setattr(
        drawing, "save_png", lambda path, *a, **m: (written.append(path), drawing_save(path, *a, **m))
    )
    draw(run, ONE)
    assert len(unet.steps) == CALLS and files(run) == whole
    assert len(written) == len(set(written)) == 4, "no image is written twice"


def test_only_what_is_missing_is_drawn(run: Run, unet: Counted, whole: dict[str, bytes]) -> None:
    draw(run, ONE)
    unet.steps.clear()
    draw(run, ONE)
    assert unet.steps == []
    first, second, *_ = sorted(run.folder.glob("*/*.png"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])  # cut off
    assert {str(task.file) for task in missing(run)} == {f"cat/{first.name}", f"cat/{second.name}"}
    draw(run, ONE)
    assert len(unet.steps) == STEPS and files(run) == whole
    more = replace(run, tasks=tasks_of([run.tasks[0].subject], 3))
    assert [task.number for task in missing(more)] == [2, 2]


def test_a_damaged_resume_file_is_drawn_anew(run: Run, unet: Counted, whole: dict[str, bytes]) -> None:
    unet.left = STEPS + 3
    with pytest.raises(Killed):
        draw(run, ONE)
    (path,) = (run.folder / RESUME).iterdir()
    state = path.read_bytes()
    assert begun(run, run.tasks[2:]) == [ResumeFile.of(run, [run.stamps[task] for task in run.tasks[2:]])]
    path.write_bytes(path.read_bytes()[:100])
    unet.left = float("inf")
    draw(run, ONE)
    assert files(run) == whole and not (run.folder / RESUME).exists()
    path.parent.mkdir()
    path.write_bytes(state)  # killed after the last image: nothing is drawn, nothing stays
    unet.left = 0
    draw(run, ONE)
    assert left_over(run) == [SETTINGS]


@pytest.mark.parametrize("state", [{"stamps": ["a"], "step": {"latents": 1}}, {"step": 1}, [1]])
def test_a_resume_file_of_another_version_is_removed(tmp_path: Path, state: Any) -> None:
    file = ResumeFile(tmp_path / "batch.pt", ("a",), STEPS)
    torch.save(state, file.path)
    assert file.read() is None and not file.path.exists()


def test_a_batch_goes_on_in_smaller_batches(run: Run, unet: Counted) -> None:
    """No step but the one after the last that was kept is taken again."""
    run = replace(run, sample=replace(SMALL, solver="dpm"), tasks=run.tasks[:2])
    other = replace(run, folder=run.folder.with_name("dpm"))
    draw(other, ONE)
    unet.steps.clear()
    unet.left = 3
    with pytest.raises(Killed):
        draw(run, ONE)
    (path,) = (run.folder / RESUME).iterdir()
    unet.left = float("inf")
    unet.steps.clear()
    draw(replace(run, sample=replace(run.sample, batch_size=1)), ONE)
    assert len(unet.steps) == 2 * (STEPS - 2) and not path.exists() and left_over(run) == [SETTINGS]
    for name, data in files(other).items():
        drawn, expected = (Image.open(io.BytesIO(data)) for data in (files(run)[name], data))
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(expected)).max() <= 1


def test_images_of_two_resume_files_are_drawn_once(run: Run, unet: Counted) -> None:
    """As a run leaves them that was killed while it split a batch: the larger one counts."""
    unet.left = 3
    with pytest.raises(Killed):
        draw(run, ONE)
    (path,) = (run.folder / RESUME).iterdir()
    stamps = tuple(run.stamps[task] for task in run.tasks[:2])
    ResumeFile.of(run, stamps[1:]).write(ResumeFile(path, stamps, STEPS).read())
    assert begun(run, run.tasks) == [ResumeFile.of(run, stamps)] and list(path.parent.iterdir()) == [path]


def test_a_step_of_a_batch_is_no_more_than_an_image(run: Run, unet: Counted) -> None:
    """Batches have no more images than these have steps, lest a kill costs more than an image's work."""
    short = replace(run, sample=replace(SMALL, steps=1))
    draw(short, ONE)
    assert len(unet.steps) == 4 and len(files(short)) == 4


def test_batches_that_decide_images_keep_their_size(run: Run, unet: Counted) -> None:
    config = replace(run.config, m_gen_norm="batch")
    short = replace(run, sample=replace(SMALL, steps=1), config=config)
    assert short.settings["sample"]["batch_size"] == BATCH
    draw(short, ONE)
    assert len(unet.steps) == 2 and len(files(short)) == 4


def test_another_runs_images_are_refused(run: Run, unet: Counted) -> None:
    draw(run, ONE)
    unet.steps.clear()

    def refused(other: Run, words: str) -> None:
        with pytest.raises(ValueError, match=words) as error:
            draw(other, ONE)
        assert "\n" not in str(error.value) and unet.steps == []

    refused(
        replace(run, sample=replace(SMALL, steps=7)),
        "sample.steps 5 .* 7",
    )
    refused(
        replace(run, config=replace(run.config, m_gen_threshold=0.3)), "method.m_gen_threshold 0.2 .* 0.3"
    )
    refused(replace(run, protocol=ProtocolConfig(texture_strength=0.5)), "texture_strength 0.4 .* 0.5")
    copy = Path(shutil.copytree(run.runtime.weights.folder, run.folder / "copy"))
    with open(copy / "unet.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    other = replace(run.runtime, weights=replace(run.runtime.weights, folder=copy))
    refused(replace(run, runtime=other), "weights.unet.safetensors")
    shown = next(iter(run.references.values()))
    changed = {photo: replace(shown, digest="0") for photo in run.references}
    refused(replace(run, references=changed), str(run.tasks[0].file))
    draw(replace(run, sample=replace(SMALL, batch_size=1)), ONE)  # another machine's way to draw the same
    for damaged in ('{"name": ', "[]"):
        (run.folder / SETTINGS).write_text(damaged)
        refused(run, f"{SETTINGS}: damaged")
    (run.folder / SETTINGS).unlink()
    refused(run, f"no {SETTINGS}")


# --- ranks -------------------------------------------------------------------------------------------


def test_batches_are_the_same_however_much_is_done(run: Run) -> None:
    """Of one subject and of the size asked for; those under way come first and stay as they are."""
    cat = run.tasks[0].subject
    run = replace(run, tasks=tasks_of([cat, replace(cat, name="cat2")], 3))  # 6 images of each
    every = batches(run, run.tasks, [], 4)
    assert [len(batch) for batch in every] == [4, 2, 4, 2]
    assert all(len({task.subject for task in batch}) == 1 for batch in every)
    done = every[0] + every[2]
    assert batches(run, [task for task in run.tasks if task not in done], [], 4) == [every[1], every[3]]
    stamps = run.stamps
    half = ResumeFile.of(run, [stamps[task] for task in every[2]])
    absent = [task for task in run.tasks if task not in every[2][:3]]  # killed while it wrote
    assert batches(run, absent, [half], 4) == [every[2], every[0], every[1], every[3]]


@dataclass(frozen=True)
class Rank(Ranks):
    """One of two, after the other one: what rank 0 shares is kept."""

    said: list[Any] = field(default_factory=list)

    def share(self, value: Any) -> Any:
        if self.main:
            self.said.append(value)
            return value
        return self.said.pop(0)

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_two_ranks_draw_one_half_each(run: Run, unet: Counted, whole: dict[str, bytes]) -> None:
    first = Rank(0, 2, torch.device("cpu"))
    draw(run, first)
    assert len(files(run)) == 2 and len(unet.steps) == STEPS
    draw(run, Rank(1, 2, torch.device("cpu"), first.said))
    assert files(run) == whole and len(unet.steps) == CALLS


@pytest.mark.parametrize("error", [ValueError("no"), OSError("no"), torch.OutOfMemoryError("no")])
def test_all_ranks_stop_at_what_stops_one(error: Exception) -> None:
    """None is left waiting for the first."""
    first = Rank(0, 2, torch.device("cpu"))

    def fail() -> None:
        raise error

    for rank in (first, Rank(1, 2, torch.device("cpu"), first.said)):
        with pytest.raises(type(error), match="no"):
            rank.once(fail)


def test_each_reference_in_turn(run: Run, unet: Counted) -> None:
    """Image n of the subject conditions the n-th image of a prompt; each is read once."""
    first = replace(run, folder=run.folder.with_name("first"))
    draw(first, ONE)
    assert unet.references == 1
    run = replace(run, protocol=ProtocolConfig(reference="each"))
    draw(run, ONE)
    assert unet.references == 1 + 2
    images = [files(one) for one in (first, run)]
    pixels = [{name: Image.open(io.BytesIO(data)).tobytes() for name, data in one.items()} for one in images]
    changed = {name for name in pixels[0] if pixels[0][name] != pixels[1][name]}
    assert changed == {name for name in pixels[0] if name.endswith("-1.png")}
    settings = json.loads((run.folder / SETTINGS).read_text())
    assert settings["protocol"]["reference"] == "each" and settings["name"] == "moma"


def test_the_grid_is_a_setting_where_it_matters(run: Run) -> None:
    """A folder from before there was a choice goes on where its images are the same."""
    for steps, solver, named in ((50, "ddim", False), (30, "ddim", True), (50, "dpm", True)):
        settings = replace(run, sample=replace(run.sample, steps=steps, solver=solver)).settings
        assert ("grid" in settings["sample"]) == named
