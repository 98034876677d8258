"""One denoising step: Eq. 3 alone, and the steps of MoMA, the base model, diffusers and the release.

Weights are pseudo-random; times do not depend on them.

Letters: B images, R = 2B rows of a UNet call (both of guidance), H heads, N tokens of a layer, D channels
per head, T text tokens, h w latents.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import split_heads
from models.unet import UNet, attention_grids, attention_layers
from models.weights.packed import optimize_layout
from moma.bench.measure import (
    BenchConfig,
    Found,
    Ratio,
    half,
    in_turn,
    matmul_peak,
    median_of,
    part_of,
    relative_error,
)
from moma.methods.moma.adapter import (
    Adapter,
    AdapterConfig,
    Conditioning,
    MoMAHook,
    condition,
    reference_features,
)
from moma.methods.moma.attention import (
    Gate,
    ReferenceLayer,
    drop_background,
    gate_inside,
    subject_self_attention,
)
from moma.methods.moma.config import DEFAULT
from moma.methods.moma.masks import Grid, m_gen_of_layer, m_ref_of_layer
from moma.sampling.config import SampleConfig
from moma.sampling.cuda_graphs import GraphedUNet, Recorder, choose_recorder
from moma.sampling.device import dtype_name
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.sampler import Guide, denoise
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


def equation_3(cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> Ratio:
    """All self-attentions of a step without projections: the explicit formula against the fused path.

    Args:
        cfg: what is measured.
        device: where.
        dtype: of the activations.
    """
    generator, mask, layers, rows = torch.Generator().manual_seed(cfg.seed), square(cfg), [], 2
    for layer, grid in zip(attention_layers(cfg.unet), attention_grids(cfg.unet, cfg.grid), strict=True):
        shape = (rows, grid[0] * grid[1], layer.channels)
        q, k, v, k_ref, v_ref = (
            split_heads(torch.randn(shape, generator=generator).to(device, dtype), layer.heads)
            for _ in range(5)
        )  # each (R, H, N, D)
        keep = m_ref_of_layer(mask, grid, keep_one_key=True).expand(rows, -1).to(device)  # (R, N)
        m_gen = m_gen_of_layer(mask, grid).expand(rows, -1, -1, -1).to(device, dtype)  # (R, 1, N, 1)
        layers.append((q, k, v, ReferenceLayer(k_ref, v_ref, keep), m_gen))
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
    what = "Eq. 3, explicit (probabilities in fp32) / fused"
    return Ratio(what, dtype_name(dtype), cfg.wanted["eq3"], *seconds, error)


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


def make_networks(cfg: BenchConfig, device: torch.device, dtype: torch.dtype, keep: bool = True) -> Networks:
    """Networks with pseudo-random weights.

    Args:
        cfg: sizes and seed.
        device: where.
        dtype: of the weights.
        keep: whether to keep a copy of the UNet's weights for a baseline.
    """
    unet = pseudo_random(lambda: UNet(cfg.unet), cfg.seed, device, dtype)
    adapter = pseudo_random(lambda: Adapter(AdapterConfig(), cfg.unet), cfg.seed, device, dtype)
    weights = unet.state_dict() if keep else {}
    return Networks(optimize_layout(unet, device, dtype), weights, adapter, choose_recorder("auto", device))


def pseudo_random(
    make: Callable[[], nn.Module], seed: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A frozen network with pseudo-random weights.

    Args:
        make: constructs it.
        seed: of the weights.
        device: where.
        dtype: of the weights.
    """
    with torch.device("meta"):
        network = make().to(dtype)
    network = network.to_empty(device=device).requires_grad_(False).eval()
    fill(network, torch.Generator(device).manual_seed(seed))
    return network


