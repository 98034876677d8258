"""Public config.json files (diffusers, transformers, LLaVA) as this project's network configs.

Each function takes the parsed file and raises ValueError for a model that the network cannot represent, and
KeyError for a required key that is absent. Where a key may be absent, the table of a network has the default
of the public library.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.clip import CLIPTextConfig, CLIPVisionConfig
from models.llama import LlamaConfig
from models.llava import LlavaConfig
from models.sam_config import MASKS, MLP_LAYERS, POINT_LABELS, SAMConfig
from models.unet import UNetConfig
from models.vae import VAEConfig

Json = Mapping[str, Any]

# Field of our config -> public key and its default.
_CLIP = {
    "layers": ("num_hidden_layers", 12),
    "act": ("hidden_act", "quick_gelu"),
    "eps": ("layer_norm_eps", 1e-5),
    "projection": ("projection_dim", 512),
}
_CLIP_TEXT = _CLIP | {
    "width": ("hidden_size", 512),
    "heads": ("num_attention_heads", 8),
    "mlp": ("intermediate_size", 2048),
    "vocab": ("vocab_size", 49408),
    "positions": ("max_position_embeddings", 77),
    "end_id": ("eos_token_id", 49407),
}
_CLIP_VISION = _CLIP | {
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "mlp": ("intermediate_size", 3072),
    "image_size": ("image_size", 224),
    "patch": ("patch_size", 32),
}
_LLAMA = {
    "vocab": ("vocab_size", 32000),
    "width": ("hidden_size", 4096),
    "layers": ("num_hidden_layers", 32),
    "heads": ("num_attention_heads", 32),
    "kv_heads": ("num_key_value_heads", None),
    "mlp": ("intermediate_size", 11008),
    "eps": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
    "positions": ("max_position_embeddings", 2048),
    "eos": ("eos_token_id", 2),
}
_SAM_VISION = {
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "global_blocks": ("global_attn_indexes", (2, 5, 8, 11)),
    "window": ("window_size", 14),
    "image_size": ("image_size", 1024),
    "patch": ("patch_size", 16),
    "eps": ("layer_norm_eps", 1e-6),
    "out_channels": ("output_channels", 256),
}
_SAM_PROMPT = {"mask_channels": ("mask_input_channels", 16)}
_SAM_DECODER = {
    "decoder_layers": ("num_hidden_layers", 2),
    "decoder_heads": ("num_attention_heads", 8),
    "decoder_mlp": ("mlp_dim", 2048),
    "downsample": ("attention_downsample_rate", 2),
    "iou_width": ("iou_head_hidden_dim", 256),
}
# Old versions of transformers wrote this id in place of the real one; it then pools at the largest id.
_LEGACY_END_ID = 2


def _read(json: Json, table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Fields of our config from their public keys."""
    return {field: json.get(key, default) for field, (key, default) in table.items()}


def _expect(model: str, json: Json, **fixed: Any) -> None:
    """ValueError unless each key is absent or has its only supported value."""
    for key, value in fixed.items():
        if json.get(key, value) != value:
            raise ValueError(f"{model} config.json: {key} {json[key]!r}, expected {value!r}")


def unet_config(json: Json) -> UNetConfig:
    """From diffusers' `unet/config.json`."""
    _expect(
        "UNet",
        json,
        act_fn="silu",
        flip_sin_to_cos=True,
        freq_shift=0,
        center_input_sample=False,
        dual_cross_attention=False,
        only_cross_attention=False,
        class_embed_type=None,
        num_class_embeds=None,
        encoder_hid_dim=None,
        resnet_time_scale_shift="default",
        mid_block_type="UNetMidBlock2DCrossAttn",
        downsample_padding=1,
        conv_in_kernel=3,
        conv_out_kernel=3,
    )
    channels = tuple(json["block_out_channels"])

    def per_level(value: Any) -> tuple:
        return tuple(value) if isinstance(value, list | tuple) else (value,) * len(channels)

    has_attention = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    blocks = json["down_block_types"]
    if unknown := set(blocks) - set(has_attention):
        raise ValueError(f"UNet block type {unknown.pop()!r}: expected one of {', '.join(has_attention)}")
    added = json.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise ValueError(f"UNet addition_embed_type {added!r}: expected none or 'text_time'")
    depths = per_level(json.get("transformer_layers_per_block", 1))
    return UNetConfig(
        in_channels=json["in_channels"],
        out_channels=json["out_channels"],
        channels=channels,
        depth=tuple(depth * has_attention[block] for depth, block in zip(depths, blocks, strict=True)),
        mid_depth=depths[-1],
        # `attention_head_dim` of the SD models is the number of heads, whatever its name says.
        heads=per_level(json.get("num_attention_heads") or json.get("attention_head_dim", 8)),
        context_dim=per_level(json["cross_attention_dim"]),
        linear_projection=json.get("use_linear_projection", False),
        resnets=json["layers_per_block"],
        norm_groups=json.get("norm_num_groups", 32),
        norm_eps=json.get("norm_eps", 1e-5),
        added_cond_dim=json["projection_class_embeddings_input_dim"] if added else None,
    )


