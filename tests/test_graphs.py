"""CUDA graphs on the CPU: what stands for a graph computes the recorded call again, on the same memory."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import attention
from moma import DEFAULT, Job, Pipeline
from moma.methods.moma.conditioning import MoMAConditioning, MoMAHook
from moma.sampling.config import TIMESTEPS
from moma.sampling.cuda_graphs import (
    CudaGraph,
    CudaRecorder,
    GraphedUNet,
    Output,
    RecordableHook,
    Run,
    choose_recorder,
)
from moma.sampling.diffusion import SolverStep, solver_steps
from moma.sampling.interface import State, StepInputs
from moma.sampling.sampler import Step, denoise
from moma.sampling.tiles import decode
from tests.helpers import GRAPHED, Rerun, condition, image, latents, mask, same, text_only, text_states

CONFIG = replace(GRAPHED, steps=8)


class Refusing(Rerun):
    def record(self, run: Run) -> tuple[Output, Callable[[], None]]:
        self.recorded += 1
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


class Wrong(Rerun):
    """Its replays are off by a tenth of the largest value."""

    def record(self, run: Run) -> tuple[Output, Callable[[], None]]:
        outputs, replay = super().record(run)

        def spoiled() -> None:
            replay()
            outputs[0].mul_(1.1)

        return outputs, spoiled


@pytest.fixture(scope="module")
def jobs(pipe: Pipeline) -> list[Job]:
    """Two subjects of different size."""
    cat = pipe.encode_subject(image(0), mask(30), "cat")
    dog = pipe.encode_subject(image(1), mask(12), "dog")
    return [Job(cat, "a cat in the snow", 0), Job(dog, "a dog", 1, strength=0.4)]


def with_recorder(pipe: Pipeline, make: Callable[[], Rerun]) -> Pipeline:
    """The pipeline on another device's way to record."""
    return replace(pipe, make_recorder=make)


@dataclass
class Shrinking:
    """A conditioning whose subject takes three quarters of the image's rows at first, then half of them."""

    cond: MoMAConditioning

    def at(self, step: SolverStep, state: State) -> StepInputs:
        if state:
            m_gen = state["m_gen"].clone()
            m_gen[:, :, 12 if step.t > 500 else 8 :] = 0
            state = {"m_gen": m_gen}
        return self.cond.at(step, state)

    def next_state(self, maps: list[Tensor], grid: tuple[int, int]) -> State:
        return self.cond.next_state(maps, grid)

    def conditional(self) -> "Shrinking":
        return Shrinking(self.cond.conditional())


