"""The drawn image world: subjects with an identity, in a scene, sometimes made of another material.

A `Spec` determines its image and (split, index) determines the spec, so nothing is stored. To draw the same
identity in another scene, use `dataclasses.replace(spec, scene=..., pose_seed=...)`. Wide images with two
subjects: `moma.world.pairs`.

Letters: S image side, W image width (S unless two subjects share the image), N images.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
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

SPLITS = ("train", "val", "test")
SEEDS = 1 << 31  # exclusive bound of pose and scene seeds


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and numbers of the world. Lengths are shares of the image side unless stated otherwise."""

    size: int = 64  # pixels: the smallest side at which faces and patterns read well
    oversample: int = 4  # images are drawn this much larger and averaged, for smooth edges
    identities: int = 4000  # per class in training: too many to memorise, so features must carry identity
    unseen_identities: int = 500  # per class, for each of val and test
    unseen_share: float = 0.1  # of class x scene x material combinations, kept out of training
    material_share: float = 0.35  # of images whose subject is made of a material
    smallest: float = 0.62  # subject height (or most of its width)
    largest: float = 0.78  # leaves the scene room to be recognised
    wide: float = 0.88  # weight of a width beside a height, so that wide subjects do not shrink to a strip
    highest_foot: float = 0.85  # where the subject stands, from the top
    lowest_foot: float = 0.94
    stray: float = 0.09  # largest distance of a subject from the middle
    margin: float = 0.02  # free space at the sides
    pair_width: float = 1.5  # width of an image of two subjects; its height is 1
    pair_smallest: float = 0.5  # subject height in it
    pair_largest: float = 0.66
    pair_reach: float = 0.05  # how far each subject may cross the middle
    same_class_share: float = 0.3  # of pairs
    left_first: float = 0.9  # share of pairs whose captions name the left subject first
    lean: float = 3.0  # largest tilt of a whole subject, in degrees
    line: float = 1.15  # outline width in pixels of a 64-pixel image: bold enough for a coarse autoencoder
    relief: float = 0.5  # strength of the soft light from above left
    shadow: float = 0.36  # darkness of the contact shadow
    weather: float = 0.05  # variation of a scene's light per channel

    def __post_init__(self) -> None:
        if min(self.size, self.oversample, self.identities, self.unseen_identities) < 1:
            raise ValueError("size, oversample, identities and unseen_identities must be at least 1")

    @property
    def pair_pixels(self) -> int:
        """Width of an image of two subjects, in pixels."""
        return round(self.pair_width * self.size)


DEFAULT = WorldConfig()
IMAGES_PER_WORKER = 50  # fewer are drawn before a process has started


@dataclass(frozen=True)
class Spec:
    """What an image shows; it determines every pixel."""

    label: str  # one of CLASSES
    number: int  # identity number within the class
    scene: str  # one of SCENES
    material: str | None  # one of MATERIALS, or None for the identity's own colours
    pose_seed: int  # place, size, facing and small movements
    scene_seed: int  # variation of the scene, and wording of the caption


class Sample(NamedTuple):
    """An image and what is known about it."""

    image: np.ndarray  # (S, S, 3) uint8, RGB
    mask: np.ndarray  # (S, S) uint8, share of each pixel that the subject covers, without its shadow
    label: str
    caption: str


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
    """An identity of a class.

    Args:
        label: one of CLASSES.
        number: from 0; numbers from `cfg.identities` on never occur in training.
        cfg: the world.

    Raises:
        ValueError: for an unknown class or number.
    """
    _known("label", label, CLASSES)
    end = cfg.identities + 2 * cfg.unseen_identities
    if not 0 <= number < end:
        raise ValueError(f"unknown identity {number}: expected 0 to {end - 1}")
    return make_identity(label, number)


@lru_cache(maxsize=8)
def _unseen(share: float) -> frozenset[tuple[str, str, str | None]]:
    """Combinations kept out of training: a similar number per class and material, so none loses many."""
    rng, found = stream("unseen"), set()
    for label in CLASSES:
        for material in (None, *MATERIALS):
            count = int(share * len(SCENES) + rng.random())
            found |= {(label, SCENES[i], material) for i in rng.permutation(len(SCENES))[:count]}
    return frozenset(found)


def held_out(label: str, scene: str, material: str | None, cfg: WorldConfig = DEFAULT) -> bool:
    """Whether a combination never occurs in training.

    Args:
        label: class of the subject.
        scene: its scene.
        material: None = its own colours.
        cfg: the world.
    """
    _check(label, scene, material)
    return (label, scene, material) in _unseen(cfg.unseen_share)


