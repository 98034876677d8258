"""Wide images of two subjects in one scene, and what their captions say of them.

Letters: S image height, W image width, N images.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import NamedTuple

import numpy as np

from moma.world.drawing import stream
from moma.world.subjects import CLASSES, MATERIALS
from moma.world.words import look_of, pattern_of
from moma.world.world import (
    DEFAULT,
    SCENES,
    SPLITS,
    Slot,
    Spec,
    WorldConfig,
    draw_seeds,
    held_out,
    identities_of,
    laid_over,
    painted,
    scenery,
    shadow,
    subject_layer,
    to_uint8,
    with_article,
    worded,
)


@dataclass(frozen=True)
class Pair:
    """What an image of two subjects shows; it determines every pixel."""

    left: Spec  # its scene seed draws the scene
    right: Spec  # of the same scene

    def __post_init__(self) -> None:
        if self.left.scene != self.right.scene:
            raise ValueError(f"a pair in {self.left.scene} and {self.right.scene}: expected one scene")

    def named(self, cfg: WorldConfig = DEFAULT) -> tuple[int, int]:
        """The subjects, 0 left and 1 right, in the order in which captions name them."""
        return (0, 1) if stream("named", self.left.scene_seed).random() < cfg.left_first else (1, 0)

    @property
    def subjects(self) -> tuple[Spec, Spec]:
        return self.left, self.right


class PairSample(NamedTuple):
    """An image and what is known about it."""

    image: np.ndarray  # (S, W, 3) uint8, RGB
    masks: np.ndarray  # (2, S, W) uint8, share of each pixel where the left and the right subject are seen


class Told(NamedTuple):
    """A caption of a pair."""

    text: str
    apart: bool  # whether its phrases describe the two subjects differently, beside their classes


class PairWords(NamedTuple):
    """A pair in words."""

    labels: tuple[str, str]  # in the order of naming
    caption: Told  # classes, scene and materials
    patterned: Told  # with the patterns
    rich: Told  # with colours and patterns


def pair(index: int, split: str = "train", cfg: WorldConfig = DEFAULT) -> Pair:
    """The pair of an image of a split.

    As in `world.spec`, training uses training identities and combinations only.

    Args:
        index: from 0, without an upper limit.
        split: one of SPLITS.
        cfg: the world.

    Raises:
        ValueError: for an unknown split or a negative index.
    """
    numbers = identities_of(split, cfg)
    if index < 0:
        raise ValueError(f"index {index}: expected 0 or more")
    rng = stream("pair", SPLITS.index(split), index)
    labels = [CLASSES[i] for i in rng.permutation(len(CLASSES))[:2]]
    if rng.random() < cfg.same_class_share:
        labels = labels[:1] * 2
    first, second = rng.choice(len(numbers), size=2, replace=False).tolist()
    while True:
        scene = SCENES[rng.integers(len(SCENES))]
        looks = [
            MATERIALS[rng.integers(len(MATERIALS))] if rng.random() < cfg.material_share else None
            for _ in labels
        ]
        kept_out = (held_out(a, scene, look, cfg) for a, look in zip(labels, looks, strict=True))
        if split != "train" or not any(kept_out):
            break
    rows = zip(labels, (numbers[first], numbers[second]), looks, strict=True)
    left, right = (Spec(a, n, scene, look, *draw_seeds(rng)) for a, n, look in rows)
    return Pair(left, right)


def pairs_of(split: str, same_class: bool, cfg: WorldConfig = DEFAULT) -> Iterator[Pair]:
    """The pairs of a split with two of one class, or of two classes, from index 0 on, without end.

    Args:
        split: one of SPLITS.
        same_class: which of them.
        cfg: the world.

    Raises:
        ValueError: for a world without such pairs.
    """
    if cfg.same_class_share == (0 if same_class else 1):
        raise ValueError(f"same_class_share {cfg.same_class_share}: expected above 0 and below 1")
    found = (pair(i, split, cfg) for i in count())
    return (what for what in found if (what.left.label == what.right.label) == same_class)


def named_specs(pairs: Iterable[Pair], cfg: WorldConfig = DEFAULT) -> list[Spec]:
    """Two specs per pair, in the order of naming."""
    return [what.subjects[i] for what in pairs for i in what.named(cfg)]


# ---- words ----


def pair_words(what: Pair, cfg: WorldConfig = DEFAULT) -> PairWords:
    """The captions of a pair. The plain one names each subject's class and material ("two cats")."""
    subjects = named_specs([what], cfg)
    plain = [s.material or "" for s in subjects]
    patterned = [s.material or pattern_of(s, cfg) for s in subjects]
    rich = [look_of(s, cfg) for s in subjects]

    def told(looks: list[str]) -> Told:
        text = worded(_both(subjects, looks), what.left.scene, what.left.scene_seed)
        return Told(text, looks[0] != looks[1])

    first, second = (s.label for s in subjects)
    return PairWords((first, second), told(plain), told(patterned), told(rich))


