"""Files to scores: embeds the images of each method and the real ones, subject by subject."""

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from torch import Tensor

from moma.evaluate.protocol import SUFFIXES, Subject, Task
from moma.evaluate.scorers import ImageScorer, measure, measure_real
from moma.evaluate.scores import Score
from moma.inputs.preprocess import on_white, open_image

LAYOUT = (
    "expected DIR/SUBJECT/PROMPT-N.png (or .jpg), PROMPT in small letters with - for all that is no letter or"
    " digit"
)


def find_images(folder: Path, tasks: Sequence[Task]) -> dict[Task, Path]:
    """The image of each task among those that somebody else has drawn, with any usual extension.

    ValueError if one is missing: averages over other prompts do not compare.
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
    """One (N, E) for each scorer."""
    images = [on_white(open_image(file)) for file in files]
    return [scorer.embed_images(images) for scorer in scorers]


def embed_real(scorers: Sequence[ImageScorer], subjects: Sequence[Subject]) -> dict[str, list[Tensor]]:
    """Subject's name -> embeddings (R, E) of all its photos by each scorer."""
    return {subject.name: embed_files(scorers, subject.photos) for subject in subjects}


def rate(
    method: str,
    images: Mapping[Task, Path],
    real: Mapping[str, Sequence[Tensor]],
    scorers: Sequence[ImageScorer],
    out: Path,
) -> list[Score]:
    """A score for each image; real: of `embed_real`; files are named as seen from `out`."""
    scores = []
    for subject, group in groupby(images, key=lambda task: task.subject):
        tasks = list(group)
        prompts, seen = [task.prompt for task in tasks], embed_files(scorers, (images[t] for t in tasks))
        values: list[dict[str, float]] = [{} for _ in tasks]
        for scorer, embedded, photos in zip(scorers, seen, real[subject.name], strict=True):
            for row, found in zip(values, measure(scorer, embedded, photos, prompts), strict=True):
                row |= found
        for task, row in zip(tasks, values, strict=True):
            file = Path(os.path.relpath(images[task], out)).as_posix()
            facts = method, subject.name, subject.word, task.kind, task.prompt, task.number
            scores.append(Score(*facts, file, row))
    return scores


def rate_real(
    real: Mapping[str, Sequence[Tensor]], scorers: Sequence[ImageScorer]
) -> dict[str, dict[str, float]]:
    """Subject -> column -> mean over all pairs of its photos; a single photo has nothing to compare with."""
    found: dict[str, dict[str, float]] = {}
    for name, embedded in real.items():
        for scorer, photos in zip(scorers, embedded, strict=True):
            if len(photos) > 1:
                rows = measure_real(scorer, photos)
                means = {column: sum(row[column] for row in rows) / len(rows) for column in rows[0]}
                found.setdefault(name, {}).update(means)
    return found
