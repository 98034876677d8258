"""Checkpoints in the public formats with pseudo-random weights, to test conversion at any size.

    python -m tests.make_checkpoints --out DIR --scale tiny|full [--only NAME ...]

full has the real sizes (LLaVA-7B alone is 14 GB); names, shapes, files and configs are those of the public
models, the values are noise.
"""

import argparse
import json
import mmap
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert_weights import convert
from models.clip import PRESETS as CLIPS
from models.clip import VISION_PRESETS, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from models.dino import PRESETS as DINOS
from models.dino import DINOConfig
from models.llama import LlamaConfig
from models.llava import LlavaConfig
from models.sam import DECODER_EPS, SAMConfig
from models.unet import UNetConfig
from models.vae import SDXL as VAE_SDXL
from models.vae import VAEConfig
from models.weights import keymaps
from models.weights.keymaps import Row, Table
from models.weights.loading import LazyTensor, ShardConfig, in_memory, joined, write_safetensors
from moma.methods.moma.adapter import AdapterConfig
from moma.sampling.base import SIZES
from moma.sampling.diffusion import ScheduleConfig, alphas_cumprod
from moma.weights.bundle import Bundle, expected_shapes
from moma.weights.sources import DefaultConfigs
from moma.weights.tiny import build_tokenizers

SHARED_FREQUENCIES = "prompt_encoder.shared_embedding.positional_embedding"


@dataclass(frozen=True)
class Scale:
    """Sizes of every network. Defaults: the public models'."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    text_2: CLIPTextConfig | None = None  # of SDXL
    tower: CLIPVisionConfig = field(default_factory=lambda: VISION_PRESETS["l14_336"])
    ip_vision: CLIPVisionConfig = field(default_factory=lambda: VISION_PRESETS["h14"])
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    sam: SAMConfig = field(default_factory=SAMConfig)
    dino_s16: DINOConfig = field(default_factory=lambda: DINOS["s16"])
    dino_b16: DINOConfig = field(default_factory=lambda: DINOS["b16"])
    clip_b32: CLIPConfig = field(default_factory=lambda: CLIPS["b32"])
    clip_l14: CLIPConfig = field(default_factory=lambda: CLIPS["l14"])
    padded_vocab: int = 32064  # of llava-hf
    first_shard: int = 9_976_000_000  # bytes; LLaVA's first shard has 9.98 GB

    @property
    def llava(self) -> LlavaConfig:
        return LlavaConfig(llama=self.llama, vision=replace(self.tower, projection=None))


FULL = Scale()
TINY = Scale(
    unet=UNetConfig(channels=(16, 32, 32, 32), heads=(2, 2, 2, 2), context_dim=(24,) * 4, norm_groups=8),
    vae=VAEConfig(channels=(8, 16, 16, 16), resnets=1, norm_groups=8),
    text=CLIPTextConfig(width=24, layers=2, heads=2, mlp=48, vocab=1000),
    tower=CLIPVisionConfig(width=32, layers=3, heads=2, mlp=64, image_size=28, projection=16),
    ip_vision=CLIPVisionConfig(width=48, layers=2, heads=3, mlp=64, act="gelu", image_size=28, projection=40),
    llama=LlamaConfig(vocab=500, width=64, layers=3, heads=4, mlp=96),
    adapter=AdapterConfig(mllm_dim=64, embed_dim=40),
    # 10 patches a side, which windows of 4 do not divide; no two widths alike where they may differ
    sam=SAMConfig(
        width=48,
        layers=3,
        heads=4,
        mlp=80,
        global_blocks=(1,),
        window=4,
        image_size=80,
        patch=8,
        out_channels=32,
        mask_channels=8,
        decoder_heads=4,
        decoder_mlp=56,
        iou_width=24,
    ),
    dino_s16=DINOConfig(width=24, layers=2, heads=2, mlp=48, image_size=32),
    dino_b16=DINOConfig(width=32, layers=2, heads=2, mlp=48, image_size=32),
    clip_b32=CLIPConfig(
        CLIPTextConfig(width=16, layers=2, heads=2, mlp=32, vocab=1000, projection=12),
        CLIPVisionConfig(width=24, layers=2, heads=2, mlp=32, image_size=64, patch=32, projection=12),
    ),
    clip_l14=CLIPConfig(
        CLIPTextConfig(width=24, layers=2, heads=2, mlp=32, vocab=1000, projection=20),
        CLIPVisionConfig(width=32, layers=3, heads=2, mlp=64, image_size=42, projection=20),
    ),
    padded_vocab=512,
    first_shard=250_000,
)
SCALES = {"tiny": TINY, "full": FULL}
SDXL_TINY = replace(
    TINY,
    unet=UNetConfig(
        channels=(16, 32, 32),
        depth=(0, 1, 2),
        mid_depth=2,
        heads=(2, 4, 4),
        context_dim=(24 + 40,) * 3,
        norm_groups=8,
        linear_projection=True,
        added_cond_dim=20 + SIZES * 8,
    ),
    vae=replace(TINY.vae, scaling=VAE_SDXL.scaling),
    text_2=CLIPTextConfig(
        width=40, layers=3, heads=2, mlp=48, act="gelu", vocab=1000, projection=20, pad="!"
    ),
)
TINY_DEFAULTS = DefaultConfigs(
    unet=TINY.unet,
    vae=TINY.vae,
    text=TINY.text,
    dinos={"dino_s16": TINY.dino_s16, "dino_b16": TINY.dino_b16},
    clips={"clip_b32": TINY.clip_b32, "clip_l14": TINY.clip_l14},
    sams=(TINY.sam,),
    sdxl={**{name: getattr(SDXL_TINY, name) for name in ("unet", "vae", "text", "text_2")}, "image_size": 96},
)


# --- values ----------------------------------------------------------------------------------------------


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that keep a deep net's activations at their size; the same name gives the same values."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(shape, dtype=dtype)
    if len(shape) < 2:  # norms and biases; λ
        centre = 1.0 if name.endswith("weight") else 0.0
        return values.normal_(centre, 0.02, generator=generator)
    return values.normal_(0.0, prod(shape[1:]) ** -0.5, generator=generator)


def drawn(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, salt: str = "") -> dict[str, LazyTensor]:
    def lazy(name: str, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, dtype, Path("drawn"), lambda: draw(salt + name, shape, dtype))

    return {name: lazy(name, shape) for name, shape in shapes.items()}


def outward(table: Table, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Our names -> the public ones."""
    result = keymaps.convert(table, tensors, "out")
    assert not result.unknown, result.unknown
    return {name: tensors[old].map(change) for name, (old, change) in result.names.items()}


