"""Time of a step over image size, batch, subject share and number of steps, as points and as an image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image

from moma.app.chart import ChartConfig, Colour, Line, chart
from moma.bench.measure import Bench, Point, memory_of, seconds_of
from moma.bench.step import Networks, make_step
from moma.methods.moma.conditioning import MoMAConditioning
from moma.methods.text import TextConditioning


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
def curves(bench: Bench, networks: Networks) -> Iterator[Point]:
    """All points; each is one call of each kind, after warm-up calls."""
    cfg = bench.cfg
    varied = [("size", x, replace(cfg, size=x), 1) for x in cfg.sizes]
    varied += [("batch", x, cfg, x) for x in cfg.batches]
    varied += [("share", x, replace(cfg, share=x), 1) for x in cfg.shares]
    for axis, value, changed, batch in varied:
        step = make_step(networks, changed, batch)
        memory = memory_of(partial(step.moma, networks.unet), bench.device)  # also warms up
        yield Point(axis, value, bench.kind, seconds_of(step.plain), seconds_of(step.moma), memory)
    # Whole denoising loops, plain and MoMA's, with masks made from the attention maps of the step before.
    step = make_step(networks, cfg)
    own = {name: value for name, value in vars(step.cond).items() if name != "m_gen"}
    both = TextConditioning(step.cond.text, None), MoMAConditioning(**own)
    for steps in cfg.lengths:
        plain, moma = (seconds_of(partial(step.loop, step.unet, cond, steps)) for cond in both)
        yield Point("steps", steps, bench.kind, plain, moma, None)


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
