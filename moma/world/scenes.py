"""The scenes of the image world, from sky to ground. A side measures 100 units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moma.world.drawing import Brush, Colour, blob, box, curve, limb, mix, oval, poly, rgb

_SNOW = rgb("ffffff")


def _cloud(b: Brush, x: float, y: float, size: float, colour: Colour, under: Colour) -> None:
    for shade, drop in ((under, 1.2), (colour, 0.0)):
        for dx, dy, r in ((-9, 1, 5), (-2, -2, 7), (6, 0, 5.5), (12, 2, 3.6)):
            b.fill(oval(x + size * dx, y + size * (dy + drop), size * r, size * (r - 0.8)), shade)
        low = box(x - 14 * size, y + size * drop, x + 15.5 * size, y + size * (5.4 + drop), 2.6 * size)
        b.fill(low, shade)


def _clouds(b: Brush, rng: np.random.Generator, low: float, colour: Colour, under: Colour) -> None:
    for i in range(int(rng.integers(1, 4))):
        x, y = (rng.uniform(0, 100) + 37 * i) % 100, rng.uniform(9, low)
        _cloud(b, x, y, rng.uniform(0.6, 1.0), colour, under)


def _beach(b: Brush, rng: np.random.Generator) -> None:
    b.fade(0, 48, rgb("5fb4e8"), rgb("a8dcf3"), rgb("e6f4ee"))
    side = rng.random() < 0.5
    sun = rng.uniform(62, 88) if side else rng.uniform(12, 38)
    b.glow(sun, 14, 26, rgb("fff3c0"), 0.9)
    b.fill(oval(sun, 14, 6.5, 6.5), rgb("fff2b8"))
    _clouds(b, rng, 30, rgb("ffffff"), rgb("d6e9f2"))
    sea = rng.uniform(42, 47)
    if rng.random() < 0.6:  # an island
        x = rng.uniform(10, 90)
        b.fill(blob((x - 22, sea + 1), (x - 8, sea - 6), (x + 4, sea - 8), (x + 22, sea + 1)), rgb("6fae9b"))
    b.fade(sea, 66, rgb("2a86b8"), rgb("3fb2c6"), rgb("8adbd2"))
    if rng.random() < 0.5:  # a sailing boat
        x = rng.uniform(15, 85)
        b.fill(poly((x, sea - 9), (x, sea + 3), (x + 8, sea + 3)), rgb("fffaf0"))
        b.fill(poly((x - 1.5, sea - 6), (x - 1.5, sea + 3), (x - 6, sea + 3)), rgb("f2b45e"))
        b.fill(poly((x - 8, sea + 4), (x + 9, sea + 4), (x + 6, sea + 8), (x - 5, sea + 8)), rgb("a5563f"))
    shore = 64 + rng.uniform(-2, 2) + 2.2 * np.sin(np.arange(7) * 1.3 + rng.uniform(0, 6))
    b.ridge(shore - 2.6, rgb("f3fbf7"))
    b.ridge(shore, rgb("d9bd8a"))
    b.ridge(shore + 4, rgb("ecd5a2"))
    b.ridge(shore + 17, rgb("f3dfb0"))
    x = rng.uniform(4, 14) if side else rng.uniform(86, 96)
    lean = 9 if side else -9
    b.fill(limb(curve((x, 80), (x + 0.2 * lean, 50), (x + lean, 22)), 3.4, 2.0), rgb("8a5f3c"))
    for dx, dy in ((-24, 4), (-17, 15), (-15, -9), (24, 4), (17, 15), (14, -10)):
        tip = (x + lean + dx, 20 + dy)
        bend = (x + lean + 0.5 * dx, 17 + 0.2 * dy)
        b.fill(limb(curve((x + lean, 21), bend, tip), 3.6, 0.8), rgb("2f8f5b") if dy > 6 else rgb("45a865"))


def _conifer(
    b: Brush, x: float, foot: float, size: float, colour: Colour, trunk: Colour, snow: bool = False
) -> None:
    b.fill(box(x - 0.07 * size, foot - 0.2 * size, x + 0.07 * size, foot, 0.5), trunk)
    for i, (y0, y1, half) in enumerate(((0.5, 0.14, 0.34), (0.75, 0.38, 0.27), (1.0, 0.62, 0.2))):
        tip, low, w = foot - y0 * size, foot - y1 * size, half * size
        tint = mix(colour, rgb("ffffff"), 0.06 * i)
        b.fill(poly((x, tip), (x + w, low), (x, low + 0.05 * size), (x - w, low)), tint)
        if snow:
            middle = (tip + low) / 2
            cap = poly((x, tip), (x + 0.5 * w, middle), (x, tip + 0.36 * size * y0), (x - 0.5 * w, middle))
            b.fill(cap, _SNOW)


def _tree(b: Brush, x: float, foot: float, size: float, leaf: Colour, trunk: Colour) -> None:
    b.fill(limb(curve((x, foot), (x, foot - 0.6 * size)), 0.08 * size, 0.06 * size), trunk)
    light = mix(leaf, (leaf[0] + 0.25, leaf[1] + 0.25, leaf[2]), 0.35)
    crown = ((-0.2, -0.58, 0.26), (0.22, -0.6, 0.25), (0, -0.8, 0.3), (-0.08, -0.86, 0.17))
    for (dx, dy, r), tone in zip(crown, (leaf, leaf, leaf, light), strict=True):
        b.fill(oval(x + dx * size, foot + dy * size, r * size, r * size), tone)


def _forest(b: Brush, rng: np.random.Generator) -> None:
    b.fade(0, 70, rgb("a9d8c0"), rgb("d8ecc4"), rgb("f3f3cf"))
    b.glow(rng.uniform(30, 70), 26, 46, rgb("fffbe0"), 0.8)
    for x in np.arange(-4, 112, 13) + rng.uniform(-4, 4):
        _conifer(b, x, 66, rng.uniform(36, 52), rgb("9cc8ac"), rgb("9cc8ac"))
    for x in np.arange(0, 112, 24) + rng.uniform(-9, 9):
        _conifer(b, x, 69, rng.uniform(46, 60), rgb("5b9d7f"), rgb("5d7a62"))
    b.ridge(62 + rng.uniform(-2, 2, 6), rgb("7fb45f"))
    for x in (rng.uniform(-3, 10), rng.uniform(90, 103)):
        if rng.random() < 0.5:
            _conifer(b, x, 78, rng.uniform(74, 92), rgb("2f6f57"), rgb("6a4a35"))
        else:
            _tree(b, x, 78, rng.uniform(66, 80), rgb("3f8a55"), rgb("6f4d37"))
    b.ridge(75 + rng.uniform(-2, 2, 5), rgb("699f4f"))
    middle = rng.uniform(35, 65)
    b.fill(blob((middle - 7, 76), (middle + 7, 76), (middle + 26, 101), (middle - 26, 101)), rgb("d2b987"))
    for x in (rng.uniform(4, 20), rng.uniform(80, 96)):  # bushes or a toadstool
        if rng.random() < 0.6:
            for dx, r in ((-6, 6), (5, 7)):
                b.fill(oval(x + dx, 88, r, r), rgb("3d7d4c"))
        else:
            b.fill(box(x - 2, 84, x + 2, 93, 1.5), rgb("f4ead6"))
            b.fill(blob((x - 8, 85), (x - 5, 78), (x + 5, 78), (x + 8, 85)), rgb("d9574a"))


def _snow(b: Brush, rng: np.random.Generator) -> None:
    b.fade(0, 66, rgb("8fbbe3"), rgb("bcd9ee"), rgb("e9f1f6"))
    for tone, base, high in ((rgb("a3b6d4"), 62, 34), (rgb("7f97bd"), 64, 24)):
        for x in np.arange(4, 110, 42) + rng.uniform(-14, 14):
            top, half = base - high - rng.uniform(0, 9), rng.uniform(26, 34)
            b.fill(poly((x, top), (x + half, base + 3), (x - half, base + 3)), tone)
            cap, w = top + 0.36 * high, 0.3 * half
            edge = (x + w, cap), (x + 0.3 * w, cap - 3), (x - 0.3 * w, cap + 2), (x - w, cap - 1)
            b.fill(poly((x, top), *edge), _SNOW)
    b.ridge(62 + rng.uniform(-3, 3, 5), rgb("dbe8f4"))
    for x in (rng.uniform(-2, 14), rng.uniform(20, 36), rng.uniform(64, 80), rng.uniform(86, 102)):
        _conifer(b, x, rng.uniform(67, 73), rng.uniform(26, 44), rgb("3f7a78"), rgb("6a5146"), snow=True)
    b.ridge(70 + rng.uniform(-3, 3, 5), rgb("eef5fb"))
    b.ridge(82 + rng.uniform(-3, 3, 5), rgb("fbfdff"))
    if rng.random() < 0.7:
        for _ in range(9):
            b.fill(oval(*rng.uniform((2, 2), (98, 56)), 1.7, 1.7), _SNOW)


def _city(b: Brush, rng: np.random.Generator) -> None:
    b.fade(0, 76, rgb("161a3f"), rgb("2f2f6b"), rgb("6b4a86"), rgb("b4718c"))
    moon = rng.uniform(12, 88)
    b.glow(moon, 15, 24, rgb("f6ecc5"), 0.55)
    b.fill(oval(moon, 15, 6.5, 6.5), rgb("f8f0cf"))
    if rng.random() < 0.5:  # a crescent
        b.fill(oval(moon + 3.5, 13.5, 5.6, 5.6), rgb("23265a"))
    for x in np.arange(-6, 106, 11.5):
        b.fill(box(x, rng.uniform(32, 54), x + 12, 80, 0.5), rgb("4a4684"))
    x = rng.uniform(-12, -2)
    while x < 100:
        wide, top = rng.uniform(19, 26), rng.uniform(22, 46)
        wall = mix(rgb("20244f"), rgb("3a2f5f"), rng.random())
        b.fill(box(x, top, x + wide, 80, 0.8), wall)
        for wx in np.arange(x + 4, x + wide - 5, 7.5):
            for wy in np.arange(top + 5, 70, 10):
                if rng.random() < 0.62:
                    light = mix(rgb("ffd97a"), rgb("f6a95b"), rng.random())
                    b.fill(box(wx, wy, wx + 4.4, wy + 5.6, 0.6), light)
        x += wide + rng.uniform(-1, 6)
    b.fade(76, 80, rgb("6d6a8c"), rgb("5d5a7e"))
    b.fade(80, 100, rgb("3c3a5c"), rgb("4b4970"))
    for wx in np.arange(rng.uniform(-16, 0), 100, 26):
        b.fill(poly((wx + 2, 95), (wx + 14, 95), (wx + 13, 97.5), (wx, 97.5)), rgb("e2d5a0"))
    x = rng.uniform(6, 14) if rng.random() < 0.5 else rng.uniform(86, 94)
    b.glow(x, 36, 22, rgb("ffe6a0"), 0.75)
    b.fill(box(x - 1.1, 38, x + 1.1, 80, 0.8), rgb("15172f"))
    b.fill(oval(x, 36, 4.2, 4.2), rgb("fff0bd"))


def _desert(b: Brush, rng: np.random.Generator) -> None:
    b.fade(0, 62, rgb("6cc0d8"), rgb("bfe0d2"), rgb("fbe6b8"))
    sun = rng.uniform(15, 85)
    b.glow(sun, 17, 30, rgb("fff6cf"), 0.95)
    b.fill(oval(sun, 17, 7.5, 7.5), rgb("fff6d2"))
    for _ in range(2):  # table mountains
        x, top, half = rng.uniform(5, 95), rng.uniform(38, 46), rng.uniform(10, 17)
        b.fill(poly((x - half, top), (x + half, top), (x + half + 6, 64), (x - half - 6, 64)), rgb("d08a62"))
        side = poly((x + 0.3 * half, top), (x + half, top), (x + half + 6, 64), (x + 0.5 * half, 64))
        b.fill(side, rgb("b97253"))
    for base, light, dark in ((58, "efb873", "d99a5b"), (68, "f3c582", "dea564"), (79, "f6d192", "e9b877")):
        peak, rise = rng.uniform(15, 85), rng.uniform(6, 10)
        b.ridge(base + rng.uniform(-1.5, 1.5, 5), rgb(light))
        lee = curve((peak, base - rise), (peak + 9, base + 1), (peak + 4, base + 9), (peak + 20, base + 15))
        crest = curve((peak + 46, base + 4), (peak + 20, base - 3), (peak, base - rise))
        bright = (peak - 40, base + 6), (peak - 18, base - 1), (peak, base - rise), (peak + 12, base + 8)
        b.fill(blob(*bright, (peak, base + 16)), rgb(light))
        b.fill(np.concatenate([lee, [[peak + 45, base + 14]], crest]), rgb(dark))
        b.ridge(base + 12 + rng.uniform(-1, 1, 5), rgb(light))
    for x in (rng.uniform(5, 16), rng.uniform(84, 95))[: 1 + int(rng.random() < 0.6)]:
        foot, tall = rng.uniform(74, 82), rng.uniform(28, 42)
        for path in (
            ((x, foot), (x, foot - tall)),
            ((x, foot - 0.35 * tall), (x - 8, foot - 0.4 * tall), (x - 8.5, foot - 0.72 * tall)),
            ((x, foot - 0.28 * tall), (x + 7.5, foot - 0.34 * tall), (x + 8, foot - 0.56 * tall)),
        ):
            b.fill(limb(curve(*path), 3.1, 2.9), rgb("3f8f62"))
        b.fill(limb(curve((x - 1, foot - 2), (x - 1, foot - tall + 2)), 0.9, 0.9), rgb("68b07c"))


def _kitchen(b: Brush, rng: np.random.Generator) -> None:
    wall = rgb(str(rng.choice(["f3e3c3", "d5e6dc", "f0d5c8", "d8e1ec"])))
    b.fade(0, 76, mix(wall, rgb("ffffff"), 0.25), mix(wall, rgb("8a7a6a"), 0.1))
    line = mix(wall, rgb("ffffff"), 0.55)
    for y in (50, 61):  # a splashback of large tiles
        b.fill(box(-2, y, 102, y + 1.2, 0.3), line)
        for x in np.arange((y - 50) * 0.7 - 2, 102, 15.4):
            b.fill(box(x, y, x + 1.2, y + 11, 0.3), line)
    left = rng.random() < 0.5
    x = rng.uniform(6, 14) if left else rng.uniform(58, 64)
    b.fill(box(x - 2, 7, x + 32, 45, 1.5), rgb("fffaf0"))
    b.fill(box(x + 1, 10, x + 29, 42, 0.5), rgb("a9d9ee"))
    b.fill(blob((x + 1, 42), (x + 1, 34), (x + 12, 30), (x + 29, 35), (x + 29, 42)), rgb("8fc48a"))
    b.fill(box(x + 14, 8, x + 16, 44, 0.2), rgb("fffaf0"))
    b.fill(box(x - 4, 44, x + 34, 47, 1), rgb("e6d3b3"))
    shelf = x + 44 if left else x - 46
    b.fill(box(shelf, 30, shelf + 36, 33.5, 0.8), rgb("a9744b"))
    tone = [rgb(t) for t in ("d96f5b", "e9b44c", "6c9f8d", "5d82a8")]
    rng.shuffle(tone)
    for i in range(3):
        tall = rng.uniform(10, 15)
        b.fill(box(shelf + 3 + 11 * i, 30 - tall, shelf + 11 + 11 * i, 30, 2), tone[i])
        b.fill(box(shelf + 4 + 11 * i, 27.5 - tall, shelf + 10 + 11 * i, 30.5 - tall, 1), rgb("f7efe0"))
    if rng.random() < 0.6:  # a hanging lamp
        x = rng.uniform(44, 56)
        b.fill(box(x - 0.6, -2, x + 0.6, 12, 0.2), rgb("5a4a42"))
        b.fill(poly((x - 3, 10), (x + 3, 10), (x + 8, 18), (x - 8, 18)), tone[3])
        b.glow(x, 20, 16, rgb("fff3c4"), 0.7)
    wood = mix(rgb("c48a58"), rgb("a86f4a"), rng.random())
    b.fade(72, 100, mix(wood, rgb("ffffff"), 0.16), wood)
    b.fill(box(-2, 70, 102, 73.5, 0.5), mix(wood, rgb("ffffff"), 0.38))
    for y in (82, 92):
        b.fill(box(-2, y, 102, y + 1, 0.3), mix(wood, rgb("4a2c18"), 0.25))


def _meadow(b: Brush, rng: np.random.Generator) -> None:
    b.fade(0, 60, rgb("6db7ee"), rgb("b5def6"), rgb("eef8f4"))
    _clouds(b, rng, 28, rgb("ffffff"), rgb("d9ebf5"))
    b.ridge(50 + rng.uniform(-6, 5, 5), rgb("9fcfa4"))
    b.ridge(58 + rng.uniform(-5, 4, 5), rgb("7fc077"))
    for x in (rng.uniform(4, 24), rng.uniform(76, 96)):
        if rng.random() < 0.65:
            _tree(b, x, 66, rng.uniform(26, 38), rgb("4d9a5c"), rgb("7a573f"))
    b.ridge(65 + rng.uniform(-3, 3, 5), rgb("8fcb63"))
    b.ridge(80 + rng.uniform(-2, 2, 5), rgb("7dbd55"))
    petal = [rgb(t) for t in ("ff8fab", "ffffff", "f7c948", "b892ff", "ff7b5a")]
    chosen = rng.permutation(5)[:3]
    for i in range(9):
        x, y = 4 + 11.5 * i + rng.uniform(-3.5, 3.5), rng.uniform(70, 77) if i % 2 else rng.uniform(84, 95)
        r = 2.4 + (y - 70) * 0.05
        tone = petal[chosen[i % 3]]
        b.fill(box(x - 0.5, y, x + 0.5, y + 3.2 * r, 0.2), rgb("4f8f3f"))
        for turn in np.arange(5) * 2 * np.pi / 5:
            b.fill(oval(x + r * np.sin(turn), y - r * np.cos(turn), 0.8 * r, 0.8 * r), tone)
        b.fill(oval(x, y, 0.75 * r, 0.75 * r), rgb("ffe27a") if tone != petal[2] else rgb("b5652a"))


def _sunset(b: Brush, rng: np.random.Generator) -> None:
    b.fade(0, 58, rgb("4b3a78"), rgb("a9528a"), rgb("ef7f6c"), rgb("fdbf6f"), rgb("ffe3a0"))
    sun, line = rng.uniform(20, 80), 57
    b.glow(sun, line - 8, 44, rgb("fff0b5"), 0.9)
    b.fill(oval(sun, line - 7, 11, 11), rgb("fff1b8"))
    for _ in range(int(rng.integers(1, 4))):  # long clouds lit from below
        x, y, wide = rng.uniform(5, 95), rng.uniform(12, 38), rng.uniform(12, 22)
        b.fill(blob((x - wide, y), (x, y - 3), (x + wide, y), (x, y + 2.5)), rgb("f4a08a"))
    b.ridge(50 + rng.uniform(-6, 6, 6), rgb("b5658a"))
    b.ridge(54 + rng.uniform(-4, 5, 6), rgb("7f4a7c"))
    b.fade(line, 84, rgb("f7b072"), rgb("d2707f"), rgb("744a82"))
    for i, wide in enumerate((10, 13, 8, 11)):  # the sun on the lake
        y = line + 1.5 + 4.6 * i
        left, right = sun - wide + rng.uniform(-3, 3), sun + wide + rng.uniform(-3, 3)
        b.fill(box(left, y, right, y + 2, 1), rgb("ffe3a0"))
    b.ridge(76 + rng.uniform(-2, 2, 5), rgb("5f3f6b"))
    b.ridge(80 + rng.uniform(-2, 2, 5), rgb("70496f"))
    x = rng.uniform(4, 14) if sun > 50 else rng.uniform(86, 96)
    if rng.random() < 0.7:
        _tree(b, x, 81, rng.uniform(40, 56), rgb("3f2c55"), rgb("35244a"))
    for x in (*rng.uniform(2, 30, 2), *rng.uniform(70, 98, 2)):
        b.fill(poly((x - 2.5, 84), (x - 4, 75), (x, 81), (x + 1, 73), (x + 2.5, 84)), rgb("4c3160"))


@dataclass(frozen=True)
class Scene:
    """A place: its phrase in captions, its drawing, and the colour of its light on the subject."""

    phrase: str
    paint: Callable[[Brush, np.random.Generator], None]
    light: Colour


PLACES = {
    "beach": Scene("on the beach", _beach, (1.0, 1.0, 0.98)),
    "forest": Scene("in the forest", _forest, (0.98, 1.0, 0.96)),
    "snow": Scene("in the snow", _snow, (0.98, 1.0, 1.02)),
    "city": Scene("in the city at night", _city, (0.88, 0.88, 1.0)),
    "desert": Scene("in the desert", _desert, (1.02, 1.0, 0.95)),
    "kitchen": Scene("in a kitchen", _kitchen, (1.0, 0.99, 0.96)),
    "meadow": Scene("on a flower meadow", _meadow, (1.0, 1.0, 1.0)),
    "sunset": Scene("at sunset", _sunset, (1.0, 0.92, 0.9)),
}
SCENES = tuple(PLACES)