def network(
    name: str, config: Any, scale: Scale, dtype: torch.dtype, salt: str = ""
) -> dict[str, LazyTensor]:
    return drawn(expected_shapes(name, config, scale.unet), dtype, salt)


# --- files ------------------------------------------------------------------------------------------------


def save(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """One file, one tensor in memory at a time; the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_safetensors(path.parent, path.stem, tensors, config=ShardConfig(max_bytes=sys.maxsize))
        return
    with torch.serialization.skip_data():  # the file with room for the values, which are never touched here
        torch.save({name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):  # writing changes the file
        places = torch.load(path, mmap=True, weights_only=True)
    for name, tensor in tensors.items():
        places[name].copy_(tensor.read())


def save_sharded(folder: Path, tensors: Mapping[str, LazyTensor], first: int, kind: str = "bin") -> None:
    """Two shards and their index, the first with up to `first` bytes."""
    stem = "pytorch_model" if kind == "bin" else "model"
    shards: list[dict[str, LazyTensor]] = [{}, {}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        shards[size > first][name] = tensor
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05}-of-00002.{kind}"
        save(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    write_json(folder / f"{stem}.{kind}.index.json", index)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")


# --- public configs ----------------------------------------------------------------------------------------


def unet_json(cfg: UNetConfig, pooled: int = 0) -> dict[str, Any]:
    """diffusers' config; pooled: width of SDXL's pooled text."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.depth]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.depth)]
    sdxl = {}
    if cfg.added_cond_dim:
        sdxl = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (cfg.added_cond_dim - pooled) // SIZES,
            "projection_class_embeddings_input_dim": cfg.added_cond_dim,
            "transformer_layers_per_block": [max(depth, 1) for depth in cfg.depth],
            "use_linear_projection": cfg.linear_projection,
        }
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(cfg.heads) if sdxl else cfg.heads[0],
        "block_out_channels": list(cfg.channels),
        "cross_attention_dim": cfg.context_dim[0],
        "down_block_types": down,
        "up_block_types": up,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "layers_per_block": cfg.resnets,
        "norm_num_groups": cfg.norm_groups,
        "sample_size": 64,
        **sdxl,
    }


