"""One denoising step: Eq. 3 alone, and the steps of MoMA, the base model, diffusers and the release.

Weights are pseudo-random; times do not depend on them.

Letters: B images, R = 2B rows of a UNet call (both of guidance), H heads, N tokens of a layer, D channels
per head, T text tokens, h w latents.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.attention import split_heads
from models.unet import Grid, UNet, attention_grids, attention_layers
from models.weights.packed import optimize_layout
from moma.bench.measure import (
    Bench,
    BenchConfig,
    Found,
    Ratio,
    in_turn,
    matmul_peak,
    median_of,
    relative_error,
)
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.attention import (
    Gate,
    ReferenceLayer,
    drop_background,
    gate_inside,
    subject_self_attention,
)
from moma.methods.moma.conditioning import MoMAConditioning, both_rows, condition_rows, reference_features
from moma.methods.moma.config import DEFAULT
from moma.methods.moma.masks import m_gen_of_layer, m_ref_of_layer
from moma.sampling.config import SampleConfig
from moma.sampling.cuda_graphs import GraphedUNet, Recorder, choose_recorder
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.interface import Conditioning, State
from moma.sampling.sampler import denoise
from moma.weights.tiny import fill

# --- Eq. 3 -------------------------------------------------------------------------------------------


def square(cfg: BenchConfig) -> Tensor:
    """A mask (1, 1, h, w) in {0, 1} of a subject in the middle that takes `share` of the image."""
    h, w = cfg.grid
    side = cfg.share**0.5
    tall, wide = round(h * side), round(w * side)
    mask = torch.zeros(1, 1, h, w)
    mask[..., (h - tall) // 2 :, (w - wide) // 2 :][..., :tall, :wide] = 1
    return mask


def equation_3(bench: Bench) -> Ratio:
    """All self-attentions of a step without projections: the explicit formula against the fused path."""
    cfg, device, dtype = bench.cfg, bench.device, bench.dtype
    generator, mask, layers, rows = torch.Generator().manual_seed(cfg.seed), square(cfg), [], 2
    for layer, grid in zip(attention_layers(cfg.unet), attention_grids(cfg.unet, cfg.grid), strict=True):
        shape = (rows, grid[0] * grid[1], layer.channels)
        q, k, v, k_ref, v_ref = (
            split_heads(torch.randn(shape, generator=generator).to(device, dtype), layer.heads)
            for _ in range(5)
        )  # each (R, H, N, D)
        key_mask = m_ref_of_layer(mask, grid, keep_one_key=True).expand(rows, -1).to(device)  # (R, N)
        m_gen = m_gen_of_layer(mask, grid).expand(rows, -1, -1, -1).to(device, dtype)  # (R, 1, N, 1)
        layers.append((q, k, v, ReferenceLayer(k_ref, v_ref, key_mask), m_gen))
    lam = torch.ones(1, device=device, dtype=dtype)
    dropped = [drop_background(layer[3]) for layer in layers]  # once per subject

    def explicit() -> list[Tensor]:
        return [
            subject_self_attention(q, k, v, ref, Gate(m_gen), lam, 1.0, "explicit")
            for q, k, v, ref, m_gen in layers
        ]

    def fused() -> list[Tensor]:
        gates = {m_gen.shape: gate_inside(m_gen) for *_, m_gen in layers}  # one for each grid
        return [
            subject_self_attention(q, k, v, ref, gates[m_gen.shape], lam, 1.0, "fused")
            for (q, k, v, _, m_gen), ref in zip(layers, dropped, strict=True)
        ]

    error = max(relative_error(a, b) for a, b in zip(fused(), explicit(), strict=True))
    seconds = in_turn(explicit, fused, cfg.repeats)
    return bench.ratio("Eq. 3, explicit (probabilities in fp32) / fused", "eq3", *seconds, error)


# --- whole steps -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Networks:
    """The UNet as the pipeline runs it, its stored weights, and an adapter."""

    unet: UNet
    weights: dict[str, Tensor]  # empty without a baseline
    adapter: Adapter
    make_recorder: Callable[[], Recorder] | None  # of CUDA graphs, as in the pipeline; None: eager steps

    @property
    def device(self) -> torch.device:
        return self.adapter.projector.proj.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.adapter.projector.proj.weight.dtype


def make_networks(bench: Bench) -> Networks:
    """Networks with pseudo-random weights."""
    unet = pseudo_random(lambda: UNet(bench.cfg.unet), bench)
    adapter = pseudo_random(lambda: Adapter(AdapterConfig(), bench.cfg.unet), bench)
    weights = unet.state_dict() if bench.baseline else {}
    unet = optimize_layout(unet, bench.device, bench.dtype)
    return Networks(unet, weights, adapter, choose_recorder(bench.runtime.cuda_graph, bench.device))


def pseudo_random(make: Callable[[], nn.Module], bench: Bench) -> nn.Module:
    """The frozen network that `make` constructs, with pseudo-random weights."""
    device = bench.device
    with torch.device("meta"):
        network = make().to(bench.dtype)
    network = network.to_empty(device=device).requires_grad_(False).eval()
    fill(network, torch.Generator(device).manual_seed(bench.cfg.seed))
    return network


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedMask(MoMAConditioning):
    """Computes M_gen but returns a fixed one, since random weights draw no subject."""

    m_gen: Tensor  # (B, 1, h, w)

    def next_state(self, maps: list[Tensor], grid: Grid) -> State:
        super().next_state(maps, grid)
        return {"m_gen": self.m_gen}


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step of B images: networks and inputs."""

    networks: Networks
    unet: GraphedUNet  # the UNet as the pipeline calls it, with CUDA graphs on CUDA devices
    x: Tensor  # (R, Z, h, w)
    t: Tensor  # (R,)
    states: Tensor  # of the text, (R, T, context_dim)
    layers: list[ReferenceLayer]  # K', V', M_ref of each layer, one row, with all keys
    mask: Tensor  # (1, 1, h, w), of the reference
    cond: FixedMask

    def plain(self, unet: UNet | None = None) -> Tensor:
        """A step of the base model."""
        return (unet or self.unet)(self.x, self.t, self.cond.text)[0]

    def moma(self, unet: UNet | None = None) -> Tensor:
        """A step of MoMA, including the mask of the next step."""
        hook = self.cond.hook(int(self.t[0]), self.cond.m_gen)
        eps, maps = (unet or self.unet)(self.x, self.t, self.cond.text, hook)
        self.cond.next_state(maps, (self.x.shape[-2], self.x.shape[-1]))
        return eps

    def reference(self) -> list[ReferenceLayer]:
        """The reference pass, without the VAE."""
        latent, label = self.x[:1], self.states[:1]
        return reference_features(
            self.networks.unet, self.networks.adapter, latent, label, self.mask, DEFAULT
        )

    def loop(self, unet: GraphedUNet, conditioning: Conditioning, steps: int) -> None:
        """All steps of a drawing from this step's noise.

        Args:
            unet: the UNet.
            conditioning: of B images.
            steps: number of steps.
        """
        schedule = solver_steps(ScheduleConfig(), steps, "ddim")
        start = self.x[: len(self.x) // 2].float()  # (B, Z, h, w)
        guidance, dtype = SampleConfig().guidance, self.networks.dtype
        for _ in denoise(unet, conditioning, schedule, start, guidance, "ddim", dtype=dtype):
            pass

    def drawing(self, steps: int) -> None:
        """All steps of a drawing with a fixed M_gen, including the capture of CUDA graphs."""
        self.loop(GraphedUNet(self.networks.unet, self.networks.make_recorder), self.cond, steps)


@torch.no_grad()
def make_step(networks: Networks, cfg: BenchConfig, batch: int = 1) -> Step:
    """A step with pseudo-random inputs.

    Args:
        networks: what to run.
        cfg: sizes, subject and seed.
        batch: B.
    """
    device, generator, rows = networks.device, torch.Generator().manual_seed(cfg.seed), 2 * batch

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, networks.dtype)

    mask, unet, adapter = square(cfg).to(device), networks.unet, networks.adapter
    x = rand(rows, cfg.unet.in_channels, *cfg.grid)
    states = rand(rows, cfg.text_tokens, cfg.unet.context_dim[0])
    label = torch.zeros(rows, cfg.text_tokens, device=device)
    label[:, 1] = 1
    layers = reference_features(unet, adapter, x[:1], states[:1], mask, DEFAULT)
    embedding = rand(batch, adapter.cfg.embed_dim)
    embedding = torch.cat([torch.zeros_like(embedding), embedding])  # (R, E)
    beta = torch.ones(rows, device=device, dtype=networks.dtype)
    cond = condition_rows(
        adapter, embedding, unet.text_kv(states), None, label, both_rows([layers] * batch), beta, DEFAULT
    )
    cond = FixedMask(**vars(cond), m_gen=mask.expand(batch, -1, -1, -1))
    t = torch.full((rows,), cfg.timestep, device=device)
    step = Step(networks, GraphedUNet(unet, networks.make_recorder), x, t, states, layers, mask, cond)
    if step.unet.recorder is not None:
        for call in (step.plain, step.moma) * 2:  # captures the CUDA graphs
            call()
    return step


