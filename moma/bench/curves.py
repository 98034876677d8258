"""How a step's time grows with what is drawn, as points and as an image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image

from moma.app.chart import ChartConfig, Colour, Line, chart
from moma.bench.measure import BenchConfig, Point, memory_of, seconds_of
from moma.bench.step import Networks, make_step
from moma.sampling.device import dtype_name
from moma.sampling.sampler import TextOnly


@dataclass(frozen=True)
class LooksConfig:
    """Of the image."""

    chart: ChartConfig = field(default_factory=lambda: ChartConfig(size=(860, 480)))
    plain: tuple[Colour, ...] = ((150, 180, 220), (230, 180, 140))  # a tint for each dtype
    moma: tuple[Colour, ...] = ((30, 90, 170), (200, 80, 30))
    labels: tuple[tuple[str, str], ...] = (
        ("size", "side of the image in pixels, one image, seconds per step"),
        ("batch", "images at once, seconds per step"),
        ("share", "subject's share of reference and image, seconds per step"),
        ("steps", "steps of the whole loop, one image, seconds for all of them"),
    )


@torch.no_grad()
def curves(cfg: BenchConfig, networks: Networks) -> Iterator[Point]:
    """Each point is one call of each kind after others that do not count."""
    for axis, values, name in (
        ("size", cfg.sizes, "size"), ("batch", cfg.batches, None), ("share", cfg.shares, "share"),
    ):  # fmt: skip
        for value in values:
            changed = replace(cfg, **{name: value}) if name else cfg
            yield point(axis, value, changed, networks, int(value) if name is None else 1)
    yield from lengths(cfg, networks)


def point(axis: str, value: float, cfg: BenchConfig, networks: Networks, batch: int) -> Point:
    step = make_step(networks, cfg, batch)
    memory = memory_of(partial(step.moma, networks.unet), networks.device)  # a call that does not count
    plain, moma = seconds_of(step.plain), seconds_of(step.moma)
    return Point(axis, value, dtype_name(networks.dtype), plain, moma, memory)


def lengths(cfg: BenchConfig, networks: Networks) -> Iterator[Point]:
    """Whole denoising loops, plain and MoMA's, with masks made from the attention maps of the step before."""
    step = make_step(networks, cfg)
    for steps in cfg.lengths:
        guides = TextOnly(step.text), step.cond
        plain, moma = (seconds_of(partial(step.loop, step.unet, guide, steps)) for guide in guides)
        yield Point("steps", steps, dtype_name(networks.dtype), plain, moma, None)


def curves_image(points: Sequence[Point], cfg: LooksConfig | None = None) -> Image.Image:
    """A chart for each axis, two beside each other."""
    cfg = cfg or LooksConfig()
    dtypes = list(dict.fromkeys(p.dtype for p in points))
    w, h = cfg.chart.size
    charts = []
    for axis, label in cfg.labels:
        lines = []
        for i, dtype in enumerate(dtypes):
            here = [p for p in points if (p.axis, p.dtype) == (axis, dtype)]
            tint = i % len(cfg.moma)
            lines.append(Line(f"plain, {dtype}", [(p.x, p.plain) for p in here], cfg.plain[tint], marks=True))
            lines.append(Line(f"MoMA, {dtype}", [(p.x, p.moma) for p in here], cfg.moma[tint], marks=True))
        longest = max((y for line in lines for _, y in line.points), default=1.0)
        charts.append(chart(lines, label, (0, longest), cfg.chart))
    image = Image.new("RGB", (2 * w, h * -(-len(charts) // 2)), cfg.chart.background)
    for i, drawn in enumerate(charts):
        image.paste(drawn, (i % 2 * w, i // 2 * h))
    return image
