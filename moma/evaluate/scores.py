"""Arithmetic of the scores: cosines of embeddings, and their averages.

DreamBooth's measures (Ruiz et al., arXiv 2208.12242): DINO and CLIP-I are the mean cosine of a picture with
all real pictures of its subject, CLIP-T is the cosine of a picture with its prompt.

Letters: N pictures, R real pictures of a subject, E embedding; embeddings are of unit length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """One picture, and what each measure says of it."""

    method: str
    subject: str  # its folder's name
    label: str  # the word for it in the prompts
    kind: str  # of the prompt: "context" or "texture"
    prompt: str
    number: int  # of the picture among those of its prompt
    file: str
    values: Mapping[str, float]  # column -> cosine; a column names measure and network


class Average(NamedTuple):
    """Mean over pictures."""

    values: dict[str, float]  # column -> mean over the pictures that have it
    count: int  # pictures


def similarity(pictures: Tensor, real: Tensor) -> Tensor:
    """Mean cosine of each picture with all real ones: (N, E), (R, E) -> (N,)."""
    if not len(real):
        raise ValueError("no real picture of the subject: expected at least one to compare with")
    return (pictures @ real.T).mean(dim=1)  # (N, R) -> (N,)


def prompt_similarity(pictures: Tensor, prompts: Tensor) -> Tensor:
    """Cosine of each picture with its own prompt: (N, E) each -> (N,)."""
    if pictures.shape != prompts.shape:
        raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts: expected one prompt for each")
    return (pictures * prompts).sum(dim=1)


def real_similarity(real: Tensor) -> Tensor:
    """Mean cosine of each real picture with each other one, never with itself: (R, E) -> (R,).

    Their mean is the mean over all pairs, the row "Real images". ValueError for a single picture.
    """
    count = len(real)
    if count < 2:
        raise ValueError(f"{count} real picture of the subject: expected two or more to compare them")
    cosines = real @ real.T  # (R, R)
    return (cosines.sum(dim=1) - cosines.diagonal()) / (count - 1)


def averages(scores: Sequence[Score], *by: str) -> dict[tuple[str, ...], Average]:
    """Mean over the pictures that share the fields `by` of Score, in the order in which they first come.

    averages(scores, "method", "kind") are a table's rows, with "method" and "subject" a chart's bars.
    """
    groups: dict[tuple[str, ...], list[Score]] = {}
    for score in scores:
        groups.setdefault(tuple(getattr(score, name) for name in by), []).append(score)
    return {key: _average(group) for key, group in groups.items()}


def _average(scores: Sequence[Score]) -> Average:
    found: dict[str, list[float]] = {}
    for score in scores:
        for column, value in score.values.items():
            found.setdefault(column, []).append(value)
    return Average({column: sum(values) / len(values) for column, values in found.items()}, len(scores))