@dataclass(frozen=True)
class HeldMask:
    """Conditioning that computes M_gen but returns a fixed one, since random weights draw no subject."""

    cond: Conditioning
    m_gen: Tensor  # (B, 1, h, w)

    @property
    def text(self) -> Tensor:
        return self.cond.text

    def conditional(self) -> "HeldMask":
        return HeldMask(self.cond.conditional(), self.m_gen)

    def hook(self, t: int, m_gen: Tensor | None) -> MoMAHook:
        return self.cond.hook(t, m_gen)

    def next_m_gen(self, records: list[Tensor], size: Grid) -> Tensor:
        self.cond.next_m_gen(records, size)
        return self.m_gen


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step of B images: networks and inputs."""

    networks: Networks
    unet: GraphedUNet  # the UNet as the pipeline calls it, with CUDA graphs on CUDA devices
    x: Tensor  # (R, Z, h, w)
    t: Tensor  # (R,)
    text: Tensor  # (R, T, context_dim)
    layers: list[ReferenceLayer]  # K', V', M_ref of each layer, one row, with all keys
    mask: Tensor  # (1, 1, h, w), of the reference
    cond: Conditioning
    m_gen: Tensor  # (B, 1, h, w)
    timestep: int

    def plain(self, unet: UNet | None = None) -> Tensor:
        """A step of the base model."""
        return (unet or self.unet)(self.x, self.t, self.text)[0]

    def drawing(self, steps: int) -> None:
        """All steps of a drawing with a fixed M_gen, including the capture of CUDA graphs."""
        unet = GraphedUNet(self.networks.unet, self.networks.make_recorder)
        self.loop(unet, HeldMask(self.cond, self.m_gen), steps)

    def loop(self, unet: GraphedUNet, guide: Guide, steps: int) -> None:
        """All steps of a drawing from this step's noise.

        Args:
            unet: the UNet.
            guide: the conditioning.
            steps: number of steps.
        """
        path, start = solver_steps(ScheduleConfig(), steps, "ddim"), self.x[: len(self.m_gen)].float()
        for _ in denoise(unet, guide, path, start, SampleConfig().guidance, "ddim"):  # start (B, Z, h, w)
            pass

    def reference(self) -> list[ReferenceLayer]:
        """The reference pass, without the VAE."""
        latent, label = self.x[:1], self.text[:1]
        return reference_features(
            self.networks.unet, self.networks.adapter, latent, label, self.mask, DEFAULT
        )

    def moma(self, unet: UNet | None = None) -> Tensor:
        """A step of MoMA, including the mask of the next step."""
        hook = self.cond.hook(self.timestep, self.m_gen)
        eps, records = (unet or self.unet)(self.x, self.t, self.text, hook)
        self.cond.next_m_gen(records, self.x.shape[-2:])
        return eps


@torch.no_grad()
def make_step(networks: Networks, cfg: BenchConfig, batch: int = 1) -> Step:
    """A step with pseudo-random inputs.

    Args:
        networks: what to run.
        cfg: sizes, subject and seed.
        batch: B.
    """
    device, generator = networks.device, torch.Generator().manual_seed(cfg.seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, networks.dtype)

    mask = square(cfg).to(device)
    x = rand(2 * batch, cfg.unet.in_channels, *cfg.grid)
    text = rand(2 * batch, cfg.text_tokens, cfg.unet.context_dim[0])
    label = torch.zeros(batch, cfg.text_tokens, device=device)
    label[:, 1] = 1
    adapter = networks.adapter
    layers = reference_features(networks.unet, adapter, x[:1], text[:1], mask, DEFAULT)
    cond = condition(
        adapter, rand(batch, adapter.cfg.embed_dim), text[batch:], text[:batch], label, [layers] * batch,
        torch.ones(batch, device=device), DEFAULT,
    )  # fmt: skip
    t = torch.full((2 * batch,), cfg.timestep, device=device)
    unet = GraphedUNet(networks.unet, networks.make_recorder)
    m_gen = mask.expand(batch, -1, -1, -1)
    step = Step(networks, unet, x, t, text, layers, mask, cond, m_gen, cfg.timestep)
    if unet.recorder is not None:
        for call in (step.plain, step.moma) * 2:  # captures the CUDA graphs
            call()
    return step


@torch.no_grad()
def steps(cfg: BenchConfig, networks: Networks, baseline: Any) -> Iterator[Found]:
    """Whole UNet calls.

    Args:
        cfg: what is measured.
        networks: what to run.
        baseline: the module tests.baseline, or None.
    """
    device, dtype, kind = networks.device, networks.dtype, dtype_name(networks.dtype)
    step = make_step(networks, cfg)
    plain, moma = in_turn(step.plain, step.moma, cfg.repeats)
    reference = median_of(step.reference, cfg.repeats)
    peak = matmul_peak(cfg, device, dtype)
    print(f"{kind}: a matrix product does {peak / 1e12:.2f} Tflop/s", file=sys.stderr)
    eager = networks.unet  # operations and memory cannot be counted in CUDA graphs
    for what, seconds, call in (
        ("plain step", plain, partial(step.plain, eager)),
        ("MoMA step", moma, partial(step.moma, eager)),
        ("reference pass", reference, step.reference),
    ):
        yield part_of(what, dtype, call, seconds, peak, device)
    yield Ratio("step, plain / MoMA", kind, cfg.wanted["moma"], plain, moma)
    if step.unet.recordings:
        yield recorded(cfg, step)
    if baseline is None:
        return
    for what, name, theirs, ours in (
        ("plain step, diffusers / ours", "plain", baseline.plain(step), step.plain),
        ("MoMA step, release / ours", "release", baseline.release(step), step.moma),
    ):
        error = relative_error(ours(), theirs())
        seconds = in_turn(theirs, ours, cfg.repeats)
        yield Ratio(what, kind, cfg.wanted[half(name, dtype)], *seconds, error)


@torch.no_grad()
def recorded(cfg: BenchConfig, step: Step) -> Ratio:
    """An eager step against its CUDA graph."""
    eager = partial(step.moma, step.networks.unet)
    error = relative_error(step.moma(), eager())
    seconds = in_turn(eager, step.moma, cfg.repeats)
    kind = dtype_name(step.networks.dtype)
    return Ratio("MoMA step, eager / CUDA graph", kind, cfg.wanted["graph"], *seconds, error)
