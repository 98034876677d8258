"""The subjects of the image world: identities, and drawings of the eight classes and four materials.

Subject units: x from -50 to 50 around the middle, y from about 0 (top) down to 100 (the ground). A subject is
drawn in palette indices (tones), so one drawing serves every colouring: an identity defines its own tones, a
material takes all of them from its ramp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moma.world.drawing import Colour, Pen, blob, box, curve, limb, mix, oklch, oval, poly, rgb, stream

CLASSES = ("cat", "dog", "bird", "turtle", "car", "robot", "teapot", "backpack")
MATERIALS = ("wooden", "golden", "stone", "icy")
PATTERNS = ("plain", "stripes", "spots", "patches")

# Tones: palette indices of one surface level.
NONE, LINE, MAIN, SHADE, SECOND, SECOND_SHADE, ACCENT, ACCENT_SHADE = range(8)
WHITE, DARK, GLASS, METAL, LAMP, PINK, SHINE, IRIS = range(8, 16)
TONES = 16
PATTERN, LIGHTER = 1, 2  # surface levels above the plain one (0): tone + TONES * level

_FIXED = {WHITE: "fbf7ee", DARK: "2b2833", GLASS: "a9d3e6", METAL: "a7afba", LAMP: "ffd35c"}
_FIXED |= {PINK: "ee8f93", SHINE: "ffffff"}
# The position of each tone on a material's ramp, from dark (0) to light (1).
_RAMP = {LINE: 0.0, MAIN: 0.62, SHADE: 0.46, SECOND: 0.8, SECOND_SHADE: 0.66, ACCENT: 0.42}
_RAMP |= {ACCENT_SHADE: 0.32}
_RAMP |= {WHITE: 0.95, DARK: 0.06, GLASS: 0.84, METAL: 0.72, LAMP: 0.9, PINK: 0.34, SHINE: 1.0, IRIS: 0.5}


@dataclass(frozen=True)
class Identity:
    """Everything that stays with a subject. Numbers named after parts of the body are in -1..1."""

    label: str
    main: Colour  # covers most of the subject
    second: Colour  # the pattern, and parts such as muzzle, belly, lid
    accent: Colour  # collar, beak, straps and the like
    pattern: str  # one of PATTERNS
    pattern_seed: int  # position of stripes, spots or patches
    pattern_turn: float  # of stripes, in degrees
    ears: float  # ears, crest, antenna, cabin, lid, handle
    girth: float  # width of the body
    limbs: float  # legs, wheels, spout, straps
    tail: float  # tail, neck, bumper, handle
    style: int  # 0, 1 or 2: the form of the class's optional part
    extra: bool  # collar, hat, roof rack, label and the like
    socks: bool  # feet, hubs, tips in the second colour


def _colours(rng: np.random.Generator) -> tuple[Colour, Colour, Colour]:
    """A main colour varied in hue and lightness, a second far from it in lightness, an accent far in hue."""
    hue, light = rng.uniform(0, 360), rng.uniform(0.48, 0.86)
    if 55 < hue < 125:  # dark yellows look muddy
        light = 0.62 + 0.6 * (light - 0.46)
    chroma = rng.uniform(0.015, 0.04) if rng.random() < 0.15 else rng.uniform(0.09, 0.17)
    away = rng.choice([25.0, -25.0, 150.0, 180.0, 210.0])
    lighter = rng.random() < 0.8 if light < 0.68 else rng.random() < 0.1
    second = rng.uniform(0.9, 0.95) if lighter else max(light - rng.uniform(0.28, 0.34), 0.36)
    if lighter and light > 0.62:  # the lighter the main colour, the nearer to white
        second = 0.965
    soft = rng.uniform(0.03, 0.07) if lighter else rng.uniform(0.07, 0.12)
    accent = hue + rng.choice([110.0, 140.0, 180.0, 220.0, 250.0])
    accent_light = rng.uniform(0.58, 0.78)
    return oklch(light, chroma, hue), oklch(second, soft, hue + away), oklch(accent_light, 0.16, accent)


def make_identity(label: str, number: int) -> Identity:
    """The identity of that number in its class."""
    rng = stream("identity", CLASSES.index(label), number)
    main, second, accent = _colours(rng)
    pattern = str(rng.choice(PATTERNS, p=[0.28, 0.24, 0.24, 0.24]))
    seed, turn = int(rng.integers(1 << 30)), float(rng.choice([0.0, 90.0, 35.0]) + rng.uniform(-8, 8))
    build = [float(v) for v in rng.uniform(-1, 1, 4)]
    style, flags = int(rng.integers(3)), rng.random(2) < 0.5
    colours, extras = (main, second, accent), (bool(flags[0]), bool(flags[1]))
    return Identity(label, *colours, pattern, seed, turn, *build, style, *extras)


# ---- colouring ----


def own_palette(who: Identity) -> np.ndarray:
    """The identity's palette (3 * TONES, 3), floats 0..1. The pattern's level replaces main by second."""
    black = rgb("1d1a26")
    tones = {tone: rgb(text) for tone, text in _FIXED.items()}
    tones |= {MAIN: who.main, SECOND: who.second, ACCENT: who.accent, LINE: mix(black, who.main, 0.14)}
    tones |= {SHADE: mix(who.main, black, 0.2), SECOND_SHADE: mix(who.second, black, 0.16)}
    tones |= {ACCENT_SHADE: mix(who.accent, black, 0.22), IRIS: mix(who.accent, rgb("ffffff"), 0.15)}
    table = np.zeros((3, TONES, 3))
    for tone, colour in tones.items():
        table[:, tone] = colour
    table[PATTERN, [MAIN, SHADE]] = table[0, [SECOND, SECOND_SHADE]]
    return table.reshape(-1, 3)


@dataclass(frozen=True)
class Material:
    """A surface: a ramp of colours, darkest first, and the shifts of its figure along it."""

    ramp: tuple[str, ...]
    darker: float  # shift of the figure's dark parts (level PATTERN)
    lighter: float  # shift of its light parts (level LIGHTER)
    cover: float  # opacity: below 1 the scene shines through
    gloss: float  # strength of the light from above left, 1 for ordinary surfaces


SURFACES = {
    "wooden": Material(("3d2314", "7a4a26", "b07a45", "d3a268", "ecca95"), -0.17, 0.1, 1.0, 1.0),
    "golden": Material(("4a2c05", "a8700f", "e0a51f", "f8d24d", "fff3b0"), -0.2, 0.3, 1.0, 1.7),
    "stone": Material(("2f3134", "65686b", "92948f", "b5b5ad", "d9d8d0"), -0.18, 0.17, 1.0, 1.1),
    "icy": Material(("2f6f9e", "6fb3dc", "a5d8f2", "d2eefb", "ffffff"), -0.16, 0.22, 0.86, 1.3),
}


def material_palette(name: str) -> np.ndarray:
    """The material's palette (3 * TONES, 3), floats 0..1."""
    surface = SURFACES[name]
    ramp = np.array([rgb(text) for text in surface.ramp])
    table = np.zeros((3, TONES, 3))
    for tone, place in _RAMP.items():
        for level, shift in enumerate((0.0, surface.darker, surface.lighter)):
            at = np.clip(place + (shift if tone not in (LINE, DARK, SHINE) else 0.0), 0, 1) * (len(ramp) - 1)
            table[level, tone] = [np.interp(at, range(len(ramp)), ramp[:, i]) for i in range(3)]
    return table.reshape(-1, 3)


