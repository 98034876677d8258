"""How fast and how small this is here: `python -m moma.bench`, and beside diffusers with `--baseline`.

Times are ratios of two things that were measured in turn in one run, on Stable Diffusion 1.5's sizes with
pseudo-random weights: times do not depend on what the weights are. Lines of memory are shares of a limit; a
whole drawing is summed from its parts, as its line says.
"""

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from moma.app.files import exit_status, markdown_table, write_text
from moma.app.record import save_png
from moma.bench.curves import curves, curves_image
from moma.bench.flow import FlowConfig, autoencoder, build_bundle, decoder, drawing, flow, pipeline
from moma.bench.measure import BenchConfig, Found, Part, Point, Ratio
from moma.bench.step import equation_3, make_networks, steps
from moma.bench.training import training
from moma.sampling.device import DTYPES, choose_device, set_precision
from moma.weights.bundle import Bundle

BASELINE = "tests.baseline"  # the same on diffusers: not a part of what runs
PARTS = ("eq3", "step", "flow", "decoder", "training", "curves")


def measured(
    args: argparse.Namespace, cfg: BenchConfig, device: torch.device, baseline: Any
) -> Iterator[Found]:
    """Every line, as soon as it is there; baseline: the module tests.baseline, or None."""
    for dtype in (DTYPES[name] for name in args.dtype):
        found: list[Found] = []
        for line in of_dtype(args, cfg, device, dtype, baseline):
            found.append(line)
            yield line
            if device.type != "cpu":
                torch.accelerator.empty_cache()
        yield from flow(found, cfg, device, dtype)


def of_dtype(
    args: argparse.Namespace, cfg: BenchConfig, device: torch.device, dtype: torch.dtype, baseline: Any
) -> Iterator[Found]:
    wanted = set(args.parts)
    if "eq3" in wanted:
        yield equation_3(cfg, device, dtype)
    if wanted & {"step", "flow", "curves"}:
        networks = make_networks(cfg, device, dtype, keep=baseline is not None)
        if "step" in wanted:
            yield from steps(cfg, networks, baseline)
        if "flow" in wanted:
            yield from drawing(cfg, networks)
        if "curves" in wanted:
            yield from curves(cfg, networks)
        del networks  # 4 GB in fp32, twice that with what the baseline needs
    if "flow" in wanted:
        yield from autoencoder(cfg, device, dtype)
    if "training" in wanted:
        yield from training(cfg, device, dtype, baseline)
    if args.bundle and reads_bundle(args, dtype):
        yield from decoder(args.bundle, cfg, device, dtype)
        yield from pipeline(args.bundle, cfg, device, dtype)


def reads_bundle(args: argparse.Namespace, dtype: torch.dtype) -> bool:
    """A 7B model in fp32 would take 27 GB."""
    return "decoder" in args.parts and dtype != torch.float32


# --- the tables ----------------------------------------------------------------------------------------


def told(line: Found) -> str:
    if isinstance(line, Ratio):
        return f"{line.what}, {line.dtype}: {line.times:.2f}"
    if isinstance(line, Point):
        return f"{line.axis} {line.x:g}, {line.dtype}: {line.plain:.3g} s plain, {line.moma:.3g} s MoMA"
    return f"{line.what}, {line.dtype}: {line.seconds:.3g} s"


def ratio_table(ratios: Sequence[Ratio]) -> str:
    rows = []
    for r in ratios:
        verdict = f"at least {r.wanted:.2f}: {'met' if r.times >= r.wanted else '**missed**'}"
        error = "" if r.error is None else f"{r.error:.1e}"
        sides = f"{r.slow:.3g} {r.unit}", f"{r.fast:.3g} {r.unit}"
        rows.append((r.what, r.dtype, *sides, f"{r.times:.2f}", verdict, error))
    return markdown_table(("what", "dtype", "first", "second", "ratio", "wanted", "difference"), rows)


def part_table(parts: Sequence[Part]) -> str:
    rows = []
    for p in parts:
        flops = "" if p.flops is None else f"{p.flops / 1e12:.2f}"
        share = "" if p.of_peak is None else f"{p.of_peak:.0%}"
        rows.append((p.what, p.dtype, f"{p.seconds:.3g}", flops, share, gigabytes(p.memory)))
    return markdown_table(("part", "dtype", "seconds", "Tflop", "of the peak", "memory"), rows)