def vae_json(cfg: VAEConfig) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(cfg.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(cfg.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(cfg.channels),
        "in_channels": cfg.in_channels,
        "out_channels": cfg.in_channels,
        "latent_channels": cfg.latent_channels,
        "layers_per_block": cfg.resnets,
        "norm_num_groups": cfg.norm_groups,
        **({"scaling_factor": cfg.scaling} if cfg.scaling != VAEConfig().scaling else {}),
    }


def clip_json(cfg: CLIPTextConfig | CLIPVisionConfig) -> dict[str, Any]:
    data = {
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "intermediate_size": cfg.mlp,
        "hidden_act": cfg.act,
        "layer_norm_eps": cfg.eps,
        "projection_dim": cfg.projection or cfg.width,
    }
    if isinstance(cfg, CLIPTextConfig):
        kind = "CLIPTextModelWithProjection" if cfg.projection else "CLIPTextModel"
        more = {"model_type": "clip_text_model", "vocab_size": cfg.vocab, "architectures": [kind]}
        return data | more | {"max_position_embeddings": cfg.positions, "bos_token_id": 0, "eos_token_id": 2}
    return data | {"model_type": "clip_vision_model", "image_size": cfg.image_size, "patch_size": cfg.patch}


def llama_json(cfg: LlamaConfig) -> dict[str, Any]:
    return {
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.groups,
        "rms_norm_eps": cfg.eps,
        "max_position_embeddings": cfg.positions,
        "vocab_size": cfg.vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }


def llava_json(scale: Scale) -> dict[str, Any]:
    return llama_json(scale.llama) | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_hidden_size": scale.tower.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
    }


def llava_hf_json(scale: Scale) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": scale.llama.vocab,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": llama_json(scale.llama) | {"model_type": "llama", "vocab_size": scale.padded_vocab},
        "vision_config": clip_json(scale.tower),
    }


def sam_json(cfg: SAMConfig) -> dict[str, Any]:
    """transformers' config.json, whose defaults are ViT-B's."""
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


# --- the checkpoints ----------------------------------------------------------------------------------------


def position_ids(prefix: str, count: int) -> dict[str, LazyTensor]:
    """The buffer that old transformers saved."""
    ids = torch.arange(count)[None]
    return {f"{prefix}embeddings.position_ids": LazyTensor((1, count), ids.dtype, Path("drawn"), lambda: ids)}


