"""Draws cat.png, the example's reference: a ginger cat on a transparent background.

python examples/make_cat.py
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE, SCALE = 512, 4  # pixels of the result; supersampling
FUR, DARK, CREAM = (233, 150, 66), (178, 92, 34), (255, 238, 212)
PINK, IRIS, INK, WHITE = (238, 148, 142), (128, 186, 80), (46, 30, 26), (255, 255, 255)
TEAL, GOLD = (38, 140, 148), (246, 200, 74)

Point = tuple[float, float]


class Pen:
    """Shapes in the result's pixels on a supersampled mask."""

    def __init__(self) -> None:
        self.mask = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
        self.draw = ImageDraw.Draw(self.mask)

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> None:
        self.draw.ellipse([(x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE], fill=255)

    def polygon(self, points: list[Point]) -> None:
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in curve([*points, points[0]])], fill=255)

    def stroke(self, points: list[Point], start: float, end: float) -> None:
        """A brush along a curve whose width goes from `start` to `end`."""
        path = curve(points, steps=80)
        for (x, y), width in zip(path, np.linspace(start, end, len(path)), strict=True):
            self.ellipse(x, y, width / 2, width / 2)


def curve(points: list[Point], steps: int = 40) -> np.ndarray:
    """Catmull-Rom spline through the points, (n, 2)."""
    p = np.array([points[0], *points, points[-1]], float)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = [
        b + (c - a) * t / 2 + (2 * a - 5 * b + 4 * c - d) * t**2 / 2 + (3 * b - a - 3 * c + d) * t**3 / 2
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.concatenate([*pieces, p[-1:]])


def mirrored(shape: Callable[[Pen, int], None]) -> Image.Image:
    """A shape drawn on the left (-1) and on the right (+1)."""
    pen = Pen()
    for side in (-1, 1):
        shape(pen, side)
    return pen.mask


def single(shape: Callable[[Pen], None]) -> Image.Image:
    pen = Pen()
    shape(pen)
    return pen.mask


class Canvas:
    """A transparent picture that takes masks as coloured layers."""

    def __init__(self) -> None:
        self.image = Image.new("RGBA", (SIZE * SCALE, SIZE * SCALE), (*FUR, 0))

    def paint(
        self,
        mask: Image.Image,
        colour: tuple[int, int, int],
        inside: Image.Image | None = None,
        blur: float = 0,
        strength: float = 1,
    ) -> None:
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * SCALE))
        if inside is not None:
            mask = ImageChops.multiply(mask, inside)
        layer = Image.new("RGBA", mask.size, (*colour, 0))
        layer.putalpha(mask.point(lambda v: round(v * strength)))
        self.image.alpha_composite(layer)

    def body(self, mask: Image.Image, colour: tuple[int, int, int]) -> None:
        """A rounded form: flat colour, darker towards its lower right rim, lighter at its upper left."""
        self.paint(mask, colour)
        rim = ImageChops.invert(ImageChops.offset(mask, -9 * SCALE, -11 * SCALE))
        self.paint(rim, DARK, mask, blur=10, strength=0.6)
        light = ImageChops.invert(ImageChops.offset(mask, 9 * SCALE, 11 * SCALE))
        self.paint(light, CREAM, mask, blur=11, strength=0.3)


