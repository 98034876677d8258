"""Drawing tools of the image world: seeded streams, colours, outlines as polygons, and two brushes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

Points = np.ndarray  # (n, 2) float64: x to the right, y down
Colour = tuple[float, float, float]  # red, green, blue in 0..1


def stream(name: str, *numbers: int) -> np.random.Generator:
    """A generator that depends only on the stream's name and the numbers (each >= 0)."""
    return np.random.default_rng([crc32(name.encode()), *numbers])


# ---- colours ----


def oklch(light: float, chroma: float, hue: float) -> Colour:
    """An OKLCH colour as sRGB.

    Args:
        light: lightness, 0..1.
        chroma: 0 to about 0.3; reduced until the colour lies in sRGB.
        hue: degrees.
    """
    for fit in (1.0, 0.85, 0.7, 0.55, 0.4, 0.2, 0.0):
        a = fit * chroma * math.cos(math.radians(hue))
        b = fit * chroma * math.sin(math.radians(hue))
        l3 = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
        m3 = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
        s3 = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * l3 - 3.3077115913 * m3 + 0.2309699292 * s3,
            -1.2684380046 * l3 + 2.6097574011 * m3 - 0.3413193965 * s3,
            -0.0041960863 * l3 - 0.7034186147 * m3 + 1.7076147010 * s3,
        )
        if min(linear) >= -1e-4 and max(linear) <= 1.0001:
            break
    clipped = [min(max(v, 0.0), 1.0) for v in linear]
    red, green, blue = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in clipped)
    return red, green, blue


def mix(a: Sequence[float], b: Sequence[float], t: float) -> Colour:
    """Linear interpolation from a (t = 0) to b (t = 1)."""
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t


def rgb(text: str) -> Colour:
    """The colour of a hexadecimal text such as "e0a458"."""
    return int(text[0:2], 16) / 255, int(text[2:4], 16) / 255, int(text[4:6], 16) / 255


def to_bytes(colour: Sequence[float]) -> tuple[int, int, int]:
    """A colour as three integers 0..255, clipped."""
    red, green, blue = (min(max(round(255 * v), 0), 255) for v in colour)
    return red, green, blue


# ---- outlines ----

_ANGLES = np.linspace(0, 2 * np.pi, 32, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)  # (32, 2)
_STEPS = 6  # points per piece of a smooth curve: no corners visible at four times 64
_T = np.arange(_STEPS)[:, None, None] / _STEPS
_CATMULL = (  # weights of the four neighbouring points, each (_STEPS, 1, 1)
    -0.5 * _T + _T**2 - 0.5 * _T**3,
    1 - 2.5 * _T**2 + 1.5 * _T**3,
    0.5 * _T + 2 * _T**2 - 1.5 * _T**3,
    -0.5 * _T**2 + 0.5 * _T**3,
)


def oval(cx: float, cy: float, rx: float, ry: float, turn: float = 0.0) -> Points:
    """An ellipse around (cx, cy) with radii rx and ry, turned by degrees."""
    points = _CIRCLE * (rx, ry)
    if turn:
        c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        points = points @ np.array([[c, s], [-s, c]])
    return points + np.array([cx, cy])


def _catmull(p0: Points, p1: Points, p2: Points, p3: Points) -> Points:
    pieces = _CATMULL[0] * p0 + _CATMULL[1] * p1 + _CATMULL[2] * p2 + _CATMULL[3] * p3  # (steps, n, 2)
    return pieces.transpose(1, 0, 2).reshape(-1, 2)


def blob(*corners: tuple[float, float]) -> Points:
    """A smooth closed curve through the corners."""
    p = np.array(corners, float)
    return _catmull(np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0))


