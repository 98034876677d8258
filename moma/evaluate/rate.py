"""From files to scores: embed the images of each method and the real ones, subject by subject."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, permutations
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from moma.evaluate.protocol import SUFFIXES, Subject, Task
from moma.evaluate.scorers import ImageScorer, embed, measure, measure_real
from moma.evaluate.scores import Score, similarity
from moma.inputs.preprocess import on_white, open_image
from moma.inputs.segment import Segmenter

LAYOUT = (
    "expected DIR/SUBJECT/PROMPT-N.png (or .jpg), PROMPT in lower case with - for anything but letters and"
    " digits"
)


def find_images(folder: Path, tasks: Sequence[Task]) -> dict[Task, Path]:
    """The image of each task among those drawn elsewhere, with any usual extension.

    ValueError if one is missing: averages over different prompts do not compare.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {LAYOUT}")
    there = {
        path.with_suffix(""): path for path in sorted(folder.glob("*/*")) if path.suffix.lower() in SUFFIXES
    }
    found = {task: there.get((folder / task.file).with_suffix("")) for task in tasks}
    if missing := [task for task, path in found.items() if path is None]:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(tasks)} images are missing, the first is {missing[0].file};"
            f" {LAYOUT}; --no-added asks for DreamBooth's 25 prompts alone, --subjects, --prompts and"
            " --per-prompt for fewer"
        )
    return found


def embed_files(scorers: Sequence[ImageScorer], files: Iterable[Path]) -> list[Tensor]:
    """N images, transparent parts white -> (N, E) for each scorer."""
    return embed(scorers, [on_white(open_image(file)) for file in files])


def embed_real(scorers: Sequence[ImageScorer], subjects: Sequence[Subject]) -> dict[str, list[Tensor]]:
    """Subject's name -> embeddings of all its R photos, (R, E) for each scorer; pairs by their subjects."""
    single = {one.name: one for subject in subjects for one in subject.each}
    return {name: embed_files(scorers, one.photos) for name, one in single.items()}


def rate(
    method: str,
    images: Mapping[Task, Path],
    real: Mapping[str, Sequence[Tensor]],
    scorers: Sequence[ImageScorer],
    out: Path,
    segmenter: Segmenter | None = None,
) -> list[Score]:
    """A score for each image.

    Args:
        method: its name.
        images: task -> file.
        real: of `embed_real`.
        scorers: whose embeddings these are.
        out: folder that the scores' file names are relative to.
        segmenter: also compares the part of an image that shows each of several subjects.
    """
    scores = []
    for subject, group in groupby(images, key=lambda task: task.subject):
        tasks = list(group)
        seen = embed_files(scorers, (images[task] for task in tasks))
        prompts = [task.prompt for task in tasks]
        each = [measure(scorers, seen, real[one.name], prompts) for one in subject.each]
        rows = [_mean(row) for row in zip(*each, strict=True)]
        if subject.parts and segmenter:
            likeness = [real[one.name] for one in subject.each]
            for task, row in zip(tasks, rows, strict=True):
                row |= rate_parts(on_white(open_image(images[task])), likeness, scorers, segmenter)
        for task, row in zip(tasks, rows, strict=True):
            file = Path(os.path.relpath(images[task], out)).as_posix()
            facts = method, subject.name, subject.word, task.kind, task.prompt, task.number
            scores.append(Score(*facts, file, row))
    return scores


def rate_parts(
    image: Image.Image,
    real: Sequence[Sequence[Tensor]],
    scorers: Sequence[ImageScorer],
    segmenter: Segmenter,
) -> dict[str, float]:
    """Column -> mean over the subjects of the likeness of the object that is each one's.

    The objects go to the subjects as they are most alike by the first scorer, one to each; where there are
    fewer objects than subjects, the whole image stands for another one.

    Args:
        image: RGB.
        real: of each subject, (R, E) for each scorer.
        scorers: whose embeddings these are.
        segmenter: finds the objects.
    """
    crops, taken = [], []
    with suppress(ValueError):  # it finds none
        for found in segmenter.objects(image):
            within = segmenter.cfg.inside * found.mask.sum()
            if all((found.mask & mask).sum() < within for mask in taken):  # else a part of another
                crops.append(image.crop(found.box))
                taken.append(found.mask)
    crops += [image] * max(0, len(real) - len(crops))
    seen = embed(scorers, crops)  # of each scorer (C, E)
    # Of each scorer (subjects, C).
    alike = [torch.stack([similarity(own, one[i]) for one in real]) for i, own in enumerate(seen)]
    every = torch.arange(len(real))
    best = max(permutations(range(len(crops)), len(real)), key=lambda pick: alike[0][every, list(pick)].sum())
    return {
        f"{scorer.columns[0]}, SAM's objects": values[every, list(best)].mean().item()
        for scorer, values in zip(scorers, alike, strict=True)
    }


def rate_real(
    real: Mapping[str, Sequence[Tensor]], scorers: Sequence[ImageScorer], subjects: Sequence[Subject]
) -> dict[str, dict[str, float]]:
    """How alike the real images of a subject are.

    Args:
        real: of `embed_real`.
        scorers: whose embeddings these are.
        subjects: that were drawn.

    Returns:
        Subject -> column -> mean over all pairs of its photos; those with a single photo are left out.
    """
    found = {one.name: [measure_real(scorers, real[part.name]) for part in one.each] for one in subjects}
    return {name: _mean(rows) for name, rows in found.items() if all(rows)}


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Column -> mean over the subjects of an image."""
    return {column: sum(row[column] for row in rows) / len(rows) for column in rows[0]}