def identities_of(split: str, cfg: WorldConfig = DEFAULT) -> range:
    """The numbers of each class's identities in a split. ValueError for an unknown split."""
    _known("split", split, SPLITS)
    if split == "train":
        return range(cfg.identities)
    first = cfg.identities + (split == "test") * cfg.unseen_identities
    return range(first, first + cfg.unseen_identities)


def spec(index: int, split: str = "train", cfg: WorldConfig = DEFAULT) -> Spec:
    """The spec of an image of a split.

    Training uses training identities and combinations; val and test use identities of their own and any
    combination.

    Args:
        index: from 0, without an upper limit.
        split: one of SPLITS.
        cfg: the world.

    Raises:
        ValueError: for an unknown split or a negative index.
    """
    if index < 0:
        raise ValueError(f"index {index}: expected 0 or more")
    numbers = identities_of(split, cfg)
    rng = stream("spec", SPLITS.index(split), index)
    label, number = CLASSES[rng.integers(len(CLASSES))], numbers[rng.integers(len(numbers))]
    while True:
        scene = SCENES[rng.integers(len(SCENES))]
        material = MATERIALS[rng.integers(len(MATERIALS))] if rng.random() < cfg.material_share else None
        if split != "train" or not held_out(label, scene, material, cfg):
            return Spec(label, number, scene, material, *draw_seeds(rng))


def in_own_colours(split: str, cfg: WorldConfig = DEFAULT) -> Iterator[Spec]:
    """The specs of a split whose subjects are of no material, from index 0 on, without end.

    ValueError where all are of one.
    """
    if cfg.material_share >= 1:
        raise ValueError(f"material_share {cfg.material_share}: expected below 1")
    return (what for i in count() if (what := spec(i, split, cfg)).material is None)


def draw_seeds(rng: np.random.Generator) -> list[int]:
    """A pose seed and a scene seed."""
    return rng.integers(SEEDS, size=2).tolist()


def elsewhere(what: Spec, seed: int) -> Spec:
    """The same subject in its own colours, in a scene and pose that the seed determines."""
    rng = stream("elsewhere", seed)
    return Spec(what.label, what.number, SCENES[rng.integers(len(SCENES))], None, *draw_seeds(rng))


def trained_elsewhere(what: Spec, seed: int, cfg: WorldConfig = DEFAULT) -> Spec:
    """The same subject in its own colours in another scene, in a combination that occurs in training.

    Args:
        what: the subject, and the scene to avoid.
        seed: of the scene and the pose.
        cfg: the world.
    """
    rng, scene = stream("another", seed), what.scene
    while scene == what.scene or held_out(what.label, scene, None, cfg):
        scene = SCENES[rng.integers(len(SCENES))]
    return Spec(what.label, what.number, scene, None, *draw_seeds(rng))


def neighbour(what: Spec, step: int, cfg: WorldConfig = DEFAULT) -> Spec:
    """The same image of another subject.

    Args:
        what: the image.
        step: identities further in its class and unseen split.
        cfg: the world.
    """
    index = (what.number - cfg.identities) % cfg.unseen_identities
    return replace(what, number=what.number - index + (index + step) % cfg.unseen_identities)


def with_article(words: str) -> str:
    """ "an icy cat" of "icy cat"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _phrase(label: str, material: str | None) -> str:
    return with_article(f"{material} {label}" if material else label)


def prompt(label: str, scene: str, material: str | None = None) -> str:
    """The plain caption, such as "a wooden cat on the beach"."""
    _check(label, scene, material)
    return f"{_phrase(label, material)} {PLACES[scene].phrase}"


# The plain wording is the prompt's, and therefore the most frequent.
_WORDINGS = ("{what} {where}",) * 3 + (
    "{where}, {what}",
    "an image of {what} {where}",
    "{what} standing {where}",
)


def caption(what: Spec) -> str:
    """Names class, scene and material, never the identity; the scene seed selects the wording."""
    _check(what.label, what.scene, what.material)
    return worded(_phrase(what.label, what.material), what.scene, what.scene_seed)


def worded(subjects: str, scene: str, scene_seed: int) -> str:
    """A caption of what an image shows in a scene; the seed selects the wording."""
    wording = _WORDINGS[stream("caption", scene_seed).integers(len(_WORDINGS))]
    return wording.format(what=subjects, where=PLACES[scene].phrase)


# ---- drawing it ----


@dataclass(frozen=True)
class Slot:
    """Where in an image a subject may stand, and its size. Lengths are shares of the image's height."""

    width: float  # of the image
    left: float  # of the free space
    right: float
    smallest: float
    largest: float


def whole_image(cfg: WorldConfig) -> Slot:
    """The slot of a single subject."""
    return Slot(1.0, 0.0, 1.0, cfg.smallest, cfg.largest)


