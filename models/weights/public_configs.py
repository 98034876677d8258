"""Public config.json files (diffusers, transformers, LLaVA) as this project's network configs.

Each function takes the parsed file and raises ValueError for a model that the network cannot represent: every
public field that changes what is computed and that a config here lacks must have its default. A value of
another type is a ValueError too, and a required key that is absent a KeyError. Where a key may be absent, the
table of a network has the default of the public library.
"""

import math
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
_LLAMA_TYPES = ("llama", "llava_llama", "llava")  # not llava_mistral and others
# Old versions of transformers wrote this id in place of the real one; it then pools at the largest id.
_LEGACY_END_ID = 2


_REQUIRED = object()
_SHOWN = 100  # characters of a wrong value in a message
# A distilled model's scheduler: its UNet predicts for few large steps.
_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatch", "EDM", "Consistency")


def value(json: Json, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """The value of a key.

    Args:
        json: the parsed file or a part of it.
        key: may be absent if there is a default, and null if that is None.
        kind: int, float (finite), bool, str, dict, or tuple for a list of numbers.
        default: of the public library.

    Raises:
        ValueError: for a value of another type.
        KeyError: if the key is absent and has no default.
    """
    found = json[key] if default is _REQUIRED else json.get(key, default)
    if found is None and default is None:
        return None
    if kind is tuple and isinstance(found, list | tuple):
        return tuple(value({key: part}, key, int) for part in found)
    fits = isinstance(found, (int, float) if kind is float else kind)
    fits = fits and (kind is bool or not isinstance(found, bool))
    if not fits or (kind is float and not abs(found) < math.inf):
        expected = {tuple: "a list of whole numbers", dict: "an object"}.get(kind, kind.__name__)
        raise ValueError(f"{key} {found!r:.{_SHOWN}}, expected {expected}")
    return found


def _read(json: Json, table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Fields of our config from their public keys, of the defaults' types."""
    kinds = {field: int if default is None else type(default) for field, (_, default) in table.items()}
    return {field: value(json, key, kinds[field], default) for field, (key, default) in table.items()}


def _expect(model: str, json: Json, **fixed: Any) -> None:
    """ValueError unless each key is absent or has its only supported value."""
    for key, wanted in fixed.items():
        if json.get(key, wanted) != wanted:
            raise ValueError(f"{model} config.json: {key} {json[key]!r:.{_SHOWN}}, expected {wanted!r}")


def check_scheduler(json: Json, sdxl: bool = False) -> None:
    """ValueError for a scheduler_config.json that is not Stable Diffusion's forward process.

    Args:
        json: the parsed file.
        sdxl: whether it is SDXL's, whose models for few steps have no scheduler of their own.
    """
    kind = value(json, "_class_name", str, "")
    if kind.startswith(_SCHEDULERS):
        raise ValueError(f"{kind}: of a distilled model or of another process, expected Stable Diffusion")
    if sdxl and json.get("timestep_spacing") == "trailing":
        raise ValueError(
            "timestep_spacing 'trailing': of a model for few steps (turbo, lightning, hyper),"
            " expected SDXL 1.0's 'leading'"
        )
    _expect(
        "scheduler",
        json,
        prediction_type="epsilon",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        trained_betas=None,
        rescale_betas_zero_snr=False,
    )


def unet_config(json: Json) -> UNetConfig:
    """From diffusers' `unet/config.json`."""
    _expect(
        "UNet",
        json,
        _class_name="UNet2DConditionModel",
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
        mid_block_scale_factor=1,
        reverse_transformer_layers_per_block=None,
        encoder_hid_dim_type=None,
        resnet_skip_time_act=False,
        resnet_out_scale_factor=1,
        time_embedding_type="positional",
        time_embedding_dim=None,
        time_embedding_act_fn=None,
        timestep_post_act=None,
        time_cond_proj_dim=None,
        attention_type="default",
        class_embeddings_concat=False,
        cross_attention_norm=None,
    )
    if json.get("mid_block_only_cross_attention"):
        raise ValueError("UNet config.json: mid_block_only_cross_attention, expected without")
    channels = value(json, "block_out_channels", tuple)

    def per_level(key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        if isinstance(json.get(key), list | tuple):
            return value(json, key, tuple)
        return (value(json, key, int, default),) * len(channels)

    has_attention = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    blocks = json["down_block_types"]
    if not isinstance(blocks, list | tuple) or not {*map(str, blocks)} <= {*has_attention}:
        expected = " and ".join(has_attention)
        raise ValueError(f"UNet down_block_types {blocks!r:.{_SHOWN}}, expected {expected}")
    up = [block.replace("Down", "Up") for block in reversed(blocks)]
    if list(json.get("up_block_types") or up) != up:
        raise ValueError(f"UNet up_block_types {json['up_block_types']!r:.{_SHOWN}}, expected {up}")
    added = json.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise ValueError(f"UNet addition_embed_type {added!r:.{_SHOWN}}: expected none or 'text_time'")
    depths = per_level("transformer_layers_per_block", 1)
    heads = per_level("attention_head_dim", 8) if not json.get("num_attention_heads") else ()
    if not len(channels) == len(blocks) == len(depths) or not channels:
        raise ValueError(f"UNet config.json: {len(channels)} block_out_channels, {len(blocks)} block types")
    return UNetConfig(
        in_channels=value(json, "in_channels", int),
        out_channels=value(json, "out_channels", int),
        channels=channels,
        depth=tuple(depth * has_attention[block] for depth, block in zip(depths, blocks, strict=True)),
        mid_depth=depths[-1],
        # `attention_head_dim` of the SD models is the number of heads, whatever its name says.
        heads=heads or per_level("num_attention_heads"),
        context_dim=per_level("cross_attention_dim"),
        linear_projection=value(json, "use_linear_projection", bool, False),
        resnets=value(json, "layers_per_block", int),
        norm_groups=value(json, "norm_num_groups", int, 32),
        norm_eps=value(json, "norm_eps", float, 1e-5),
        added_cond_dim=value(json, "projection_class_embeddings_input_dim", int) if added else None,
    )


def vae_config(json: Json) -> VAEConfig:
    """From diffusers' `vae/config.json`."""
    _expect(
        "VAE",
        json,
        _class_name="AutoencoderKL",
        act_fn="silu",
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=True,
        shift_factor=None,
        latents_mean=None,
        latents_std=None,
        out_channels=json.get("in_channels", 3),
    )
    channels = value(json, "block_out_channels", tuple)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        _expect("VAE", {key: list(json.get(key) or [kind] * len(channels))}, **{key: [kind] * len(channels)})
    return VAEConfig(
        in_channels=value(json, "in_channels", int, 3),
        latent_channels=value(json, "latent_channels", int),
        channels=channels,
        resnets=value(json, "layers_per_block", int),
        norm_groups=value(json, "norm_num_groups", int, 32),
        scaling=value(json, "scaling_factor", float, 0.18215),
    )


def clip_text_config(json: Json) -> CLIPTextConfig:
    """From the config.json of transformers' CLIPModel or CLIPTextModel(WithProjection)."""
    part, projection = _clip_part(json, "text")
    config = CLIPTextConfig(**_read(part, _CLIP_TEXT), projection=projection)
    return replace(config, end_id=None) if config.end_id == _LEGACY_END_ID else config


def clip_vision_config(json: Json) -> CLIPVisionConfig:
    """From the config.json of transformers' CLIPModel or CLIPVisionModel(WithProjection)."""
    part, projection = _clip_part(json, "vision")
    _expect("CLIP", part, num_channels=3)
    return CLIPVisionConfig(**_read(part, _CLIP_VISION), projection=projection)


def _clip_part(json: Json, tower: str) -> tuple[Json, int | None]:
    """The keys of one tower, "text" or "vision", and the width of the projection if the model has it."""
    lone = f"clip_{tower}_model"
    model_type = json.get("model_type", "clip" if f"{tower}_config" in json else lone)
    if model_type == "clip":
        # Old files hold the part twice; the `_dict` one wins wholly, and its gaps are defaults.
        parts = (value(json, f"{tower}_config{end}", dict, None) for end in ("_dict", ""))
        return next((part for part in parts if part), {}), value(json, "projection_dim", int, 512)
    if model_type != lone:
        raise ValueError(
            f"CLIP config.json: model_type {model_type!r:.{_SHOWN}}, expected 'clip' or {lone!r}"
        )
    projected = any(kind.endswith("WithProjection") for kind in architectures(json))
    return json, value(json, "projection_dim", int, 512) if projected else None


def architectures(json: Json) -> list[str]:
    """The classes that transformers names in its files."""
    found = json.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(kind, str) for kind in found):
        raise ValueError(f"architectures {found!r:.{_SHOWN}}, expected a list of names")
    return found


def llama_config(json: Json) -> LlamaConfig:
    """From transformers' or LLaVA's own config.json, or the `text_config` of llava-hf's."""
    fields = _read(json, _LLAMA)
    if fields["heads"] < 1:
        raise ValueError(f"LLaMA config.json: num_attention_heads {fields['heads']}, expected 1 or more")
    ropes = (value(json, key, dict, None) for key in ("rope_parameters", "rope_scaling"))
    rope = next((rope for rope in ropes if rope), {})
    derived = {
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "head_dim": json.get("head_dim") or fields["width"] // fields["heads"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", json.get("partial_rotary_factor", 1)),
    }
    head_dim = fields["width"] // fields["heads"]
    _expect("LLaMA", derived, rope_type="default", head_dim=head_dim, partial_rotary_factor=1)
    _expect("LLaMA", json, hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False)
    _expect("LLaMA", json, sliding_window=None)
    if not (kind := value(json, "model_type", str, "llama")).startswith(_LLAMA_TYPES):
        raise ValueError(f"LLaMA config.json: model_type {kind!r:.{_SHOWN}}, expected 'llama'")
    return LlamaConfig(**fields | {"rope_theta": value(rope, "rope_theta", float, fields["rope_theta"])})


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
        llama = llama_config(value(json, "text_config", dict))
        # Ids from the image token on were added by llava-hf (image, pad, filling up to a multiple of 64).
        llama = replace(llama, vocab=min(llama.vocab, value(json, "image_token_index", int, llama.vocab)))
        vision, projector = clip_vision_config(value(json, "vision_config", dict)), "mlp2x_gelu"
        layer = value(json, "vision_feature_layer", int, -2)
    else:
        if vision is None:
            raise ValueError("LLaVA config.json has no vision tower: give its CLIP model too")
        if value(json, "mm_hidden_size", int, vision.width) != vision.width:
            raise ValueError(
                f"LLaVA config.json: mm_hidden_size {json['mm_hidden_size']}, but the CLIP model has "
                f"{vision.width}; give the CLIP model that mm_vision_tower names"
            )
        _expect("LLaVA", json, mm_vision_select_feature="patch", mm_use_im_start_end=False)
        _expect("LLaVA", json, mm_patch_merge_type="flat", mm_resampler_type=None)
        if json.get("image_aspect_ratio") not in (None, "pad"):
            raise ValueError(
                f"LLaVA image_aspect_ratio {json['image_aspect_ratio']!r:.{_SHOWN}}, expected 'pad'"
            )
        llama, projector = llama_config(json), value(json, "mm_projector_type", str, "linear")
        layer = value(json, "mm_vision_select_layer", int)
    return LlavaConfig(llama, replace(vision, projection=None), projector, layer)


def sam_config(json: Json) -> SAMConfig:
    """From the config.json of transformers' SamModel."""
    if json.get("model_type") != "sam":
        raise ValueError(f"config.json: model_type {json.get('model_type')!r:.{_SHOWN}}, expected 'sam'")
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    vision, prompt, decoder = (value(json, part, dict, None) or {} for part in parts)
    _expect("SAM", vision, num_channels=3, hidden_act="gelu", qkv_bias=True)
    _expect("SAM", vision, use_abs_pos=True, use_rel_pos=True)
    channels = value(vision, "output_channels", int, 256)
    for part in (prompt, decoder):
        _expect("SAM", part, hidden_size=channels)
    for key, default in (("image_size", 1024), ("patch_size", 16)):
        _expect("SAM", prompt, **{key: vision.get(key, default)})
    _expect("SAM", prompt, num_point_embeddings=POINT_LABELS, hidden_act="gelu")
    _expect("SAM", decoder, hidden_act="relu", num_multimask_outputs=MASKS - 1, iou_head_depth=MLP_LAYERS)
    fields = _read(vision, _SAM_VISION) | _read(prompt, _SAM_PROMPT) | _read(decoder, _SAM_DECODER)
    return SAMConfig(
        **fields,
        mlp=value(vision, "mlp_dim", int, None)
        or int(fields["width"] * value(vision, "mlp_ratio", float, 4.0)),
    )


def check_vit(json: Json, layers: int, heads: int) -> None:
    """ValueError for transformers' ViTConfig of a model other than DINO's.

    Args:
        json: the parsed file.
        layers: of the network whose shapes the weights have.
        heads: of it.
    """
    _expect("ViT", json, num_hidden_layers=layers, num_attention_heads=heads)
    _expect("ViT", json, hidden_act="gelu", qkv_bias=True, num_channels=3)