def draw_pattern(pen: Pen, who: Identity) -> None:
    """The identity's stripes, spots or patches over the whole subject, as level PATTERN."""
    rng = stream("pattern", who.pattern_seed)
    if who.pattern == "stripes":
        gap, shift = rng.uniform(20, 25), rng.uniform(0, 20)
        brush = pen.turned(who.pattern_turn, 0, 50)
        bend = rng.uniform(-4, 4)
        for x in np.arange(-90 + shift, 90, gap):
            y = np.linspace(-50, 150, 9)
            middle = np.stack([x + bend * np.sin(y / 14), y], 1)
            brush.shape(np.concatenate([middle, middle[::-1] + np.array([0.42 * gap, 0])]), PATTERN, 0)
    elif who.pattern == "spots":
        gap, size, shift = rng.uniform(21, 26), rng.uniform(6.2, 7.8), rng.uniform(-10, 10, 2)
        for row, y in enumerate(np.arange(-10, 112, 0.87 * gap)):
            for x in np.arange(-75, 75, gap) + (row % 2) * gap / 2:
                dx, dy = rng.uniform(-2.5, 2.5, 2) + shift
                pen.shape(oval(x + dx, y + dy, size, size * rng.uniform(0.9, 1.1)), PATTERN, 0)
    elif who.pattern == "patches":
        for x, y in ((-34, 24), (14, 6), (30, 58), (-18, 66), (4, 96)):
            bumps = rng.uniform(11, 20, 6)
            turn = rng.uniform(0, 6.3) + np.arange(6) * np.pi / 3
            dx, dy = rng.uniform(-7, 7, 2)
            ring = np.stack([x + dx + bumps * np.cos(turn), y + dy + bumps * np.sin(turn)], 1)
            pen.shape(blob(*ring), PATTERN, 0)