def curve(*corners: tuple[float, float]) -> Points:
    """A smooth open curve through the corners."""
    p = np.array(corners, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    return np.concatenate([_catmull(p[:-3], p[1:-2], p[2:-1], p[3:]), p[-2:-1]])


def limb(path: Points, start: float, end: float) -> Points:
    """A band around a path (n, 2) with round ends; its half width runs from start to end."""
    path = np.asarray(path, float)
    along = np.gradient(path, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    across = np.stack([-along[:, 1], along[:, 0]], 1) * np.linspace(start, end, len(path))[:, None]
    bend = np.linspace(0, np.pi, 9)[1:-1, None]
    cap_end = path[-1] + across[-1] * np.cos(bend) + along[-1] * end * np.sin(bend)
    cap_start = path[0] - across[0] * np.cos(bend) - along[0] * start * np.sin(bend)
    return np.concatenate([path + across, cap_end, (path - across)[::-1], cap_start])


def box(x0: float, y0: float, x1: float, y1: float, r: float = 3.0, slant: float = 0.0) -> Points:
    """A rectangle with corners of radius r; slant widens its foot on both sides."""
    q = _CIRCLE.reshape(4, 8, 2)
    q = np.concatenate([q, np.roll(_CIRCLE, -8, 0).reshape(4, 8, 2)[:, :1]], 1) * r
    centres = np.array([[x1 - r, y1 - r], [x0 + r, y1 - r], [x0 + r, y0 + r], [x1 - r, y0 + r]])
    points = (q + centres[:, None]).reshape(-1, 2)
    if slant:
        share = (points[:, 1] - y0) / (y1 - y0)
        points[:, 0] += slant * share * np.sign(points[:, 0] - (x0 + x1) / 2)
    return points


def poly(*corners: tuple[float, float]) -> Points:
    """A polygon with sharp corners."""
    return np.array(corners, float)


# ---- brushes ----

_VISIBLE = 8  # half width of a line in pixels, above which the gaps between the pieces of a curve show


class Pen:
    """Draws filled, outlined shapes in palette indices onto an 8-bit image."""

    def __init__(self, image: Image.Image, matrix: np.ndarray, line: float, ink: int) -> None:
        """Create a pen.

        Args:
            image: 8-bit image to draw on.
            matrix: (2, 3), from subject units to pixels.
            line: width of outlines in pixels.
            ink: palette index of outlines.
        """
        self.image, self.matrix, self.line, self.ink = image, matrix, line, ink
        self.draw = ImageDraw.Draw(image)

    def turned(self, degrees: float, x: float, y: float, dx: float = 0.0, dy: float = 0.0) -> Pen:
        """A pen whose shapes are turned about (x, y) by degrees and moved by (dx, dy)."""
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        local = np.array([[c, -s, x - c * x + s * y + dx], [s, c, y - s * x - c * y + dy], [0, 0, 1]])
        return Pen(self.image, self.matrix @ local, self.line, self.ink)

    def place(self, points: Points) -> Points:
        """Subject units (n, 2) in pixels."""
        return points @ self.matrix[:, :2].T + self.matrix[:, 2]

    def shape(self, points: Points, tone: int, edge: float = 1.0) -> None:
        """Fill a polygon with a tone; edge is its outline's width relative to the pen's (0: none)."""
        placed = self.place(points)
        flat = placed.ravel().tolist()
        if edge:
            r = edge * self.line
            self.draw.line(flat + flat[:4], self.ink, round(2 * r))
            if len(points) <= 12 or r > _VISIBLE:  # round off the outline's gaps
                self._dots(placed, r, self.ink)
        self.draw.polygon(flat, tone)

    def stroke(self, points: Points, tone: int, width: float = 1.0) -> None:
        """Draw an open line of a tone, with its width relative to the pen's."""
        placed = self.place(points)
        self.draw.line(placed.ravel().tolist(), tone, round(width * self.line))
        r = width * self.line / 2
        self._dots(placed if r > _VISIBLE else placed[[0, -1]], r, tone)

    def _dots(self, centres: Points, r: float, tone: int) -> None:
        """Fill circles of radius r around pixels (n, 2)."""
        for x, y in centres.tolist():
            self.draw.ellipse((x - r, y - r, x + r, y + r), tone)


class Brush:
    """Draws coloured shapes onto an image whose sides measure 100 units."""

    def __init__(self, side: int) -> None:
        self.image = Image.new("RGB", (side, side))
        self.side, self.unit = side, side / 100
        self.draw = ImageDraw.Draw(self.image)

    def fade(self, y0: float, y1: float, *colours: Sequence[float]) -> None:
        """Fill the rows y0..y1 with an even gradient through the colours."""
        top, end = round(y0 * self.unit), round(y1 * self.unit)
        at = np.linspace(0, len(colours) - 1, end - top)
        rows = np.stack([np.interp(at, range(len(colours)), [c[i] for c in colours]) for i in range(3)], 1)
        column = Image.fromarray(np.round(255 * rows.clip(0, 1)).astype(np.uint8)[:, None])
        self.image.paste(column.resize((self.side, end - top), Image.Resampling.NEAREST), (0, top))

    def fill(self, points: Points, colour: Sequence[float]) -> None:
        """Fill a polygon."""
        self.draw.polygon((points * self.unit).ravel().tolist(), to_bytes(colour))

    def glow(self, cx: float, cy: float, radius: float, colour: Sequence[float], strength: float) -> None:
        """Draw a soft light around (cx, cy); strength is its opacity in the middle."""
        size = max(round(2 * radius * self.unit), 2)
        light = _GLOW.resize((size, size), Image.Resampling.BILINEAR).point(lambda v: v * strength)
        corner = (round((cx - radius) * self.unit), round((cy - radius) * self.unit))
        self.image.paste(to_bytes(colour), (*corner, corner[0] + size, corner[1] + size), light)

    def ridge(self, heights: Sequence[float], colour: Sequence[float]) -> None:
        """Fill everything below a line through evenly spaced heights."""
        at = np.linspace(-10, 110, len(heights))
        line = curve(*np.stack([at, np.asarray(heights, float)], 1))
        self.fill(np.concatenate([line, [[110, 101], [-10, 101]]]), colour)


_AXIS = np.linspace(-1, 1, 33)
_FALL = (1 - np.hypot(_AXIS[:, None], _AXIS[None])).clip(0, 1) ** 2
_GLOW = Image.fromarray(np.round(255 * _FALL).astype(np.uint8))  # (33, 33), falling to 0 at the rim