def _place(what: Spec, slot: Slot, cfg: WorldConfig) -> tuple[np.ndarray, Pose]:
    """The matrix (2, 3) from subject units to pixels of the large drawing, and the pose."""
    rng = stream("pose", what.pose_seed)
    x0, x1, y0 = EXTENTS[what.label]
    side = cfg.size * cfg.oversample
    size = rng.uniform(slot.smallest, slot.largest)
    flip = -1 if rng.random() < 0.5 else 1
    unit = size / max(100 - y0, cfg.wide * (x1 - x0))
    foot = rng.uniform(cfg.highest_foot, cfg.lowest_foot)
    # largest distance of the subject's middle from the slot's
    room = max((slot.right - slot.left) / 2 - cfg.margin - unit * (x1 - x0) / 2, 0.0)
    shift = float(np.clip(rng.uniform(-cfg.stray, cfg.stray), -room, room))
    middle = (slot.left + slot.right) / 2 + shift - flip * unit * (x0 + x1) / 2
    turn = np.radians(cfg.lean * rng.uniform(-1, 1))
    c, s = unit * np.cos(turn), unit * np.sin(turn)
    linear = np.array([[flip * c, -s], [flip * s, c]])
    offset = np.array([middle, foot]) - linear @ (0, 100)  # puts the foot (0, 100) in place
    tilt, swing = rng.uniform(-1, 1, 2)
    return side * np.concatenate([linear, offset[:, None]], 1), Pose(float(tilt), float(swing))


class Layer(NamedTuple):
    """A subject as it is laid over a scene."""

    light: np.ndarray  # (S, W, 3) colour times coverage, lit, 0..1
    cover: np.ndarray  # (S, W) share of each pixel that the subject covers
    opaque: float  # share of the scene that it hides where it covers a pixel


