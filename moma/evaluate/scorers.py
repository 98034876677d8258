"""Networks that score images: DINO and CLIP as embeddings of unit length.

A column is named by measure and network variant. Papers often leave the network open, and scores differ
between variants, so no table may omit it.

Letters: N images or texts, R real images of a subject, E embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip import CLIP
from models.clip_image import clip_image
from models.dino import DINO
from models.dino_image import dino_image
from models.tokenizers import ClipTokenizer
from moma.evaluate.scores import prompt_similarity, real_similarity, similarity
from moma.inputs.faces import EMBEDDING, Face
from moma.weights.bundle import SCORERS, Bundle

COLUMNS = {  # network of a bundle -> its measures: similarity to real images, then to the prompt
    "dino_s16": ("DINO ViT-S/16",),
    "dino_b16": ("DINO ViT-B/16",),
    "clip_b32": ("CLIP-I ViT-B/32", "CLIP-T ViT-B/32"),
    "clip_l14": ("CLIP-I ViT-L/14", "CLIP-T ViT-L/14"),
}
Item = TypeVar("Item")
BATCH = 32  # images or texts per call: fills a GPU; a CPU gains nothing from more


@runtime_checkable
class ImageScorer(Protocol):
    """Measures similarity to real images."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its measures; the first is the mean cosine with the real images of the subject."""

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N images of any size and mode -> (N, E) float32 of unit length, on the CPU."""


@runtime_checkable
class TextScorer(ImageScorer, Protocol):
    """Also measures similarity to the prompt, in its second column."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, E) float32 of unit length, on the CPU, in the space of the images."""


@dataclass(frozen=True)
class DINOScorer:
    """The class token of DINO."""

    network: DINO
    columns: tuple[str, ...]
    batch: int = BATCH

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        size, like = self.network.cfg.image_size, self.network.cls_token

        def embed(some: Sequence[Image.Image]) -> Tensor:
            return self.network(torch.stack([dino_image(image, size) for image in some]).to(like))  # (n, E)

        return _unit(images, embed, self.batch)


@dataclass(frozen=True)
class CLIPScorer:
    """CLIP's projected embeddings; texts are truncated to its positions."""

    network: CLIP
    tokenizer: ClipTokenizer
    columns: tuple[str, ...]
    batch: int = BATCH

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        size, like = self.network.cfg.vision.image_size, next(self.network.parameters())

        def embed(some: Sequence[Image.Image]) -> Tensor:
            pixels = torch.stack([clip_image(image, size) for image in some]).to(like)  # (n, 3, S, S)
            return self.network.image_features(pixels)  # (n, E)

        return _unit(images, embed, self.batch)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        device = next(self.network.parameters()).device
        return _unit(
            texts, lambda some: self.network.text_features(self.tokenizer.ids(some).to(device)), self.batch
        )


@dataclass(frozen=True)
class FaceScorer:
    """ArcFace's embedding of an image's largest face; an image without a face is like no other."""

    find: Callable[[Image.Image], Sequence[Face]]  # `load_detector`
    columns: tuple[str, ...] = ("face ArcFace",)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        found = [next(iter(self.find(image)), None) for image in images]
        rows = [torch.zeros(EMBEDDING) if face is None else face.embedding for face in found]
        return F.normalize(torch.stack(rows), dim=1)  # (N, E)


@torch.no_grad()
def _unit(items: Sequence[Item], embed: Callable[[Sequence[Item]], Tensor], batch: int) -> Tensor:
    """Embed in batches; float32 of unit length."""
    if not items:
        raise ValueError("nothing to score: expected at least one image or text")
    rows = [embed(items[i : i + batch]).float().cpu() for i in range(0, len(items), batch)]  # (n, E) each
    return F.normalize(torch.cat(rows), dim=1)  # (N, E)


def load_scorers(
    bundle: Bundle,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = BATCH,
) -> list[ImageScorer]:
    """All scorers in a bundle, DINO first.

    Args:
        bundle: may have none.
        device: of the networks.
        dtype: of the networks; float32 keeps rounding out of the scores.
        batch: images or texts per call.
    """
    scorers: list[ImageScorer] = []
    for name in (name for name in SCORERS if name in bundle.networks):
        network = bundle.build(name, device, dtype).eval()
        if isinstance(network, CLIP):
            scorers.append(CLIPScorer(network, bundle.clip_tokenizer(name), COLUMNS[name], batch))
        else:
            scorers.append(DINOScorer(network, COLUMNS[name], batch))
    return scorers


def check_scorers(bundle: Bundle) -> None:
    """ValueError for a bundle without any scorer."""
    if not set(SCORERS) & set(bundle.networks):
        raise ValueError(
            f"{bundle.folder}: has none of {', '.join(SCORERS)}; convert one into it, or give another bundle"
            " with --scorers"
        )


def embed(scorers: Sequence[ImageScorer], images: Sequence[Image.Image]) -> list[Tensor]:
    """N images -> (N, E) for each scorer."""
    return [scorer.embed_images(images) for scorer in scorers]


def measure(
    scorers: Sequence[ImageScorer],
    images: Sequence[Tensor],
    real: Sequence[Tensor],
    prompts: Sequence[str],
) -> list[dict[str, float]]:
    """Score N images of one subject.

    Args:
        scorers: whose embeddings these are.
        images: (N, E) for each scorer.
        real: (R, E) for each scorer.
        prompts: N.

    Returns:
        Column -> score, for each image.
    """
    found: dict[str, Tensor] = {}  # column -> (N,)
    for scorer, own, others in zip(scorers, images, real, strict=True):
        found[scorer.columns[0]] = similarity(own, others)
        if isinstance(scorer, TextScorer):
            found[scorer.columns[1]] = prompt_similarity(own, scorer.embed_texts(prompts))
    rows = zip(*(column.tolist() for column in found.values()), strict=True)
    return [dict(zip(found, row, strict=True)) for row in rows]


def measure_real(scorers: Sequence[ImageScorer], real: Sequence[Tensor]) -> dict[str, float]:
    """Column -> mean cosine over all pairs of real images of one subject.

    Args:
        scorers: whose embeddings these are.
        real: (R, E) for each scorer.

    Returns:
        Nothing for a single image, which has no pair.
    """
    found = {}
    for scorer, own in zip(scorers, real, strict=True):
        if len(own) > 1:
            values = real_similarity(own).tolist()
            found[scorer.columns[0]] = sum(values) / len(values)
    return found
