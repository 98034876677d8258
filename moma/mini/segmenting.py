"""Pretraining of MoMA-mini's SAM with clicks and boxes on renders, whose masks are known.

Letters: N images, B batch, n subjects of an image, P prompts of an image, M masks of a prompt, H W sides of
an image, S side of SAM's input, h w of the image in it, s side of SAM's masks.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.sam import BOX_END, BOX_START, FOREGROUND, IGNORED, SAM, Prompts
from models.sam_image import preprocess
from moma.inputs.segment import Box, Point
from moma.mini.config import SegmentTrainingConfig
from moma.mini.tasks import Images, Pairs
from moma.training.order import generators_for
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
    """One prompt of each kind per image. Its target is a subject, or everything that is none."""

    def __init__(self, sam: SAM, images: Images, pairs: Pairs, cfg: SegmentTrainingConfig) -> None:
        super().__init__(len(images), cfg.held_out, cfg.train.batch_size, cfg.train.seed)
        self.model, self.images, self.pairs, self.cfg = SegmentLoss(sam, cfg), images, pairs, cfg

    def assemble(self, items: Tensor, numbers: Tensor) -> Batch:
        rows = []
        for item, generator in zip(items.tolist(), generators_for(self.seed, numbers), strict=True):
            paired = bool(torch.rand((), generator=generator) < self.cfg.paired)
            data, place = (self.pairs, item % len(self.pairs)) if paired else (self.images, item)
            masks = data.masks[place]  # (n, H, W)
            order = torch.randperm(len(masks), generator=generator)
            rows.append(self._asked(data.images[place], masks[order], generator))
        pixels, points, labels, target = map(torch.stack, zip(*rows, strict=True))
        return {"pixels": pixels, "points": points, "labels": labels, "target": target, "number": numbers}

    def _asked(self, image: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """An image (3, H, W) as SAM sees it, (3, S, S), and its prompts with targets (P, S, S)."""
        side = self.model.sam.cfg.image_size
        pixels, where = preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()), side)  # (1, 3, S, S)
        h, w = where.inside
        inside = F.interpolate(masks[None] / 255, (h, w), mode="bilinear", antialias=True)[0]  # (n, h, w)
        points, labels, target = prompts(inside, self.cfg, generator)
        return pixels[0], points, labels, F.pad(target, (0, side - w, 0, side - h))

    def networks(self) -> dict[str, nn.Module]:
        return {"sam": self.model.sam}


def prompts(
    masks: Tensor, cfg: SegmentTrainingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One prompt of each kind: a click on the first subject, two clicks, a box around it, another box, and a
    click beside all subjects. The other box is around the other subject or, without one, around all of the
    image but its margin.

    Args:
        masks: coverage by each of one or two subjects, (n, h, w) in 0..1.
        cfg: jitter of the boxes.
        generator: of the draws.

    Returns:
        points (P, 2, 2) as x, y in pixels; labels (P, 2); and targets (P, h, w) in 0..1.
    """
    size = torch.tensor(masks.shape[:0:-1])  # (2,): w, h
    first, last, rest = masks[0], masks[-1], 1 - masks.amax(dim=0)  # (h, w) each
    on, also, off = (_somewhere(where > 0.5, generator) for where in (first, first, rest))  # (2,)
    box = _box(first, cfg, generator)  # (2, 2)
    if len(masks) > 1:
        other = _box(last, cfg, generator)  # (2, 2)
    else:
        margin = cfg.frame_margin * size * torch.rand((2, 2), generator=generator)  # (2, 2)
        other = torch.stack([margin[0], size - margin[1]])  # (2, 2)
    unused = torch.zeros(2)
    one, two, beside = (torch.stack(pair) for pair in ((on, unused), (on, also), (off, unused)))  # (2, 2)
    points = torch.stack([one, two, box, other, beside])  # (P, 2, 2)
    click, corners = (FOREGROUND, IGNORED), (BOX_START, BOX_END)
    labels = torch.tensor([click, (FOREGROUND, FOREGROUND), corners, corners, click])  # (P, 2)
    return points, labels, torch.stack([first, first, first, last, rest])  # (P, h, w)


def _box(mask: Tensor, cfg: SegmentTrainingConfig, generator: torch.Generator) -> Tensor:
    """A loose box (2, 2) around a subject (h, w): x, y of two corners."""
    rows, columns = (mask > 0.5).nonzero().unbind(dim=1)
    low = torch.stack([columns.min(), rows.min()]).float()  # (2,)
    high = torch.stack([columns.max(), rows.max()]) + 1.0  # (2,)
    loose = cfg.box_jitter * (high - low) * torch.randn((2, 2), generator=generator)  # (2, 2)
    return (torch.stack([low, high]) + loose).clamp(torch.zeros(2), torch.tensor(mask.shape[::-1]))


def _somewhere(where: Tensor, generator: torch.Generator) -> Tensor:
    """A random pixel where a mask (S, S) is True, as x, y (2,)."""
    places = where.nonzero()  # (n, 2) as y, x
    return places[torch.randint(len(places), (), generator=generator)].flip(0).float()


def hints(mask: Tensor) -> tuple[Box, Point]:
    """The box of a subject and the pixel of it that is nearest to its middle; mask: bool (H, W)."""
    places = mask.nonzero().flip(1).float()  # (n, 2): x, y
    click = places[(places - places.mean(dim=0)).square().sum(dim=1).argmin()]  # (2,)
    return (*places.amin(dim=0).tolist(), *(places.amax(dim=0) + 1).tolist()), tuple(click.tolist())
