"""transformers' SAM beside ours with the same pseudo-random weights."""

import torch
import transformers
from torch import Tensor

from models.sam import SAM, SAMConfig
from models.weights import keymaps
from tests.make_checkpoints import SHARED_FREQUENCIES, sam_json
from tests.recipe import fill, normal


def build_sam(cfg: SAMConfig) -> SAM:
    """Ours with recipe weights, the random frequencies included."""
    with torch.device("meta"):
        ours = SAM(cfg)
    fill(ours.to_empty(device="cpu"))
    frequencies = ours.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    frequencies.copy_(torch.from_numpy(normal("sam/frequencies", frequencies.shape)))
    return ours.eval()


def share_sam(ours: SAM) -> transformers.SamModel:
    """transformers' network on our tensors themselves."""
    with torch.device("meta"):
        theirs = transformers.SamModel(transformers.SamConfig(**sam_json(ours.cfg)))
    state = ours.state_dict()
    names = keymaps.convert(keymaps.SAM_TRANSFORMERS, state, "out").names
    weights = {public: state[key] for public, (key, _) in names.items()}
    weights[SHARED_FREQUENCIES] = weights["shared_image_embedding.positional_embedding"]
    theirs.load_state_dict(weights, strict=True, assign=True)
    return theirs.eval()


def reference(
    theirs: transformers.SamModel, features: Tensor, masks: Tensor | None = None, **prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """All four outputs of transformers' decoder as ours gives them: (logits, IoU).

    prompts: input_points (B, P, N, 2) with input_labels (B, P, N), input_boxes (B, P, 4).
    """
    common = {"image_embeddings": features, "input_masks": masks, **prompts}
    single, multiple = (theirs(**common, multimask_output=multi) for multi in (False, True))
    logits = torch.cat([single.pred_masks, multiple.pred_masks], dim=2)
    return logits, torch.cat([single.iou_scores, multiple.iou_scores], dim=2)
