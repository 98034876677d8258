"""Full-size CLIP and LLaVA against transformers', on the same pseudo-random weights, float32 on the CPU.

Both networks of a case share one copy of the weights; LLaVA-7B has its full width and two of its blocks.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import transformers
from torch import Tensor, nn

from models.clip import TEXT_PRESETS, VISION_PRESETS, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from models.llama import LlamaConfig
from models.llava import Llava, LlavaConfig
from models.tokenizers import IMAGE_TOKEN
from tests.parity_case import Case
from tests.recipe import fill, ints, normal


def build(network: Callable[[], nn.Module]) -> nn.Module:
    """Ours, with recipe weights, without the time of the usual initialisation."""
    with torch.device("meta"):
        ours = network()
    ours.to_empty(device="cpu")
    fill(ours)
    return ours.eval()


def share(network: Callable[[], nn.Module], weights: dict[str, Tensor]) -> nn.Module:
    """transformers' network on the given tensors themselves; keys lack `text_model.` or `vision_model.`."""
    with torch.device("meta"):
        theirs = network()
    names = {key.replace("text_model.", "").replace("vision_model.", ""): key for key in theirs.state_dict()}
    theirs.load_state_dict({names[key]: value for key, value in weights.items()}, strict=True, assign=True)
    for module in list(theirs.modules()):  # buffers that no file holds are still on "meta"
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(config=module.config)
    return theirs.eval()


def public_sizes(cfg: CLIPTextConfig | CLIPVisionConfig) -> dict[str, object]:
    """The part of transformers' configuration that text and vision have in common."""
    return {
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "hidden_act": cfg.act,
        "layer_norm_eps": cfg.eps,
        **({} if cfg.projection is None else {"projection_dim": cfg.projection}),
    }


def public_text(cfg: CLIPTextConfig) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(**public_sizes(cfg), eos_token_id=2, attn_implementation="eager")


def text_ids(cfg: CLIPTextConfig) -> Tensor:
    """A padded and a full text, (2, 77) int64; CLIP's vocabulary ends with the begin and the end token."""
    begin, end = cfg.vocab - 2, cfg.vocab - 1
    ids = torch.from_numpy(ints("parity/ids", (2, cfg.positions), 0, begin))
    ids[:, 0], ids[0, 20:], ids[1, -1] = begin, end, end
    return ids


def public_vision(cfg: CLIPVisionConfig) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        **public_sizes(cfg), image_size=cfg.image_size, patch_size=cfg.patch, attn_implementation="eager"
    )


@torch.no_grad()
def text_states(cfg: CLIPTextConfig) -> tuple[Tensor, Tensor]:
    """Hidden states after the final LayerNorm, (2, 77, C): what Stable Diffusion reads."""
    public = public_text(cfg)
    ours = build(lambda: CLIPText(cfg))
    theirs = share(lambda: transformers.CLIPTextModel(public), ours.state_dict())
    ids = text_ids(cfg)
    return ours(ids)[0], theirs(ids).last_hidden_state


@torch.no_grad()
def text_embedding(cfg: CLIPTextConfig) -> tuple[Tensor, Tensor]:
    """Projected embeddings, (2, P): what CLIP-T reads."""
    public = public_text(cfg)
    ours = build(lambda: CLIPText(cfg))
    theirs = share(lambda: transformers.CLIPTextModelWithProjection(public), ours.state_dict())
    ids = text_ids(cfg)
    return ours(ids)[1], theirs(ids).text_embeds


@torch.no_grad()
def penultimate(cfg: CLIPTextConfig) -> tuple[Tensor, Tensor]:
    """States before the last block, (2, 77, C): what SDXL reads."""
    ours = build(lambda: CLIPText(cfg))
    kind = transformers.CLIPTextModelWithProjection if cfg.projection else transformers.CLIPTextModel
    theirs = share(lambda: kind(public_text(cfg)), ours.state_dict())
    ids = text_ids(cfg)
    return ours.states(ids)[0], theirs(ids, output_hidden_states=True).hidden_states[-2]


