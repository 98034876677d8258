"""MM-Diff's modules at the released sizes; float32, CPU.

The authors' code is no package: attention is compared with diffusers' (whose IP-Adapter has the same second
attention), the other modules with a plain restatement in float64 that reads the released names.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as PublicAttention
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor

from models.attention import split_heads
from models.unet import SDXL, Attention, UNetConfig, attention_layers
from models.weights.keymaps import convert
from moma.methods.mm_diff.adapter import BlockLoRA, MMDiffAdapter, MMDiffSizes
from moma.methods.mm_diff.keymap import official
from moma.methods.mm_diff.method import SubjectHook
from tests.parity_case import Case
from tests.parity_language import build
from tests.recipe import normal

SCALE = 0.8
ONE_BLOCK = UNetConfig(channels=(640,), depth=(1,), mid_depth=0, heads=(10,), context_dim=(2048,), resnets=1)


def tensor(key: str, *shape: int) -> Tensor:
    return torch.from_numpy(normal(f"parity/{key}", shape))


@torch.no_grad()
def modules() -> tuple[Tensor, Tensor]:
    """Subject tokens and merged words of two people, all numbers side by side."""
    sizes = MMDiffSizes()
    ours = build(lambda: MMDiffAdapter(sizes, ONE_BLOCK))
    named = convert(official(ONE_BLOCK), ours.state_dict(), "out").names
    w = {name: ours.state_dict()[key].double() for name, (key, _) in named.items()}
    face, patches = F.normalize(tensor("face", 2, 512), dim=-1), tensor("patches", 2, 257, sizes.patch_dim)
    embedding = tensor("embedding", 2, sizes.embed_dim)
    words = [tensor(f"word{i}", 2, width) for i, width in enumerate(sizes.text_dims)]
    images = ours.images(embedding)
    merged = [fuse(*pair) for fuse, *pair in zip(ours.fuse, words, images, strict=True)]
    found = [ours.head(face, patches), *merged]
    expected = [tokens_of(w, sizes, face.double(), patches.double())]
    expected += merged_words(w, [x.double() for x in words], embedding.double())
    return (torch.cat([x.flatten().double() for x in parts]) for parts in (found, expected))


def linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].mT
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def merged_words(w: Mapping[str, Tensor], words: list[Tensor], embedding: Tensor) -> list[Tensor]:
    x, found = gelu(linear(w, "obj_embeds_proj.fc", norm(w, "obj_embeds_proj.layernorm", embedding))), []
    for i, (word, name) in enumerate(zip(words, ("mm_fuse_one", "mm_fuse_two"), strict=True)):
        both = torch.cat([word, linear(w, f"obj_embeds_proj.proj_{i + 1}", x)], dim=-1)
        hidden = gelu(linear(w, f"{name}.fc1", norm(w, f"{name}.layernorm", both)))
        found.append(linear(w, f"{name}.fc2", hidden))
    return found


def tokens_of(w: Mapping[str, Tensor], sizes: MMDiffSizes, face: Tensor, patches: Tensor) -> Tensor:
    start = "face_embeds_proj"
    x = linear(w, f"{start}.proj.2", gelu(linear(w, f"{start}.proj.0", face)))
    x = tokens = norm(w, f"{start}.layer_norm", x.view(len(x), sizes.tokens, -1))
    dense = linear(w, f"{start}.refiner.proj_in", patches)
    for i in range(sizes.depth):
        own = f"{start}.refiner.layers.{i}.0"
        query = norm(w, f"{own}.norm2", x)
        keys = torch.cat([norm(w, f"{own}.norm1", dense), query], dim=1)
        q, (k, v) = linear(w, f"{own}.to_q", query), linear(w, f"{own}.to_kv", keys).chunk(2, dim=-1)
        heads = []
        for one in range(sizes.heads):
            part = slice(one * sizes.head_dim, (one + 1) * sizes.head_dim)
            scores = q[..., part] @ k[..., part].mT / math.sqrt(sizes.head_dim)
            heads.append(scores.softmax(dim=-1) @ v[..., part])
        x = x + linear(w, f"{own}.to_out", torch.cat(heads, dim=-1))
        hidden = norm(w, f"{start}.refiner.layers.{i}.1.0", x)
        hidden = gelu(linear(w, f"{start}.refiner.layers.{i}.1.1", hidden))
        x = x + linear(w, f"{start}.refiner.layers.{i}.1.3", hidden)
    out = norm(w, f"{start}.refiner.norm_out", linear(w, f"{start}.refiner.proj_out", x))
    return tokens + out


@torch.no_grad()
def cross_attention(channels: int, heads: int) -> tuple[Tensor, Tensor]:
    """One layer with its LoRAs and the tokens of two subjects, 32x32 queries."""
    layer = next(layer for layer in attention_layers(SDXL) if layer.channels == channels)
    base = build(lambda: Attention(channels, 2048, heads))
    lora = build(lambda: BlockLoRA(layer, 64))
    queries, text, tokens = (
        tensor("q", 2, 1024, channels),
        tensor("text", 2, 77, 2048),
        tensor("s", 2, 8, 2048),
    )
    public = PublicAttention(channels, cross_attention_dim=2048, heads=heads, dim_head=channels // heads)
    public.load_state_dict(base.state_dict())
    second = IPAdapterAttnProcessor2_0(channels, 2048, (8,), SCALE)
    layers = []
    for name, ours, theirs in (("k", base.to_k, second.to_k_ip[0]), ("v", base.to_v, second.to_v_ip[0])):
        theirs.weight.copy_(ours.weight + lora.image[name].product())
        layers.append(split_heads(F.linear(tokens, ours.weight) + lora.image[name](tokens), heads))
    for name, pair in lora.attn2.items():
        for network in (base, public):
            linear = network.to_out[0] if name == "out" else getattr(network, f"to_{name}")
            linear.weight += pair.product()
    public.set_processor(second)
    hook = SubjectHook([tuple(layers)], torch.ones(2, 1, 1, 8).bool(), torch.full((2, 1, 1, 1), SCALE))
    ours = base(queries, text, lambda *qkv: hook.cross_attn(0, *qkv, (32, 32)))[0]
    return ours, public(queries, encoder_hidden_states=(text, [tokens]))


CASES = [
    Case("MM-Diff tokens, refiner, merged words", modules),
    Case("MM-Diff attention, 640 channels", partial(cross_attention, 640, 10)),
    Case("MM-Diff attention, 1280 channels", partial(cross_attention, 1280, 20)),
]
