"""What MoMA-mini's SAM is asked in training, and its losses against hand-made values."""

from dataclasses import replace

import pytest
import torch

from models.sam import BOX_END, BOX_START, FOREGROUND, IGNORED, SAM
from moma.mini.config import SegmentTrainingConfig
from moma.mini.segmenting import SegmentTask, dice, focal, prompts
from moma.mini.tasks import Images, Pairs
from moma.world.pairs import render_pairs
from moma.world.world import render
from tests.fake_sam import SMALL

CFG = SegmentTrainingConfig()


def disc(side: int = 64) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((x - 20.0) ** 2 + (y - 40.0) ** 2 < 10**2).float()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("subjects", [1, 2])
def test_prompts_ask_for_what_they_touch(seed: int, subjects: int) -> None:
    masks = torch.stack([disc(), disc().flip(1)])[:subjects, :43]  # cut off as a wide image is
    points, labels, target = prompts(masks, CFG, torch.Generator().manual_seed(seed))
    assert points.shape == (5, 2, 2) and labels.shape == (5, 2)
    first, last, rest = masks[0], masks[-1], 1 - masks.amax(dim=0)
    assert all(torch.equal(a, b) for a, b in zip(target, (first, first, first, last, rest), strict=True))
    for spots, kinds, wanted in zip(points, labels, target, strict=True):
        for point, kind in zip(spots, kinds, strict=True):
            if kind == FOREGROUND:
                x, y = point.int().tolist()
                assert wanted[y, x] == 1
    boxes = points[(labels == torch.tensor([BOX_START, BOX_END])).all(dim=1)]  # (2, 2, 2)
    assert (boxes[:, 0] < boxes[:, 1]).all() and boxes.min() >= 0
    assert boxes[..., 0].max() <= 64 and boxes[..., 1].max() <= 43
    tight, other = boxes
    assert (tight - torch.tensor([[11.0, 31.0], [30.0, 43.0]])).abs().max() < 5
    if subjects == 1:
        assert (other[0] <= 0.15 * 64).all() and (other[1] >= torch.tensor([0.85 * 64, 0.85 * 43])).all()
    else:
        assert (other - torch.tensor([[34.0, 31.0], [53.0, 43.0]])).abs().max() < 5
    assert (labels == IGNORED).sum() == 2
    again = prompts(masks, CFG, torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip((points, labels, target), again, strict=True))


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
    sam, two = SAM(SMALL), render_pairs(range(3), "val")
    wide = Pairs(torch.from_numpy(two["image"]).permute(0, 3, 1, 2), torch.from_numpy(two["masks"]), [])
    cfg = replace(CFG, held_out=1, paired=0.5, train=replace(CFG.train, seed=3))
    task = SegmentTask(sam, Images(images, masks, []), wide, cfg)
    many = task.assemble(torch.zeros(40).long(), torch.arange(40))
    padded = (many["pixels"][:, :, 43:] == 0).flatten(1).all(dim=1)  # (B,)
    assert 10 < padded.sum() < 30, "half of the images are wide"
    different = (many["target"][:, 0] != many["target"][:, 3]).flatten(1).any(dim=1)  # (B,)
    assert torch.equal(padded, different) and not many["target"][padded][..., 43:, :].any()
    batch = task.assemble(torch.tensor([0, 2]), torch.tensor([10, 11]))
    assert batch["target"].shape == (2, 5, 64, 64)
    losses = task.model(batch)
    assert losses.shape == (2,)
    one = task.model({name: value[1:] for name, value in batch.items()})
    torch.testing.assert_close(one[0], losses[1])
    losses.sum().backward()
    unused = {name for name, p in sam.named_parameters() if p.grad is None}
    assert all("mask_downscaling" in name for name in unused)  # masks as prompts are not trained
