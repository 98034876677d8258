"""Averages that papers report for the complete DreamBooth protocol."""

from collections.abc import Mapping
from dataclasses import dataclass

SUBJECTS, PROMPTS, PER_PROMPT = 30, 25, 4  # of the protocol
IMAGES = SUBJECTS * PROMPTS * PER_PROMPT
# Columns for papers that do not say which network they used.
UNSTATED = ("DINO, variant not stated", "CLIP-I, variant not stated", "CLIP-T, variant not stated")
NOTE = """Rows marked (published) cover 30 subjects, 25 prompts and 4 images per prompt. They come from the
papers of DreamBooth (arXiv 2208.12242, Table 1) and BLIP-Diffusion (arXiv 2305.14720), the others from later
comparisons. DreamBooth's DINO is ViT-S/16; scores of unknown networks have columns of their own. Scores of
other protocols are left out; MoMA's own (arXiv 2404.05674, Table 1) are missing."""


@dataclass(frozen=True)
class Published:
    """Averages over all images of a method, or over the real images."""

    name: str
    values: Mapping[str, float]
    images: int = IMAGES  # 0: real images


def _unstated(name: str, *values: float) -> Published:
    return Published(name, dict(zip(UNSTATED, values, strict=True)))


def _first(name: str, images: int, dino: float, *clip: float) -> Published:
    """A row of DreamBooth's own paper."""
    values = dict(zip(UNSTATED[1:], clip, strict=False))
    return Published(name, {"DINO ViT-S/16": dino, **values}, images)


# Averages over images of two subjects, as Subject-Diffusion (arXiv 2307.11410) reports them: DINO, CLIP-I,
# CLIP-T, each subject's similarity alike.
PAIRS = (
    _unstated("DreamBooth", 0.430, 0.695, 0.308),
    _unstated("Subject-Diffusion", 0.506, 0.696, 0.310),
)
DREAMBOOTH = (
    _first("Real images", 0, 0.774, 0.885),
    _first("DreamBooth (Imagen)", IMAGES, 0.696, 0.812, 0.306),
    _first("DreamBooth (Stable Diffusion)", IMAGES, 0.668, 0.803, 0.305),
    _first("Textual Inversion", IMAGES, 0.569, 0.780, 0.255),
    _unstated("BLIP-Diffusion, zero-shot", 0.594, 0.779, 0.300),
    _unstated("BLIP-Diffusion, fine-tuned", 0.670, 0.805, 0.302),
    _unstated("Custom Diffusion", 0.643, 0.790, 0.305),
    _unstated("ELITE", 0.621, 0.771, 0.293),
    _unstated("IP-Adapter (SD 1.5)", 0.667, 0.813, 0.289),
)
