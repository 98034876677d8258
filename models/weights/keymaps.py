"""Tables from public parameter names to this project's, and the small engine that applies them.

A table is a list of rows: public name, our name, and a `Transform` where the shapes differ. `{}` stands for a
number and `*` for any text; both sides carry the same ones in the same order. The first matching row decides,
and a row without our name drops the key. Every table works in both directions ("in" = public to ours, "out" =
back); where several public spellings lead to one name, "out" writes the first.

Sources of the public names: CompVis/stable-diffusion (ldm/modules/diffusionmodules), diffusers
(UNet2DConditionModel, AutoencoderKL), transformers (CLIPModel, LlavaForConditionalGeneration, SamModel,
ViTModel), haotian-liu/LLaVA (llava/model), facebookresearch/segment-anything, tencent-ailab/IP-Adapter,
bytedance/MoMA.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["in", "out"]


@dataclass(frozen=True)
class Transform:
    """Applied to the values: `into` on the way in, `back` on the way out. Both run on meta tensors."""

    into: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _to_matrix(x: Tensor) -> Tensor:
    """(C, D), (C, D, 1) or (C, D, 1, 1) -> (C, D); other shapes stay, for the shape check to report."""
    return x.reshape(x.shape[:2]) if x.dim() > 2 and x.shape[2:].numel() == 1 else x


def _to_vector(x: Tensor) -> Tensor:
    """() -> (1,); other shapes stay, for the shape check to report."""
    return x.reshape(1) if x.dim() == 0 else x


COPY = Transform(_same, _same)
CONV = Transform(_to_matrix, lambda x: x[:, :, None, None])  # a 1x1 convolution there, a linear layer here
TRANSPOSED = Transform(Tensor.t, Tensor.t)
MATRIX = Transform(_to_matrix, _same)  # linear on both sides, in some files shaped like a convolution
VECTOR = Transform(_to_vector, _same)  # one number, in some files without a dimension


class Row(NamedTuple):
    public: str
    ours: str | None  # None: not a weight of ours, dropped
    transform: Transform = COPY


Table = Sequence[Row]


@dataclass
class Converted:
    """names: new name -> (old name, change of the values); dropped, unknown: old names."""

    names: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def convert(table: Table, keys: Iterable[str], direction: Direction = "in") -> Converted:
    """Translate names; ValueError if two of them become the same.

    Args:
        table: rows to apply.
        keys: names to translate.
        direction: "in" = public to ours, "out" = back.
    """
    if direction == "in":
        rows = [(_pattern(row.public), row.ours, row.transform.into) for row in table]
    else:
        rows = [(_pattern(row.ours), row.public, row.transform.back) for row in table if row.ours is not None]
    result = Converted()
    for key in keys:
        hits = ((pattern.fullmatch(key), target, change) for pattern, target, change in rows)
        match, target, change = next((hit for hit in hits if hit[0]), (None, None, None))
        if match is None:
            result.unknown.append(key)
            continue
        if target is None:
            result.dropped.append(key)
            continue
        name = _fill(target, match.groups())
        if name in result.names:
            raise ValueError(f"{key} and {result.names[name][0]} are both {name}; a mix of two layouts")
        result.names[name] = (key, change)
    return result


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.*)"))


def _fill(text: str, parts: Sequence[str]) -> str:
    values = iter(parts)
    return re.sub(r"\{\}|\*", lambda _: next(values), text)


# --- Stable Diffusion 1.5, single file (LDM) --------------------------------------------------------

LDM_UNET_PREFIX = "model.diffusion_model."
LDM_VAE_PREFIX = "first_stage_model."
LDM_TEXT_PREFIX = "cond_stage_model."
SDXL_TEXT_PREFIXES = ("conditioner.embedders.0.", "conditioner.embedders.1.model.")  # CLIP L, OpenCLIP bigG
LDM_EMA_PREFIX = "model_ema."

_UNET_RESNET = (  # LDM, diffusers
    ("in_layers.0.*", "norm1.*"),
    ("in_layers.2.*", "conv1.*"),
    ("emb_layers.1.*", "time_emb_proj.*"),
    ("out_layers.0.*", "norm2.*"),
    ("out_layers.3.*", "conv2.*"),
    ("skip_connection.*", "conv_shortcut.*"),
)


def ldm_unet(attention: Sequence[bool], resnets: int, added: bool = False) -> Table:
    """LDM UNet <-> diffusers' names. LDM counts blocks across levels, samplers included.

    Args:
        attention: whether each level has attention, finest first.
        resnets: number per level on the way down (one more on the way up).
        added: whether it has SDXL's added conditioning.
    """
    levels = len(attention)
    rows = [
        Row("time_embed.0.*", "time_embedding.linear_1.*"),
        Row("time_embed.2.*", "time_embedding.linear_2.*"),
        Row("input_blocks.0.0.*", "conv_in.*"),
        Row("out.0.*", "conv_norm_out.*"),
        Row("out.2.*", "conv_out.*"),
    ]
    if added:
        rows += [Row(f"label_emb.0.{2 * i}.*", f"add_embedding.linear_{i + 1}.*") for i in range(2)]

    def resnet(public: str, ours: str) -> None:
        rows.extend(Row(f"{public}.{there}", f"{ours}.{here}") for there, here in _UNET_RESNET)

    for level in range(levels):
        first = 1 + level * (resnets + 1)
        for j in range(resnets):
            resnet(f"input_blocks.{first + j}.0", f"down_blocks.{level}.resnets.{j}")
            if attention[level]:
                rows.append(Row(f"input_blocks.{first + j}.1.*", f"down_blocks.{level}.attentions.{j}.*"))
        if level < levels - 1:
            sampler = f"down_blocks.{level}.downsamplers.0.conv.*"
            rows.append(Row(f"input_blocks.{first + resnets}.0.op.*", sampler))
    resnet("middle_block.0", "mid_block.resnets.0")
    rows.append(Row("middle_block.1.*", "mid_block.attentions.0.*"))
    resnet("middle_block.2", "mid_block.resnets.1")
    for block, has_attention in enumerate(reversed(attention)):
        for j in range(resnets + 1):
            number = block * (resnets + 1) + j
            resnet(f"output_blocks.{number}.0", f"up_blocks.{block}.resnets.{j}")
            if block < levels - 1 and j == resnets:  # before the attention row, whose `*` matches it too
                slot = 2 if has_attention else 1
                sampler = f"up_blocks.{block}.upsamplers.0.conv.*"
                rows.append(Row(f"output_blocks.{number}.{slot}.conv.*", sampler))
            if has_attention:
                rows.append(Row(f"output_blocks.{number}.1.*", f"up_blocks.{block}.attentions.{j}.*"))
    return rows


_VAE_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def ldm_vae(levels: int) -> Table:
    """LDM autoencoder <-> diffusers' names; the middle attention has 1x1 convolutions there, Linear here."""
    rows: list[Row] = []
    for half in ("encoder", "decoder"):
        mid = f"{half}.mid_block.attentions.0"
        # The second spelling comes from diffusers' export script of 2023, and community files carry it.
        for names in (("q", "k", "v", "proj_out"), _VAE_ATTENTION):
            for public, ours in zip(names, _VAE_ATTENTION, strict=True):
                rows.append(Row(f"{half}.mid.attn_1.{public}.weight", f"{mid}.{ours}.weight", CONV))
                rows.append(Row(f"{half}.mid.attn_1.{public}.bias", f"{mid}.{ours}.bias"))
        rows.append(Row(f"{half}.mid.attn_1.norm.*", f"{mid}.group_norm.*"))
        for j in (0, 1):
            there, here = f"{half}.mid.block_{j + 1}", f"{half}.mid_block.resnets.{j}"
            rows += [
                Row(f"{there}.nin_shortcut.*", f"{here}.conv_shortcut.*"),
                Row(f"{there}.*", f"{here}.*"),
            ]
        rows.append(Row(f"{half}.norm_out.*", f"{half}.conv_norm_out.*"))
        rows += [Row(f"{half}.{conv}.*", f"{half}.{conv}.*") for conv in ("conv_in", "conv_out")]
    for level in range(levels):
        for there, here in (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}"),
            (f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"),  # LDM counts from the finest
        ):
            rows += [
                Row(f"{there}.block.{{}}.nin_shortcut.*", f"{here}.resnets.{{}}.conv_shortcut.*"),
                Row(f"{there}.block.{{}}.*", f"{here}.resnets.{{}}.*"),
                Row(f"{there}.downsample.conv.*", f"{here}.downsamplers.0.conv.*"),
                Row(f"{there}.upsample.conv.*", f"{here}.upsamplers.0.conv.*"),
            ]
    return [*rows, Row("quant_conv.*", "quant_conv.*"), Row("post_quant_conv.*", "post_quant_conv.*")]


