"""A few generated triplets, and a tiny bundle that fits them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.tiny import TinyConfig, build_tiny_bundle

SIDE = 64  # pixels: 8x8 latents
SCENES = ("in the snow", "on the beach at sunset")


@dataclass(frozen=True)
class Drawing:
    """A disc on a background of another colour."""

    label: str
    centre: tuple[int, int]
    radius: int
    seed: int
    width: int = SIDE

    def image(self) -> tuple[Image.Image, Image.Image]:
        colours = np.random.default_rng(self.seed).integers(0, 256, (2, 3))
        y, x = np.ogrid[:SIDE, : self.width]
        inside = (y - self.centre[0]) ** 2 + (x - self.centre[1]) ** 2 < self.radius**2
        pixels = np.where(inside[..., None], colours[0], colours[1])
        return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(np.uint8(255) * inside)


def write_data(folder: Path, count: int, broken: int | None = None) -> Path:
    """Write triplets; every third has another image as its reference. broken: the one whose mask is full."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        drawing = Drawing(("cat", "teddy bear")[i % 2], (24 + 3 * (i % 5), 36 - 2 * (i % 4)), 10 + i, seed=i)
        image, mask = drawing.image()
        if i == broken:
            mask = Image.new("L", mask.size, 255)
        image.save(folder / f"{i}.png")
        mask.save(folder / f"{i}_mask.png")
        line = {
            "key": f"sample{i}", "image": f"{i}.png", "mask": f"{i}_mask.png", "label": drawing.label,
            "caption": f"a {drawing.label} {SCENES[i // 2 % 2]}",
        }  # fmt: skip
        if i % 3 == 2:
            line |= {"reference_image": f"{i - 2}.png", "reference_mask": f"{i - 2}_mask.png"}
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_bundle(folder: Path, seed: int = 0) -> Path:
    build_tiny_bundle(folder, seed, TinyConfig(image_size=SIDE))
    return folder


def write_pairs(folder: Path, width: int = SIDE) -> Path:
    """Images of two cats, one of whom is black, and of a cat alone; in wide ones they are farther apart."""
    folder.mkdir()
    places = (20, 20), (40, 44 + (width - SIDE) // 2)
    discs = [Drawing("cat", place, 10 + 2 * i, 1 + i, width) for i, place in enumerate(places)]
    (photo, left), (_, right) = (disc.image() for disc in discs)
    for name, one in (("photo", photo), ("left", left), ("right", right)):
        one.save(folder / f"{name}.png")
    one = {"image": "photo.png", "mask": "left.png", "label": "cat"}
    two = one | {"caption": "a cat and a black cat", "others": [{"mask": "right.png", "label": "black cat"}]}
    lines = [{"caption": "a cat in the snow", **one}, two, {"caption": "a cat", **one}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder
