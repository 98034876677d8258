"""What becomes of real photos: `python -m tests.photos FOLDER... [--masks FOLDER]`.

Prints how many of the images MoMA-mini's weights do not know, beside renders that they have not seen, and,
with masks of the same names (`SUBJECT/IMAGE.png`, or `IMAGE_mask.*` beside the images), how well the rule for
plain backgrounds finds the subject and how often it refuses.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moma import Bundle
from moma.evaluate.protocol import SUFFIXES
from moma.inputs.preprocess import find_mask, open_image, open_mask
from moma.world.world import render
from tests.helpers import MINI

GOOD = 0.8  # IoU


def images_in(folders: Sequence[Path]) -> list[Path]:
    """Every image but the masks."""
    found = [
        path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES
    ]
    return [path for path in found if not path.stem.endswith("_mask")]


def mask_of(photo: Path, folder: Path | None) -> Path | None:
    """The mask file of an image."""
    near = photo.with_name(f"{photo.stem}_mask{photo.suffix}")
    far = folder and folder / photo.parent.name / f"{photo.stem}.png"
    return next((path for path in (far, near) if path and path.exists()), None)


def iou(photo: Path, mask: Path) -> float | None:
    """Of the rule's mask with the given one; None if it refuses."""
    try:
        found = find_mask(open_image(photo)).mask
    except ValueError:
        return None
    ours, theirs = (np.asarray(x) > 127 for x in (found, open_mask(mask).resize(found.size)))
    return float((ours & theirs).sum() / (ours | theirs).sum())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the two measurements."""
    parser = argparse.ArgumentParser("python -m tests.photos", description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--masks", type=Path)
    parser.add_argument("--renders", type=int, default=500)
    args = parser.parse_args(argv)
    photos, known = images_in(args.folders), Bundle.open(MINI).familiar
    away = [known.distance(open_image(photo)) / known.limit.item() for photo in photos]
    drawn = [Image.fromarray(render(i, "val").image) for i in range(args.renders)]
    near = [known.distance(image) / known.limit.item() for image in drawn]
    for name, values in (("images", away), ("renders", near)):
        noted = sum(value > 1 for value in values)
        print(f"{name}: {noted} of {len(values)} noted; distances {min(values):.2f} to {max(values):.2f}")
    pairs = [(photo, mask) for photo in photos if (mask := mask_of(photo, args.masks))]
    found = [(iou(photo, mask), photo) for photo, mask in pairs]
    answers = sorted((value, photo) for value, photo in found if value is not None)
    values = np.array([value for value, _ in answers])
    print(f"plain background: {len(answers)} answers, {len(found) - len(answers)} refusals")
    if answers:
        print(f"IoU: mean {values.mean():.2f}, least {values[0]:.2f}; below {GOOD}: {(values < GOOD).sum()}")
    for value, photo in answers:
        print(f"  {value:.2f} {photo}")


if __name__ == "__main__":
    main()
