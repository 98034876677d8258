"""The image world of MoMA-mini: subjects with an identity, in a scene, at times made of another material.

Every image follows from its `Spec` alone and every spec from (split, index) alone, so nothing is stored.
The same identity in another place is `dataclasses.replace(spec, scene=..., pose_seed=...)`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from moma.world.drawing import Brush, Pen, stream
from moma.world.scenes import PLACES, SCENES
from moma.world.subjects import (
    CLASSES,
    DRAWERS,
    EXTENTS,
    LINE,
    MATERIALS,
    PATTERN,
    SURFACES,
    TONES,
    Identity,
    Pose,
    draw_figure,
    draw_pattern,
    make_identity,
    material_palette,
    own_palette,
)

__all__ = [
    "CLASSES", "DEFAULT", "MATERIALS", "SCENES", "SPLITS", "Identity", "Sample", "Spec", "WorldConfig",
    "backdrop", "caption", "draw", "held_out", "identity", "prompt", "render", "render_many", "spec",
]  # fmt: skip

SPLITS = ("train", "val", "test")
_SEEDS = 1 << 31  # seeds of poses and scenes lie below this


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and numbers of the world."""

    size: int = 64  # side of an image: the smallest at which faces and patterns read well
    oversample: int = 4  # drawn this much larger, then averaged: smooth edges
    identities: int = 4000  # per class in training: too many to memorise, so features have to carry identity
    unseen_identities: int = 500  # per class and split kept for val and for test
    unseen_share: float = 0.1  # share of class x scene x material never trained: tests new combinations
    material_share: float = 0.35  # of images with a material: it needs practice, but mostly identities show
    smallest: float = (
        0.62  # subject's height (or most of its width) as a share of the side: large enough to read
    )
    largest: float = 0.78  # leaves the scene room to be recognised
    wide: float = 0.88  # of a width counts like a height: wide subjects do not shrink to a strip
    highest_foot: float = (
        0.85  # where the subject stands, share of the side from the top: always on the ground
    )
    lowest_foot: float = 0.94
    stray: float = 0.09  # how far from the middle a subject may stand, share of the side
    margin: float = 0.02  # kept free at the sides, share of the side
    lean: float = 3.0  # degrees a whole subject may tip
    line: float = 1.15  # outline's width in pixels of an image 64 wide: bold enough for a coarse autoencoder
    relief: float = 0.5  # strength of the soft light from above left
    shadow: float = 0.36  # darkness of the contact shadow
    weather: float = 0.05  # how far a scene's light may vary per channel: times of day

    def __post_init__(self) -> None:
        if min(self.size, self.oversample, self.identities, self.unseen_identities) < 1:
            raise ValueError("size, oversample, identities and unseen_identities must be at least 1")


DEFAULT = WorldConfig()


@dataclass(frozen=True)
class Spec:
    """What an image shows; it determines every pixel."""

    label: str  # one of CLASSES
    number: int  # identity number within the class
    scene: str  # one of SCENES
    material: str | None  # one of MATERIALS, or None for the identity's own colours
    pose_seed: int  # place, size, facing and small movements
    scene_seed: int  # the scene's variation, and the caption's wording


class Sample(NamedTuple):
    """An image and what is known about it."""

    image: np.ndarray  # (size, size, 3) uint8, RGB
    mask: (
        np.ndarray
    )  # (size, size) uint8, share of each pixel the subject covers (0..255), without its shadow
    label: str
    caption: str
    attributes: dict[str, Any]  # label, scene, material, number, main, second, accent (RGB 0..1), pattern


def _known(kind: str, value: str | None, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"unknown {kind} {value!r}: expected one of {', '.join(options)}")


def _check(label: str, scene: str, material: str | None) -> None:
    _known("label", label, CLASSES)
    _known("scene", scene, SCENES)
    if material is not None:
        _known("material", material, MATERIALS)


# ---- what to draw ----


@lru_cache(maxsize=4096)
def identity(label: str, number: int, cfg: WorldConfig = DEFAULT) -> Identity:
    """The identity of that number (0 up) in its class; from cfg.identities on they are never trained."""
    _known("label", label, CLASSES)
    end = cfg.identities + 2 * cfg.unseen_identities
    if not 0 <= number < end:
        raise ValueError(f"unknown identity {number}: expected 0 to {end - 1}")
    return make_identity(label, number)


@lru_cache(maxsize=8)
def _unseen(share: float) -> frozenset[tuple[str, str, str | None]]:
    """Combinations kept from training: a like number per class and material, so none loses many."""
    rng, found = stream("unseen"), set()
    for label in CLASSES:
        for material in (None, *MATERIALS):
            count = int(share * len(SCENES) + rng.random())
            found |= {(label, SCENES[i], material) for i in rng.permutation(len(SCENES))[:count]}
    return frozenset(found)


def held_out(label: str, scene: str, material: str | None, cfg: WorldConfig = DEFAULT) -> bool:
    """Whether the combination never occurs in training."""
    _check(label, scene, material)
    return (label, scene, material) in _unseen(cfg.unseen_share)


def spec(index: int, split: str = "train", cfg: WorldConfig = DEFAULT) -> Spec:
    """The index-th image (0 up) of a split.

    Training takes trained identities and combinations; val and test take identities of their own and any
    combination.
    """
    _known("split", split, SPLITS)
    if index < 0:
        raise ValueError(f"index {index}: expected 0 or more")
    rng = stream("spec", SPLITS.index(split), index)
    first = 0 if split == "train" else cfg.identities + (split == "test") * cfg.unseen_identities
    count = cfg.identities if split == "train" else cfg.unseen_identities
    label, number = CLASSES[rng.integers(len(CLASSES))], first + int(rng.integers(count))
    while True:
        scene = SCENES[rng.integers(len(SCENES))]
        material = MATERIALS[rng.integers(len(MATERIALS))] if rng.random() < cfg.material_share else None
        if split != "train" or not held_out(label, scene, material, cfg):
            pose_seed, scene_seed = (int(v) for v in rng.integers(_SEEDS, size=2))
            return Spec(label, number, scene, material, pose_seed, scene_seed)


def _phrase(label: str, material: str | None) -> str:
    words = f"{material} {label}" if material else label
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def prompt(label: str, scene: str, material: str | None = None) -> str:
    """The plain caption: "a wooden cat on the beach"."""
    _check(label, scene, material)
    return f"{_phrase(label, material)} {PLACES[scene].phrase}"


# the plain wording is the prompt's, and therefore the most frequent
_WORDINGS = ("{what} {where}",) * 3 + (
    "{where}, {what}",
    "an image of {what} {where}",
    "{what} standing {where}",
)


def caption(what: Spec) -> str:
    """Names class, scene and material, never the identity; the wording follows from the scene's seed."""
    _check(what.label, what.scene, what.material)
    wording = _WORDINGS[stream("caption", what.scene_seed).integers(len(_WORDINGS))]
    return wording.format(what=_phrase(what.label, what.material), where=PLACES[what.scene].phrase)


# ---- drawing it ----


def _place(what: Spec, cfg: WorldConfig) -> tuple[np.ndarray, Pose]:
    """Subject units to pixels of the large drawing (2, 3), and the pose."""
    rng = stream("pose", what.pose_seed)
    x0, x1, y0 = EXTENTS[what.label]
    side = cfg.size * cfg.oversample
    size = rng.uniform(cfg.smallest, cfg.largest)
    flip = -1 if rng.random() < 0.5 else 1
    unit = size / max(100 - y0, cfg.wide * (x1 - x0))
    foot = rng.uniform(cfg.highest_foot, cfg.lowest_foot)
    room = max(0.5 - cfg.margin - unit * (x1 - x0) / 2, 0.0)  # the subject's own middle stays this near 0.5
    shift = float(np.clip(rng.uniform(-cfg.stray, cfg.stray), -room, room))
    middle = 0.5 + shift - flip * unit * (x0 + x1) / 2
    turn = np.radians(cfg.lean * rng.uniform(-1, 1))
    c, s = unit * np.cos(turn), unit * np.sin(turn)
    linear = np.array([[flip * c, -s], [flip * s, c]])
    offset = np.array([middle, foot]) - linear @ (0, 100)  # the foot (0, 100) stands where it should
    tilt, swing = rng.uniform(-1, 1, 2)
    return side * np.concatenate([linear, offset[:, None]], 1), Pose(float(tilt), float(swing))