@torch.no_grad()
def steps(bench: Bench, networks: Networks) -> Iterator[Found]:
    """Whole UNet calls, also of the baseline if there is one."""
    step, repeats = make_step(networks, bench.cfg), bench.cfg.repeats
    plain, moma = in_turn(step.plain, step.moma, repeats)
    reference, peak = median_of(step.reference, repeats), matmul_peak(bench)
    print(f"{bench.kind}: a matrix product does {peak / 1e12:.2f} Tflop/s", file=sys.stderr)
    eager = networks.unet  # operations and memory cannot be counted in CUDA graphs
    yield bench.part("plain step", plain, partial(step.plain, eager), peak)
    yield bench.part("MoMA step", moma, partial(step.moma, eager), peak)
    yield bench.part("reference pass", reference, step.reference, peak)
    yield bench.ratio("step, plain / MoMA", "moma", plain, moma)
    if step.unet.graphs:
        yield recorded(bench, step)
    if bench.baseline:
        release = bench.baseline.release(step)
        yield _compared(
            bench, "plain step, diffusers / ours", "plain", bench.baseline.plain(step), step.plain
        )
        yield _compared(bench, "MoMA step, release / ours", "release", release, step.moma)


def recorded(bench: Bench, step: Step) -> Ratio:
    """An eager step against its CUDA graph."""
    eager = partial(step.moma, step.networks.unet)
    return _compared(bench, "MoMA step, eager / CUDA graph", "graph", eager, step.moma)


@torch.no_grad()
def _compared(
    bench: Bench, what: str, wanted: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor]
) -> Ratio:
    """Two calls that compute the same; wanted: key of `BenchConfig.wanted`."""
    error = relative_error(ours(), theirs())
    return bench.ratio(what, wanted, *in_turn(theirs, ours, bench.cfg.repeats), error)
