"""What the contract allows: any number of subjects in a batch, changing inputs, a base like SDXL's."""

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

from models.attention import attention
from models.clip import CLIPText, CLIPTextConfig
from models.tokenizers import ClipTokenizer
from models.unet import Grid, KeysValues, UNet, UNetConfig
from models.vae import VAE, VAEConfig
from moma.inputs.preprocess import Reference
from moma.methods.text import Prepared, Subject, TextConditioning, TextToImage, half
from moma.sampling.base import SIZES, Base
from moma.sampling.config import SampleConfig
from moma.sampling.cuda_graphs import ConstantHook
from moma.sampling.diffusion import SolverStep, solver_steps
from moma.sampling.interface import Job, State, StepInputs
from moma.sampling.pipeline import Pipeline
from moma.weights.tiny import build_tokenizers, fill
from tests.helpers import Rerun, image, latents, mask, same

WIDTHS, POOLED, SIDE = (16, 32), 24, 64
WORDS = ("cat", "dog", "vase")
CONFIG = SampleConfig(steps=6, height=SIDE, width=SIDE, batch_size=3)


@dataclass(frozen=True, eq=False)
class KeySubject(Subject):
    """A subject with K and V of its word in every cross-attention."""

    layers: list[KeysValues]  # each (1, H, T, D)


@dataclass(frozen=True, eq=False)
class ChangingConditioning(TextConditioning):
    """Text, added conditioning and hook differ between even and odd steps, which the state tells apart."""

    other: tuple[list[KeysValues], Tensor]  # text and added conditioning of the odd steps
    subjects: list[list[list[KeysValues]]]  # of R rows, each one's

    def at(self, step: SolverStep, state: State) -> StepInputs:
        even = not state or bool((state["odd"] == 0).all())
        text, added = (self.text, self.added) if even else self.other
        return StepInputs(text, added, ChangingHook(self, even))

    def next_state(self, maps: list[Any], grid: Grid) -> State:
        rows = torch.stack(maps).mean(dim=0)  # (R,)
        return {"odd": rows.view(self.rows_per_image, -1).mean(dim=0)[:, None]}  # (B, 1)

    def conditional(self) -> Self:
        text, added = self.other
        other = [(half(k), half(v)) for k, v in text], half(added)
        return replace(super().conditional(), other=other, subjects=half(self.subjects))


@dataclass(frozen=True, eq=False)
class ChangingHook(ConstantHook):
    """Cross-attention that also reads the row's subjects, in even steps only."""

    cond: ChangingConditioning
    even: bool

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        z = attention(q, k, v)  # (R, H, N, D)
        if self.even:
            z = torch.cat([self._row(layer, q[i : i + 1], z[i : i + 1], i) for i in range(len(q))])
        return z, z.new_full((len(z),), float(self.even))

    def _row(self, layer: int, q: Tensor, z: Tensor, i: int) -> Tensor:
        return z + sum(attention(q, *one[layer]) for one in self.cond.subjects[i])

    def key(self) -> Hashable:
        return id(self.cond), self.even


class Changing(TextToImage):
    """Draws 0 to 8 subjects."""

    Presets: ClassVar[Mapping[str, Any]] = TextToImage.Presets

    @torch.no_grad()
    def encode_reference(self, reference: Reference, word: str, **options: Any) -> KeySubject:
        return KeySubject(word, reference, self.base.unet.text_kv(self.base.encode_text([word]).states))

    def condition(self, prepared: Sequence[Prepared], config: SampleConfig) -> ChangingConditioning:
        text, added = self.encode_texts(prepared, config)
        other = [(k.flip(2), v * 0.5) for k, v in text], added * 0.5
        rows = [[subject.layers for subject in one.job.subjects] for one in prepared]
        return ChangingConditioning(text, added, other, rows + rows)