def make_sd15(folder: Path, scale: Scale, tokenizers: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Stable Diffusion 1.5 or XL in diffusers folders."""
    ending = ".fp16.safetensors" if dtype == torch.float16 else ".safetensors"
    unet, vae = network("unet", scale.unet, scale, dtype), network("vae", scale.vae, scale, dtype)
    text = outward([Row("text_model.*", "*")], network("text", scale.text, scale, dtype))
    text |= position_ids("text_model.", scale.text.positions)
    second, pooled = [], 0
    if scale.text_2:
        named = outward(keymaps.CLIP_TEXT, network("text_2", scale.text_2, scale, dtype, "2"))
        second, pooled = (
            [("text_encoder_2", named, "model", clip_json(scale.text_2))],
            scale.text_2.projection,
        )
    for part, tensors, stem, config in (
        *second,
        ("unet", unet, "diffusion_pytorch_model", unet_json(scale.unet, pooled)),
        ("vae", vae, "diffusion_pytorch_model", vae_json(scale.vae)),
        ("text_encoder", text, "model", clip_json(scale.text)),
    ):
        write_json(folder / part / "config.json", config)
        save(folder / part / f"{stem}{ending}", tensors)
    kind = "StableDiffusionXLPipeline" if second else "StableDiffusionPipeline"
    scheduler = {"_class_name": "EulerDiscreteScheduler" if second else "PNDMScheduler"}
    write_json(folder / "model_index.json", {"_class_name": kind})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for part in ("tokenizer", "tokenizer_2")[: 1 + len(second)]:
        (folder / part).mkdir(exist_ok=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(tokenizers / name, folder / part / name)
    if second:
        write_json(folder / "tokenizer_2" / "tokenizer_config.json", {"pad_token": scale.text_2.pad})
    return folder


def ldm_tensors(
    scale: Scale, dtype: torch.dtype, ema: bool = False, salt: str = "", vae: bool = True, text: bool = True
) -> dict[str, LazyTensor]:
    """What a single-file Stable Diffusion 1.5 or XL holds, without the outer `state_dict`."""
    sdxl = scale.text_2 is not None
    table = keymaps.ldm_unet([depth > 0 for depth in scale.unet.depth], scale.unet.resnets, sdxl)
    unet = outward(table, network("unet", scale.unet, scale, dtype, salt))
    result = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    if ema:
        average = outward(table, network("unet", scale.unet, scale, dtype, f"{salt}ema"))
        for name, tensor in average.items():
            result[f"model_ema.diffusion_model{name.replace('.', '')}"] = tensor
        result |= drawn({"model_ema.decay": (), "model_ema.num_updates": ()}, torch.float32)
    alphas = alphas_cumprod(ScheduleConfig())
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    for name, values in (("betas", betas), ("alphas_cumprod", alphas)):
        result[name] = in_memory(values.to(dtype), Path("drawn"))
    if vae:
        named = outward(
            keymaps.ldm_vae(len(scale.vae.channels)), network("vae", scale.vae, scale, dtype, salt)
        )
        result |= {f"first_stage_model.{name}": tensor for name, tensor in named.items()}
    if text:
        named = network("text", scale.text, scale, dtype, salt)
        prefix = (
            f"{keymaps.SDXL_TEXT_PREFIXES[0] if sdxl else keymaps.LDM_TEXT_PREFIX}transformer.text_model."
        )
        result |= {f"{prefix}{name}": t for name, t in named.items()}
        result |= position_ids(prefix, scale.text.positions)
    if text and sdxl:
        named = open_clip(network("text_2", scale.text_2, scale, dtype, f"{salt}2"))
        result |= {f"{keymaps.SDXL_TEXT_PREFIXES[1]}{name}": t for name, t in named.items()}
    return result


def open_clip(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A text encoder in OpenCLIP's layout: q, k and v are one matrix."""
    named = outward(keymaps.OPEN_CLIP_TEXT, tensors)
    for key in [key for key in named if ".attn.q_proj." in key]:
        parts = [named.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        named[key.replace(".q_proj.", ".in_proj_")] = joined(parts)
    return named | drawn({"logit_scale": ()}, torch.float32)


def make_ldm(path: Path, scale: Scale, dtype: torch.dtype = torch.float16, **parts: Any) -> Path:
    """A single-file checkpoint; .ckpt nests its tensors as pytorch_lightning does."""
    tensors = ldm_tensors(scale, dtype, **parts)
    if path.suffix == ".safetensors":
        save(path, tensors)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.read().contiguous() for name, tensor in tensors.items()}
        torch.save({"epoch": 3, "global_step": 470000, "state_dict": state, "lr_schedulers": []}, path)
    return path


def make_vae(folder: Path, scale: Scale, old: bool = True, salt: str = "mse") -> Path:
    """sd-vae-ft-mse: a lone VAE folder, with diffusers' old names for the attention."""
    tensors = network("vae", scale.vae, scale, torch.float32, salt)
    write_json(folder / "config.json", vae_json(scale.vae))
    table = keymaps.DIFFUSERS_VAE_OLD if old else keymaps.DIFFUSERS_VAE
    save(folder / "diffusion_pytorch_model.safetensors", outward(table, tensors))
    return folder


def tower_tensors(scale: Scale, dtype: torch.dtype, salt: str = "tower") -> dict[str, LazyTensor]:
    return network("vision", replace(scale.tower, projection=None), scale, dtype, salt)


def make_clip(folder: Path, scale: Scale) -> Path:
    """openai/clip-vit-large-patch14-336: a whole CLIPModel, float32, as .bin."""
    tower, text = tower_tensors(scale, torch.float32), replace(scale.text, projection=scale.tower.projection)
    tensors = {f"vision_model.{name}": tensor for name, tensor in tower.items()}
    for name, tensor in network("text", text, scale, torch.float32).items():
        tensors[name if name == "text_projection.weight" else f"text_model.{name}"] = tensor
    projection = {"visual_projection.weight": (scale.tower.projection, scale.tower.width), "logit_scale": ()}
    tensors |= drawn(projection, torch.float32) | position_ids("text_model.", scale.text.positions)
    tensors |= position_ids("vision_model.", scale.tower.patches + 1)
    write_json(folder / "config.json", clip_model_json(CLIPConfig(text, scale.tower)))
    save(folder / "pytorch_model.bin", tensors)
    return folder


def clip_model_json(cfg: CLIPConfig) -> dict[str, Any]:
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": cfg.text.projection}
    return config | {"text_config": clip_json(cfg.text), "vision_config": clip_json(cfg.vision)}


def make_clip_scorer(folder: Path, scale: Scale, name: str, tokenizers: Path) -> Path:
    """openai/clip-vit-base-patch32 or -large-patch14: a whole CLIPModel with its tokenizer."""
    cfg = getattr(scale, name)
    tensors = outward(keymaps.CLIP_WHOLE, network(name, cfg, scale, torch.float32, name))
    tensors |= drawn({"logit_scale": ()}, torch.float32)
    tensors |= position_ids("text_model.", cfg.text.positions)
    tensors |= position_ids("vision_model.", cfg.vision.patches + 1)
    write_json(folder / "config.json", clip_model_json(cfg))
    save(folder / "pytorch_model.bin", tensors)
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizers / file, folder / file)
    return folder


