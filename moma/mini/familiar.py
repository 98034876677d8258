"""What images of the drawn world look like, so that MoMA-mini knows that it does not know others."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from moma.inputs.familiar import Familiar
from moma.mini.config import FamiliarTraining
from moma.world.world import WorldConfig, render


def fit_familiar(world: WorldConfig, cfg: FamiliarTraining) -> Familiar:
    """From training renders as they are and enlarged, subjects alone on white, and JPEG files.

    Args:
        world: what is drawn.
        cfg: how many, and of which sizes.
    """
    whole: list[Image.Image] = []
    alone: list[Image.Image] = []
    compressed: list[Image.Image] = []
    for index in range(cfg.renders + cfg.large):
        large = index >= cfg.renders
        sample = render(index, "train", replace(world, size=cfg.large_side) if large else world)
        image = Image.fromarray(sample.image)
        enlarged = image if large else image.resize((cfg.enlarged,) * 2, Image.Resampling.BICUBIC)
        whole += [image] if large else [image, enlarged]
        alone.append(Image.fromarray(np.dstack([sample.image, sample.mask])))
        enlarged.save(file := io.BytesIO(), "JPEG", quality=cfg.quality)
        compressed.append(Image.open(file))
    return Familiar.fit([whole, alone, compressed])
