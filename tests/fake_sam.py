"""A stand-in for SAM whose masks are regions of one colour, and the sizes of a small SAM."""

import torch
from torch import Tensor, nn

from models.sam import Prompts
from models.sam_config import SAMConfig

SMALL = SAMConfig(
    width=16, layers=2, heads=2, mlp=32, global_blocks=(1,), window=2, image_size=64, out_channels=32,
    decoder_mlp=32, iou_width=16,
)  # fmt: skip
ALIKE = 0.2  # distance of normalised pixels; the colours of a test image are further apart
# Predicted for the four masks: the region, its left part, the region, the whole image.
IOUS = (0.9, 0.9, 0.95, 0.99)


class FlatSAM(nn.Module):
    """Answers a point with all pixels of the colour there, and a box with those of its centre's colour.

    The logits have the size of the input. `asked` collects the shapes of the prompts' labels.
    """

    def __init__(self, side: int = 128) -> None:
        super().__init__()
        self.cfg = SAMConfig(image_size=side)
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked: list[tuple[int, ...]] = []

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        self.asked.append(tuple(prompts.labels.shape))
        answers = [
            self._answer(features[0], *prompt) for prompt in zip(*(p[0] for p in prompts), strict=True)
        ]
        return torch.stack(answers)[None], torch.tensor(IOUS).expand(1, len(answers), 4)

    def _answer(self, image: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """image (3, S, S), points (N, 2), labels (N,) -> (4, S, S)"""
        corners = points[labels >= 2]
        where = (corners.mean(dim=0, keepdim=True) if len(corners) else points).long()
        seen = [(image - image[:, y, x, None, None]).abs().amax(dim=0) < ALIKE for x, y in where.tolist()]
        region = torch.stack(seen).any(dim=0)  # (S, S)
        part = region if region.all() else region & (torch.arange(region.shape[1]) < where[0, 0] + 2)
        return torch.stack([region, part, region, torch.ones_like(region)]) * 16.0 - 8