def make_dino(path: Path, scale: Scale, name: str = "dino_s16") -> Path:
    """dino_deitsmall16_pretrain.pth or dino_vitbase16_pretrain.pth: the flat dict of a backbone."""
    save(path, network(name, getattr(scale, name), scale, torch.float32, name))
    return path


def make_dino_training(path: Path, scale: Scale, name: str = "dino_s16") -> Path:
    """dino_deitsmall16_pretrain_full_checkpoint.pth: teacher and student with heads, and more."""
    cfg = getattr(scale, name)
    teacher, student = (
        {key: t.read() for key, t in network(name, cfg, scale, torch.float32, salt).items()}
        for salt in (name, "student")
    )
    head = {"head.mlp.0.weight": torch.ones(4, cfg.width), "head.last_layer.weight_g": torch.ones(4, 1)}
    content = {
        "teacher": {f"backbone.{key}": value for key, value in teacher.items()} | head,
        "student": {f"module.backbone.{key}": value for key, value in student.items()}
        | {f"module.{key}": value for key, value in head.items()},
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def dino_json(cfg: DINOConfig) -> dict[str, Any]:
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_act": "gelu",
        "hidden_size": cfg.width,
        "image_size": cfg.image_size,
        "intermediate_size": cfg.mlp,
        "layer_norm_eps": 1e-12,  # as published there, where the official code has 1e-6
        "num_attention_heads": cfg.heads,
        "num_channels": 3,
        "num_hidden_layers": cfg.layers,
        "patch_size": cfg.patch,
        "qkv_bias": True,
    }


def make_dino_hf(folder: Path, scale: Scale, name: str = "dino_s16", new: bool = False) -> Path:
    """facebook/dino-vits16 or -vitb16; new: with the names of transformers 5."""
    separate = {}
    for key, tensor in network(name, getattr(scale, name), scale, torch.float32, name).items():
        for i, letter in enumerate("qkv" if ".qkv." in key else ""):
            part = tensor.map(lambda x, i=i: x.chunk(3)[i].contiguous())
            separate[key.replace(".qkv.", f".{letter}.")] = part
        if ".qkv." not in key:
            separate[key] = tensor
    write_json(folder / "config.json", dino_json(getattr(scale, name)))
    save(folder / "model.safetensors", outward(keymaps.DINO_HF_NEW if new else keymaps.DINO_HF, separate))
    return folder


