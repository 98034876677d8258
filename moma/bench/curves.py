"""Time of a step over image size, batch, subject share and number of steps, as points and as an image."""

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
    """Looks of the image."""

    chart: ChartConfig = field(default_factory=lambda: ChartConfig(size=(860, 480)))
    plain: tuple[Colour, ...] = ((150, 180, 220), (230, 180, 140))  # one tint per dtype
    moma: tuple[Colour, ...] = ((30, 90, 170), (200, 80, 30))
    labels: tuple[tuple[str, str], ...] = (
        ("size", "image side in pixels (one image, seconds per step)"),
        ("batch", "images in a batch (seconds per step)"),
        ("share", "share of the subject in reference and image (seconds per step)"),
        ("steps", "steps of the whole loop (one image, seconds for all)"),
    )


@torch.no_grad()
def curves(cfg: BenchConfig, networks: Networks) -> Iterator[Point]:
    """All points; each is one call of each kind, after warm-up calls."""
    for size in cfg.sizes:
        yield _point("size", size, replace(cfg, size=size), networks)
    for batch in cfg.batches:
        yield _point("batch", batch, cfg, networks, batch)
    for share in cfg.shares:
        yield _point("share", share, replace(cfg, share=share), networks)
    # Whole denoising loops, plain and MoMA's, with masks made from the attention maps of the step before.
    step = make_step(networks, cfg)
    for steps in cfg.lengths:
        guides = TextOnly(step.text), step.cond
        plain, moma = (seconds_of(partial(step.loop, step.unet, guide, steps)) for guide in guides)
        yield Point("steps", steps, dtype_name(networks.dtype), plain, moma, None)


def _point(axis: str, value: float, cfg: BenchConfig, networks: Networks, batch: int = 1) -> Point:
    step = make_step(networks, cfg, batch)
    memory = memory_of(partial(step.moma, networks.unet), networks.device)  # also warms up
    plain, moma = seconds_of(step.plain), seconds_of(step.moma)
    return Point(axis, value, dtype_name(networks.dtype), plain, moma, memory)


def curves_image(points: Sequence[Point], cfg: LooksConfig | None = None) -> Image.Image:
    """One chart per axis, two in a row."""
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