def ldm_ema(keys: Iterable[str]) -> dict[str, str]:
    """Key of a UNet weight in an LDM file -> key of its moving average, where the file has one."""
    present = set(keys)
    plain = [key for key in present if key.startswith(LDM_UNET_PREFIX)]
    averages = {key: LDM_EMA_PREFIX + key.removeprefix("model.").replace(".", "") for key in plain}
    return {key: average for key, average in averages.items() if average in present}


# --- diffusers autoencoder ----------------------------------------------------------------------------


def _diffusers_vae(old: bool) -> Table:
    rows: list[Row] = []
    names = ("query", "key", "value", "proj_attn") if old else _VAE_ATTENTION
    for public, ours in zip(names, _VAE_ATTENTION, strict=True):
        for half in ("encoder", "decoder"):
            mid = f"{half}.mid_block.attentions.0"
            rows.append(Row(f"{mid}.{public}.weight", f"{mid}.{ours}.weight", MATRIX))
            rows.append(Row(f"{mid}.{public}.bias", f"{mid}.{ours}.bias"))
    return [*rows, Row("*", "*")]


DIFFUSERS_VAE = _diffusers_vae(old=False)
DIFFUSERS_VAE_OLD = _diffusers_vae(old=True)  # files from before diffusers 0.17, such as sd-vae-ft-mse

