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

from moma.app.files import Parser, exit_status, markdown_table, write_text
from moma.app.record import save_png
from moma.bench.curves import curves, curves_image
from moma.bench.flow import FlowConfig, autoencoder, build_bundle, decoder, drawing, flow, pipeline
from moma.bench.measure import Bench, BenchConfig, Found, Part, Point, Ratio
from moma.bench.step import equation_3, make_networks, steps
from moma.bench.training import training
from moma.sampling.device import DTYPES, set_precision
from moma.sampling.interface import Runtime
from moma.weights.bundle import Bundle

BASELINE = "tests.baseline"  # the same steps on diffusers
PARTS = ("eq3", "step", "flow", "decoder", "training", "curves")


def measured(bench: Bench, parts: Sequence[str]) -> Iterator[Found]:
    """The lines of these parts, as soon as they are known."""
    found: list[Found] = []
    for line in _of_parts(bench, set(parts)):
        found.append(line)
        yield line
        if bench.device.type != "cpu":
            torch.accelerator.empty_cache()
    yield from flow(bench, found)


def _of_parts(bench: Bench, parts: set[str]) -> Iterator[Found]:
    if "eq3" in parts:
        yield equation_3(bench)
    if parts & {"step", "flow", "curves"}:
        networks = make_networks(bench)
        if "step" in parts:
            yield from steps(bench, networks)
        if "flow" in parts:
            yield from drawing(bench, networks)
        if "curves" in parts:
            yield from curves(bench, networks)
        del networks  # frees several GB
    if "flow" in parts:
        yield from autoencoder(bench)
    if "training" in parts:
        yield from training(bench)
    # Not in fp32, in which a 7B model takes 27 GB.
    if "decoder" in parts and bench.runtime.weights and bench.dtype != torch.float32:
        yield from decoder(bench)
        yield from pipeline(bench)


# --- the tables ----------------------------------------------------------------------------------------


HEADS: dict[type[Found], tuple[str, ...]] = {
    Ratio: ("what", "dtype", "first", "second", "ratio", "wanted", "difference"),
    Part: ("part", "dtype", "seconds", "Tflop", "of the peak", "memory"),
    Point: ("what varies", "", "dtype", "plain", "MoMA", "ratio", "memory"),
}


def cells(line: Found) -> tuple[str, ...]:
    """A row under its kind's `HEADS`; a ratio says whether it is met."""
    if isinstance(line, Ratio):
        sides = f"{line.slow:.3g} {line.unit}", f"{line.fast:.3g} {line.unit}", f"{line.times:.2f}"
        verdict = f"at least {line.wanted:.2f}: {'met' if line.times >= line.wanted else '**missed**'}"
        return line.what, line.dtype, *sides, verdict, "" if line.error is None else f"{line.error:.1e}"
    memory = "" if line.memory is None else f"{line.memory / 1e9:.2f} GB"
    if isinstance(line, Part):
        flops = "" if line.flops is None else f"{line.flops / 1e12:.2f}"
        share = "" if line.of_peak is None else f"{line.of_peak:.0%}"
        return line.what, line.dtype, f"{line.seconds:.3g}", flops, share, memory
    seconds = f"{line.plain:.3g} s", f"{line.moma:.3g} s", f"{line.moma / line.plain:.2f}"
    return line.axis, f"{line.x:g}", line.dtype, *seconds, memory


def tables(found: Sequence[Found]) -> str:
    """Markdown tables of ratios, of parts and of points."""
    kinds = ((head, [cells(x) for x in found if isinstance(x, kind)]) for kind, head in HEADS.items())
    return "\n".join(markdown_table(*table) for table in kinds)


# --- the command ---------------------------------------------------------------------------------------


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cfg = BenchConfig()
    parser = Parser("python -m moma.bench", description=__doc__.split("\n\n")[1])
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
    cfg = replace(BenchConfig(), size=args.size, share=args.share, repeats=args.repeats)
    runtime = Runtime.choose(None, args.device)
    if runtime.device.index:
        torch.accelerator.set_device_index(runtime.device.index)  # which `_wait` synchronises
    baseline = _load_baseline() if args.baseline else None
    if "decoder" in args.parts and args.dtype != ["fp32"]:
        runtime = replace(runtime, weights=_open_bundle(args.bundle, cfg))
    found: list[Found] = []
    for dtype in args.dtype:
        for line in measured(Bench(cfg, replace(runtime, dtype=DTYPES[dtype]), baseline), args.parts):
            found.append(line)
            print(", ".join(filter(None, cells(line))), file=sys.stderr)
            _write_numbers(args.out, found, cfg, runtime.device)
    print(tables(found))
    if points := [line for line in found if isinstance(line, Point)]:
        save_png(args.out.with_suffix(".png"), curves_image(points))


def _open_bundle(folder: Path | None, cfg: BenchConfig) -> Bundle | None:
    """The bundle of full size, made if it is missing. ValueError for an incomplete one."""
    if folder is None:
        print("no --bundle: skipping the decoder and pipeline lines", file=sys.stderr)
        return None
    if not folder.exists():
        build_bundle(folder, cfg.size, FlowConfig().networks)
    bundle = Bundle.open(folder)
    for name in FlowConfig().networks:
        bundle.config(name)
    return bundle


def _write_numbers(path: Path, found: Sequence[Found], cfg: BenchConfig, device: torch.device) -> None:
    """Write what has been measured so far."""
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    named = zip(("ratios", "parts", "points"), HEADS, strict=True)
    lines = {name: [asdict(x) for x in found if isinstance(x, kind)] for name, kind in named}
    write_text(path, json.dumps({"where": where, "config": asdict(cfg)} | lines, indent=1))


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("bench", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