def point_table(points: Sequence[Point]) -> str:
    rows = []
    for p in points:
        seconds = f"{p.plain:.3g} s", f"{p.moma:.3g} s", f"{p.moma / p.plain:.2f}"
        rows.append((p.axis, f"{p.x:g}", p.dtype, *seconds, gigabytes(p.memory)))
    return markdown_table(("what varies", "", "dtype", "plain", "MoMA", "ratio", "memory"), rows)


def gigabytes(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 1e9:.2f} GB"


# --- the command ---------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cfg = BenchConfig()
    parser = argparse.ArgumentParser("python -m moma.bench", description=__doc__.split("\n\n")[1])
    parser.add_argument("--size", type=int, default=cfg.size, help=f"pixels a side, default {cfg.size}")
    parser.add_argument("--share", type=float, default=cfg.share, help=f"of the subject, default {cfg.share}")
    parser.add_argument("--repeats", type=int, default=cfg.repeats, help=f"default {cfg.repeats}")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default all")
    parser.add_argument("--baseline", action="store_true", help="also diffusers (tests/requirements.txt)")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="full-size weights for the decoder's and the pipeline's lines, which are left out without it; "
        "made here, pseudo-random and 16 GB large, if it does not exist",
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"), help="the numbers as JSON")
    args = parser.parse_args(argv)
    step = cfg.factor * 2 ** (cfg.unet.levels - 1)
    if args.size < step or args.size % step:
        raise ValueError(f"--size {args.size}: expected a multiple of {step}")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share {args.share}: expected above 0, at most 1")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: expected 1 or more")
    if args.out.suffix != ".json" or args.out.is_dir():
        raise ValueError(f"--out {args.out}: expected the name of a .json file")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, "{}\n")  # that it cannot be written is known now, not after an hour
    return args


def load_baseline() -> Any:
    """The module that needs diffusers; ValueError if that is not there."""
    try:
        return importlib.import_module(BASELINE)
    except ImportError as error:
        raise ValueError(
            f"--baseline: {error}; run it in the repository, after pip install -r tests/requirements.txt"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """ValueError for a user's mistake."""
    set_precision()
    args = parse(argv)
    baseline = load_baseline() if args.baseline else None
    device = choose_device(args.device)
    cfg = replace(BenchConfig(), size=args.size, share=args.share, repeats=args.repeats)
    if device.index:
        torch.accelerator.set_device_index(device.index)  # the one that `wait` waits for
    prepare_bundle(args, cfg)
    found: list[Found] = []
    for line in measured(args, cfg, device, baseline):
        found.append(line)
        print(told(line), file=sys.stderr)
        write_numbers(args.out, found, cfg, device)
    ratios, parts, points = sorted_out(found)
    print(ratio_table(ratios), part_table(parts), point_table(points), sep="\n")
    if points:
        save_png(args.out.with_suffix(".png"), curves_image(points))


def prepare_bundle(args: argparse.Namespace, cfg: BenchConfig) -> None:
    """The folder of --bundle, made if it is not there; ValueError if it is no complete bundle."""
    if not any(reads_bundle(args, DTYPES[name]) for name in args.dtype):
        return
    if not args.bundle:
        print("no --bundle: the decoder's and the pipeline's lines are left out", file=sys.stderr)
        return
    if not args.bundle.exists():
        build_bundle(args.bundle, cfg.size, FlowConfig().networks)
    bundle = Bundle.open(args.bundle)
    for name in FlowConfig().networks:
        bundle.config(name)


def sorted_out(found: Sequence[Found]) -> tuple[list[Ratio], list[Part], list[Point]]:
    ratios, parts, points = ([x for x in found if isinstance(x, kind)] for kind in (Ratio, Part, Point))
    return ratios, parts, points


def write_numbers(path: Path, found: Sequence[Found], cfg: BenchConfig, device: torch.device) -> None:
    """What has been measured so far."""
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    lines = zip(("ratios", "parts", "points"), sorted_out(found), strict=True)
    numbers = {name: [asdict(line) for line in group] for name, group in lines}
    write_text(path, json.dumps({"where": where, "config": asdict(cfg)} | numbers, indent=1))


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("bench", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