# --- CLIP ------------------------------------------------------------------------------------------------

CLIP_TEXT: Table = [
    Row("*position_ids", None),  # a buffer of old transformers
    Row("vision_model.*", None),
    Row("visual_projection.*", None),
    Row("logit_scale", None),
    Row("text_projection.weight", "text_projection.weight"),
    Row("text_model.*", "*"),
]
CLIP_VISION: Table = [
    Row("*position_ids", None),
    Row("text_model.*", None),
    Row("text_projection.*", None),
    Row("logit_scale", None),
    Row("visual_projection.weight", "visual_projection.weight"),
    Row("vision_model.*", "*"),
]
CLIP_WHOLE: Table = [
    Row("*position_ids", None),
    Row("logit_scale", None),  # of the training's loss; a cosine has none
    Row("text_projection.weight", "text_model.text_projection.weight"),
    Row("visual_projection.weight", "vision_model.visual_projection.weight"),
    Row("text_model.*", "text_model.*"),
    Row("vision_model.*", "vision_model.*"),
]
# transformers 5 saves a lone tower without its prefix
CLIP_BARE: Table = [Row("*position_ids", None), Row("*", "*")]
LDM_TEXT: Table = [
    Row("*position_ids", None),
    Row("logit_scale", None),
    Row("transformer.text_model.*", "*"),
    Row("transformer.*", "*"),  # NAI and other early fine-tunes
]

# OpenCLIP's text encoder, as SDXL's single files have it, but for attn.{q,k,v}_proj, one attn.in_proj there
OPEN_CLIP_TEXT: Table = [
    Row("logit_scale", None),
    Row("attn_mask", None),
    Row("token_embedding.weight", "embeddings.token_embedding.weight"),
    Row("positional_embedding", "embeddings.position_embedding.weight"),
    Row("transformer.resblocks.{}.ln_{}.*", "encoder.layers.{}.layer_norm{}.*"),
    Row("transformer.resblocks.{}.attn.*", "encoder.layers.{}.self_attn.*"),
    Row("transformer.resblocks.{}.mlp.c_fc.*", "encoder.layers.{}.mlp.fc1.*"),
    Row("transformer.resblocks.{}.mlp.c_proj.*", "encoder.layers.{}.mlp.fc2.*"),
    Row("ln_final.*", "final_layer_norm.*"),
    Row("text_projection", "text_projection.weight", TRANSPOSED),
]

# --- DINO ------------------------------------------------------------------------------------------------


