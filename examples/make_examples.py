"""Draws the example references: subjects of MoMA-mini's world that it was not trained on.

python examples/make_examples.py
"""

from pathlib import Path

import numpy as np
from PIL import Image

from moma.mini.world import DEFAULT, Spec, WorldConfig, draw

WORLD = WorldConfig(size=512)  # pixels: the world draws at any size
UNSEEN = DEFAULT.identities + DEFAULT.unseen_identities  # the first number of the test split
SUBJECTS = {"cat": UNSEEN + 22, "dog": UNSEEN + 1, "car": UNSEEN + 7, "teapot": UNSEEN + 6}


def main() -> None:
    for label, number in SUBJECTS.items():
        sample = draw(Spec(label, number, "meadow", None, pose_seed=11, scene_seed=5), WORLD)
        picture = np.dstack([sample.image, sample.mask])  # (S, S, 4), the mask as transparency
        Image.fromarray(picture).save(Path(__file__).with_name(f"{label}.png"), optimize=True)


if __name__ == "__main__":
    main()
