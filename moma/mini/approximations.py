"""Effects of approximate speed-ups: `python -m moma.mini.approximations --bundle weights/mini --pairs 64`.

Draws held-out subjects in every setting, classifies the images as the report does, and rewrites the tables of
docs/approximations.md. Each batch is drawn in all settings in turn, so that their times can be compared.

Letters: N pairs, S image side.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, NamedTuple

import torch

from moma.app.files import exit_status
from moma.load import load
from moma.mini.asked import Asked, Drawn, drawn, make_jobs, singles
from moma.mini.config import ReportConfig
from moma.mini.rated import Table, Values, classified, measure
from moma.mini.report import FIDELITY, SHIPPED, around, parser_of, rewrite
from moma.sampling.config import TIMESTEPS, SampleConfig
from moma.sampling.device import set_precision
from moma.sampling.diffusion import ScheduleConfig, solver_steps
from moma.sampling.interface import Job
from moma.sampling.pipeline import Pipeline
from moma.sampling.sampler import is_guided
from moma.world.classifiers import load_probes

PAIRS = 64  # a share is then known to about 12 points
STRENGTH = 1.0  # β of all settings
OTHER_SEEDS = 1_000_000  # added to the pairs' seeds for other noise; larger than all of them
FEWER, FEWEST = 2 / 5, 1 / 5  # of the baseline's steps: 20 and 10 of 50
MIN_STEPS = 5  # of the baseline, so that FEWEST of them is one
SUBJECT_BELOW = (950, 800)  # the release's gate; a fifth of the steps without Eq. 3
# Guidance in the first 60% of the steps, in the middle 60%, in the first 80%.
INTERVALS = {"t ≥ 400": (400, TIMESTEPS), "200 ≤ t < 800": (200, 800), "t ≥ 200": (200, TIMESTEPS)}
MEASURES = (*FIDELITY, "mask")
INTRO = """`{command}`, {day}: torch {torch} on {device}, {dtype}, CPU threads: {threads}.

{pairs} unseen subjects, β = {strength:g}, guidance {guidance:g}, the same noise in every row but the second.
UNet rows and seconds (CPU time on CPUs) are shares of the baseline's, which took {seconds:.2f} s per image
for denoising and decoding (no language model, no reference pass); brackets after seconds hold the least and
the largest share of a batch. Difference: mean absolute difference to the baseline's images, 0..255. The other
measures, the classifiers and the 95% intervals: [mini.md](mini.md).
"""


@dataclass(frozen=True)
class Setting:
    """What differs from the baseline."""

    sample: Mapping[str, Any] = field(default_factory=dict)  # fields of SampleConfig
    method: Mapping[str, Any] = field(default_factory=dict)  # fields of MethodConfig
    seeds: int = 0  # added to the images' seeds


def settings(steps: int) -> dict[str, Setting]:
    """Name -> setting, starting with the baseline of that many steps of DDIM."""
    fewer, fewest = round(steps * FEWER), round(steps * FEWEST)
    dpm, old = {"solver": "dpm", "steps": fewer}, {"grid": "leading"}
    some = {f"guidance at {at}": {"guidance_interval": interval} for at, interval in INTERVALS.items()}
    return {
        f"DDIM, {steps} steps: the baseline": Setting(),
        "the same, other noise": Setting(seeds=OTHER_SEEDS),
        f"DPM-Solver++, {fewer} steps": Setting(dpm),
        f"DDIM, {fewer} steps": Setting({"steps": fewer}),
        f"DPM-Solver++, {fewest} steps": Setting(dpm | {"steps": fewest}),
        f"DPM-Solver++, {fewer} steps, the release's grid": Setting(dpm | old),
        f"DPM-Solver++, {fewest} steps, the release's grid": Setting(dpm | old | {"steps": fewest}),
        **{f"subject term at t < {t}": Setting(method={"subject_below_t": t}) for t in SUBJECT_BELOW},
        **{name: Setting(change) for name, change in some.items()},
        **{f"DPM-Solver++, {fewer} steps, {name}": Setting(dpm | change) for name, change in some.items()},
    }


def unet_rows(sample: SampleConfig) -> int:
    """UNet rows that one image takes: two per step with guidance, else one."""
    schedule = solver_steps(ScheduleConfig(), sample.steps, sample.solver, sample.grid)
    return sum(1 + is_guided(step.t, sample.guidance_interval) for step in schedule)


class Timed(NamedTuple):
    """Drawings of all pairs in one setting."""

    drawn: Drawn
    seconds: list[float]  # of each batch


def draw_batch(
    pipe: Pipeline, jobs: Sequence[Job], setting: Setting, sample: SampleConfig
) -> tuple[Drawn, float]:
    """Draw jobs in a setting, whose fields of MethodConfig leave the jobs' subjects as they are.

    Args:
        pipe: draws them.
        jobs: what to draw.
        setting: what differs from `sample`.
        sample: the baseline.

    Returns:
        The drawings, and seconds: of CPU time on a CPU, so that other work on the machine does not count.
    """
    now = time.process_time if pipe.device.type == "cpu" else time.perf_counter
    pipe = pipe.with_config(replace(pipe.method.config, **setting.method))
    jobs = [replace(job, seed=job.seed + setting.seeds) for job in jobs]
    start = now()
    found = drawn(pipe.run(jobs, replace(sample, **setting.sample)))
    return found, now() - start


@torch.no_grad()
def _draw_in_turn(
    pipe: Pipeline, pairs: Sequence[Asked], named: Mapping[str, Setting], cfg: ReportConfig
) -> dict[str, Timed]:
    """All pairs in all settings, batch by batch."""
    found: dict[str, list[tuple[Drawn, float]]] = {name: [] for name in named}
    size = cfg.sample.batch_size
    for start in range(0, len(pairs), size):
        jobs = make_jobs(pipe, pairs[start : start + size], cfg, STRENGTH)
        if start == 0:  # warm up
            draw_batch(pipe, jobs, Setting({"steps": 1}), cfg.sample)
        for name, setting in named.items():
            found[name].append(draw_batch(pipe, jobs, setting, cfg.sample))
        print(f"{start + len(jobs)} of {len(pairs)} pairs", file=sys.stderr)
    timed = {}
    for name, batches in found.items():
        parts, seconds = zip(*batches, strict=True)
        timed[name] = Timed(Drawn(*(torch.cat(x) for x in zip(*parts, strict=True))), list(seconds))
    return timed


def compared(values: Mapping[str, Values], timed: Mapping[str, Timed]) -> tuple[dict[str, Values], ...]:
    """Measures of each setting with the difference to the first one's images, and minus its measures."""
    base, *others = values
    expected = timed[base].drawn.images.float()  # (N, 3, S, S)
    shown, less = {base: values[base]}, {}
    for name in others:
        difference = (timed[name].drawn.images.float() - expected).abs().mean(dim=(1, 2, 3))  # (N,)
        shown[name] = values[name] | {"difference": difference}
        less[name] = {key: values[name][key].float() - values[base][key].float() for key in MEASURES}
    return shown, less


