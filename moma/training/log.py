"""The log of a run, one JSON object a line, and the picture of its losses."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from moma.output import write_text

Points = list[tuple[float, float]]
Colour = tuple[int, int, int]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; [] if there is none. What a killed process has left of a line is skipped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def cut_log(path: Path, step: int) -> None:
    """Forget what is younger than `step`, as the run goes on from there."""
    lines = [json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(lines))


def write_log(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line; it survives the process from here on."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


# --- the picture -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveConfig:
    """Looks of the picture of the losses; sizes in pixels."""

    size: tuple[int, int] = (960, 540)
    margins: tuple[int, int, int, int] = (84, 44, 30, 56)  # left, top, right, bottom: numbers and legend
    font: int = 15
    ticks: int = 6  # about as many numbers on each axis
    # The smoothed line averages over about this share of the run: a diffusion loss jumps with its timesteps.
    smooth: float = 0.03
    # The axis ends at this share of the training losses, so that one outlier does not flatten the rest.
    shown: float = 0.995
    background: Colour = (255, 255, 255)
    grid: Colour = (228, 228, 228)
    ink: Colour = (60, 60, 60)
    raw: Colour = (190, 210, 235)
    train: Colour = (30, 90, 170)
    validation: Colour = (200, 80, 30)


def loss_curve(log: Sequence[Mapping[str, Any]], cfg: CurveConfig | None = None) -> Image.Image:
    """Training loss, as it is and smoothed, and validation loss over the steps, out of a log's lines."""
    cfg = cfg or CurveConfig()
    raw = [(line["step"], line["loss"]) for line in log if "loss" in line]
    validation = [(line["step"], line["validation"]) for line in log if "validation" in line]
    smooth = smoothed(raw, max(1.0, cfg.smooth * len(raw)))
    lines = (
        ("loss", raw, cfg.raw),
        ("smoothed", smooth, cfg.train),
        ("validation", validation, cfg.validation),
    )
    losses = sorted(y for _, y in raw)[: math.ceil(cfg.shown * len(raw))] + [
        y for _, y in smooth + validation
    ]
    x_ticks = ticks(0, max((x for x, _ in raw + validation), default=1), cfg.ticks)
    y_ticks = ticks(min(losses, default=0), max(losses, default=1), cfg.ticks)

    image = Image.new("RGB", cfg.size, cfg.background)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(cfg.font)
    left, top, right, bottom = cfg.margins
    right, bottom = cfg.size[0] - right, cfg.size[1] - bottom

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = min(1.0, (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))
        return left + across * (right - left), bottom - up * (bottom - top)

    for x in x_ticks:
        draw.line([place(x, y_ticks[0]), place(x, y_ticks[-1])], cfg.grid)
        draw.text((place(x, 0)[0], bottom + 6), f"{x:g}", cfg.ink, font, anchor="mt")
    for y in y_ticks:
        draw.line([place(x_ticks[0], y), place(x_ticks[-1], y)], cfg.grid)
        draw.text((left - 8, place(0, y)[1]), f"{y:.3g}", cfg.ink, font, anchor="rm")
    draw.text(((left + right) / 2, cfg.size[1] - 8), "step", cfg.ink, font, anchor="mb")
    at = left  # where the legend goes on
    for name, points, colour in lines:
        if points:
            draw.line([place(x, y) for x, y in points], colour, 1 if name == "loss" else 2, joint="curve")
            draw.line([(at, top / 2), (at + 24, top / 2)], colour, 3)
            text = f"{name} {points[-1][1]:.4g}"
            draw.text((at + 32, top / 2), text, cfg.ink, font, anchor="lm")
            at += 60 + int(font.getlength(text))
    for px, py in (place(x, y) for x, y in validation):  # few: each is seen
        draw.ellipse([px - 3, py - 3, px + 3, py + 3], cfg.validation)
    return image


def smoothed(points: Points, length: float) -> Points:
    """Exponential average over about `length` points, corrected for its beginning."""
    result, total, weight, keep = [], 0.0, 0.0, 1 - 1 / length
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        result.append((x, total / weight))
    return result


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, the first at or below `low`, the last at or above `high`."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / count))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * count >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