def draw_cat() -> Image.Image:
    canvas, middle = Canvas(), 250

    tail = single(lambda p: p.stroke([(330, 452), (410, 452), (448, 392), (428, 330), (446, 286)], 46, 34))
    canvas.body(tail, FUR)
    rings = Pen()
    for ring in ([(404, 476), (394, 424)], [(466, 424), (420, 404)], [(456, 356), (406, 356)]):
        rings.stroke(ring, 15, 15)
    canvas.paint(rings.mask, DARK, tail, blur=1)
    canvas.paint(single(lambda p: p.ellipse(446, 284, 30, 22)), CREAM, tail, blur=4)

    def torso(p: Pen) -> None:
        p.polygon(
            [
                (250, 240),
                (322, 276),
                (362, 380),
                (366, 452),
                (300, 482),
                (200, 482),
                (134, 452),
                (138, 380),
                (178, 276),
            ]
        )

    trunk = single(torso)
    canvas.body(trunk, FUR)
    flanks = Pen()
    for side in (-1, 1):
        for y in (330, 362, 394):
            flanks.stroke(
                [(middle + side * 128, y), (middle + side * 96, y + 4), (middle + side * 66, y + 16)], 17, 3
            )
    canvas.paint(flanks.mask, DARK, trunk, blur=1)

    canvas.body(mirrored(lambda p, s: p.ellipse(middle + s * 88, 438, 42, 50)), FUR)  # haunches
    canvas.body(mirrored(lambda p, s: p.ellipse(middle + s * 94, 476, 40, 19)), CREAM)  # hind paws
    chest = single(
        lambda p: p.polygon([(250, 268), (302, 306), (292, 384), (250, 424), (208, 384), (198, 306)])
    )
    canvas.paint(chest, CREAM, trunk, blur=5)

    def leg(p: Pen, side: int) -> None:
        p.stroke([(middle + side * 38, 350), (middle + side * 40, 410), (middle + side * 35, 468)], 54, 50)

    legs = mirrored(leg)
    canvas.body(legs, FUR)
    bands = Pen()
    for side in (-1, 1):
        for y in (384, 412):
            bands.stroke([(middle + side * 70, y), (middle + side * 40, y + 7)], 12, 3)
    canvas.paint(bands.mask, DARK, legs, blur=1)
    canvas.body(mirrored(lambda p, s: p.ellipse(middle + s * 35, 480, 36, 20)), CREAM)  # front paws
    toes = Pen()
    for side in (-1, 1):
        for paw, y in ((35, 480), (94, 477)):
            for toe in (-11, 11):
                x = middle + side * paw + toe
                toes.stroke([(x, y), (x, y + 15)], 3, 3)
    canvas.paint(toes.mask, DARK, strength=0.8)

    def ear(p: Pen, side: int) -> None:
        p.draw.polygon(
            [((middle + side * x) * SCALE, y * SCALE) for x, y in ((22, 84), (100, 18), (126, 150))], fill=255
        )
        p.stroke([(middle + side * 24, 86), (middle + side * 98, 24), (middle + side * 122, 146)], 10, 10)

    canvas.body(mirrored(ear), FUR)

    def inner(p: Pen, side: int) -> None:
        p.draw.polygon(
            [((middle + side * x) * SCALE, y * SCALE) for x, y in ((50, 92), (94, 48), (108, 132))], fill=255
        )

    canvas.paint(mirrored(inner), PINK, blur=2)

    def skull(p: Pen) -> None:
        p.polygon(
            [
                (250, 66),
                (316, 80),
                (366, 138),
                (376, 200),
                (340, 250),
                (250, 276),
                (160, 250),
                (124, 200),
                (134, 138),
                (184, 80),
            ]
        )

    head = single(skull)
    canvas.paint(ImageChops.offset(head, 0, 9 * SCALE), DARK, trunk, blur=8, strength=0.55)  # its shadow
    collar = single(lambda p: p.stroke([(184, 262), (250, 292), (316, 262)], 17, 17))
    canvas.paint(collar, TEAL, trunk)
    canvas.body(head, FUR)
    tabby = Pen()
    tabby.stroke([(250, 62), (250, 126)], 19, 5)
    for side in (-1, 1):
        tabby.stroke([(middle + side * 36, 64), (middle + side * 29, 116)], 17, 4)
        tabby.stroke([(middle + side * 70, 74), (middle + side * 56, 108)], 13, 3)
        for y, slope in ((176, 8), (206, 0), (232, -10)):
            tabby.stroke([(middle + side * 132, y), (middle + side * 92, y + slope)], 15, 2)
    canvas.paint(tabby.mask, DARK, head, blur=1)
    canvas.paint(mirrored(lambda p, s: p.ellipse(middle + s * 30, 226, 42, 32)), CREAM, head, blur=5)
    canvas.paint(single(lambda p: p.ellipse(middle, 252, 34, 22)), CREAM, head, blur=4)
    canvas.paint(single(lambda p: p.ellipse(middle, 186, 15, 40)), CREAM, head, blur=8, strength=0.7)

    canvas.paint(mirrored(lambda p, s: p.ellipse(middle + s * 60, 166, 35, 34)), INK)  # eyes
    iris = mirrored(lambda p, s: p.ellipse(middle + s * 60, 166, 31, 30))
    canvas.paint(iris, IRIS)
    canvas.paint(
        mirrored(lambda p, s: p.ellipse(middle + s * 60, 186, 26, 12)), GOLD, iris, blur=6, strength=0.8
    )
    canvas.paint(mirrored(lambda p, s: p.ellipse(middle + s * 58, 167, 15, 26)), INK, iris)
    canvas.paint(mirrored(lambda p, s: p.ellipse(middle + s * 60 - 10, 154, 9, 10)), WHITE)
    canvas.paint(mirrored(lambda p, s: p.ellipse(middle + s * 60 + 10, 181, 4, 5)), WHITE)

    canvas.paint(single(lambda p: p.polygon([(233, 204), (250, 199), (267, 204), (250, 221)])), PINK)
    mouth = Pen()
    mouth.stroke([(250, 218), (250, 230)], 4, 4)
    for side in (-1, 1):
        mouth.stroke([(250, 230), (middle + side * 14, 241), (middle + side * 32, 233)], 4, 3)
        for y in (221, 230):
            for x in (40, 54):
                mouth.ellipse(middle + side * x, y - (x == 54) * 2, 1.7, 1.7)
    canvas.paint(mouth.mask, INK)
    whiskers = Pen()
    for side in (-1, 1):
        for y, end in ((218, 204), (226, 226), (234, 248)):
            hair = [(58, y), (116, (y + end) / 2 - 3), (170, end)]
            whiskers.stroke([(middle + side * x, height) for x, height in hair], 3.6, 1.6)
    canvas.paint(whiskers.mask, CREAM)
    bell = single(lambda p: p.ellipse(250, 298, 15, 15))
    canvas.paint(bell, GOLD)
    canvas.paint(single(lambda p: p.stroke([(250, 298), (250, 312)], 4, 3)), INK, bell)
    canvas.paint(single(lambda p: p.ellipse(245, 292, 5, 4)), WHITE, bell, blur=1)
    return canvas.image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw_cat().save(Path(__file__).with_name("cat.png"), optimize=True)
