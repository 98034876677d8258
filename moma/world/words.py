"""What the pretraining says about a render: the world's caption, and a richer one that names colours."""

from dataclasses import dataclass

import numpy as np

from moma.world.world import CLASSES, MATERIALS, SCENES, WorldConfig, identity, prompt

# Names of the colours in rich captions, sRGB 0..255: as coarse as the captions of public images.
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
    caption: str  # class, scene and material: what training and sampling get
    rich: str  # with the identity's colours and pattern: for CLIP, the captioner and half of the UNet's texts
    subject: str  # the rich caption without the scene


def colour_name(rgb: np.ndarray) -> str:
    """The nearest name; rgb (3,) in 0..1."""
    names = list(COLOURS)
    table = np.array([COLOURS[name] for name in names], np.float64)
    return names[int(np.square(table - 255 * np.asarray(rgb, np.float64)).sum(axis=1).argmin())]


def words_of(
    label: str, scene: str, material: str | None, number: int, caption: str, cfg: WorldConfig
) -> Words:
    """The captions of one render of the identity `number`; caption: the world's."""
    who = identity(label, number, cfg)
    what = (
        material or f"{colour_name(who.main)} and {colour_name(who.second)} {PATTERNS[who.pattern]}".strip()
    )
    plain = prompt(label, scene, material)
    bare = prompt(label, scene)  # "a cat on the beach"
    article = "an" if what[0] in "aeiou" else "a"
    where = bare.split(label, 1)[1]  # " on the beach"
    subject = f"{article} {what} {label}"
    return Words(label, caption, plain if material else subject + where, subject)


def words_of_renders(found: dict[str, np.ndarray], cfg: WorldConfig) -> list[Words]:
    """The words of all of `world.render_many`'s images."""
    rows = zip(
        found["label"], found["scene"], found["material"], found["number"], found["caption"], strict=True
    )
    return [
        words_of(CLASSES[a], SCENES[b], None if m < 0 else MATERIALS[m], int(n), str(c), cfg)
        for a, b, m, n, c in rows
    ]
