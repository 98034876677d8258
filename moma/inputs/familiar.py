"""Whether an image is of the kind that a model was trained on, by its edges and colours.

Weights that know one kind of images only lie beside `familiar.safetensors`: means and inverse covariances of
a few statistics of such images, and the distance beyond which an image is of another kind.

Letters: N images, F statistics, G groups of images, S side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image

from models.weights.loading import read_checkpoint, save_tensors
from moma.inputs.preprocess import on_white

FILE = "familiar.safetensors"


@dataclass(frozen=True)
class FamiliarConfig:
    """What is measured of an image. Values are 0..255."""

    side: int = 64  # pixels that the image is scaled to
    steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 128, 512)  # bounds of differences of neighbours
    dark: int = 70  # below it lie outlines
    bright: int = 240
    saturations: tuple[float, ...] = (0.0, 0.1, 0.4, 0.7, 1.1)  # bounds
    levels: tuple[int, ...] = (16, 64)  # per channel, of which different colours are counted
    least: float = 0.01  # added to shares before their logarithm
    ridge: float = 0.1  # added to the variances, of which each is 1
    # The limit, of the distance that a share of the images keeps: well beyond what unseen ones have.
    share: float = 0.99
    room: float = 1.3


CONFIG = FamiliarConfig()


def statistics(image: Image.Image, cfg: FamiliarConfig = CONFIG) -> np.ndarray:
    """Logarithms (F,) of the shares of steps, colours and tones."""
    small = on_white(image).resize((cfg.side, cfg.side), Image.Resampling.BOX)
    x = np.asarray(small).astype(np.int16)  # (S, S, 3)
    shares: list[float] = []
    for order in (1, 2):
        for axis in (0, 1):
            step = np.abs(np.diff(x, order, axis=axis)).max(axis=2)
            shares.extend(np.histogram(step, cfg.steps)[0] / step.size)
    high, low = x.max(axis=2), x.min(axis=2)  # (S, S)
    shares.extend(np.histogram((high - low) / np.maximum(high, 1), cfg.saturations)[0] / high.size)
    shares += [(high < cfg.dark).mean(), (high > cfg.bright).mean(), high.std() / 255]
    for levels in cfg.levels:
        colours = np.unique((x * levels // 256).reshape(-1, 3), axis=0)
        shares.append(len(colours) / high.size)
    return np.log(np.array(shares) + cfg.least)


@dataclass(frozen=True)
class Familiar:
    """The images that a model knows, as normal distributions of their statistics."""

    mean: torch.Tensor  # (G, F)
    precision: torch.Tensor  # (G, F, F), inverse covariances
    limit: torch.Tensor  # (), a distance

    @classmethod
    def fit(cls, groups: Sequence[Sequence[Image.Image]], cfg: FamiliarConfig = CONFIG) -> Self:
        """Of images, in groups that differ, such as those with and without a background."""
        means, precisions, found = [], [], []
        for images in groups:
            values = np.stack([statistics(image, cfg) for image in images])  # (N, F)
            scale = values.std(axis=0) + cfg.least
            wide = np.cov((values / scale).T) + cfg.ridge * np.eye(len(scale))
            means.append(values.mean(axis=0))
            precisions.append(np.linalg.inv(wide) / np.outer(scale, scale))
            found.append(values)
        mean, precision = (torch.tensor(np.stack(x), dtype=torch.float32) for x in (means, precisions))
        near = cls(mean, precision, torch.zeros(()))
        distances = [near._distance(value) for values in found for value in values]
        return cls(mean, precision, torch.tensor(float(cfg.room * np.quantile(distances, cfg.share))))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """What a bundle's folder holds; None if it holds nothing. ValueError for a file that does not fit."""
        if not (folder / FILE).is_file():
            return None
        stored = {name: tensor.read() for name, tensor in read_checkpoint(folder / FILE).items()}
        size = len(statistics(Image.new("RGB", (1, 1))))
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        groups = len(stored["mean"]) if shapes.get("mean") else 0
        if shapes != {"mean": (groups, size), "precision": (groups, size, size), "limit": ()}:
            raise ValueError(f"{folder / FILE}: shapes {shapes}, expected statistics of {size} values")
        return cls(**{name: tensor.float() for name, tensor in stored.items()})

    def save(self, folder: Path) -> None:
        """Write it beside a bundle's networks."""
        save_tensors(folder, Path(FILE).stem, vars(self))

    def distance(self, image: Image.Image) -> float:
        """From the nearest group; RGB, or RGBA (transparent parts become white)."""
        return self._distance(statistics(image))

    def knows(self, image: Image.Image) -> bool:
        """Whether an image is of the kind."""
        return self.distance(image) <= self.limit.item()

    def _distance(self, values: np.ndarray) -> float:
        away = torch.tensor(values, dtype=torch.float32) - self.mean  # (G, F)
        return torch.einsum("gi,gij,gj->g", away, self.precision, away).min().item()
