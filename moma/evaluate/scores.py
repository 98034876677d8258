"""Cosines of embeddings, and their averages.

DreamBooth's measures (Ruiz et al., arXiv 2208.12242): DINO and CLIP-I are the mean cosine of an image with
all real images of its subject, CLIP-T is the cosine of an image with its prompt.

Letters: N images, R real images of a subject, E embedding; embeddings are of unit length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Score:
    """The scores of one image."""

    method: str
    subject: str  # its folder's name
    label: str  # its word in the prompts
    kind: str  # of the prompt: "context" or "texture"
    prompt: str
    number: int  # of the image among those of its prompt
    file: str
    values: Mapping[str, float]  # column (measure and network) -> cosine


class Average(NamedTuple):
    """Mean over images."""

    values: dict[str, float]  # column -> mean over the images that have a value
    count: int  # images


def similarity(images: Tensor, real: Tensor) -> Tensor:
    """Mean cosine of each image (N, E) with all real ones (R, E) -> (N,)."""
    if not len(real):
        raise ValueError("no real image of the subject: expected at least one to compare with")
    return (images @ real.T).mean(dim=1)  # (N, R) -> (N,)


def prompt_similarity(images: Tensor, prompts: Tensor) -> Tensor:
    """Cosine of each image (N, E) with its own prompt (N, E) -> (N,)."""
    if images.shape != prompts.shape:
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: expected one prompt for each")
    return (images * prompts).sum(dim=1)


def real_similarity(real: Tensor) -> Tensor:
    """Mean cosine of each real image with the others, (R, E) -> (R,); ValueError for a single image.

    The mean of the result is the mean over all pairs, the row "Real images".
    """
    count = len(real)
    if count < 2:
        raise ValueError(f"{count} real image of the subject: expected two or more to compare them")
    cosines = real @ real.T  # (R, R)
    return (cosines.sum(dim=1) - cosines.diagonal()) / (count - 1)


def averages(scores: Sequence[Score], *by: str) -> dict[tuple[str, ...], Average]:
    """Means over the images that agree in the fields `by` of Score, in order of first appearance.

    averages(scores, "method", "kind") gives the rows of a table.
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