def subject_layer(what: Spec, slot: Slot, cfg: WorldConfig) -> Layer:
    """A spec's subject alone.

    Args:
        what: the subject; its scene gives the light.
        slot: where it stands.
        cfg: the world.
    """
    _check(what.label, what.scene, what.material)
    who = identity(what.label, what.number, cfg)
    matrix, pose = _place(what, slot, cfg)
    side, times = cfg.size * cfg.oversample, cfg.oversample
    line, shape = cfg.line * side / 64, (round(slot.width * side), side)
    tones, levels = Image.new("L", shape), Image.new("L", shape)
    DRAWERS[what.label](Pen(tones, matrix, line, LINE), who, pose)
    if what.material:
        draw_figure(Pen(levels, matrix, line, PATTERN), what.material, who.pattern_seed)
    else:
        draw_pattern(Pen(levels, matrix, line, PATTERN), who)
    tone = np.asarray(tones)
    palette = material_palette(what.material) if what.material else own_palette(who)
    palette = np.concatenate([palette, np.zeros((1, 3))])  # black background: averages are premultiplied
    numbers = np.where(tone > 0, tone + TONES * np.asarray(levels), len(palette) - 1)
    image = Image.fromarray(numbers.astype(np.uint8))
    image.putpalette(np.round(255 * palette).astype(np.uint8).tobytes())
    colour = np.asarray(image.convert("RGB").reduce(times), np.float32) / 255
    cover = np.asarray(Image.fromarray((tone > 0).view(np.uint8) * 255).reduce(times), np.float32) / 255
    # Parts bulge between the outlines; their slope towards the light brightens or darkens them.
    cushion = Image.fromarray((tone > LINE).view(np.uint8) * 255).reduce(times)
    high = np.asarray(cushion.filter(ImageFilter.GaussianBlur(2.2 * cfg.size / 64)), np.float32) / 255
    step = max(cfg.size // 64, 1)
    padded = np.pad(high, step)
    slope = padded[2 * step :, 2 * step :] - padded[: -2 * step, : -2 * step]
    surface = SURFACES[what.material] if what.material else None
    gloss, opaque = (surface.gloss, surface.cover) if surface else (1.0, 1.0)
    light = (cfg.relief * gloss * slope)[..., None]
    shade, shine = 1 + light.clip(-0.5, 0), light.clip(0, 0.5)
    place = np.float32(PLACES[what.scene].light)
    return Layer((colour * shade * (1 - shine) + shine * cover[..., None]) * place, cover, opaque)


def scenery(what: Spec, width: float, cfg: WorldConfig) -> np.ndarray:
    """The scene without subject and shadow, (S, W, 3) floats 0..1; a wide one is cut from a larger square.

    Args:
        what: its scene and scene seed are drawn.
        width: of the image, in heights, at least 1.
        cfg: the world.
    """
    rng = stream("scene", what.scene_seed)
    weather = 1 + rng.uniform(-cfg.weather, cfg.weather, 3)
    side, tall = round(width * cfg.size) * cfg.oversample, cfg.size * cfg.oversample
    brush = Brush(side)
    PLACES[what.scene].paint(brush, rng)
    image = brush.image
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top = round((1 + cfg.lowest_foot) / 2 * (side - tall))  # keeps the ground at the subjects' feet
    image = image.crop((0, top, side, top + tall))
    flat = np.asarray(image.reduce(cfg.oversample), np.float32) / 255
    return (flat * weather.astype(np.float32)).clip(0, 1)


def shadow(cover: np.ndarray, cfg: WorldConfig) -> np.ndarray:
    """Light that the ground keeps around the foot of a subject with coverage (S, W): (S, W, 1) in 0..1."""
    rows = np.flatnonzero(cover.max(1) > 0.5)
    foot, height = rows[-1], rows[-1] - rows[0] + 1
    columns = np.flatnonzero(cover[foot - height // 5 : foot + 1].max(0) > 0.5)
    half = (columns[-1] - columns[0] + 1) / 2
    down, across = (np.arange(n, dtype=np.float32) for n in cover.shape)
    x = (across - (columns[0] + half)) / (1.3 * half)
    y = (down - foot) / (0.06 * cfg.size)
    dark = np.exp(-((x[None] ** 2 + y[:, None] ** 2) ** 1.5))
    return (1 - cfg.shadow * dark)[..., None]


def laid_over(scene: np.ndarray, layer: Layer) -> np.ndarray:
    """A scene (S, W, 3) with a subject in front of it."""
    return scene * (1 - layer.opaque * layer.cover[..., None]) + layer.opaque * layer.light


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Floats 0..1, clipped, as bytes."""
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)


def draw(what: Spec, cfg: WorldConfig = DEFAULT) -> Sample:
    """The image of a spec."""
    layer = subject_layer(what, whole_image(cfg), cfg)
    image = laid_over(scenery(what, 1.0, cfg) * shadow(layer.cover, cfg), layer)
    return Sample(to_uint8(image), to_uint8(layer.cover), what.label, caption(what))


def render(index: int, split: str = "train", cfg: WorldConfig = DEFAULT) -> Sample:
    """The image of `spec` with the same arguments."""
    return draw(spec(index, split, cfg), cfg)


def painted(paint: Callable[[Any], Any], images: Sequence[Any], workers: int) -> list[Any]:
    """Draw images in order.

    Args:
        paint: draws one.
        images: what they show.
        workers: processes that share the drawing; 0 = this one. Few images take fewer.
    """
    workers = min(workers, len(images) // IMAGES_PER_WORKER)
    if not workers:
        return [paint(what) for what in images]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(paint, images, chunksize=IMAGES_PER_WORKER)


def render_many(
    indices: Iterable[int], split: str = "train", cfg: WorldConfig = DEFAULT, workers: int = 0
) -> dict[str, np.ndarray]:
    """Images of a split, stacked.

    Args:
        indices: of the images, at least one.
        split: one of SPLITS.
        cfg: the world.
        workers: as in `painted`.

    Returns:
        image (N, S, S, 3) uint8; mask (N, S, S) uint8; label, scene, material (-1 for none) as indices into
        CLASSES, SCENES, MATERIALS, and number, (N,) int64; caption (N,) str.
    """
    specs = [spec(int(i), split, cfg) for i in indices]
    if not specs:
        raise ValueError("no indices given: expected at least one")
    samples = painted(partial(draw, cfg=cfg), specs, workers)
    return described(specs) | {
        "image": np.stack([sample.image for sample in samples]),
        "mask": np.stack([sample.mask for sample in samples]),
        "caption": np.array([sample.caption for sample in samples]),
    }


def described(specs: Sequence[Spec]) -> dict[str, np.ndarray]:
    """label, scene, material (-1: none), indices into CLASSES, SCENES, MATERIALS; number: (N,) int64 each."""
    materials = [MATERIALS.index(what.material) if what.material else -1 for what in specs]
    return {
        "label": np.array([CLASSES.index(what.label) for what in specs], np.int64),
        "scene": np.array([SCENES.index(what.scene) for what in specs], np.int64),
        "material": np.array(materials, np.int64),
        "number": np.array([what.number for what in specs], np.int64),
    }


def specs_of(found: Mapping[str, np.ndarray]) -> list[Spec]:
    """The specs of `render_many`'s images; their seeds are unknown and set to 0."""
    rows = zip(*(found[name].tolist() for name in ("label", "number", "scene", "material")), strict=True)
    return [Spec(CLASSES[a], n, SCENES[b], MATERIALS[m] if m >= 0 else None, 0, 0) for a, n, b, m in rows]