def filled(network: nn.Module) -> Any:
    fill(network, torch.Generator().manual_seed(0))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Two text encoders, pooled text and sizes, as SDXL has them."""
    folder: Path = tmp_path_factory.mktemp("tokenizers")
    build_tokenizers(folder)
    tokenizer = ClipTokenizer(folder / "vocab.json", folder / "merges.txt")
    vocab = len(json.loads((folder / "vocab.json").read_text()))
    encoders = tuple(
        filled(CLIPText(CLIPTextConfig(width=w, layers=2, heads=4, mlp=32, vocab=vocab, projection=p)))
        for w, p in zip(WIDTHS, (None, POOLED), strict=True)
    )
    unet = UNetConfig(
        channels=(32, 64, 64), depth=(1, 1, 0), heads=(4, 4, 4), context_dim=(sum(WIDTHS),) * 3,
        norm_groups=8, added_cond_dim=POOLED + SIZES * 8,
    )  # fmt: skip
    vae = VAEConfig(channels=(16, 16, 32, 32), resnets=1, norm_groups=8)
    base = Base(filled(UNet(unet)), filled(VAE(vae)), encoders, (tokenizer, tokenizer), SIDE)
    yield Pipeline(Changing(base, Changing.Presets["default"]))


@pytest.fixture(scope="module")
def jobs(pipe: Pipeline) -> list[Job]:
    """Images with none, one and three subjects."""
    one, two, three = (pipe.encode_subject(image(i), mask(20 + i), word) for i, word in enumerate(WORDS))
    return [
        Job((), "a house in the snow", 0),
        Job(two, "a dog", 1, negative="snow"),
        Job((one, two, three), "a cat, a dog and a vase", 2),
    ]


@pytest.mark.parametrize("interval", [(0, 1000), (300, 800)])
def test_a_batch_is_its_singles(pipe: Pipeline, jobs: list[Job], interval: tuple[int, int]) -> None:
    config = replace(CONFIG, guidance_interval=interval)
    batch = latents(pipe, jobs, config)
    for i, job in enumerate(jobs):
        same(latents(pipe, [job], config), batch[i : i + 1], 1e-3 * float(batch.abs().max()))
    for i, job in enumerate(jobs[1:], 1):
        alone = latents(pipe, [replace(job, subjects=())], config)
        assert not torch.allclose(alone, batch[i : i + 1], atol=1e-2), "subjects have an effect"


@pytest.mark.parametrize("interval", [(0, 1000), (300, 800)])
def test_graphs_change_nothing(pipe: Pipeline, jobs: list[Job], interval: tuple[int, int]) -> None:
    """Steps of each kind are recorded by themselves: even and odd, guided or not."""
    config, recorder = replace(CONFIG, steps=12, guidance_interval=interval), Rerun()
    graphed = latents(replace(pipe, make_recorder=lambda: recorder), jobs, config)
    same(graphed, latents(pipe, jobs, config), 1e-4)
    assert recorder.recorded == (2 if interval == (0, 1000) else 4)
    assert set(recorder.replayed) == set(range(recorder.recorded))


def test_steps_differ(pipe: Pipeline, jobs: list[Job]) -> None:
    """Text, added conditioning and hook of the odd steps are others."""
    with torch.no_grad():
        cond = pipe.method.condition(pipe.method.prepare(jobs), CONFIG)
    step = solver_steps(pipe.base.schedule, CONFIG.steps, CONFIG.solver)[0]
    even, odd = (cond.at(step, {"odd": torch.full((3, 1), float(n))}) for n in range(2))
    assert even.text is cond.text and odd.text is cond.other[0]
    assert not torch.equal(even.added, odd.added) and even.hook.even and not odd.hook.even


def test_each_subject_has_its_strength_and_region() -> None:
    assert Job((), "a house", 0, strength=0.4).strengths(1.0) == ()
    assert Job(("a", "b"), "a b", 0).strengths(0.7) == (0.7, 0.7)
    assert Job(("a", "b"), "a b", 0, strength=0.4).strengths(1.0) == (0.4, 0.4)
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    job = Job(("a", "b"), "a b", 0, strength=(None, 0.4), regions=(left, right))
    assert job.strengths(1.0) == (1.0, 0.4) and job.regions == (left, right)
    for wrong in (
        {"strength": (0.4,)},
        {"regions": (left,)},
        {"regions": (left, (0.5, 0, 0.5, 1))},
        {"regions": (left, (0.5, 0.9, 1, 0.1))},
        {"regions": (None, (0, 0, 1, 2))},
        {"regions": (None, (float("nan"), 0, 1, 1))},
    ):
        with pytest.raises(ValueError):
            Job(("a", "b"), "a b", 0, **wrong)


def test_what_a_method_has_no_use_for(pipe: Pipeline, jobs: list[Job]) -> None:
    """Regions, several images of one subject, a strength below zero."""
    for wrong, value in (({"regions": ((0, 0, 1, 1),)}, "region"), ({"strength": (-1.0,)}, "-1")):
        with pytest.raises(ValueError, match=value):
            pipe.run([replace(jobs[1], **wrong)], CONFIG)
    assert len(pipe.sample(jobs[1].subjects, "a dog", regions=(None,), strength=(1.0,), config=CONFIG)) == 1
    with pytest.raises(ValueError, match="2 images"):
        pipe.encode_subject([image(0), image(1)], [mask(20), mask(21)], "cat")
    with pytest.raises(ValueError, match="2"):
        pipe.encode_subject([image(0)], [mask(20), mask(21)], "cat")
