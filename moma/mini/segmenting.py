"""Pretraining of MoMA-mini's SAM with clicks and boxes on renders, whose masks are known.

Letters: N images, B batch, P prompts of an image, M masks of a prompt, S image side, s side of
SAM's masks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sam import BOX_END, BOX_START, FOREGROUND, IGNORED, SAM, Prompts
from models.sam_image import normalised
from moma.mini.config import SegmentTrainingConfig
from moma.mini.tasks import Images
from moma.training.order import generator_for
from moma.training.pretraining import PretrainingTask
from moma.training.task import Batch


class SegmentLoss(nn.Module):
    """SAM's own loss (arXiv 2304.02643, appendix A): focal, dice and squared error of the predicted IoU.

    The single mask and the best of the other three have equal weight.
    """

    def __init__(self, sam: SAM, cfg: SegmentTrainingConfig) -> None:
        super().__init__()
        self.sam, self.cfg = sam, cfg

    def forward(self, batch: Batch) -> Tensor:
        """Losses (B,) of pixels (B, 3, S, S), normalised, points (B, P, 2, 2), labels (B, P, 2), and target
        (B, P, S, S) in 0..1."""
        features = self.sam.encode(batch["pixels"])  # (B, C, h, w)
        logits, predicted = self.sam.decode(features, Prompts(batch["points"], batch["labels"]))
        target = F.adaptive_avg_pool2d(batch["target"], logits.shape[-2:])  # (B, P, s, s)
        target = target[:, :, None].expand_as(logits)  # (B, P, M, s, s)
        fit = self.cfg.focal_weight * focal(logits, target, self.cfg.focal_gamma) + dice(logits, target)
        single, several = fit[:, :, 0], fit[:, :, 1:].min(dim=2).values  # (B, P)
        with torch.no_grad():
            mask, true = logits > 0, target > 0.5
            true_iou = (mask & true).sum(dim=(3, 4)) / (mask | true).sum(dim=(3, 4)).clamp_min(1)  # (B, P, M)
        error = (predicted.float() - true_iou).square().mean(dim=2)  # (B, P)
        return (single + several + self.cfg.iou_weight * error).mean(dim=1)


def focal(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Mean focal loss (arXiv 1708.02002).

    Args:
        logits: of masks, (..., S, S).
        target: (..., S, S) in 0..1.
        gamma: exponent; a larger one reduces the weight of correct pixels.

    Returns:
        (...).
    """
    error = F.binary_cross_entropy_with_logits(logits, target, reduction="none")  # (..., S, S)
    miss = (logits.sigmoid() - target).abs()  # (..., S, S)
    return (miss**gamma * error).mean(dim=(-2, -1))


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice coefficient (...) of masks (..., S, S)."""
    found = logits.sigmoid()
    both, all_ = (found * target).sum(dim=(-2, -1)), (found + target).sum(dim=(-2, -1))  # (...)
    return 1 - (2 * both + 1) / (all_ + 1)


class SegmentTask(PretrainingTask):
    """One prompt of each kind per image. Its target is the subject, or everything else."""

    def __init__(self, sam: SAM, images: Images, cfg: SegmentTrainingConfig) -> None:
        super().__init__(len(images), cfg.held_out, cfg.train.batch_size, cfg.train.seed)
        self.model, self.images, self.cfg = SegmentLoss(sam, cfg), images, cfg

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        points, labels, targets = [], [], []
        for mask, number in zip(self.images.masks[items] / 255, numbers.tolist(), strict=True):
            generator = generator_for(self.seed, number)
            asked, kind, wanted = prompts(mask[0], self.cfg, generator)
            points.append(asked)
            labels.append(kind)
            targets.append(torch.where(wanted[:, None, None], mask, 1 - mask))  # (P, S, S)
        return {
            "pixels": normalised(self.images.images[items]), "points": torch.stack(points),
            "labels": torch.stack(labels), "target": torch.stack(targets), "number": numbers,
        }  # fmt: skip

    def networks(self) -> dict[str, nn.Module]:
        return {"sam": self.model.sam}


def prompts(
    mask: Tensor, cfg: SegmentTrainingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One prompt of each kind: a click on the subject, two clicks, a box around it, a box around all of the
    image but its margin, and a click beside the subject.

    Args:
        mask: coverage by the subject, (S, S) in 0..1.
        cfg: jitter of the boxes.
        generator: of the draws.

    Returns:
        points (P, 2, 2) as x, y in pixels; labels (P, 2); and whether the target is the subject, (P,) bool.
    """
    side = mask.shape[-1]
    on, also, off = (_somewhere(where, generator) for where in (mask > 0.5, mask > 0.5, mask < 0.5))  # (2,)
    rows, columns = (mask > 0.5).nonzero().unbind(dim=1)
    low = torch.stack([columns.min(), rows.min()]).float()  # (2,)
    high = torch.stack([columns.max(), rows.max()]) + 1.0  # (2,)
    loose = cfg.box_jitter * (high - low) * torch.randn((2, 2), generator=generator)  # (2, 2)
    box = (torch.stack([low, high]) + loose).clamp(0, side)  # (2, 2)
    margin = cfg.frame_margin * side * torch.rand((2, 2), generator=generator)  # (2, 2)
    frame = torch.stack([margin[0], side - margin[1]])  # (2, 2)
    unused = torch.zeros(2)
    one, two, beside = (torch.stack(pair) for pair in ((on, unused), (on, also), (off, unused)))  # (2, 2)
    points = torch.stack([one, two, box, frame, beside])  # (P, 2, 2)
    click, corners = (FOREGROUND, IGNORED), (BOX_START, BOX_END)
    labels = torch.tensor([click, (FOREGROUND, FOREGROUND), corners, corners, click])  # (P, 2)
    return points, labels, torch.tensor([True, True, True, True, False])


def _somewhere(where: Tensor, generator: torch.Generator) -> Tensor:
    """A random pixel where a mask (S, S) is True, as x, y (2,)."""
    places = where.nonzero()  # (n, 2) as y, x
    return places[torch.randint(len(places), (), generator=generator)].flip(0).float()