def vae_config(json: Json) -> VAEConfig:
    """From diffusers' `vae/config.json`."""
    _expect("VAE", json, act_fn="silu", use_quant_conv=True, use_post_quant_conv=True)
    return VAEConfig(
        in_channels=json.get("in_channels", 3),
        latent_channels=json["latent_channels"],
        channels=json["block_out_channels"],
        resnets=json["layers_per_block"],
        norm_groups=json.get("norm_num_groups", 32),
        scaling=json.get("scaling_factor", 0.18215),
    )


def clip_text_config(json: Json) -> CLIPTextConfig:
    """From the config.json of transformers' CLIPModel or CLIPTextModel(WithProjection)."""
    config = CLIPTextConfig(**_read(_clip_part(json, "text"), _CLIP_TEXT))
    return replace(config, end_id=None) if config.end_id == _LEGACY_END_ID else config


def clip_vision_config(json: Json) -> CLIPVisionConfig:
    """From the config.json of transformers' CLIPModel or CLIPVisionModel(WithProjection)."""
    part = _clip_part(json, "vision")
    _expect("CLIP", part, num_channels=3)
    return CLIPVisionConfig(**_read(part, _CLIP_VISION))


def _clip_part(json: Json, tower: str) -> Json:
    """The keys of one tower, "text" or "vision", with the width of the projection that the model has."""
    lone = f"clip_{tower}_model"
    model_type = json.get("model_type", "clip" if f"{tower}_config" in json else lone)
    if model_type == "clip":
        # Old files hold the part twice; the `_dict` one wins wholly, and its gaps are defaults.
        part = json.get(f"{tower}_config_dict") or json.get(f"{tower}_config") or {}
        return {**part, "projection_dim": json.get("projection_dim", 512)}
    if model_type != lone:
        raise ValueError(f"CLIP config.json: model_type {model_type!r}, expected 'clip' or {lone!r}")
    projected = (json.get("architectures") or [""])[0].endswith("WithProjection")
    return json if projected else {**json, "projection_dim": None}


def llama_config(json: Json) -> LlamaConfig:
    """From transformers' or LLaVA's own config.json, or the `text_config` of llava-hf's."""
    fields = _read(json, _LLAMA)
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    derived = {
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "head_dim": json.get("head_dim") or fields["width"] // fields["heads"],
    }
    _expect("LLaMA", derived, rope_type="default", head_dim=fields["width"] // fields["heads"])
    _expect("LLaMA", json, hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False)
    return LlamaConfig(**fields | {"rope_theta": rope.get("rope_theta", fields["rope_theta"])})


def llava_config(json: Json, vision: CLIPVisionConfig | None = None) -> LlavaConfig:
    """From the config.json of the original LLaVA or of transformers' (llava-hf).

    vision: config of the image tower, which the original file does not hold (it names a CLIP model).
    """
    if "text_config" in json:
        _expect(
            "LLaVA",
            json,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
            multimodal_projector_bias=True,
        )
        llama = llama_config(json["text_config"])
        # Ids from the image token on were added by llava-hf (image, pad, filling up to a multiple of 64).
        llama = replace(llama, vocab=min(llama.vocab, json.get("image_token_index", llama.vocab)))
        vision, projector = clip_vision_config(json["vision_config"]), "mlp2x_gelu"
        layer = json.get("vision_feature_layer", -2)
    else:
        if vision is None:
            raise ValueError("LLaVA config.json has no vision tower: give its CLIP model too")
        if json.get("mm_hidden_size", vision.width) != vision.width:
            raise ValueError(
                f"LLaVA config.json: mm_hidden_size {json['mm_hidden_size']}, but the CLIP model has "
                f"{vision.width}; give the CLIP model that mm_vision_tower names"
            )
        _expect("LLaVA", json, mm_vision_select_feature="patch", mm_use_im_start_end=False)
        _expect("LLaVA", json, mm_patch_merge_type="flat")
        llama, projector = llama_config(json), json.get("mm_projector_type", "linear")
        layer = json["mm_vision_select_layer"]
    return LlavaConfig(llama, replace(vision, projection=None), projector, layer)


def sam_config(json: Json) -> SAMConfig:
    """From the config.json of transformers' SamModel."""
    if json.get("model_type") != "sam":
        raise ValueError(f"config.json: model_type {json.get('model_type')!r}, expected 'sam'")
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    vision, prompt, decoder = (json.get(part) or {} for part in parts)
    _expect("SAM", vision, num_channels=3, hidden_act="gelu", qkv_bias=True)
    _expect("SAM", vision, use_abs_pos=True, use_rel_pos=True)
    _expect("SAM", prompt, num_point_embeddings=POINT_LABELS, hidden_act="gelu")
    _expect("SAM", decoder, hidden_act="relu", num_multimask_outputs=MASKS - 1, iou_head_depth=MLP_LAYERS)
    fields = _read(vision, _SAM_VISION) | _read(prompt, _SAM_PROMPT) | _read(decoder, _SAM_DECODER)
    return SAMConfig(
        **fields | {"global_blocks": tuple(fields["global_blocks"])},
        mlp=vision.get("mlp_dim") or int(fields["width"] * vision.get("mlp_ratio", 4.0)),
    )
