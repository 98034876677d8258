"""Full-size Segment Anything against transformers', with the same pseudo-random weights; float32, CPU."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from models.sam import BACKGROUND, BOX_END, BOX_START, FOREGROUND, Prompts
from models.sam_config import PRESETS, SAMConfig
from models.weights.public_configs import sam_config
from tests.make_checkpoints import sam_json
from tests.parity_case import Case
from tests.recipe import normal, uniform
from tests.sam_reference import build_sam, reference, share_sam

INSIDE = 768, 1024  # the image within the square input, the rest is padding


@torch.no_grad()
def sam(cfg: SAMConfig, part: Literal["masks", "iou"]) -> tuple[Tensor, Tensor]:
    """From the image: two prompts of two points, two boxes, and two of both, all four outputs of each."""
    assert sam_config(sam_json(cfg)) == cfg
    ours = build_sam(cfg)
    theirs = share_sam(ours)
    height, width = INSIDE
    pixels = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
    pixels[:, :, :height, :width] = torch.from_numpy(normal("parity/pixels", (1, 3, height, width)))
    features, their_features = ours.encode(pixels), theirs.get_image_embeddings(pixels)

    points = torch.from_numpy(uniform("parity/points", (1, 2, 2, 2))) * torch.tensor([width, height])
    labels = torch.tensor([[[FOREGROUND, FOREGROUND], [FOREGROUND, BACKGROUND]]])
    corners = torch.tensor([[[[100.0, 50], [900, 700]], [[300, 300], [500, 450]]]])
    edges = torch.tensor([BOX_START, BOX_END]).expand(1, 2, 2)
    pairs = (
        (Prompts(points, labels), {"input_points": points, "input_labels": labels}),
        (Prompts(corners, edges), {"input_boxes": corners.flatten(2)}),
        (
            Prompts(torch.cat([points, corners], dim=2), torch.cat([labels, edges], dim=2)),
            {"input_points": points, "input_labels": labels, "input_boxes": corners.flatten(2)},
        ),
    )
    which = ("masks", "iou").index(part)
    mine = [ours.decode(features, prompts)[which] for prompts, _ in pairs]
    public = [reference(theirs, their_features, **prompts)[which] for _, prompts in pairs]
    return torch.cat(mine, dim=1), torch.cat(public, dim=1)


CASES = [
    Case("SAM ViT-B, masks, 1024x1024", partial(sam, PRESETS["b"], "masks")),
    Case("SAM ViT-B, predicted IoU", partial(sam, PRESETS["b"], "iou")),
    Case("SAM ViT-L, masks, 1024x1024", partial(sam, PRESETS["l"], "masks")),
    Case("SAM ViT-H, masks, 1024x1024", partial(sam, PRESETS["h"], "masks")),
]