def _subject(what: Spec, cfg: WorldConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colour times coverage (S, S, 3) and coverage (S, S), 0..1; slope towards the light (S, S), -1..1."""
    who = identity(what.label, what.number, cfg)
    matrix, pose = _place(what, cfg)
    side, times = cfg.size * cfg.oversample, cfg.oversample
    line = cfg.line * side / 64
    tones, levels = Image.new("L", (side, side)), Image.new("L", (side, side))
    DRAWERS[what.label](Pen(tones, matrix, line, LINE), who, pose)
    if what.material:
        draw_figure(Pen(levels, matrix, line, PATTERN), what.material, who.pattern_seed)
    else:
        draw_pattern(Pen(levels, matrix, line, PATTERN), who)
    tone = np.asarray(tones)
    palette = material_palette(what.material) if what.material else own_palette(who)
    palette = np.concatenate(
        [palette, np.zeros((1, 3))]
    )  # nothing: black, so that averages are premultiplied
    numbers = np.where(tone > 0, tone + TONES * np.asarray(levels), len(palette) - 1)
    image = Image.fromarray(numbers.astype(np.uint8))
    image.putpalette(np.round(255 * palette).astype(np.uint8).tobytes())
    colour = np.asarray(image.convert("RGB").reduce(times), np.float32) / 255
    cover = np.asarray(Image.fromarray((tone > 0).view(np.uint8) * 255).reduce(times), np.float32) / 255
    # parts as cushions between the outlines: their slope towards the light gives it or takes it
    cushion = Image.fromarray((tone > LINE).view(np.uint8) * 255).reduce(times)
    high = np.asarray(cushion.filter(ImageFilter.GaussianBlur(2.2 * cfg.size / 64)), np.float32) / 255
    step = max(cfg.size // 64, 1)
    padded = np.pad(high, step)
    slope = padded[2 * step :, 2 * step :] - padded[: -2 * step, : -2 * step]
    return colour, cover, slope


def _scenery(what: Spec, cfg: WorldConfig) -> np.ndarray:
    """The scene without subject and shadow, (S, S, 3) floats 0..1."""
    rng = stream("scene", what.scene_seed)
    weather = 1 + rng.uniform(-cfg.weather, cfg.weather, 3)
    brush = Brush(cfg.size * cfg.oversample)
    PLACES[what.scene].paint(brush, rng)
    image = brush.image
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flat = np.asarray(image.reduce(cfg.oversample), np.float32) / 255
    return (flat * weather.astype(np.float32)).clip(0, 1)


def _shadow(cover: np.ndarray, cfg: WorldConfig) -> np.ndarray:
    """How much light the ground keeps around the subject's foot, (S, S, 1) floats 0..1."""
    rows = np.flatnonzero(cover.max(1) > 0.5)
    foot, height = rows[-1], rows[-1] - rows[0] + 1
    columns = np.flatnonzero(cover[foot - height // 5 : foot + 1].max(0) > 0.5)
    half = (columns[-1] - columns[0] + 1) / 2
    grid = np.arange(cfg.size, dtype=np.float32)
    x = (grid - (columns[0] + half)) / (1.3 * half)
    y = (grid - foot) / (0.06 * cfg.size)
    dark = np.exp(-((x[None] ** 2 + y[:, None] ** 2) ** 1.5))
    return (1 - cfg.shadow * dark)[..., None]


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)


def _compose(what: Spec, cfg: WorldConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and the same with the subject's shadow alone (S, S, 3), coverage (S, S): floats 0..1."""
    _check(what.label, what.scene, what.material)
    colour, cover, slope = _subject(what, cfg)
    empty = _scenery(what, cfg) * _shadow(cover, cfg)
    surface = SURFACES[what.material] if what.material else None
    gloss, opaque = (surface.gloss, surface.cover) if surface else (1.0, 1.0)
    light = (cfg.relief * gloss * slope)[..., None]
    shade, shine = 1 + light.clip(-0.5, 0), light.clip(0, 0.5)
    place = np.float32(PLACES[what.scene].light)
    lit = (colour * shade * (1 - shine) + shine * cover[..., None]) * place
    return empty * (1 - opaque * cover[..., None]) + opaque * lit, empty, cover


def backdrop(what: Spec, cfg: WorldConfig = DEFAULT) -> np.ndarray:
    """The image of the spec without its subject, its shadow included: (size, size, 3) uint8."""
    return _bytes(_compose(what, cfg)[1])


def draw(what: Spec, cfg: WorldConfig = DEFAULT) -> Sample:
    """The image of a spec."""
    image, _, cover = _compose(what, cfg)
    who = identity(what.label, what.number, cfg)
    attributes = {"label": what.label, "scene": what.scene, "material": what.material, "number": what.number}
    attributes |= {"main": who.main, "second": who.second, "accent": who.accent, "pattern": who.pattern}
    return Sample(_bytes(image), _bytes(cover), what.label, caption(what), attributes)


def render(index: int, split: str = "train", cfg: WorldConfig = DEFAULT) -> Sample:
    """The index-th image of a split."""
    return draw(spec(index, split, cfg), cfg)


def render_many(
    indices: Iterable[int], split: str = "train", cfg: WorldConfig = DEFAULT, workers: int = 0
) -> dict[str, np.ndarray]:
    """Images of a split, stacked in the order of indices; workers > 0 share the drawing among processes.

    image (N, S, S, 3) uint8; mask (N, S, S) uint8; label, scene, material (-1: none), number (N,) int64,
    the first three as places in CLASSES, SCENES, MATERIALS; main, second, accent (N, 3) float32, RGB 0..1;
    caption (N,) str.
    """
    indices = [int(i) for i in indices]
    if not indices:
        raise ValueError("no indices given: expected at least one")
    work = partial(render, split=split, cfg=cfg)
    if workers:
        chunk = max(len(indices) // (8 * workers), 1)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            samples = pool.map(work, indices, chunk)
    else:
        samples = [work(i) for i in indices]
    facts = [sample.attributes for sample in samples]
    found = {key: np.stack([getattr(sample, key) for sample in samples]) for key in ("image", "mask")}
    names = {"label": CLASSES, "scene": SCENES, "material": MATERIALS}
    for key, options in names.items():
        found[key] = np.array([options.index(f[key]) if f[key] else -1 for f in facts], np.int64)
    found["number"] = np.array([f["number"] for f in facts], np.int64)
    found |= {key: np.array([f[key] for f in facts], np.float32) for key in ("main", "second", "accent")}
    found["caption"] = np.array([sample.caption for sample in samples])
    return found
