"""Draw the example references, subjects that MoMA-mini was not trained on, and its images of them.

python examples/make_examples.py
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import moma  # noqa: E402 (the path comes first)
from moma.app.options import SCENES  # noqa: E402
from moma.app.record import save_png  # noqa: E402
from moma.app.sheets import Cell, SheetConfig, contact_sheet  # noqa: E402
from moma.inputs.preprocess import find_mask, open_image  # noqa: E402
from moma.world.world import DEFAULT, Spec, WorldConfig, draw  # noqa: E402

WORLD = WorldConfig(size=512)  # the world draws at any size
UNSEEN = DEFAULT.identities + DEFAULT.unseen_identities  # the first number of the test split
SUBJECTS = {"cat": UNSEEN + 22, "dog": UNSEEN + 1, "car": UNSEEN + 7, "teapot": UNSEEN + 6}
MATERIALS = ("wooden", "golden")
TEXTURE_STRENGTH = 0.4  # β of Eq. 3 for new textures, as in the paper
RESULTS = Path(__file__).with_name("results.png")


def references() -> None:
    """Write <label>.png beside this file, the mask as transparency."""
    for label, number in SUBJECTS.items():
        sample = draw(Spec(label, number, "meadow", None, pose_seed=11, scene_seed=5), WORLD)
        rgba = np.dstack([sample.image, sample.mask])  # (S, S, 4)
        Image.fromarray(rgba).save(Path(__file__).with_name(f"{label}.png"), optimize=True)


def results() -> None:
    """Write the sheet of README.md: each reference in sample.py's scenes, then of other materials."""
    pipe, rows = moma.load(ROOT / "weights" / "mini"), []
    for label in SUBJECTS:
        image = open_image(Path(__file__).with_name(f"{label}.png"))
        subject = pipe.encode_subject(image, find_mask(image).mask, label)
        captions = [(f"a {label}", scene) for scene in SCENES]
        textures = [(f"a {material} {label}", SCENES[0]) for material in MATERIALS]
        drawn = pipe.sample(subject, [" ".join(lines) for lines in captions])
        drawn += pipe.sample(subject, [" ".join(lines) for lines in textures], strength=TEXTURE_STRENGTH)
        cells = map(Cell, drawn, captions + textures)
        rows.append([Cell(subject.reference.white, ("reference",)), *cells])
    save_png(RESULTS, contact_sheet(rows, SheetConfig(cell=128)))


if __name__ == "__main__":
    references()
    results()