def _both(subjects: list[Spec], looks: list[str]) -> str:
    """ "a striped cat and a dog", or "two wooden cats" where the words are the same."""
    phrases = [f"{look} {s.label}".strip() for s, look in zip(subjects, looks, strict=True)]
    if phrases[0] == phrases[1]:
        return f"two {phrases[0]}s"
    return " and ".join(map(with_article, phrases))


# ---- drawing ----


def slots(cfg: WorldConfig) -> tuple[Slot, Slot]:
    """Where the left and the right subject may stand."""
    half, sizes = cfg.pair_width / 2, (cfg.pair_smallest, cfg.pair_largest)
    left = Slot(cfg.pair_width, 0.0, half + cfg.pair_reach, *sizes)
    return left, replace(left, left=half - cfg.pair_reach, right=cfg.pair_width)


def draw_pair(what: Pair, cfg: WorldConfig = DEFAULT) -> PairSample:
    """The image of a pair; the subject that stands lower is in front."""
    layers = [subject_layer(s, slot, cfg) for s, slot in zip(what.subjects, slots(cfg), strict=True)]
    feet = [np.flatnonzero(layer.cover.max(1) > 0.5)[-1] for layer in layers]
    back, front = np.argsort(feet, kind="stable").tolist()
    scene = scenery(what.left, cfg.pair_width, cfg)
    for layer in layers:
        scene = scene * shadow(layer.cover, cfg)
    image = laid_over(laid_over(scene, layers[back]), layers[front])
    seen = [layer.cover for layer in layers]
    seen[back] = seen[back] * (1 - seen[front])
    return PairSample(to_uint8(image), to_uint8(np.stack(seen)))


def render_pairs(
    indices: Iterable[int], split: str = "train", cfg: WorldConfig = DEFAULT, workers: int = 0
) -> dict[str, np.ndarray]:
    """`draw_pairs` of a split.

    Args:
        indices: of the pairs.
        split: one of SPLITS.
        cfg: the world.
        workers: as in `painted`.
    """
    return draw_pairs([pair(int(i), split, cfg) for i in indices], cfg, workers)


def draw_pairs(pairs: Sequence[Pair], cfg: WorldConfig = DEFAULT, workers: int = 0) -> dict[str, np.ndarray]:
    """Images of pairs, stacked.

    Args:
        pairs: what they show.
        cfg: the world.
        workers: as in `painted`.

    Returns:
        image (N, S, W, 3) uint8 and masks (N, 2, S, W) uint8, in the order of naming.
    """
    samples = painted(partial(draw_pair, cfg=cfg), pairs, workers)
    masks = [s.masks[list(what.named(cfg))] for what, s in zip(pairs, samples, strict=True)]
    return {"image": np.stack([s.image for s in samples]), "masks": np.stack(masks)}