def draw_figure(pen: Pen, material: str, seed: int) -> None:
    """The material's figure over the whole subject, as levels PATTERN (darker) and LIGHTER."""
    rng = stream("figure", seed)
    if material == "wooden":  # wide waving grain, and one knot
        x = np.linspace(-75, 75, 13)
        phase, knot = rng.uniform(0, 6.3), rng.uniform((-20, 30), (20, 75))
        for row, y in enumerate(np.arange(-4, 112, 15.0)):
            middle = np.stack([x, y + 3.5 * np.sin(x / 17 + phase + 0.35 * row)], 1)
            width = 5.5 if row % 2 else 4.0
            pen.shape(np.concatenate([middle, middle[::-1] + np.array([0, width])]), PATTERN, 0)
        pen.shape(oval(*knot, 10, 7), PATTERN, 0)
        pen.shape(oval(*knot, 5.5, 3.2), NONE, 0)
    elif material == "golden":  # one wide and one narrow sheen, a dark reflection below each
        brush, shift = pen.turned(28, 0, 50), rng.uniform(-6, 6)
        for x, width in ((-30, 9), (-15, 3.5), (22, 7)):
            left = x + shift
            brush.shape(poly((left, -60), (left + width, -60), (left + width, 160), (left, 160)), LIGHTER, 0)
            left += width + 6
            brush.shape(poly((left, -60), (left + 5, -60), (left + 5, 160), (left, 160)), PATTERN, 0)
    elif material == "stone":  # a few blotches, dark and light
        for i in range(16):
            x, y = -45 + 30 * (i % 4) + rng.uniform(-9, 9), 4 + 29 * (i // 4) + rng.uniform(-9, 9)
            rx, ry = rng.uniform(5, 11, 2)
            pen.shape(oval(x, y, rx, ry, rng.uniform(0, 180)), PATTERN if i % 2 else LIGHTER, 0)
    else:  # facets
        for i, x in enumerate((-60, -34, -8, 18, 44)):
            top, foot = x + rng.uniform(-8, 8), x + rng.uniform(-8, 8) - 24
            split = rng.uniform(35, 65)
            at = top + (foot - top) * split / 100
            level = LIGHTER if i % 2 else PATTERN
            pen.shape(poly((top, -20), (top + 19, -20), (at + 6, split)), level, 0)
            pen.shape(poly((at + 6, split), (foot + 24, 120), (foot, 120)), LIGHTER + PATTERN - level, 0)


# ---- the classes ----


@dataclass(frozen=True)
class Pose:
    """Small differences between two images of one subject, each in -1..1."""

    tilt: float
    swing: float


def _eye(pen: Pen, x: float, y: float, r: float, look: float = 0.0, iris: bool = False) -> None:
    pen.shape(oval(x, y, r, 1.1 * r), IRIS if iris else WHITE, 0.8)
    pen.shape(oval(x + look, y + 0.5, 0.62 * r, 0.8 * r), DARK, 0)
    pen.shape(oval(x + look - 0.25 * r, y - 0.35 * r, 0.32 * r, 0.32 * r), SHINE, 0)


def _cat(pen: Pen, who: Identity, pose: Pose) -> None:
    wide, lift = 3.5 * who.girth, 5 * pose.swing
    tails = (
        ((16, 90), (38, 92), (46, 74), (40 + lift, 56)),
        ((16, 92), (40, 90), (34, 70), (47 + lift, 54)),
        ((16, 92), (36, 95), (48, 84), (46 + lift, 70)),
    )
    tail, thick = curve(*tails[who.style]), 5.5 + who.tail
    pen.shape(limb(tail, thick, thick), MAIN)
    if who.socks:
        pen.shape(limb(tail[-7:], thick, thick), SECOND, 0)
    side = 24 + wide
    body = blob((-15, 50), (15, 50), (side - 3, 74), (side, 94), (0, 100), (-side, 94), (3 - side, 74))
    pen.shape(body, MAIN)
    pen.shape(blob((0, 56), (11, 68), (9, 86), (0, 92), (-9, 86), (-11, 68)), SECOND, 0)
    for x in (-10, 10):
        pen.shape(oval(x, 95, 8.5, 5.5), SECOND if who.socks else MAIN)
    if who.extra:
        pen.shape(blob((-18, 54), (0, 60), (18, 54), (17, 61), (0, 67), (-17, 61)), ACCENT)
        pen.shape(oval(0, 67, 4.5, 4.5), LAMP, 0.8)
    head = pen.turned(6 * pose.tilt, 0, 56)
    tip, out = -1 - 4 * who.ears, 27 + 2 * who.ears
    for s in (-1, 1):
        head.shape(poly((s * 31, 30), (s * out, tip), (s * 6, 16)), MAIN)
        head.shape(poly((s * 26, 22), (s * (out - 2), tip + 8), (s * 13, 16)), PINK, 0)
    head.shape(blob((0, 11), (20, 14), (33, 32), (28, 50), (0, 59), (-28, 50), (-33, 32), (-20, 14)), MAIN)
    head.shape(oval(0, 49, 13, 8.5), SECOND, 0)
    for s in (-1, 1):
        _eye(head, s * 14.5, 34, 8, -s, iris=True)
        head.stroke(curve((0, 48), (s * 3, 53), (s * 7, 51)), LINE, 0.9)
    head.shape(poly((-4, 43), (4, 43), (0, 48)), PINK, 0.5)


def _dog(pen: Pen, who: Identity, pose: Pose) -> None:
    deep, wag = 2.5 * who.girth, 7 * pose.swing
    tails = (
        ((-34, 58), (-46, 48), (-48 + wag, 32)),
        ((-34, 58), (-48, 56), (-50, 42), (-40 + wag, 36)),
        ((-34, 60), (-44, 56), (-50 + wag, 46)),
    )
    pen.shape(limb(curve(*tails[who.style]), 6, 4 - 0.8 * who.tail), MAIN)
    foot = SECOND if who.socks else MAIN
    for x in (-19, 12):
        pen.shape(box(x - 6, 66, x + 6, 98, 5), SHADE)
    body = blob((-38, 58), (-20, 50 - deep), (20, 48), (31, 62), (24, 82), (-14, 82 + deep), (-36, 80))
    pen.shape(body, MAIN)
    pen.shape(blob((-26, 80), (-8, 74), (14, 77), (10, 84), (-10, 84 + deep)), SECOND, 0)
    for x in (-30, 23):
        pen.shape(box(x - 7, 66, x + 7, 100, 5), MAIN)
        pen.shape(box(x - 7, 89, x + 8, 100, 5), foot)
        pen.shape(box(x - 5, 60, x + 5, 84, 5), MAIN, 0)
    if who.extra:
        pen.shape(blob((2, 58), (20, 66), (40, 58), (38, 66), (20, 74), (2, 66)), ACCENT)
    head = pen.turned(6 * pose.tilt, 20, 55)
    head.shape(blob((20, 8), (38, 14), (46, 34), (40, 56), (20, 63), (0, 56), (-6, 34), (2, 14)), MAIN)
    long = 6 * who.ears
    for s in (-1, 1):
        if who.style == 2:  # pricked ears
            head.shape(poly((20 + s * 5, 14), (20 + s * 24, -8 - long / 2), (20 + s * 25, 26)), SECOND)
        else:
            ear = ((20 + s * 13, 10), (20 + s * 26, 10), (20 + s * 33, 30), (20 + s * 29, 46 + long))
            head.shape(blob(*ear, (20 + s * 22, 36)), SECOND)
    head.shape(oval(20, 49, 15, 12), WHITE if who.style == 2 else SECOND, 0.7)
    for s in (-1, 1):
        _eye(head, 20 + s * 11, 29, 7.2, 0.5)
        head.stroke(curve((20, 50), (20 + s * 3, 55), (20 + s * 7, 54)), LINE, 0.9)
    head.shape(oval(20, 43, 6, 4.6), DARK, 0.4)
    head.shape(oval(18.5, 41.8, 1.7, 1.2), SHINE, 0)


def _bird(pen: Pen, who: Identity, pose: Pose) -> None:
    plump, flap = 3 * who.girth, 5 * pose.swing
    for x in (-4, 12):
        pen.stroke(poly((x, 84), (x + 1, 98)), LINE, 3.6)
        pen.stroke(poly((x - 5, 98), (x + 9, 98)), LINE, 3.2)
        pen.stroke(poly((x, 84), (x + 1, 98)), ACCENT, 1.9)
        pen.stroke(poly((x - 5, 98), (x + 9, 98)), ACCENT, 1.7)
    end = -46 - 4 * who.tail
    pen.shape(blob((-18, 60), (end, 44 + flap), (end - 2, 56 + flap), (-22, 76)), SECOND)
    if who.style == 1:  # crest
        for dx, dy in ((-6, 2), (2, -3), (10, -4)):
            pen.shape(limb(curve((14, 20), (10 + dx, 6 + dy - 3 * who.ears)), 4, 3), ACCENT)
    pen.shape(poly((38, 26), (53 + 2 * who.limbs, 35), (38, 43)), ACCENT)
    front = (14, 6), (34, 12), (41, 30), (36, 48), (34, 68), (18, 86 + plump / 2), (-8, 87 + plump / 2)
    pen.shape(blob(*front, (-28 - plump, 72), (-24, 54), (-10, 40), (-8, 20)), MAIN)
    pen.shape(blob((33, 54), (31, 70), (17, 83 + plump / 2), (2, 82), (14, 66), (24, 54)), SECOND, 0)
    wing = pen.turned(7 * pose.swing, 2, 50)
    wing.shape(blob((6, 50), (10, 62), (-4, 75), (-34, 80 - 3 * who.limbs), (-26, 62), (-10, 48)), SHADE)
    if who.socks:
        wing.shape(blob((-8, 72), (-34, 80 - 3 * who.limbs), (-28, 66), (-16, 66)), ACCENT, 0)
    if who.style == 2:  # cap
        pen.shape(blob((-6, 22), (0, 12), (14, 6), (30, 10), (36, 17), (16, 15), (4, 22)), ACCENT, 0)
    _eye(pen, 24, 29, 9, 1 + pose.tilt)
    if who.extra:
        pen.shape(oval(15, 43, 4.5, 3.2), PINK, 0)


def _turtle(pen: Pen, who: Identity, pose: Pose) -> None:
    high, step = 12 - 5 * who.girth, 3 * pose.swing
    pen.shape(limb(curve((-40, 84), (-50, 86), (-58, 80 - 3 * who.tail)), 5, 2.5), SECOND)
    for x in (-22, 10):
        pen.shape(box(x - 7 - step, 78, x + 7 - step, 97, 6), SECOND_SHADE)
    neck = pen.turned(6 * pose.tilt, 26, 78)
    neck.shape(limb(curve((22, 80), (36, 78), (44, 58)), 10, 10), SECOND)
    neck.shape(blob((44, 30), (60, 36), (66, 52), (58, 64), (42, 66), (30, 58), (29, 40)), SECOND)
    dome = (-28, 28 + high), (-6, 20 + high), (16, 28 + high)
    pen.shape(blob((-46, 84), (-44, 54), *dome, (33, 56), (35, 84)), MAIN)
    if who.pattern == "plain":  # a plain shell shows its plates
        pen.stroke(curve((-44, 58), (-20, 52), (8, 52), (32, 58)), SHADE, 1.6)
        for x0, x1 in ((-20, -26), (8, 14)):
            pen.stroke(curve((x0, 52), (x1, 82)), SHADE, 1.6)
        pen.stroke(curve((-6, 22 + high), (-6, 52)), SHADE, 1.6)
    rim = blob((-50, 80), (-28, 84), (14, 84), (39, 80), (39, 89), (14, 92), (-28, 92), (-50, 89))
    pen.shape(rim, ACCENT)
    for x in (-32, 22):
        pen.shape(box(x - 9 + step, 84, x + 9 + step, 100, 6), SECOND)
    if who.style == 2:  # hat
        neck.shape(blob((30, 36), (36, 22 - 2 * who.ears), (50, 22 - 2 * who.ears), (58, 36)), ACCENT)
    _eye(neck, 51, 45, 8, 1.5)
    neck.stroke(curve((50, 60), (57, 60), (63, 55)), LINE, 0.9)
    if who.extra:
        neck.shape(oval(41, 55, 4.5, 3), PINK, 0)


def _car(pen: Pen, who: Identity, pose: Pose) -> None:
    tall, r = 4 * who.ears, 14 + 1.6 * who.limbs
    if who.extra:  # roof load
        pen.shape(box(-24, 22 - tall, 16, 34 - tall, 3), ACCENT)
    if who.style == 0:  # saloon
        roof = blob((-42, 62), (-34, 40), (-24, 32 - tall), (14, 32 - tall), (26, 42), (38, 62))
        panes = ((-31, 57, -5), (0, 57, 27))
    elif who.style == 1:  # beetle
        roof = blob((-46, 66), (-36, 42), (-14, 28 - tall), (10, 30 - tall), (28, 46), (40, 66))
        panes = ((-32, 57, -6), (-1, 57, 24))
    else:  # van
        roof = box(-54, 28 - tall, 30, 72, 9)
        panes = ((-46, 55, -12), (-7, 55, 23))
    pen.shape(roof, MAIN)
    for i, (x0, y1, x1) in enumerate(panes):
        top = 39 - tall
        lean = 0 if who.style == 2 else 7
        left, right = (lean, 0) if i == 0 else (0, lean)
        pen.shape(poly((x0 + left, top), (x1 - right, top), (x1, y1), (x0, y1)), GLASS, 0.8)
        pen.shape(poly((x0 + left + 4, top), (x0 + left + 10, top), (x0 + 7, y1), (x0 + 1, y1)), SHINE, 0)
    nose = 60 - 2 * who.tail
    if who.style == 2:
        pen.shape(blob((-56, 58), (-40, 56), (30, 56), (48, nose), (57, 70), (56, 86), (-54, 87)), MAIN)
    else:
        pen.shape(blob((-57, 66), (-44, 58), (34, 57), (52, nose + 2), (58, 74), (55, 87), (-55, 87)), MAIN)
    pen.shape(box(-55, 80, 56, 88, 4), SECOND if who.socks else SHADE, 0)
    pen.shape(oval(51, 70, 5.5, 5.5), LAMP, 0.8)
    pen.shape(box(-58, 66, -51, 75, 2.5), PINK, 0.8)
    pen.stroke(poly((-3, 60), (-3, 78)), LINE, 0.8)
    for x in (-31, 31):
        pen.shape(oval(x, 99.5 - r, r, r), DARK)
        pen.shape(oval(x, 99.5 - r, 0.52 * r, 0.52 * r), ACCENT if who.socks else METAL, 0)
        pen.shape(oval(x, 99.5 - r, 0.18 * r, 0.18 * r), DARK, 0)


def _robot(pen: Pen, who: Identity, pose: Pose) -> None:
    wide, arm = 3 * who.girth, 9 * pose.swing
    for x in (-12, 12):
        pen.shape(box(x - 5, 78, x + 5, 95, 2), METAL)
        pen.shape(box(x - 10, 90, x + 10, 100, 4.5), SECOND if who.socks else SHADE)
    for s in (-1, 1):
        hand = (s * (38 + wide), 74 - s * arm)
        pen.shape(limb(curve((s * 22, 56), (s * (34 + wide), 60), hand), 4.2, 4.2), METAL)
        pen.shape(oval(*hand, 6.5, 6.5), ACCENT)
    pen.shape(box(-24 - wide, 50, 24 + wide, 84, 6), MAIN)
    panel = box(-13, 57, 13, 76, 3) if who.style != 1 else oval(0, 67, 11, 11)
    pen.shape(panel, SECOND, 0.8)
    if who.style == 0:
        for x, tone in ((-6, ACCENT), (6, LAMP)):
            pen.shape(oval(x, 66, 3.6, 3.6), tone, 0.5)
    elif who.style == 1:
        pen.shape(blob((0, 73), (-7, 65), (-3, 61), (0, 63), (3, 61), (7, 65)), ACCENT, 0)
    else:
        pen.shape(box(-9, 62, 9, 66, 1.5), ACCENT, 0)
        pen.shape(box(-9, 69, 3, 73, 1.5), LAMP, 0)
    pen.shape(box(-7, 44, 7, 52, 1), METAL)
    head = pen.turned(5 * pose.tilt, 0, 46)
    top = 14
    for x in (0,) if not who.extra else (-14, 14):
        head.stroke(poly((x, top), (x * 1.2, 4)), LINE, 2.6)
        head.shape(oval(x * 1.2, 2 - who.ears, 5, 5), ACCENT)
    for s in (-1, 1):
        head.shape(box(s * 31 - 5, 23, s * 31 + 5, 37, 3), ACCENT)
    head.shape(box(-30, top, 30, 47, (7, 14, 10)[who.style]), MAIN)
    head.shape(box(-23, 20, 23, 42, 7), SECOND if who.tail > 0 else METAL, 0.8)
    for s in (-1, 1):
        _eye(head, s * 11, 28.5, 7, 0.5 * pose.swing)
    head.stroke(poly((-8, 38.5), (8, 38.5)), LINE, 1.2)


def _teapot(pen: Pen, who: Identity, pose: Pose) -> None:
    wide, low = 3 * who.girth, 2 * who.tail
    handle = ((-28, 44), (-50, 40 + low), (-54, 62), (-44, 78), (-24, 82))
    if who.style == 1:  # an edged handle
        handle = ((-28, 42), (-52, 42), (-53, 60), (-46, 76), (-24, 82))
    path = curve(*handle)
    for tone, extra in ((LINE, 1.0), (ACCENT, 0.0)):
        pen.shape(limb(path, 4.4, 4.4), tone, extra)
    up = 30 - 5 * who.limbs
    tip = ((50, up), (52, up - 2), (48, up + 2))[who.style]
    pen.shape(limb(curve((24, 78), (38, 66), (42, 48), tip), 10, 4.6), MAIN)
    pen.shape(limb(curve((tip[0] - 3, up + 3), (tip[0] + 3, up - 2)), 5.5, 5.5), SECOND)
    pen.shape(box(-20, 90, 20, 100, 4), ACCENT if who.socks else SECOND)
    side = 34 + wide
    if who.style == 2:  # tall and conical
        right, left = ((20, 30), (29, 62), (side - 2, 88)), ((2 - side, 88), (-29, 62), (-20, 30))
    else:
        right, left = ((20, 32), (side, 52), (side, 78)), ((-side, 78), (-side, 52), (-20, 32))
    pen.shape(blob(left[-1], *right, (20, 96), (-20, 96), *left[:-1]), MAIN)
    if who.extra:  # a band around the belly
        band = blob((-side, 61), (0, 67), (side, 61), (side, 70), (0, 76), (-side, 70))
        pen.shape(band, SECOND, 0)
    dome = 4 * who.ears
    pen.shape(blob((-24, 33), (-16, 20 - dome), (0, 15 - dome), (16, 20 - dome), (24, 33), (0, 37)), SECOND)
    pen.shape(oval(0, 11 - dome, 6.5, 6.5), ACCENT)
    pen.shape(blob((-24, 52), (-19, 44), (-15, 47), (-19, 62), (-23, 68)), SHINE, 0)


def _backpack(pen: Pen, who: Identity, pose: Pose) -> None:
    wide, r = 3 * who.girth, (16, 24, 10)[who.style]
    loop = 2 * who.ears
    path = curve((-12, 14), (-9, 2 - loop), (9, 2 - loop), (12, 14))
    pen.shape(limb(path, 3.6, 3.6), ACCENT)
    side = 32 + wide
    sway = 3 * pose.swing
    for s in (-1, 1):
        strap = curve((s * 24, 24), (s * (side + 7), 44), (s * (side + 6) + sway, 70))
        pen.shape(limb(strap, 4.5, 4.0), ACCENT)
        pen.shape(box(s * side - 9, 62, s * side + 9, 95, 6), SECOND)
    pen.shape(box(-side, 9, side, 100, r, 2), MAIN)
    deep = 46 + 3 * who.tail
    pocket = box(-side + 8, 62, side - 8, 94, (7, 12, 4)[who.style])
    pen.shape(pocket, SECOND)
    pen.shape(box(-side + 8, 60, side - 8, 71, 5), ACCENT if who.socks else SECOND_SHADE, 0.9)
    if who.extra:  # a flap with two straps
        foot = (side - 4, deep), (0, deep + 4), (4 - side, deep)
        pen.shape(blob((-side + 1, 24), (-20, 9), (20, 9), (side - 1, 24), *foot), MAIN)
        for x in (-15, 15):
            pen.shape(box(x - 4, 26, x + 4, deep + 8, 2), ACCENT, 0.8)
            pen.shape(box(x - 5.5, deep - 1, x + 5.5, deep + 8, 2), LAMP, 0.6)
    else:  # a zip and a round badge
        zip_ = curve((-side + 5, 44), (-side + 9, 22), (0, 18), (side - 9, 22), (side - 5, 44))
        pen.stroke(zip_, SHADE, 1.8)
        pen.shape(oval(0, 40, 9.5, 9.5), ACCENT, 0.8)
        pen.shape(oval(0, 40, 4.2, 4.2), LAMP, 0)
    pen.shape(box(-4, 67, 4, 76, 2), LAMP, 0.6)


DRAWERS: dict[str, Callable[[Pen, Identity, Pose], None]] = dict(
    zip(CLASSES, (_cat, _dog, _bird, _turtle, _car, _robot, _teapot, _backpack), strict=True)
)
# Left, right and top of what nearly every subject of a class fills, with its outline; the foot is at 100.
EXTENTS = {
    "cat": (-38, 58, -8), "dog": (-62, 58, -13), "bird": (-57, 58, -6), "turtle": (-63, 73, 17),
    "car": (-67, 67, 17), "robot": (-50, 50, -7), "teapot": (-63, 64, -1), "backpack": (-50, 50, -8),
}  # fmt: skip
