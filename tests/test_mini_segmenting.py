"""What MoMA-mini's SAM is asked in training, and its losses against hand-made values."""

from dataclasses import replace

import pytest
import torch

from models.sam import BOX_END, BOX_START, FOREGROUND, IGNORED, SAM
from moma.mini.config import SegmentTrainingConfig
from moma.mini.segmenting import SegmentTask, dice, focal, prompts
from moma.mini.tasks import Images
from moma.world.world import render
from tests.fake_sam import SMALL

CFG = SegmentTrainingConfig()


def disc(side: int = 64) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((x - 20.0) ** 2 + (y - 40.0) ** 2 < 10**2).float()


@pytest.mark.parametrize("seed", range(5))
def test_prompts_ask_for_what_they_touch(seed: int) -> None:
    mask = disc()
    points, labels, subject = prompts(mask, CFG, torch.Generator().manual_seed(seed))
    assert points.shape == (5, 2, 2) and labels.shape == (5, 2)
    assert subject.tolist() == [True, True, True, True, False]
    each = points.flatten(0, 1), labels.flatten(), subject.repeat_interleave(2)
    for point, kind, wanted in zip(*each, strict=True):
        if kind == FOREGROUND:
            x, y = point.int().tolist()
            assert bool(mask[y, x]) == bool(wanted)
    boxes = points[(labels == torch.tensor([BOX_START, BOX_END])).all(dim=1)]  # (2, 2, 2)
    assert (boxes[:, 0] < boxes[:, 1]).all() and boxes.min() >= 0 and boxes.max() <= 64
    tight, frame = boxes
    assert (tight - torch.tensor([[11.0, 31.0], [30.0, 50.0]])).abs().max() < 5
    assert (frame[0] <= 0.15 * 64).all() and (frame[1] >= 0.85 * 64).all()
    assert (labels == IGNORED).sum() == 2
    again = prompts(mask, CFG, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip((points, labels, subject), again, strict=True))


def test_losses_of_known_masks() -> None:
    target = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    sure, unsure = (2 * target - 1) * 50, torch.zeros(2, 2)
    assert focal(sure, target, 2.0) == pytest.approx(0, abs=1e-6)
    assert focal(unsure, target, 2.0) == pytest.approx(0.25 * 0.6931, abs=1e-4)  # (1/2)² ln 2
    assert dice(sure, target) == pytest.approx(0, abs=1e-6)
    assert dice(-sure, target) == pytest.approx(1 - 1 / 5)  # no pixel in common, 2 + 2 pixels
    assert dice(unsure, target) == pytest.approx(1 - 3 / 5)  # 1 of 2 + 2


def test_the_loss_takes_the_best_of_three_masks_and_reaches_every_part() -> None:
    shown = [render(i, "val") for i in range(4)]
    images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in shown])
    masks = torch.stack([torch.from_numpy(s.mask)[None] for s in shown])
    sam = SAM(SMALL)
    cfg = replace(CFG, held_out=1, train=replace(CFG.train, seed=3))
    task = SegmentTask(sam, Images(images, masks, []), cfg)
    batch = task.assemble(torch.tensor([0, 2]), torch.tensor([10, 11]))
    assert batch["target"].shape == (2, 5, 64, 64)
    assert torch.equal(batch["target"][:, 4], 1 - batch["target"][:, 0])
    losses = task.model(batch)
    assert losses.shape == (2,)
    one = task.model({name: value[1:] for name, value in batch.items()})
    torch.testing.assert_close(one[0], losses[1])
    losses.sum().backward()
    unused = {name for name, p in sam.named_parameters() if p.grad is None}
    assert all("mask_downscaling" in name for name in unused)  # masks as prompts are not trained