def make_ip_vision(folder: Path, scale: Scale) -> Path:
    """IP-Adapter's models/image_encoder."""
    tensors = network("ip_vision", scale.ip_vision, scale, torch.float16)
    named = {n if n == "visual_projection.weight" else f"vision_model.{n}": t for n, t in tensors.items()}
    config = clip_json(scale.ip_vision) | {"architectures": ["CLIPVisionModelWithProjection"]}
    write_json(folder / "config.json", config)
    save(folder / "model.safetensors", named)
    return folder


def make_llava(
    folder: Path, scale: Scale, tokenizers: Path, tower: str | None = None, dtype: torch.dtype = torch.float16
) -> Path:
    """The original layout: config.json, two .bin shards and their index, tokenizer.model, a stale
    mm_projector.bin. tower: salt of the image tower inside, None = none inside."""
    tensors = network("llava", scale.llava, scale, dtype)
    if tower is not None:
        inside = tower_tensors(scale, dtype, tower)
        tensors |= {f"tower.{name}": tensor for name, tensor in inside.items()}
    named = outward(keymaps.LLAVA_ORIGINAL, tensors)
    angles = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (64,) for i in range(scale.llama.layers)}
    named |= drawn(angles, torch.float32)
    write_json(folder / "config.json", llava_json(scale))
    save_sharded(folder, named, scale.first_shard)
    stale = drawn({"model.mm_projector.0.weight": (scale.llama.width, scale.tower.width)}, dtype, "stale")
    save(folder / "mm_projector.bin", stale)
    shutil.copyfile(tokenizers / "tokenizer.model", folder / "tokenizer.model")
    return folder


def make_llava_hf(folder: Path, scale: Scale, tokenizers: Path, new: bool = False) -> Path:
    """llava-hf's layout: safetensors shards, padded vocabulary, the tower inside."""
    tensors = network("llava", scale.llava, scale, torch.float16)
    tensors |= {f"tower.{n}": t for n, t in tower_tensors(scale, torch.float16).items()}
    named = outward(keymaps.llava_hf(new, scale.llama.vocab, scale.padded_vocab), tensors)
    write_json(folder / "config.json", llava_hf_json(scale))
    save_sharded(folder, named, scale.first_shard, "safetensors")
    shutil.copyfile(tokenizers / "tokenizer.model", folder / "tokenizer.model")
    return folder


def _layers(cfg: UNetConfig) -> tuple[int, int, int]:
    return (
        sum(d * cfg.resnets for d in cfg.depth),
        sum(d * (cfg.resnets + 1) for d in cfg.depth),
        cfg.mid_depth,
    )