def costs(
    timed: Mapping[str, Timed], named: Mapping[str, Setting], sample: SampleConfig
) -> dict[str, dict[str, str]]:
    """UNet rows and seconds as shares of the first setting's.

    Args:
        timed: name of a setting -> its drawings.
        named: name -> setting.
        sample: the baseline.

    Returns:
        Heading -> name of a setting -> share.
    """
    base = next(iter(named))
    rows, seconds = {}, {}
    for name, setting in named.items():
        share = unet_rows(replace(sample, **setting.sample)) / unet_rows(sample)
        rows[name] = f"{share:.3g}"
        shares = [own / its for own, its in zip(timed[name].seconds, timed[base].seconds, strict=True)]
        middle = statistics.median(shares)
        seconds[name] = "1" if name == base else f"{middle:.2f} ({min(shares):.2f} to {max(shares):.2f})"
    return {"UNet rows": rows, "seconds": seconds}


# --- the command -------------------------------------------------------------------------------------


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    paths = SHIPPED | {"--page": ("docs/approximations.md", "page to rewrite between its marks")}
    numbers = {"--pairs": PAIRS, "--steps": ReportConfig().sample.steps}
    parser = parser_of("moma.mini.approximations", __doc__, paths, numbers)
    args = parser.parse_args(argv)
    if args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs}: expected 1 or more")
    if args.steps < MIN_STEPS:
        raise ValueError(f"--steps {args.steps}: expected {MIN_STEPS} or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and rewrite the page. ValueError for wrong arguments."""
    set_precision()
    args, cfg, day = _parse(argv), ReportConfig(), date.today()
    cfg = replace(cfg, sample=replace(cfg.sample, steps=args.steps))
    unet_rows(cfg.sample)  # refuses bad steps, as the next two lines a bad page, before anything is drawn
    args.page.parent.mkdir(parents=True, exist_ok=True)
    around(args.page)
    probes = load_probes(args.probes)
    pipe = load(args.bundle, device=args.device, dtype=args.dtype, stream="off")
    pairs, named = singles(args.pairs, [None], cfg), settings(args.steps)
    timed = _draw_in_turn(pipe, pairs, named, cfg)
    shown = {name: its.drawn for name, its in timed.items()}
    values = measure(shown, classified(shown, probes), pairs, probes, cfg)
    shown, less = compared(values, timed)
    tables = (
        Table("Settings", "", ("difference", *MEASURES), shown, costs(timed, named, cfg.sample)),
        Table("Minus the baseline, pair by pair", "", MEASURES, less),
    )
    given = sys.argv[1:] if argv is None else argv
    intro = INTRO.format(
        command=" ".join(["python -m moma.mini.approximations", *given]),
        day=day.isoformat(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=pipe.device,
        dtype=str(pipe.dtype).removeprefix("torch."),
        pairs=len(pairs),
        strength=STRENGTH,
        guidance=cfg.sample.guidance,
        seconds=sum(next(iter(timed.values())).seconds) / len(pairs),
    )
    text = "\n".join([intro, *(table.markdown() for table in tables)])
    rewrite(args.page, text)
    print(text)


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("approximations", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
