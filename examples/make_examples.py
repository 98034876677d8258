"""Draw the example references, subjects that MoMA-mini was not trained on, its images of them, and the images
of the pages on tasks (docs/tasks): to be run again after new weights. Needs Chromium.

python examples/make_examples.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import moma  # noqa: E402 (the path comes first)
import sample  # noqa: E402
from moma import Pipeline, SampleConfig  # noqa: E402
from moma.app.options import SCENES  # noqa: E402
from moma.app.record import save_png  # noqa: E402
from moma.app.sheets import Cell, SheetConfig, contact_sheet  # noqa: E402
from moma.evaluate import __main__ as evaluation  # noqa: E402
from moma.evaluate import figures  # noqa: E402
from moma.inputs.preprocess import find_mask, on_white, open_image  # noqa: E402
from moma.methods.prompts import joined  # noqa: E402
from moma.world.world import DEFAULT, Spec, WorldConfig, draw  # noqa: E402

WORLD = WorldConfig(size=512)  # the world draws at any size
UNSEEN = DEFAULT.identities + DEFAULT.unseen_identities  # the first number of the test split
SUBJECTS = {"cat": UNSEEN + 22, "dog": UNSEEN + 1, "car": UNSEEN + 7, "teapot": UNSEEN + 6}
MATERIALS = ("wooden", "golden")
TEXTURE_STRENGTH = 0.4  # β of Eq. 3 for new textures, as in the paper
RESULTS = Path(__file__).with_name("results.png")
SHEET, LARGE, WIDE = SheetConfig(cell=144), 192, 192  # pixels: an image's, a reference's, of two subjects
PAIR = ("cat", "teapot")  # in one image; the first one by several methods
METHODS = {"the text alone": "text", "reference attention": "reference-attention", "MoMA": "moma"}

# The commands of the pages, and the images in TASKS that they draw.
TASKS, MINI = ROOT / "docs" / "tasks", str(ROOT / "weights" / "mini")
QUICK = ["--solver", "dpm", "--steps", "20"]
CAT, TEAPOT = (["--ref", str(ROOT / "examples" / name)] for name in ("cat.png", "teapot.png"))
FIGURES = {
    "scene": ["context", *CAT, *TEAPOT],
    "texture": ["texture", *CAT, *TEAPOT],
    "strength": ["beta", *CAT, "--prompt", "a golden {subject} on the beach"],
    "training": ["methods", *CAT, *TEAPOT, "--prompt", "a {subject} in the snow", "--method", "text",
        "--method", "moma"],
}  # fmt: skip
SEVERAL = [*CAT, *TEAPOT, "--region", "0,0,0.5,1", "--region", "0.5,0,1,1", "--size", "96x64", "--num", "4",
    "--prompt", "a cat and a teapot on the beach"]  # fmt: skip
SCORES = ["--world", "--method", "moma", "--method", "text", "--subjects", "2", "--prompts", "2", "1",
    "--per-prompt", "1"]  # fmt: skip
BROWSER = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=900,1500"]
COLOURS = 200  # of an image in TASKS: a third of the bytes


def references() -> None:
    """Write <label>.png beside this file, the mask as transparency."""
    for label, number in SUBJECTS.items():
        sample = draw(Spec(label, number, "meadow", None, pose_seed=11, scene_seed=5), WORLD)
        rgba = np.dstack([sample.image, sample.mask])  # (S, S, 4)
        Image.fromarray(rgba).save(Path(__file__).with_name(f"{label}.png"), optimize=True)


def results() -> None:
    """Write the sheet of README.md, of the first seed: each reference in sample.py's scenes and of other
    materials, two subjects in one image, and one subject by several methods."""
    pipe = moma.load(MINI)
    rows = [_subject_row(pipe, label) for label in SUBJECTS]
    save_png(RESULTS, contact_sheet([*rows, _pair_row(pipe), _methods_row()], SHEET))


def _subject_row(pipe: Pipeline, label: str) -> list[Cell]:
    subject, reference = _encoded(pipe, label)
    scenes = [f"a {label} {scene}" for scene in SCENES]
    textures = [f"a {material} {label} {SCENES[0]}" for material in MATERIALS]
    drawn = pipe.sample(subject, scenes) + pipe.sample(subject, textures, strength=TEXTURE_STRENGTH)
    return [reference, *(Cell(image, (text,)) for image, text in zip(drawn, scenes + textures, strict=True))]


def _pair_row(pipe: Pipeline) -> list[Cell]:
    subjects, references = zip(*(_encoded(pipe, label) for label in PAIR), strict=True)
    texts = [f"a {joined(PAIR)} {scene}" for scene in SCENES]
    wide = SampleConfig(height=DEFAULT.size, width=DEFAULT.pair_pixels)
    cells = [
        Cell(*one, WIDE) for one in zip(pipe.sample(subjects, texts, config=wide), zip(texts), strict=True)
    ]
    return [*(one._replace(side=SHEET.cell) for one in references), *cells]


def _methods_row() -> list[Cell]:
    label, row = PAIR[0], []
    for name, method in METHODS.items():
        pipe = moma.load(MINI, method=method)
        subject, reference = _encoded(pipe, label) if pipe.method.subjects[-1] else ((), None)
        (image,) = pipe.sample(subject, f"a {label} {SCENES[0]}")
        row.append(Cell(image, (name,)))
    return [reference, *row]


def _encoded(pipe: Pipeline, label: str) -> tuple[Any, Cell]:
    """An example as the pipeline's subject and as a large cell."""
    image = open_image(Path(__file__).with_name(f"{label}.png"))
    subject = pipe.encode_subject(image, find_mask(image).mask, label)
    return subject, Cell(on_white(image), (f"reference: {label}",), LARGE)


def tasks(work: Path, chromium: str) -> None:
    """Write the images of the pages on tasks.

    Args:
        work: an empty folder.
        chromium: the program, which photographs the page of scores.
    """
    for name, options in FIGURES.items():
        figures.main([*options, *QUICK, "--bundle", MINI, "--out", str(work / f"{name}.png")])
    sample.main([*SEVERAL, *QUICK, "--weights", MINI, "--cache", "off", "--out", str(work / "drawn")])
    (work / "drawn" / "cat-and-teapot-sheet.png").rename(work / "several.png")
    evaluation.main([*SCORES, *QUICK, "--bundle", MINI, "--out", str(work / "scores")])
    page = (work / "scores" / "index.html").as_uri()
    subprocess.run([chromium, *BROWSER, f"--screenshot={work / 'scores.png'}", page], check=True)
    for path in work.glob("*.png"):
        save_png(TASKS / path.name, Image.open(path).convert("RGB").quantize(COLOURS))


if __name__ == "__main__":
    if (found := shutil.which("chromium") or shutil.which("chromium-browser")) is None:
        sys.exit("make_examples.py: no chromium on the PATH, which draws docs/tasks/scores.png: install it")
    references()
    results()
    with tempfile.TemporaryDirectory() as folder:
        tasks(Path(folder), found)