def _dino_hf(layer: str, names: Sequence[tuple[str, str]]) -> Table:
    both = ("layernorm_before.*", "norm1.*"), ("layernorm_after.*", "norm2.*")
    return [
        Row("embeddings.cls_token", "cls_token"),
        Row("embeddings.position_embeddings", "pos_embed"),
        Row("embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
        *(Row(f"{layer}.{{}}.{there}", f"blocks.{{}}.{here}") for there, here in (*names, *both)),
        Row("layernorm.*", "norm.*"),
    ]


# transformers' ViTModel <-> the official names, but for attn.q, .k and .v, which are one attn.qkv there
DINO_HF = _dino_hf(
    "encoder.layer",
    [
        ("attention.attention.query.*", "attn.q.*"),
        ("attention.attention.key.*", "attn.k.*"),
        ("attention.attention.value.*", "attn.v.*"),
        ("attention.output.dense.*", "attn.proj.*"),
        ("intermediate.dense.*", "mlp.fc1.*"),
        ("output.dense.*", "mlp.fc2.*"),
    ],
)
DINO_HF_NEW = _dino_hf(  # of transformers 5
    "layers",
    [
        ("attention.q_proj.*", "attn.q.*"),
        ("attention.k_proj.*", "attn.k.*"),
        ("attention.v_proj.*", "attn.v.*"),
        ("attention.o_proj.*", "attn.proj.*"),
        ("mlp.fc1.*", "mlp.fc1.*"),
        ("mlp.fc2.*", "mlp.fc2.*"),
    ],
)

# --- LLaVA -----------------------------------------------------------------------------------------------
# Ours: llama.*, projector.*, tower.*

LLAVA_ORIGINAL: Table = [  # haotian-liu/LLaVA, KunpengSong/MoMA_llava_7b
    Row("*position_ids", None),
    Row("model.layers.{}.self_attn.rotary_emb.inv_freq", None),
    Row("model.vision_tower.vision_tower.vision_model.*", "tower.*"),
    Row("model.mm_projector.*", "projector.*"),
    Row("model.embed_tokens.weight", "llama.embed_tokens.weight"),
    Row("model.layers.*", "llama.layers.*"),
    Row("model.norm.weight", "llama.norm.weight"),
    Row("lm_head.weight", "llama.lm_head.weight"),
]


def llava_hf(new: bool, vocab: int, padded: int) -> Table:
    """llava-hf <-> ours.

    Args:
        new: the names of transformers >= 4.52 in memory, else those of the hub's files.
        vocab: rows of the token embedding in LLaMA.
        padded: rows in the file: llava-hf appends <image>, <pad> and padding, which are dropped on the way
        in and
            zero on the way out.
    """

    def pad(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(padded - x.shape[0], x.shape[1])])

    words = Transform(lambda x: x[:vocab], pad)
    if new:
        language, head, model = "model.language_model.", "lm_head.weight", "model."
    else:
        language, head, model = "language_model.model.", "language_model.lm_head.weight", ""
    return [
        Row("*position_ids", None),
        Row(f"{language}layers.{{}}.self_attn.rotary_emb.inv_freq", None),
        Row(f"{language}embed_tokens.weight", "llama.embed_tokens.weight", words),
        Row(head, "llama.lm_head.weight", words),
        Row(f"{language}layers.*", "llama.layers.*"),
        Row(f"{language}norm.weight", "llama.norm.weight"),
        Row(f"{model}multi_modal_projector.linear_1.*", "projector.0.*"),
        Row(f"{model}multi_modal_projector.linear_2.*", "projector.2.*"),
        Row(f"{model}vision_tower.vision_model.*", "tower.*"),
        Row(f"{model}vision_tower.*", "tower.*"),  # transformers 5
    ]


# --- Segment Anything ------------------------------------------------------------------------------------

