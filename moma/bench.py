"""How fast this is here: `python -m moma.bench`, and beside diffusers with `--baseline`.

Every claim is a ratio of two things that were measured in turn in one run, on Stable Diffusion 1.5's sizes
with pseudo-random weights: times do not depend on what the weights are.

Letters: R = 2 rows of a UNet call (both of guidance), H heads, N tokens of a layer, D channels per head,
T text tokens, h w latents.
"""

import argparse
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from models.attention import split_heads
from models.unet import SD15, UNet, UNetConfig, attention_grids, attention_layers
from moma.adapter import Adapter, AdapterConfig, Conditioning, condition, reference_features
from moma.attention import ReferenceLayer, drop_background, queries_inside, subject_self_attention
from moma.bundle import DTYPES
from moma.config import DEFAULT
from moma.masks import Grid, m_gen_of_layer, m_ref_of_layer
from moma.output import exit_status, write_text
from moma.pipeline import choose_device, set_precision
from moma.tiny import fill

ROWS = 2
BASELINE = "tests.baseline"  # the same on diffusers: not a part of what runs


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    unet: UNetConfig = SD15
    size: int = 512  # pixels
    share: float = 0.35  # of the subject in the reference and in the picture
    repeats: int = 5  # of each side, in turn; the median counts
    factor: int = 8  # pixels per latent
    text_tokens: int = 77
    timestep: int = 500  # where Eq. 3 acts
    peak: int = 2048  # side of the matrices whose product is taken for this machine's peak
    seed: int = 0
    # Least ratios; "half": where 16-bit types have another one. A MoMA step may take 1.1 times a plain one's.
    wanted: Mapping[str, float] = field(
        default_factory=lambda: {
            "eq3": 4.0, "moma": 1 / 1.1, "plain": 1.0, "plain half": 1 / 0.9, "release": 2.8,
            "release half": 4.0,
        }
    )  # fmt: skip

    @property
    def grid(self) -> Grid:
        """Latents."""
        return self.size // self.factor, self.size // self.factor


@dataclass(frozen=True)
class Ratio:
    """One line of the table."""

    what: str
    dtype: str
    wanted: float  # least ratio
    slow: float  # seconds of what is compared with
    fast: float  # seconds of ours
    error: float | None = None  # largest difference over the largest value, where both give the same

    @property
    def times(self) -> float:
        return self.slow / self.fast


# --- measuring ---------------------------------------------------------------------------------------