@torch.no_grad()
def image_embedding(cfg: CLIPVisionConfig) -> tuple[Tensor, Tensor]:
    """Projected embeddings, (2, P): all blocks, the pooling and the projection."""
    ours = build(lambda: CLIPVision(cfg))
    theirs = share(lambda: transformers.CLIPVisionModelWithProjection(public_vision(cfg)), ours.state_dict())
    pixels = torch.from_numpy(normal("parity/pixels", (2, 3, cfg.image_size, cfg.image_size)))
    return ours(pixels)[1], theirs(pixels).image_embeds


@torch.no_grad()
def llava_states(cfg: LlavaConfig) -> tuple[Tensor, Tensor]:
    """LLaMA's hidden states after the final RMSNorm over text and image, (1, T, C)."""
    llama, image_id = cfg.llama, cfg.llama.vocab - 1
    public = transformers.LlavaConfig(
        vision_config=public_vision(cfg.vision),
        text_config=transformers.LlamaConfig(
            vocab_size=llama.vocab,
            hidden_size=llama.width,
            intermediate_size=llama.mlp,
            num_hidden_layers=llama.layers,
            num_attention_heads=llama.heads,
            rms_norm_eps=llama.eps,
            max_position_embeddings=llama.positions,
        ),
        image_token_index=image_id,
        attn_implementation="eager",
    )
    ours = build(lambda: Llava(cfg))
    parts = {
        "tower.": "vision_tower.",
        "projector.0.": "multi_modal_projector.linear_1.",
        "projector.2.": "multi_modal_projector.linear_2.",
        "llama.": "language_model.",
    }
    weights = {
        public_name + key.removeprefix(part): value
        for key, value in ours.state_dict().items()
        for part, public_name in parts.items()
        if key.startswith(part)
    }
    theirs = share(lambda: transformers.LlavaModel(public), weights)
    pixels = torch.from_numpy(normal("parity/pixels", (1, 3, cfg.vision.image_size, cfg.vision.image_size)))
    words = torch.from_numpy(ints("parity/words", (40,), 3, image_id))
    ids = torch.cat([words[:5], torch.tensor([IMAGE_TOKEN]), words[5:]])
    embeds, _ = ours.splice([ids], ours.encode_images(pixels))
    expanded = torch.cat([words[:5], torch.full((cfg.vision.patches,), image_id), words[5:]])
    return ours.llama(embeds), theirs(input_ids=expanded[None], pixel_values=pixels).last_hidden_state


TWO_BLOCKS = replace(LlavaConfig(), llama=LlamaConfig(layers=2, lm_head=False))
CASES = [
    Case("CLIP text L/14 (SD1.5), states", partial(text_states, TEXT_PRESETS["sd15"])),
    Case("CLIP text L/14, embedding", partial(text_embedding, TEXT_PRESETS["l14"])),
    Case("CLIP text L/14 (SDXL), penultimate", partial(penultimate, TEXT_PRESETS["sd15"])),
    Case("OpenCLIP text bigG (SDXL), penultimate", partial(penultimate, TEXT_PRESETS["bigg"])),
    Case("OpenCLIP text bigG (SDXL), embedding", partial(text_embedding, TEXT_PRESETS["bigg"])),
    Case("CLIP text B/32, embedding", partial(text_embedding, TEXT_PRESETS["b32"])),
    Case("CLIP vision B/32, embedding", partial(image_embedding, VISION_PRESETS["b32"])),
    Case("CLIP vision L/14 224, embedding", partial(image_embedding, VISION_PRESETS["l14"])),
    Case("CLIP vision L/14 336, embedding", partial(image_embedding, VISION_PRESETS["l14_336"])),
    Case("OpenCLIP vision H/14, embedding", partial(image_embedding, VISION_PRESETS["h14"])),
    Case("LLaVA-1.5-7B, 2 of 32 blocks, states", partial(llava_states, TWO_BLOCKS)),
]
