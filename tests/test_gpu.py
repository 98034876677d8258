"""What only a CUDA device can show: recorded steps, streams and pinned memory, its kernels, training.

MOMA_GPU=1 python -m pytest tests/test_gpu.py
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train
from models.llama import Llama, LlamaConfig
from models.weights.loading import in_memory
from models.weights.stream import StreamedLlama
from moma import Job, load, load_segmenter
from moma.methods.moma.attention import (
    Gate,
    ReferenceLayer,
    context_cross_attention,
    drop_background,
    gate_inside,
    subject_self_attention,
)
from moma.methods.moma.conditioning import MoMAConditioning, MoMAHook
from moma.sampling.cuda_graphs import CudaRecorder, GraphedUNet, Output, Run
from moma.sampling.diffusion import solver_steps
from moma.sampling.sampler import denoise
from moma.training.log import read_log
from moma.world.world import render
from tests.helpers import GRAPHED, ROOT, condition, image, latents, mask
from tests.training_data import write_bundle, write_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


def far(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    found, expected = found.float().cpu(), expected.float().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


# --- attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("counts", [(350, 350), (350, 90), (350, 0)], ids=["alike", "unlike", "one without"])
def test_attention(dtype: torch.dtype, most: float, counts: tuple[int, int]) -> None:
    """Fused on the GPU against explicit in float32 on the CPU: Eq. 3 with its gradients, the context's."""
    rows, heads, tokens, width = 2, 8, 1024, 40
    generator = torch.Generator().manual_seed(0)
    keep = torch.arange(tokens) < torch.tensor(counts)[:, None]  # (R, M)
    m_gen = torch.rand(rows, 1, tokens, 1, generator=generator).clamp_min(0.5)
    m_gen[:, :, tokens // 3 :] = 0
    drawn = [torch.randn(rows, heads, tokens, width, generator=generator).to(dtype) for _ in range(5)]
    found = []
    for device, impl, kind in (("cpu", "explicit", torch.float32), (CUDA, "fused", dtype)):
        q, k, v, k_ref, v_ref = (x.to(device, kind).requires_grad_() for x in drawn)
        ref, gate = ReferenceLayer(k_ref, v_ref, keep.to(device)), m_gen.to(device, kind)
        lam = torch.full((1,), 0.7, device=device, dtype=kind, requires_grad=True)
        used, asked = (drop_background(ref), gate_inside(gate)) if impl == "fused" else (ref, Gate(gate))
        z = subject_self_attention(q, k, v, used, asked, lam, 0.8, impl)
        label = torch.eye(77, device=device)[:rows]
        text, context = (k[:, :, :77], v[:, :, :77]), (k_ref[:, :, :4], v_ref[:, :, :4])
        with torch.no_grad():  # where z is overwritten
            again = subject_self_attention(q, k, v, used, asked, lam, 0.8, impl)
            crossed = context_cross_attention(q, *text, *context, asked, label, impl)
        gradients = torch.autograd.grad(z.float().square().sum(), (q, k, v, k_ref, v_ref, lam))
        found.append([z, again, *crossed, *gradients])
    for a, b in zip(*found, strict=True):
        assert far(b, a) < most


# --- CUDA graphs ---------------------------------------------------------------------------------------


class Counting(CudaRecorder):
    """Notes what it records."""

    def __init__(self, recorded: list[Run]) -> None:
        super().__init__(CUDA)
        self.recorded = recorded

    def record(self, run: Run) -> tuple[Output, Callable[[], None]]:
        self.recorded.append(run)
        return super().record(run)


# Four steps of noise under guidance: an H200 was 0.0014 away from a CPU in float32.
@pytest.mark.parametrize(("dtype", "most"), [("fp32", 5e-3), ("bf16", 0.1)])
def test_recorded_drawing(folder: str, dtype: str, most: float, recwarn: pytest.WarningsRecorder) -> None:
    """Whole drawings with and without graphs, and on the CPU."""
    found, recorded = [], []
    for device, graph in (("cuda", "on"), ("cuda", "off"), ("cpu", "off")):
        pipe = load(folder, device=device, dtype=dtype, cuda_graph=graph)
        if graph == "on":
            pipe = replace(pipe, make_recorder=partial(Counting, recorded))
        cat = pipe.encode_subject(image(0), mask(30), "cat")
        dog = pipe.encode_subject(image(1), mask(12), "dog")
        found.append(latents(pipe, [Job(cat, "a cat in the snow", 0), Job(dog, "a dog", 1)], GRAPHED))
    assert recorded and not [w for w in recwarn if "CUDA graphs" in str(w.message)]
    assert far(found[0], found[1]) < most
    assert dtype == "bf16" or far(found[0], found[2]) < most


@dataclass(frozen=True, eq=False)
class Waiting(MoMAHook):
    """Asks for a value on the device, which no graph can."""

    def self_attn(self, layer: int, *args: Tensor, **options: object) -> tuple[Tensor, None]:
        z, attention_map = super().self_attn(layer, *args, **options)
        return z + 0 * z.sum().item(), attention_map


@dataclass(frozen=True, eq=False)
class WaitingConditioning(MoMAConditioning):
    def hook(self, t: int, m_gen: Tensor | None) -> Waiting:
        hook = super().hook(t, m_gen)
        return Waiting(hook.cond, hook.subject_on, hook.m_gen)


@torch.no_grad()
def test_what_cannot_be_recorded_runs_eagerly(folder: str, recwarn: pytest.WarningsRecorder) -> None:
    """One warning, the same result; after it memory is given and taken, and other drawings are recorded."""
    pipe = load(folder, device="cuda", dtype="fp32", cuda_graph="on")
    cat = pipe.encode_subject(image(0), mask(30), "cat")
    jobs = [Job(cat, "a cat in the snow", 0)]
    before = latents(pipe, jobs, GRAPHED)
    assert not [w for w in recwarn if "CUDA graphs" in str(w.message)]
    conditioning = condition(pipe, jobs, GRAPHED)
    waiting = WaitingConditioning(**{f.name: getattr(conditioning, f.name) for f in fields(conditioning)})
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(CUDA)
    path = solver_steps(pipe.base.schedule, GRAPHED.steps, "ddim")
    *_, expected = denoise(pipe.base.unet, conditioning, path, start, 7.5, "ddim")
    unet = GraphedUNet(pipe.base.unet, lambda: CudaRecorder(CUDA))
    with pytest.warns(UserWarning, match="CUDA graphs"):
        *_, found = denoise(unet, waiting, path, start, 7.5, "ddim")
    assert far(found.latents, expected.latents) < 1e-4
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.ones(1 << 20, device=CUDA).sum().item() == 1 << 20
    assert far(latents(pipe, jobs, GRAPHED), before) < 1e-4
    assert sum("CUDA graphs" in str(w.message) for w in recwarn) == 0


# --- the decoder ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_streamed_blocks(stored: torch.dtype) -> None:
    """The resident numbers, again and again, with two blocks in memory: none is used before it is there."""
    cfg = LlamaConfig(vocab=500, width=1024, layers=8, heads=8, mlp=2816, lm_head=False)
    dtype = torch.bfloat16
    llama = Llama(cfg).requires_grad_(False)
    state = {name: weight.to(stored) for name, weight in llama.state_dict().items()}
    lazy = {name: in_memory(weight, Path("x")) for name, weight in state.items()}
    embeds = [torch.randn(1, n, cfg.width, generator=torch.Generator().manual_seed(n)) for n in (37, 600)]
    embeds = [x.to(CUDA, dtype) for x in embeds]
    streamed = StreamedLlama(cfg, lazy, CUDA, dtype)
    embeds[0] @ embeds[0].mT  # cuBLAS keeps 32 MiB from its first product on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = streamed.each(embeds)
    block = sum(w.numel() for name, w in state.items() if name.startswith("layers.0.")) * dtype.itemsize
    states = sum(x.nbytes for x in embeds)
    assert torch.cuda.max_memory_allocated() - before < 2.5 * block + 20 * states
    resident = llama.to(dtype).to(CUDA)
    for found in (first, streamed.each(embeds), streamed.each(embeds)):
        for a, b in zip(found, resident.each(embeds), strict=True):
            assert torch.equal(a, b)


# --- masks and training --------------------------------------------------------------------------------


def test_masks_are_the_cpus() -> None:
    image = Image.fromarray(render(3, "test").image)
    here, there = (load_segmenter(ROOT / "weights" / "mini", device) for device in ("cpu", "cuda"))
    for options in ({}, {"point": (0, 0)}, {"box": (8, 8, 56, 56)}, {"object": 1}):
        a, b = (np.asarray(segmenter.subject_mask(image, **options)) > 0 for segmenter in (here, there))
        assert (a & b).sum() > 0.99 * (a | b).sum() > 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle, and data of ten samples."""
    folder = tmp_path_factory.mktemp("train")
    write_bundle(folder / "bundle")
    write_data(folder / "data", 10)
    return folder


def losses(place: Path, out: Path, stage: str, *more: object) -> list[float]:
    """Of all steps that the run has made so far."""
    where = ["--bundle", place / "bundle", "--data", place / "data", "--out", out]
    few = ["--batch-size", 2, "--workers", 1, "--set", "validation_samples=2", "--set", "warmup=1"]
    own = ["--train", "lora"] if stage == "moma:stage1" else ["--cache", out.parent / f"{out.name}-cache"]
    settings = ["--set", "save_every=2", *own]
    assert train.run([stage, *map(str, [*where, *few, *settings, *more])]) == 0
    return [line["loss"] for line in read_log(out / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize("stage", ["moma:stage1", "moma:stage2"])
def test_training(place: Path, tmp_path: Path, stage: str) -> None:
    """The CPU's losses in float32, also where a run was stopped and went on; bf16's are near them."""
    whole, cpu, bf16, cut = (tmp_path / name for name in ("whole", "cpu", "bf16", "cut"))
    exact = "--dtype", "fp32"
    expected = losses(place, whole, stage, *exact, "--device", "cuda", "--steps", 4)
    assert losses(place, cpu, stage, *exact, "--device", "cpu", "--steps", 4) == pytest.approx(expected, 1e-3)
    assert losses(place, bf16, stage, "--dtype", "bf16", "--device", "cuda", "--steps", 4) == pytest.approx(
        expected, 0.1
    )
    losses(place, cut, stage, *exact, "--device", "cuda", "--steps", 2)
    resumed = losses(place, cut, stage, *exact, "--device", "cuda", "--steps", 4, "--resume")
    assert resumed == pytest.approx(expected, 1e-4)