SAM_OFFICIAL: Table = [
    Row("pixel_*", None),  # mean and std of the input, in the files of some trainers
    Row("*", "*"),
]
SAM_TRANSFORMERS: Table = [
    Row(
        "shared_image_embedding.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    Row("prompt_encoder.shared_embedding.positional_embedding", None),  # a duplicate
    Row("vision_encoder.pos_embed", "image_encoder.pos_embed"),
    Row("vision_encoder.patch_embed.projection.*", "image_encoder.patch_embed.proj.*"),
    Row("vision_encoder.layers.{}.layer_norm{}.*", "image_encoder.blocks.{}.norm{}.*"),
    Row("vision_encoder.layers.*", "image_encoder.blocks.*"),
    Row("vision_encoder.neck.conv1.*", "image_encoder.neck.0.*"),
    Row("vision_encoder.neck.layer_norm1.*", "image_encoder.neck.1.*"),
    Row("vision_encoder.neck.conv2.*", "image_encoder.neck.2.*"),
    Row("vision_encoder.neck.layer_norm2.*", "image_encoder.neck.3.*"),
    Row("prompt_encoder.point_embed.*", "prompt_encoder.point_embeddings.*"),
    Row("prompt_encoder.mask_embed.conv1.*", "prompt_encoder.mask_downscaling.0.*"),
    Row("prompt_encoder.mask_embed.layer_norm1.*", "prompt_encoder.mask_downscaling.1.*"),
    Row("prompt_encoder.mask_embed.conv2.*", "prompt_encoder.mask_downscaling.3.*"),
    Row("prompt_encoder.mask_embed.layer_norm2.*", "prompt_encoder.mask_downscaling.4.*"),
    Row("prompt_encoder.mask_embed.conv3.*", "prompt_encoder.mask_downscaling.6.*"),
    Row("prompt_encoder.*", "prompt_encoder.*"),
    Row("mask_decoder.transformer.layers.{}.layer_norm{}.*", "mask_decoder.transformer.layers.{}.norm{}.*"),
    Row("mask_decoder.transformer.layer_norm_final_attn.*", "mask_decoder.transformer.norm_final_attn.*"),
    Row("mask_decoder.transformer.*", "mask_decoder.transformer.*"),
    Row("mask_decoder.upscale_conv1.*", "mask_decoder.output_upscaling.0.*"),
    Row("mask_decoder.upscale_layer_norm.*", "mask_decoder.output_upscaling.1.*"),
    Row("mask_decoder.upscale_conv2.*", "mask_decoder.output_upscaling.3.*"),
    *(
        Row(f"mask_decoder.{head}.{there}.*", f"mask_decoder.{head}.layers.{here}.*")
        for head in ("output_hypernetworks_mlps.{}", "iou_prediction_head")
        for there, here in (("proj_in", 0), ("layers.0", 1), ("proj_out", 2))
    ),
    Row("mask_decoder.*", "mask_decoder.*"),
]

# --- adapters --------------------------------------------------------------------------------------------


def processors(down: int, up: int, mid: int) -> Iterable[tuple[int, int]]:
    """(index in diffusers' list of attention layers, index in execution order).

    diffusers lists the layers as it registers them: down, up, mid; they run as down, mid, up.
    """
    for layer in range(down + up + mid):
        if layer < down:
            yield layer, layer
        elif layer < down + up:
            yield layer, layer + mid
        else:
            yield layer, layer - up


def moma_th(down: int, up: int, mid: int) -> Table:
    """The official attn_adapters_projectors.th <-> ours; the file numbers self-attention 2l, cross-attention
    2l+1.

    Args:
        down: transformer layers (pairs of self- and cross-attention) of the UNet's way down.
        up: of its way up.
        mid: of its middle.
    """
    rows = [Row("projectors.*", "projector.*"), Row("llm_mapping.mapping.*", "mapping.*")]
    for layer, ours in processors(down, up, mid):
        for kind, number in (("subject", 2 * layer), ("context", 2 * layer + 1)):
            public = f"self_cross_attentions.{number}"
            rows.append(Row(f"{public}.to_k_ip.weight", f"{kind}.{ours}.to_k.weight"))
            rows.append(Row(f"{public}.to_v_ip.weight", f"{kind}.{ours}.to_v.weight"))
        scale = f"self_cross_attentions.{2 * layer}.scale_learnable"
        rows.append(Row(scale, f"subject.{ours}.scale", VECTOR))
    return rows


def ip_adapter(down: int, up: int, mid: int) -> Table:
    """IP-Adapter (.bin flattened, .safetensors, or its trainer's output) <-> projector and context.

    Args:
        down: transformer layers of the UNet's way down.
        up: of its way up.
        mid: of its middle.
    """
    rows: list[Row] = []
    for head, body in (("image_proj", "ip_adapter"), ("image_proj_model", "adapter_modules")):
        rows.append(Row(f"{head}.*", "projector.*"))
        for layer, ours in processors(down, up, mid):
            public = f"{body}.{2 * layer + 1}"
            rows.append(Row(f"{public}.to_k_ip.weight", f"context.{ours}.to_k.weight"))
            rows.append(Row(f"{public}.to_v_ip.weight", f"context.{ours}.to_v.weight"))
    return rows
