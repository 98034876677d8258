"""Charts drawn with Pillow: lines for training and the benchmark, dots for the subjects of an evaluation."""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Points = list[tuple[float, float]]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ChartConfig:
    """Layout and colours of a line chart, in pixels."""

    size: tuple[int, int] = (960, 540)
    margins: tuple[int, int, int, int] = (84, 44, 30, 56)  # left, top, right, bottom: for numbers and legend
    font: int = 15
    ticks: int = 6  # approximate count of numbers per axis
    background: Colour = (255, 255, 255)
    grid: Colour = (228, 228, 228)
    ink: Colour = (60, 60, 60)
    width: int = 2  # of a line
    mark: int = 3  # radius of a mark


@dataclass(frozen=True)
class Line:
    """One line of a chart; its points go from left to right."""

    name: str
    points: Points
    colour: Colour
    thin: bool = False
    marks: bool = False  # mark each point


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_range: tuple[float, float] | None = None,
    cfg: ChartConfig | None = None,
) -> Image.Image:
    """Lines over axes with round numbers; x starts at 0. The legend shows each line's last value.

    Args:
        lines: drawn in order.
        x_label: below the x axis.
        y_range: that the y axis must cover, None = all values; larger values are drawn at its end.
        cfg: layout.
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
    at = left  # of the next entry of the legend
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
    """Tick positions of an axis.

    Args:
        low: the first tick is at or below it.
        high: the last tick is at or above it.
        count: about so many round numbers.
    """
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / count))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor * count >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def fit(text: str, font: Any, width: float) -> str:
    """Cut a text to a width.

    Args:
        text: one line.
        font: PIL's.
        width: pixels.

    Returns:
        The text, or its start with an ellipsis.
    """
    start = text[: _most(width)]
    if start == text and font.getlength(text) <= width:
        return text
    count = bisect_right(range(1, len(start) + 1), width, key=lambda n: font.getlength(f"{text[:n]}…"))
    return f"{text[:count]}…"


def wrap(text: str, font: Any, width: float, lines: int) -> list[str]:
    """Break a text into lines between words, and within those that are wider than a line.

    Args:
        text: of any length.
        font: PIL's.
        width: pixels.
        lines: at most; the last one then ends with an ellipsis.
    """
    words = deque(text[: lines * _most(width)].split())
    wrapped = [""]
    while words:
        word = words.popleft()
        line = f"{wrapped[-1]} {word}".lstrip()
        if font.getlength(line) <= width:
            wrapped[-1] = line
        elif wrapped[-1]:
            wrapped.append("")
            words.appendleft(word)
        else:
            count = max(1, bisect_right(range(1, len(word)), width, key=lambda n: font.getlength(word[:n])))
            wrapped[-1:] = [word[:count], ""]
            words.appendleft(word[count:])
        if len(wrapped) > lines:
            return [*wrapped[: lines - 1], fit(f"{wrapped[lines - 1]} {' '.join(words)}", font, width)]
    return wrapped


def _most(width: float) -> int:
    """No more characters can be seen in a line."""
    return int(width) + 1


# --- dots --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DotsConfig:
    """Layout and colours of a dot chart, in pixels; it is shown at half its size."""

    names: int = 380  # maximum width of the names at the left
    panel: int = 520
    gap: int = 36  # around everything
    row: int = 36
    line: int = 44  # height of a line of text: legend, titles, axis, caption
    mark: int = 7  # radius
    spread: float = 5.0  # vertical distance of the dots in a row, so that equal values stay visible
    font: int = 24
    ticks: int = 5  # approximate count of numbers per axis
    background: Colour = (255, 255, 255)
    band: Colour = (246, 246, 244)  # every other row
    grid: Colour = (224, 224, 224)
    ink: Colour = (50, 50, 50)


@dataclass(frozen=True)
class Series:
    """Values that share a colour and a shape."""

    name: str
    values: Mapping[str, float]  # row -> value
    colour: Colour
    shape: int = 0  # 0 disc, 1 square, 2 diamond, 3 triangle, for readers who do not see the colours
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """A part of the chart with its own axis."""

    title: str
    series: Sequence[Series]


def dots(rows: Sequence[str], panels: Sequence[Panel], caption: str, cfg: DotsConfig) -> Image.Image:
    """A row for each name and, in each panel, a dot for every series with a value there.

    Args:
        rows: names, from top to bottom.
        panels: from left to right.
        caption: below the chart.
        cfg: layout.
    """
    font = ImageFont.load_default(cfg.font)
    names = int(max((min(font.getlength(plain(row)), cfg.names) for row in rows), default=0))
    width = 2 * cfg.gap + names + len(panels) * (cfg.gap + cfg.panel)
    shown = {series.name: series for panel in panels for series in panel.series if series.values}
    legend = list(_legend(list(shown), font, width - 2 * cfg.gap, cfg))
    top = cfg.gap + cfg.line * (legend[-1][1] + 2 if legend else 1)  # legend, then titles
    bottom = top + cfg.row * len(rows)
    image = Image.new("RGB", (width, bottom + 2 * cfg.line + cfg.gap), cfg.background)
    draw = ImageDraw.Draw(image)
    for x, line, name in legend:
        y = cfg.gap + cfg.line * (line + 0.5)
        _mark(draw, x + cfg.mark, y, shown[name], cfg)
        draw.text((x + 3 * cfg.mark, y), plain(name), cfg.ink, font, anchor="lm")
    for n, row in enumerate(rows):
        y = top + n * cfg.row
        if n % 2 == 0:
            draw.rectangle([cfg.gap, y, width - cfg.gap, y + cfg.row - 1], cfg.band)
        text = fit(plain(row), font, names)
        draw.text((cfg.gap + names, y + cfg.row / 2), text, cfg.ink, font, anchor="rm")
    for n, panel in enumerate(panels):
        left = cfg.gap + names + cfg.gap + n * (cfg.panel + cfg.gap)
        _panel(draw, font, rows, panel, (left, top), cfg)
    draw.text((cfg.gap, bottom + 1.5 * cfg.line), plain(caption), cfg.ink, font, anchor="lm")
    return image


def _panel(
    draw: ImageDraw.ImageDraw,
    font: Any,
    rows: Sequence[str],
    panel: Panel,
    corner: tuple[int, int],
    cfg: DotsConfig,
) -> None:
    """Draw a panel's title, axis and dots; corner: left and top of the first row."""
    (left, top), bottom = corner, corner[1] + cfg.row * len(rows)
    values = [v for series in panel.series for v in series.values.values()]
    axis = ticks(min(values, default=0), max(values, default=1), cfg.ticks)
    inner = cfg.panel - 2 * cfg.line  # room for half a number at both ends

    def place(value: float) -> float:
        return left + cfg.line + inner * (value - axis[0]) / (axis[-1] - axis[0])

    title = fit(plain(panel.title), font, cfg.panel)
    draw.text((left + cfg.panel / 2, top - cfg.line / 2), title, cfg.ink, font, anchor="mm")
    for value in axis:
        draw.line([(place(value), top), (place(value), bottom)], cfg.grid, 2)
        draw.text((place(value), bottom + cfg.line / 2), f"{value:.3g}", cfg.ink, font, anchor="mm")
    for n, row in enumerate(rows):
        for i, series in enumerate(panel.series):
            if row in series.values:
                y = top + (n + 0.5) * cfg.row + (i - (len(panel.series) - 1) / 2) * cfg.spread
                _mark(draw, place(series.values[row]), y, series, cfg)


def _legend(
    names: Sequence[str], font: Any, width: float, cfg: DotsConfig
) -> Iterator[tuple[float, int, str]]:
    """(x, number of the line, name) of each entry."""
    x, line = float(cfg.gap), 0
    for name in names:
        needed = 3 * cfg.mark + font.getlength(plain(name))
        if x > cfg.gap and x + needed > cfg.gap + width:
            x, line = float(cfg.gap), line + 1
        yield x, line, name
        x += needed + cfg.gap


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, series: Series, cfg: DotsConfig) -> None:
    r = cfg.mark
    shapes = (
        None,
        [(-r, -r), (r, -r), (r, r), (-r, r)],
        [(0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0)],
        [(0, -1.2 * r), (1.2 * r, r), (-1.2 * r, r)],
    )
    shape, inside = shapes[series.shape % len(shapes)], cfg.background if series.hollow else series.colour
    if shape is None:
        draw.ellipse([x - r, y - r, x + r, y + r], inside, series.colour, width=3)
    else:
        draw.polygon([(x + dx, y + dy) for dx, dy in shape], inside, series.colour, width=3)


def plain(text: str) -> str:
    """The text as one line without Greek, which Pillow's own font lacks."""
    return " ".join(text.replace("β", "beta").split())
