"""Benchmark of speed and memory: `python -m moma.bench`; with `--baseline` also against diffusers.

Ratios compare two calls that were timed in turn in one run, at the sizes of Stable Diffusion 1.5 with
pseudo-random weights, on which times do not depend. Memory is compared with a limit. The time of a whole
drawing is summed from its parts.
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

BASELINE = "tests.baseline"  # the same steps on diffusers
PARTS = ("eq3", "step", "flow", "decoder", "training", "curves")


def measured(
    args: argparse.Namespace, cfg: BenchConfig, device: torch.device, baseline: Any
) -> Iterator[Found]:
    """All lines, as soon as they are known.

    Args:
        args: of the command.
        cfg: what is measured.
        device: where.
        baseline: the module tests.baseline, or None.
    """
    for dtype in (DTYPES[name] for name in args.dtype):
        found: list[Found] = []
        for line in _of_dtype(args, cfg, device, dtype, baseline):
            found.append(line)
            yield line
            if device.type != "cpu":
                torch.accelerator.empty_cache()
        yield from flow(found, cfg, device, dtype)


def _of_dtype(
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
        del networks  # frees several GB
    if "flow" in wanted:
        yield from autoencoder(cfg, device, dtype)
    if "training" in wanted:
        yield from training(cfg, device, dtype, baseline)
    if args.bundle and _reads_bundle(args, dtype):
        yield from decoder(args.bundle, cfg, device, dtype)
        yield from pipeline(args.bundle, cfg, device, dtype)


def _reads_bundle(args: argparse.Namespace, dtype: torch.dtype) -> bool:
    """Not in fp32, in which a 7B model takes 27 GB."""
    return "decoder" in args.parts and dtype != torch.float32


# --- the tables ----------------------------------------------------------------------------------------


def _summary(line: Found) -> str:
    if isinstance(line, Ratio):
        return f"{line.what}, {line.dtype}: {line.times:.2f}"
    if isinstance(line, Point):
        return f"{line.axis} {line.x:g}, {line.dtype}: {line.plain:.3g} s plain, {line.moma:.3g} s MoMA"
    return f"{line.what}, {line.dtype}: {line.seconds:.3g} s"


def ratio_table(ratios: Sequence[Ratio]) -> str:
    """A Markdown table that says which ratios are met."""
    rows = []
    for r in ratios:
        verdict = f"at least {r.wanted:.2f}: {'met' if r.times >= r.wanted else '**missed**'}"
        error = "" if r.error is None else f"{r.error:.1e}"
        sides = f"{r.slow:.3g} {r.unit}", f"{r.fast:.3g} {r.unit}"
        rows.append((r.what, r.dtype, *sides, f"{r.times:.2f}", verdict, error))
    return markdown_table(("what", "dtype", "first", "second", "ratio", "wanted", "difference"), rows)


def _part_table(parts: Sequence[Part]) -> str:
    rows = []
    for p in parts:
        flops = "" if p.flops is None else f"{p.flops / 1e12:.2f}"
        share = "" if p.of_peak is None else f"{p.of_peak:.0%}"
        rows.append((p.what, p.dtype, f"{p.seconds:.3g}", flops, share, _gigabytes(p.memory)))
    return markdown_table(("part", "dtype", "seconds", "Tflop", "of the peak", "memory"), rows)


def _point_table(points: Sequence[Point]) -> str:
    rows = []
    for p in points:
        seconds = f"{p.plain:.3g} s", f"{p.moma:.3g} s", f"{p.moma / p.plain:.2f}"
        rows.append((p.axis, f"{p.x:g}", p.dtype, *seconds, _gigabytes(p.memory)))
    return markdown_table(("what varies", "", "dtype", "plain", "MoMA", "ratio", "memory"), rows)


def _gigabytes(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 1e9:.2f} GB"


# --- the command ---------------------------------------------------------------------------------------


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cfg = BenchConfig()
    parser = argparse.ArgumentParser("python -m moma.bench", description=__doc__.split("\n\n")[1])
    for name, kind, text in (
        ("size", int, "image side in pixels"),
        ("share", float, "share of the image that the subject takes"),
        ("repeats", int, "timed calls of each side"),
    ):
        default = getattr(cfg, name)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument(
        "--baseline", action="store_true", help="compare with diffusers (tests/requirements.txt)"
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="bundle with full-size weights, needed for the decoder and pipeline lines; a missing one is "
        "created with pseudo-random weights (16 GB)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench.json"), help="file for the numbers as JSON"
    )
    args = parser.parse_args(argv)
    step = cfg.factor * 2 ** (cfg.unet.levels - 1)
    if args.size < step or args.size % step:
        raise ValueError(f"--size {args.size}: expected a multiple of {step}")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share {args.share}: expected above 0, at most 1")
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: expected 1 or more")
    if args.out.suffix != ".json" or args.out.is_dir():
        raise ValueError(f"--out {args.out}: expected a .json file")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, "{}\n")  # fails before anything is measured
    return args


def _load_baseline() -> Any:
    """The module that needs diffusers. ValueError if diffusers is missing."""
    try:
        return importlib.import_module(BASELINE)
    except ImportError as error:
        advice = "run it in the repository, after pip install -r tests/requirements.txt"
        raise ValueError(f"--baseline: {error}; {advice}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the tables. ValueError for wrong arguments."""
    set_precision()
    args = _parse(argv)
    baseline = _load_baseline() if args.baseline else None
    device = choose_device(args.device)
    cfg = replace(BenchConfig(), size=args.size, share=args.share, repeats=args.repeats)
    if device.index:
        torch.accelerator.set_device_index(device.index)  # which `wait` synchronises
    _prepare_bundle(args, cfg)
    found: list[Found] = []
    for line in measured(args, cfg, device, baseline):
        found.append(line)
        print(_summary(line), file=sys.stderr)
        _write_numbers(args.out, found, cfg, device)
    ratios, parts, points = _by_kind(found)
    print(ratio_table(ratios), _part_table(parts), _point_table(points), sep="\n")
    if points:
        save_png(args.out.with_suffix(".png"), curves_image(points))


def _prepare_bundle(args: argparse.Namespace, cfg: BenchConfig) -> None:
    """Make a missing bundle. ValueError for an incomplete one."""
    if not any(_reads_bundle(args, DTYPES[name]) for name in args.dtype):
        return
    if not args.bundle:
        print("no --bundle: skipping the decoder and pipeline lines", file=sys.stderr)
        return
    if not args.bundle.exists():
        build_bundle(args.bundle, cfg.size, FlowConfig().networks)
    bundle = Bundle.open(args.bundle)
    for name in FlowConfig().networks:
        bundle.config(name)


def _by_kind(found: Sequence[Found]) -> tuple[list[Ratio], list[Part], list[Point]]:
    ratios, parts, points = ([x for x in found if isinstance(x, kind)] for kind in (Ratio, Part, Point))
    return ratios, parts, points


def _write_numbers(path: Path, found: Sequence[Found], cfg: BenchConfig, device: torch.device) -> None:
    """Write what has been measured so far."""
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    lines = zip(("ratios", "parts", "points"), _by_kind(found), strict=True)
    numbers = {name: [asdict(line) for line in group] for name, group in lines}
    write_text(path, json.dumps({"where": where, "config": asdict(cfg)} | numbers, indent=1))


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("bench", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