def in_turn(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of both, called in turn after one call each that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repeats + 1):
        for call, kept in zip((first, second), seconds, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            if round_:
                kept.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def operations(run: Callable[[], Any]) -> int:
    """Floating point operations of matrix products, convolutions and attention."""

    def sdpa(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not in torch's own list
    with FlopCounterMode(display=False, custom_mapping={cpu: sdpa}) as counter:
        run()
    return counter.get_total_flops()


def matmul_peak(cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product."""
    generator = torch.Generator(device).manual_seed(cfg.seed)
    a = torch.randn(cfg.peak, cfg.peak, generator=generator, device=device).to(dtype)
    seconds, _ = in_turn(lambda: a @ a, lambda: None, cfg.repeats)
    return 2 * cfg.peak**3 / seconds


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


# --- what is measured --------------------------------------------------------------------------------


def square(cfg: BenchConfig) -> Tensor:
    """A subject of `share` of the picture in its middle: (1, 1, h, w) in {0, 1}."""
    h, w = cfg.grid
    side = cfg.share**0.5
    tall, wide = round(h * side), round(w * side)
    mask = torch.zeros(1, 1, h, w)
    mask[..., (h - tall) // 2 :, (w - wide) // 2 :][..., :tall, :wide] = 1
    return mask


def equation_3(cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> Ratio:
    """All self-attentions of a step without their projections: the formula against the fused path."""
    generator, mask, layers = torch.Generator().manual_seed(cfg.seed), square(cfg), []
    for layer, grid in zip(attention_layers(cfg.unet), attention_grids(cfg.unet, cfg.grid), strict=True):
        shape = (ROWS, grid[0] * grid[1], layer.channels)
        q, k, v, k_ref, v_ref = (
            split_heads(torch.randn(shape, generator=generator).to(device, dtype), layer.heads)
            for _ in range(5)
        )  # each (R, H, N, D)
        keep = m_ref_of_layer(mask, grid, keep_one_key=True).expand(ROWS, -1).to(device)  # (R, N)
        m_gen = m_gen_of_layer(mask, grid).expand(ROWS, -1, -1, -1).to(device, dtype)  # (R, 1, N, 1)
        layers.append((q, k, v, ReferenceLayer(k_ref, v_ref, keep), m_gen))
    lam = torch.ones(1, device=device, dtype=dtype)
    dropped = [drop_background(layer[3]) for layer in layers]  # once per subject

    def explicit() -> list[Tensor]:
        return [
            subject_self_attention(q, k, v, ref, m_gen, lam, 1.0, "explicit")
            for q, k, v, ref, m_gen in layers
        ]

    def fused() -> list[Tensor]:
        inside = {m_gen.shape: queries_inside(m_gen) for *_, m_gen in layers}  # one for each grid
        return [
            subject_self_attention(q, k, v, ref, m_gen, lam, 1.0, "fused", inside[m_gen.shape])
            for (q, k, v, _, m_gen), ref in zip(layers, dropped, strict=True)
        ]

    error = max(relative_error(a, b) for a, b in zip(fused(), explicit(), strict=True))
    return Ratio(
        "Eq. 3, explicit / fused",
        name_of(dtype),
        cfg.wanted["eq3"],
        *in_turn(explicit, fused, cfg.repeats),
        error,
    )


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step of one picture: networks and inputs."""

    unet: UNet
    adapter: Adapter
    x: Tensor  # (R, Z, h, w)
    t: Tensor  # (R,)
    text: Tensor  # (R, T, context_dim)
    layers: list[ReferenceLayer]  # L x K', V', M_ref of the reference, with all keys
    cond: Conditioning
    m_gen: Tensor  # (1, 1, h, w)

    def plain(self) -> Tensor:
        return self.unet(self.x, self.t, self.text)[0]

    def moma(self) -> Tensor:
        """With all that a step of MoMA does besides: masks, and the mask of the next step."""
        hook = self.cond.hook(int(self.t[0]), self.m_gen)
        eps, records = self.unet(self.x, self.t, self.text, hook)
        self.cond.next_m_gen(records, self.x.shape[-2:])
        return eps


def make_step(cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> Step:
    generator = torch.Generator().manual_seed(cfg.seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    unet = pseudo_random(lambda: UNet(cfg.unet), cfg.seed, device, dtype)
    adapter = pseudo_random(lambda: Adapter(AdapterConfig(), cfg.unet), cfg.seed, device, dtype)
    mask = square(cfg).to(device)
    x, text = (
        rand(ROWS, cfg.unet.in_channels, *cfg.grid),
        rand(ROWS, cfg.text_tokens, cfg.unet.context_dim[0]),
    )
    label = torch.zeros(1, cfg.text_tokens, device=device)
    label[:, 1] = 1
    layers = reference_features(unet, adapter, x[:1], text[:1], mask, DEFAULT)
    beta = torch.ones(1, device=device)
    cond = condition(
        adapter, rand(1, adapter.cfg.embed_dim), text[1:], text[:1], label, [layers], beta, DEFAULT
    )
    t = torch.full((ROWS,), cfg.timestep, device=device)
    return Step(unet, adapter, x, t, text, layers, cond, mask)


def pseudo_random(
    make: Callable[[], nn.Module], seed: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A network with weights from a seed."""
    with torch.device("meta"):
        network = make().to(dtype)
    network = network.to_empty(device=device).requires_grad_(False).eval()
    fill(network, torch.Generator().manual_seed(seed))
    return network


def steps(cfg: BenchConfig, device: torch.device, dtype: torch.dtype, baseline: Any) -> Iterator[Ratio]:
    """Whole UNet calls."""
    step, kind = make_step(cfg, device, dtype), name_of(dtype)
    plain, moma = in_turn(step.plain, step.moma, cfg.repeats)
    peak, work = matmul_peak(cfg, device, dtype), operations(step.plain)
    print(
        f"{kind}: a plain step {work / 1e12:.2f} Tflop, {work / plain / peak:.0%} of the peak of "
        f"{peak / 1e12:.2f} Tflop/s; a MoMA step {operations(step.moma) / work - 1:+.1%} operations",
        file=sys.stderr,
    )
    yield Ratio("step, plain / MoMA", kind, cfg.wanted["moma"], plain, moma)
    if baseline is None:
        return
    half = "" if dtype == torch.float32 else " half"
    for what, name, theirs, ours in (
        ("plain step, diffusers / ours", "plain", baseline.plain(step), step.plain),
        ("MoMA step, release / ours", "release", baseline.release(step), step.moma),
    ):
        error = relative_error(ours(), theirs())
        yield Ratio(what, kind, cfg.wanted[name + half], *in_turn(theirs, ours, cfg.repeats), error)


def measured(cfg: BenchConfig, device: torch.device, dtypes: Sequence[str], baseline: Any) -> Iterator[Ratio]:
    """Every line of the table, as soon as it is there."""
    for name in dtypes:
        yield equation_3(cfg, device, DTYPES[name])
        yield from steps(cfg, device, DTYPES[name], baseline)


# --- the command -------------------------------------------------------------------------------------


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, kind in DTYPES.items() if kind == dtype)


def table(ratios: Sequence[Ratio]) -> str:
    lines = [
        "| what | dtype | seconds | seconds | ratio | wanted | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in ratios:
        error = "" if r.error is None else f"{r.error:.1e}"
        times = f"{r.slow:.3f} | {r.fast:.3f} | {r.times:.2f}"
        verdict = f"at least {r.wanted:.2f}: {'met' if r.times >= r.wanted else '**missed**'}"
        lines.append(f"| {r.what} | {r.dtype} | {times} | {verdict} | {error} |")
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cfg = BenchConfig()
    parser = argparse.ArgumentParser("python -m moma.bench", description=__doc__.split("\n\n")[1])
    parser.add_argument("--size", type=int, default=cfg.size, help=f"pixels a side, default {cfg.size}")
    parser.add_argument("--share", type=float, default=cfg.share, help=f"of the subject, default {cfg.share}")
    parser.add_argument("--repeats", type=int, default=cfg.repeats, help=f"default {cfg.repeats}")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--baseline", action="store_true", help="also diffusers (tests/requirements.txt)")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"), help="the numbers as JSON")
    args = parser.parse_args(argv)
    step = cfg.factor * 2 ** (cfg.unet.levels - 1)
    if args.size < step or args.size % step:
        raise ValueError(f"--size {args.size}: expected a multiple of {step}")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share {args.share}: expected above 0, at most 1")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: expected 1 or more")
    return args


def load_baseline() -> Any:
    """The module that needs diffusers; ValueError if that is not there."""
    try:
        return importlib.import_module(BASELINE)
    except ImportError as error:
        raise ValueError(
            f"--baseline: {error}; run it in the repository, after pip install -r tests/requirements.txt"
        ) from error


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """ValueError for a user's mistake."""
    set_precision()
    args = parse(argv)
    baseline = load_baseline() if args.baseline else None
    device = choose_device(args.device)
    cfg = replace(BenchConfig(), size=args.size, share=args.share, repeats=args.repeats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ratios = []
    for ratio in measured(cfg, device, args.dtype, baseline):
        ratios.append(ratio)
        print(f"{ratio.what}, {ratio.dtype}: {ratio.times:.2f}", file=sys.stderr)
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(table(ratios))
    found = {"where": where, "config": asdict(cfg), "ratios": [asdict(r) for r in ratios]}
    write_text(args.out, json.dumps(found, indent=1))


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("bench", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