@torch.no_grad()
def steps(
    pipe: Pipeline, unet: object, jobs: list[Job], solver: str, interval: tuple[int, int] = (0, TIMESTEPS)
) -> list[Step]:
    """All steps of one batch, kept until the last one is done."""
    conditioning = Shrinking(condition(pipe, jobs, CONFIG))
    start = torch.randn(len(jobs), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    path = solver_steps(pipe.base.schedule, CONFIG.steps, solver)
    return list(denoise(unet, conditioning, path, start, 7.5, solver, interval))


@pytest.mark.parametrize(
    ("solver", "impl"), [("ddim", "fused"), pytest.param("dpm", "explicit", marks=pytest.mark.slow)]
)
def test_every_step_is_the_eager_one(pipe: Pipeline, jobs: list[Job], solver: str, impl: str) -> None:
    """Two subjects, several kinds of steps; no result is overwritten by a later replay."""
    pipe, recorder = pipe.with_config(replace(DEFAULT, attention=impl)), Rerun()
    eager = steps(pipe, pipe.base.unet, jobs, solver)
    unet = GraphedUNet(pipe.base.unet, lambda: recorder)
    graphed = steps(pipe, unet, jobs, solver)
    for a, b in zip(graphed, eager, strict=True):
        for x, y in (
            (a.latents, b.latents),
            (a.noise_pred, b.noise_pred),
            (a.state["m_gen"], b.state["m_gen"]),
        ):
            same(x, y, 1e-5)
    assert all(isinstance(one.hook, MoMAHook) for one in unet.graphs.values())  # their memory is held
    # 7 steps have a mask; of each kind one runs eagerly. "fused" has as many kinds as numbers of queries.
    assert recorder.replayed == ([0] * 2 + [1] * 3 if impl == "fused" else [0] * 6)


def test_guidance_at_some_steps(pipe: Pipeline, jobs: list[Job]) -> None:
    """Steps with both rows of guidance and with one are recorded apart."""
    recorder, interval = Rerun(), (500, TIMESTEPS)
    eager = steps(pipe, pipe.base.unet, jobs, "ddim", interval)
    graphed = steps(pipe, GraphedUNet(pipe.base.unet, lambda: recorder), jobs, "ddim", interval)
    for a, b in zip(graphed, eager, strict=True):
        same(a.latents, b.latents, 1e-5)
    assert len(recorder.replayed) > 1 and recorder.recorded >= 2


def test_a_drawing(pipe: Pipeline, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch of two and two of one: each batch has recordings of its own, gone before its decoding."""
    made: list[Rerun] = []

    def make() -> Rerun:
        made.append(Rerun())
        return made[-1]

    def recordings() -> int:
        return sum(type(one) is CudaGraph for one in gc.get_objects())

    gc.collect()
    before = recordings()

    def watched(*args: Any) -> Tensor:
        assert recordings() <= before
        return decode(*args)

    monkeypatch.setattr("moma.sampling.pipeline.decode", watched)
    eager, graphed = latents(pipe, jobs, GRAPHED), with_recorder(pipe, make)
    same(latents(graphed, jobs, GRAPHED), eager, 1e-5)
    same(latents(graphed, jobs, replace(GRAPHED, batch_size=1)), eager)
    # The last of each drawing is for a batch that does not come.
    assert [recorder.replayed for recorder in made] == [[0, 0], [], [0, 0], [0, 0], []]


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Refusing, "operation not permitted"), (Wrong, "eager")],
)
def test_fallback(pipe: Pipeline, jobs: list[Job], kind: type[Rerun], message: str) -> None:
    """One warning, then everything is eager, in the next batch too; the images are the same."""
    made: list[Rerun] = []

    def make() -> Rerun:
        made.append(kind())
        return made[-1]

    config = replace(GRAPHED, batch_size=1)
    with pytest.warns(UserWarning, match=message) as warned:
        found = latents(with_recorder(pipe, make), jobs, config)
    same(found, latents(pipe, jobs, config), 1e-5)
    assert len(warned) == 1 and len(made) == 1 and made[0].recorded == 1 and len(made[0].replayed) <= 1


@torch.no_grad()
def test_kinds_of_calls(pipe: Pipeline, jobs: list[Job]) -> None:
    """Another Q, no subject term or no M_gen is another key; other values of a mask are the same key."""
    conditioning = condition(pipe, jobs, CONFIG)

    def key(t: int, filled: int | None) -> tuple:
        """filled: rows of 16 cells of both images that are inside M_gen."""
        m_gen = None if filled is None else torch.zeros(2, 1, 16, 16)
        if filled:
            m_gen[:, :, :filled] = torch.rand(2, 1, filled, 16) / 2 + 0.5
        hook = conditioning.hook(t, m_gen)
        assert isinstance(hook, RecordableHook)
        hook.prepare([(16, 16), (8, 8), (16, 16)])
        return hook.key(), tuple(tensor.shape for tensor in hook.inputs())

    assert key(500, 3) == key(400, 3) == key(500, 4)  # 48 and 64 cells: one bucket
    others = [
        key(500, 3),
        key(500, 5),
        key(500, 0),
        key(500, 16),
        key(960, 3),
        key(500, None),
        key(960, None),
    ]
    assert len(set(others)) == len(others)
    again = condition(pipe, jobs, CONFIG)
    assert (
        again.hook(960, None).key() != conditioning.hook(960, None).key()
    )  # other conditioning: other memory


class PlainHook:
    """A hook without what recording needs."""

    def self_attn(self, layer, q, k, v, grid):
        return attention(q, k, v), None

    cross_attn = self_attn


@torch.no_grad()
def test_without_a_hook_and_with_a_foreign_one(pipe: Pipeline) -> None:
    """Plain Stable Diffusion is recorded; a hook without the contract always runs eagerly."""
    recorder = Rerun()
    unet = GraphedUNet(pipe.base.unet, lambda: recorder)
    conditioning = text_only(pipe, text_states(pipe, "", "a cat"))
    text = conditioning.text
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    path = solver_steps(pipe.base.schedule, 4, "ddim")
    *_, eager = denoise(pipe.base.unet, conditioning, path, x, 7.5, "ddim")
    *_, graphed = denoise(unet, conditioning, path, x, 7.5, "ddim")
    same(graphed.latents, eager.latents, 1e-5)
    assert recorder.replayed == [0, 0, 0]  # to compare, and for the two steps after that
    rows = torch.cat([x, x])
    early, late = (torch.full((2,), t) for t in (900, 10))
    kept = [unet(rows, t, text)[0] for t in (early, late)]  # the second one spares the first
    for found, t in zip(kept, (early, late), strict=True):
        same(found, pipe.base.unet(rows, t, text)[0], 1e-5)
    for t in (early, late, early):
        assert torch.equal(unet(rows, t, text, PlainHook())[0], pipe.base.unet(rows, t, text, PlainHook())[0])
    assert recorder.recorded == 1


def test_choice() -> None:
    """Nothing of CUDA is touched by choosing."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 3)
    assert choose_recorder("auto", cpu) is choose_recorder("off", cpu) is choose_recorder("off", gpu) is None
    assert choose_recorder("auto", gpu).func is choose_recorder("on", gpu).func is CudaRecorder
