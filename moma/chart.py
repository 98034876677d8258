"""Line charts drawn with Pillow: the losses of a training run, the curves of the benchmark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Points = list[tuple[float, float]]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ChartConfig:
    """Looks of a chart; sizes in pixels."""

    size: tuple[int, int] = (960, 540)
    margins: tuple[int, int, int, int] = (84, 44, 30, 56)  # left, top, right, bottom: numbers and legend
    font: int = 15
    ticks: int = 6  # about as many numbers on each axis
    background: Colour = (255, 255, 255)
    grid: Colour = (228, 228, 228)
    ink: Colour = (60, 60, 60)
    width: int = 2  # of a line
    mark: int = 3  # radius of a mark


@dataclass(frozen=True)
class Line:
    """One line of a chart, from left to right."""

    name: str
    points: Points
    colour: Colour
    thin: bool = False
    marks: bool = False  # each point is seen: for few


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_range: tuple[float, float] | None = None,
    cfg: ChartConfig | None = None,
) -> Image.Image:
    """Lines over axes with round numbers. The legend gives each line's last value. x begins at 0.

    y_range: what the axis must hold, None = every value; values above it are drawn at its end.
    """
    cfg = cfg or ChartConfig()
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = y_range or (min(ys, default=0), max(ys, default=1))
    x_ticks = ticks(0, max(xs, default=1), cfg.ticks)
    y_ticks = ticks(low, high, cfg.ticks)

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
    draw.text(((left + right) / 2, cfg.size[1] - 8), x_label, cfg.ink, font, anchor="mb")
    at = left  # where the legend goes on
    for line in (line for line in lines if line.points):
        width = 1 if line.thin else cfg.width
        draw.line([place(x, y) for x, y in line.points], line.colour, width, joint="curve")
        draw.line([(at, top / 2), (at + 24, top / 2)], line.colour, 3)
        text = f"{line.name} {line.points[-1][1]:.4g}"
        draw.text((at + 32, top / 2), text, cfg.ink, font, anchor="lm")
        at += 60 + int(font.getlength(text))
        if line.marks:
            for px, py in (place(x, y) for x, y in line.points):
                draw.ellipse([px - cfg.mark, py - cfg.mark, px + cfg.mark, py + cfg.mark], line.colour)
    return image


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, the first at or below `low`, the last at or above `high`."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / count))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * count >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
