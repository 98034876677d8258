"""transformers' SAM beside ours with the same pseudo-random weights."""

from typing import Any

import torch
import transformers
from torch import Tensor

from models import keymaps
from models.sam import DECODER_EPS, SAM, SAMConfig
from tests.recipe import fill, normal

# 10 patches a side, which windows of 4 do not divide; a depth, a width and a head of their own everywhere.
TINY = SAMConfig(
    width=48, layers=3, heads=4, mlp=80, global_blocks=(1,), window=4, image_size=80, patch=8,
    out_channels=32, mask_channels=8, decoder_layers=2, decoder_heads=4, decoder_mlp=56, iou_width=24,
)  # fmt: skip


def public_json(cfg: SAMConfig) -> dict[str, Any]:
    """transformers' config.json of the same network."""
    sides = {"image_size": cfg.image_size, "patch_size": cfg.patch}
    return {
        "model_type": "sam",
        "vision_config": {
            **sides,
            "hidden_size": cfg.width,
            "output_channels": cfg.out_channels,
            "num_hidden_layers": cfg.layers,
            "num_attention_heads": cfg.heads,
            "mlp_dim": cfg.mlp,
            "window_size": cfg.window,
            "global_attn_indexes": list(cfg.global_blocks),
            "layer_norm_eps": cfg.eps,
            "num_pos_feats": cfg.out_channels // 2,
        },
        "prompt_encoder_config": {
            **sides,
            "hidden_size": cfg.out_channels,
            "mask_input_channels": cfg.mask_channels,
        },
        "mask_decoder_config": {
            "hidden_size": cfg.out_channels,
            "mlp_dim": cfg.decoder_mlp,
            "num_hidden_layers": cfg.decoder_layers,
            "num_attention_heads": cfg.decoder_heads,
            "attention_downsample_rate": cfg.downsample,
            "iou_head_hidden_dim": cfg.iou_width,
            "layer_norm_eps": DECODER_EPS,  # segment-anything's, not transformers' default
        },
    }


def fill_sam(ours: SAM) -> SAM:
    """Recipe weights, the random frequencies included."""
    fill(ours)
    frequencies = ours.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    frequencies.copy_(torch.from_numpy(normal("sam/frequencies", frequencies.shape)))
    return ours.eval()


def share_sam(ours: SAM) -> transformers.SamModel:
    """transformers' network on our tensors themselves."""
    with torch.device("meta"):
        theirs = transformers.SamModel(transformers.SamConfig(**public_json(ours.cfg)))
    state = ours.state_dict()
    names = keymaps.convert(keymaps.SAM_TRANSFORMERS, state, "out").names
    weights = {public: state[key] for public, (key, _) in names.items()}
    shared = "prompt_encoder.shared_embedding.positional_embedding"  # tied: no name in the files
    weights[shared] = weights["shared_image_embedding.positional_embedding"]
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