def make_moma(path: Path, scale: Scale) -> Path:
    """attn_adapters_projectors.th: three state dicts, mixed precision, a second projector in llm_mapping."""
    tensors = network("adapter", scale.adapter, scale, torch.float32)
    parts: dict[str, dict[str, Tensor]] = {"projectors": {}, "self_cross_attentions": {}, "llm_mapping": {}}
    for name, tensor in outward(keymaps.moma_th(*_layers(scale.unet)), tensors).items():
        part, key = name.split(".", 1)
        half = part == "self_cross_attentions"
        parts[part][key] = tensor.read().half() if half else tensor.read()
    parts["llm_mapping"] |= {f"projector.{name}": t for name, t in parts["projectors"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(parts, path)
    return path


def make_ip_adapter(path: Path, scale: Scale) -> Path:
    """ip-adapter_sd15: .bin is nested, .safetensors flat."""
    tensors = network("ip_adapter", scale.adapter, scale, torch.float16, "ip")
    named = outward(keymaps.ip_adapter(*_layers(scale.unet)), tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save(path, named)
    else:
        parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, tensor in named.items():
            part, key = name.split(".", 1)
            parts[part][key] = tensor.read()
        torch.save(parts, path)
    return path


def make_lora(path: Path, scale: Scale, rank: int = 2) -> Path:
    """As kohya's scripts write it, of the UNet's cross-attention and the text encoder's."""
    tensors: dict[str, LazyTensor] = {}
    for start, name, ends in (
        ("lora_unet_", "unet", ("attn2.to_k.weight", "attn2.to_out.0.weight")),
        ("lora_te_text_model_", "text", ("self_attn.q_proj.weight",)),
    ):
        for key, shape in expected_shapes(name, getattr(scale, name), scale.unet).items():
            if key.endswith(ends):
                out, into = shape
                layer = start + key.removesuffix(".weight").replace(".", "_")
                shapes = {"lora_down.weight": (rank, into), "lora_up.weight": (out, rank), "alpha": ()}
                tensors |= drawn({f"{layer}.{end}": size for end, size in shapes.items()}, torch.float16)
    save(path, tensors)
    return path


def make_sam(path: Path, scale: Scale) -> Path:
    """sam_vit_b_01ec64.pth and its kind."""
    save(path, network("sam", scale.sam, scale, torch.float32))
    return path


def make_sam_hf(folder: Path, scale: Scale) -> Path:
    """facebook/sam-vit-base, which has the random frequencies twice."""
    named = outward(keymaps.SAM_TRANSFORMERS, network("sam", scale.sam, scale, torch.float32))
    frequencies = named["shared_image_embedding.positional_embedding"]
    write_json(folder / "config.json", sam_json(scale.sam))
    save(folder / "model.safetensors", named | {SHARED_FREQUENCIES: frequencies})
    return folder


def make_all(out: Path, scale: Scale, tokenizers: Path, only: Iterable[str] = ()) -> None:
    """Everything that a full conversion needs, and one of each further format."""
    makers: dict[str, Callable[[], Path]] = {
        "sd15": lambda: make_sd15(out / "sd15", scale, tokenizers),
        "vae": lambda: make_vae(out / "sd-vae-ft-mse", scale),
        "clip": lambda: make_clip(out / "clip-vit-large-patch14-336", scale),
        "llava": lambda: make_llava(out / "MoMA_llava_7b", scale, tokenizers, tower="tower"),
        "moma": lambda: make_moma(out / "attn_adapters_projectors.th", scale),
        "ckpt": lambda: make_ldm(out / "v1-5-pruned.ckpt", scale, torch.float32, ema=True),
        "community": lambda: make_ldm(out / "community.safetensors", scale, salt="community"),
        "ip_vision": lambda: make_ip_vision(out / "image_encoder", scale),
        "ip_adapter": lambda: make_ip_adapter(out / "ip-adapter_sd15.bin", scale),
        "ip_adapter_flat": lambda: make_ip_adapter(out / "ip-adapter_sd15.safetensors", scale),
        "sam": lambda: make_sam(out / "sam_vit_b_01ec64.pth", scale),
        "sam_hf": lambda: make_sam_hf(out / "sam-vit-base", scale),
        "dino": lambda: make_dino(out / "dino_deitsmall16_pretrain.pth", scale),
        "dino_b16": lambda: make_dino(out / "dino_vitbase16_pretrain.pth", scale, "dino_b16"),
        "dino_hf": lambda: make_dino_hf(out / "dino-vits16", scale),
        "clip_b32": lambda: make_clip_scorer(out / "clip-vit-base-patch32", scale, "clip_b32", tokenizers),
        "clip_l14": lambda: make_clip_scorer(out / "clip-vit-large-patch14", scale, "clip_l14", tokenizers),
        "llava_hf": lambda: make_llava_hf(out / "llava-1.5-7b-hf", scale, tokenizers),
    }
    if unknown := set(only) - set(makers):
        raise SystemExit(f"{unknown.pop()!r}: expected one of {', '.join(makers)}")
    for name, make in makers.items():
        if not only or name in only:
            print(make())


def converted(
    sources: list[Path], out: Path, base: Bundle | None = None, **options: object
) -> tuple[Bundle, str]:
    """Convert checkpoints of the tiny scale; the bundle, and everything that was said."""
    said: list[str] = []
    convert(sources, out, base=base, say=said.append, **{"defaults": TINY_DEFAULTS, **options})
    return Bundle.open(out), "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--only", nargs="*", default=[], help="some of the checkpoints")
    parser.add_argument("--tokenizers", type=Path, help="folder with vocab.json, merges.txt, tokenizer.model")
    args = parser.parse_args()
    tokenizers = args.tokenizers
    if tokenizers is None:
        tokenizers = args.out / "tokenizers"
        build_tokenizers(tokenizers)
    make_all(args.out, SCALES[args.scale], tokenizers, args.only)


if __name__ == "__main__":
    main()
