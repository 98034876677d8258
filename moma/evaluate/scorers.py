"""Networks that judge images: DINO and CLIP as embeddings of unit length, each named with its variant.

Which network a published figure comes from is often left open, and the figures differ between variants: a
column is called by measure and network, so that no table is without it.

Letters: N images or texts, E embedding.
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
from moma.weights.bundle import SCORERS, Bundle

COLUMNS = {  # network of a bundle -> what it measures: likeness to real images, then to the prompt
    "dino_s16": ("DINO ViT-S/16",),
    "dino_b16": ("DINO ViT-B/16",),
    "clip_b32": ("CLIP-I ViT-B/32", "CLIP-T ViT-B/32"),
    "clip_l14": ("CLIP-I ViT-L/14", "CLIP-T ViT-L/14"),
}
Item = TypeVar("Item")
BATCH = 32  # images or texts at once: fills a GPU, and a CPU gains nothing from more


@runtime_checkable
class ImageScorer(Protocol):
    """Judges likeness to real images."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What it measures; the first is the mean cosine with the real images of the subject."""
        ...

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """N images of any size and mode -> (N, E) float32 of unit length, on the CPU."""
        ...


@runtime_checkable
class TextScorer(ImageScorer, Protocol):
    """Judges likeness to the prompt, too, as the second of its columns."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """N texts -> (N, E) float32 of unit length, on the CPU, in the space of the images."""
        ...


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
    """CLIP's projected embeddings; a longer text than it knows positions for is cut, as CLIP does."""

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


@torch.no_grad()
def _unit(items: Sequence[Item], embed: Callable[[Sequence[Item]], Tensor], batch: int) -> Tensor:
    """A few at a time, made float32 of unit length."""
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
    """All scorers that the bundle has, DINO first; [] if there are none.

    dtype: float32, so that scores do not depend on rounding; others are for those who know what they lose.
    """
    scorers: list[ImageScorer] = []
    for name in (name for name in SCORERS if name in bundle.networks):
        network = bundle.build(name, device, dtype).eval()
        if isinstance(network, CLIP):
            scorers.append(CLIPScorer(network, bundle.clip_tokenizer(name), COLUMNS[name], batch))
        else:
            scorers.append(DINOScorer(network, COLUMNS[name], batch))
    return scorers


def measure(
    scorer: ImageScorer, images: Tensor, real: Tensor, prompts: Sequence[str]
) -> list[dict[str, float]]:
    """Column -> score of each image of one subject.

    images (N, E) and real (R, E): embeddings by the same scorer; prompts: N.
    """
    found = [similarity(images, real)]  # (N,) each
    if isinstance(scorer, TextScorer):
        found.append(prompt_similarity(images, scorer.embed_texts(prompts)))
    return _rows(scorer.columns, found)


def measure_real(scorer: ImageScorer, real: Tensor) -> list[dict[str, float]]:
    """The same of each real image (R, E) of one subject against the others; they have no prompt."""
    return _rows(scorer.columns[:1], [real_similarity(real)])


def _rows(columns: Sequence[str], values: Sequence[Tensor]) -> list[dict[str, float]]:
    each = zip(*(column.tolist() for column in values), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in each]
