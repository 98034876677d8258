"""What pretraining says about a render: the world's caption, and a richer one that names colours."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moma.world.scenes import PLACES
from moma.world.world import DEFAULT, Spec, WorldConfig, identity, specs_of, with_article

# Colour names in rich captions, sRGB 0..255, as coarse as in captions of public images.
COLOURS = {
    "red": (205, 55, 55), "orange": (235, 145, 55), "yellow": (235, 210, 70), "olive": (130, 125, 45),
    "green": (65, 150, 75), "mint": (140, 215, 170), "teal": (45, 140, 145), "cyan": (100, 205, 225),
    "blue": (65, 105, 200), "navy": (45, 60, 110), "purple": (120, 75, 165), "lilac": (180, 155, 225),
    "pink": (235, 150, 190), "maroon": (125, 50, 65), "brown": (130, 85, 50), "beige": (225, 200, 165),
    "white": (240, 240, 240), "grey": (145, 145, 150), "black": (45, 45, 50),
}  # fmt: skip
PATTERNS = {"plain": "", "stripes": "striped ", "spots": "spotted ", "patches": "patched "}


@dataclass(frozen=True)
class Words:
    """One render in words."""

    label: str
    caption: str  # class, scene and material: the text of training and sampling
    rich: str  # with the identity's colours and pattern, for CLIP, the captioner and half of the UNet's texts
    subject: str  # the rich caption without the scene


def colour_name(rgb: np.ndarray) -> str:
    """The name of the nearest colour; rgb (3,) in 0..1."""
    names = list(COLOURS)
    table = np.array([COLOURS[name] for name in names], np.float64)
    return names[int(np.square(table - 255 * np.asarray(rgb, np.float64)).sum(axis=1).argmin())]


def pattern_of(what: Spec, cfg: WorldConfig = DEFAULT) -> str:
    """The word for a subject's own pattern, such as "striped"; empty where it is plain."""
    return PATTERNS[identity(what.label, what.number, cfg).pattern].strip()


def look_of(what: Spec, cfg: WorldConfig = DEFAULT) -> str:
    """A subject's material, or its own colours and pattern: "red and blue striped"."""
    who = identity(what.label, what.number, cfg)
    own = f"{colour_name(who.main)} and {colour_name(who.second)} {pattern_of(what, cfg)}".strip()
    return what.material or own


def words_of(what: Spec, caption: str = "", cfg: WorldConfig = DEFAULT) -> Words:
    """The captions of one render.

    Args:
        what: what the render shows.
        caption: the world's caption of it.
        cfg: the world.
    """
    subject = with_article(f"{look_of(what, cfg)} {what.label}")
    return Words(what.label, caption, f"{subject} {PLACES[what.scene].phrase}", subject)


def words_of_renders(found: Mapping[str, np.ndarray], cfg: WorldConfig) -> list[Words]:
    """The captions of all images of `world.render_many`."""
    rows = zip(specs_of(found), found["caption"].tolist(), strict=True)
    return [words_of(what, caption, cfg) for what, caption in rows]
