"""Everything that MM-Diff trains beside its image encoder, as one module outside the base's networks.

Letters: S images, P embedding of an image, W width of a text encoder, X width of the cross-attention,
K tokens of an image, N patch tokens, C their width, r rank, H heads, D channels per head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention, merge_heads, split_heads
from models.clip import CLIPText, CLIPTextConfig
from models.lora import LoRALinear
from models.unet import AttentionLayer, KeysValues, UNet, UNetConfig, attention_layers

ATTENTION = ("q", "k", "v", "out")  # the linear layers of an attention layer
OFFICIAL = ("one", "two")  # the release's names of the text encoders


@dataclass(frozen=True)
class TextLoRA:
    """Sizes of one text encoder's LoRA."""

    layers: int
    width: int
    rank: int
    mlp: int | None = None  # width of the hidden layer; None = attention alone

    @classmethod
    def of(cls, cfg: CLIPTextConfig, rank: int, mlp: bool = False) -> "TextLoRA":
        return cls(cfg.layers, cfg.width, rank, cfg.mlp if mlp else None)


@dataclass(frozen=True)
class MMDiffSizes:
    """Sizes beside the UNet's; the defaults are the released portrait model's."""

    # What the subject's tokens are made of: a face's embedding (release), or the image's own (paper).
    subject: Literal["face", "cls"] = "face"
    face_dim: int = 512  # of a face's embedding
    embed_dim: int = 768  # P
    patch_dim: int = 1024  # C
    text_dims: tuple[int, ...] = (768, 1280)  # W of each text encoder
    tokens: int = 4  # K
    hidden: int = 1024  # of the tokens' first layer
    depth: int = 4  # blocks of the refiner
    heads: int = 8
    head_dim: int = 256
    ff_mult: int = 2
    rank: int = 64  # of the UNet's LoRAs
    text_1: TextLoRA | None = None
    text_2: TextLoRA | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_dims", tuple(self.text_dims))  # JSON has lists

    @property
    def subject_dim(self) -> int:
        """Width of what a subject's tokens are made of."""
        return self.face_dim if self.subject == "face" else self.embed_dim


class Pair(nn.Module):
    """A low-rank change of a linear layer, x -> B A x; it starts at zero."""

    def __init__(self, dim_in: int, dim_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, dim_in) / rank)  # A (r, in)
        self.up = nn.Parameter(torch.zeros(dim_out, rank))  # B (out, r)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)  # (..., out)

    def product(self) -> Tensor:
        """B A, float32 (out, in)."""
        return self.up.float() @ self.down.float()


def _pairs(names: Sequence[str], dim_in: int, dim_out: int, rank: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: Pair(dim_in, dim_out, rank) for name in names})


class BlockLoRA(nn.Module):
    """One transformer block's LoRAs: of both attentions, and of K, V of the subject tokens."""

    def __init__(self, layer: AttentionLayer, rank: int) -> None:
        super().__init__()
        dim, context = layer.channels, layer.context_dim
        self.attn1 = _pairs(ATTENTION, dim, dim, rank)
        self.attn2 = _pairs(("q", "out"), dim, dim, rank)
        self.attn2.update(_pairs(("k", "v"), context, dim, rank))
        self.image = _pairs(("k", "v"), context, dim, rank)


def text_lora(sizes: TextLoRA | None) -> nn.ModuleList:
    """The LoRAs of a text encoder, layer by layer; none without sizes."""
    layers = nn.ModuleList()
    for _ in range(sizes.layers if sizes else 0):
        layers.append(_pairs([f"{name}_proj" for name in ATTENTION], sizes.width, sizes.width, sizes.rank))
        if sizes.mlp is not None:
            layers[-1].update(_pairs(("fc1",), sizes.width, sizes.mlp, sizes.rank))
            layers[-1].update(_pairs(("fc2",), sizes.mlp, sizes.width, sizes.rank))
    return layers


class ImageProjection(nn.Module):
    """Embedding of an image (S, P) -> one per text encoder, (S, W). Official: CLIPEmbedsProjHead."""

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layernorm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.proj = nn.ModuleList(nn.Linear(dim, width) for width in widths)

    def forward(self, embedding: Tensor) -> list[Tensor]:
        x = F.gelu(self.fc(self.layernorm(embedding)))  # (S, P)
        return [proj(x) for proj in self.proj]


class Fusion(nn.Module):
    """A word's token embedding and its image's, (S, W) each -> the token embedding (S, W) in its place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(2 * width)
        self.fc1, self.fc2 = nn.Linear(2 * width, width), nn.Linear(width, width)

    def forward(self, word: Tensor, image: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.layernorm(torch.cat([word, image], dim=-1)))))  # (S, W)


class RefinerAttention(nn.Module):
    """Subject tokens (S, K, X) attend to patch tokens (S, N, X) and to themselves."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        x = self.norm2(x)  # (S, K, X)
        kv = self.to_kv(torch.cat([self.norm1(patches), x], dim=1))  # (S, N + K, 2HD)
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), *kv.chunk(2, dim=-1)))
        return self.to_out(merge_heads(attention(q, k, v)))  # (S, K, X)


class SERefiner(nn.Module):
    """Details for the subject tokens, out of patch tokens: (S, K, X), (S, N, C) -> (S, K, X)."""

    def __init__(self, cfg: MMDiffSizes, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(cfg.patch_dim, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([RefinerAttention(dim, cfg.heads, cfg.head_dim), _feed_forward(dim, cfg.ff_mult)])
            for _ in range(cfg.depth)
        )
        self.proj_out, self.norm_out = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        patches = self.proj_in(patches)  # (S, N, X)
        for attend, feed_forward in self.layers:
            x = x + attend(x, patches)
            x = x + feed_forward(x)
        return self.norm_out(self.proj_out(x))  # (S, K, X)


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    layers = nn.Linear(dim, dim * mult, bias=False), nn.GELU(), nn.Linear(dim * mult, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), *layers)


class SubjectTokens(nn.Module):
    """A subject's embedding and patch tokens -> its tokens (S, K, X). Official: FaceEmbedsProjHead."""

    def __init__(self, cfg: MMDiffSizes, dim: int) -> None:
        super().__init__()
        self.tokens = cfg.tokens
        layers = nn.Linear(cfg.subject_dim, cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, cfg.tokens * dim)
        self.proj, self.layer_norm = nn.Sequential(*layers), nn.LayerNorm(dim)
        self.refiner = SERefiner(cfg, dim)

    def forward(self, embedding: Tensor, patches: Tensor) -> Tensor:
        x = self.proj(embedding).unflatten(-1, (self.tokens, -1))  # (S, K, X)
        x = self.layer_norm(x)
        return x + self.refiner(x, patches)


class MMDiffAdapter(nn.Module):
    """All parameters of MM-Diff beside its image encoder's."""

    def __init__(self, cfg: MMDiffSizes, unet_cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg, self.layers = cfg, attention_layers(unet_cfg)
        self.images = ImageProjection(cfg.embed_dim, cfg.text_dims)
        self.fuse = nn.ModuleList(Fusion(width) for width in cfg.text_dims)
        self.head = SubjectTokens(cfg, self.layers[0].context_dim)
        self.unet = nn.ModuleList(BlockLoRA(layer, cfg.rank) for layer in self.layers)
        self.text = nn.ModuleList(text_lora(sizes) for sizes in (cfg.text_1, cfg.text_2)[: len(self.fuse)])

    def keys_values(self, tokens: Tensor, frozen: Sequence[KeysValues]) -> list[KeysValues]:
        """K, V of subject tokens.

        Args:
            tokens: (R, K, X).
            frozen: the base's own weights of K and V in each cross-attention (`frozen_context`).

        Returns:
            For each layer K and V, each (R, H, K, D).
        """
        return [
            tuple(
                split_heads(F.linear(tokens, weight) + lora.image[name](tokens), layer.heads)
                for name, weight in zip("kv", weights, strict=True)
            )
            for lora, layer, weights in zip(self.unet, self.layers, frozen, strict=True)
        ]


# --- LoRAs and the base's networks ----------------------------------------------------------------------


def frozen_context(unet: UNet) -> list[KeysValues]:
    """The weights of K and V of each cross-attention, without the text's LoRAs."""
    layers = ((block.attn2.to_k, block.attn2.to_v) for block in unet.transformer_blocks())
    return [tuple(getattr(x, "base", x).weight for x in pair) for pair in layers]


def targets(
    adapter: MMDiffAdapter, unet: UNet, encoders: Sequence[CLIPText]
) -> Iterator[tuple[nn.Module, str, Pair]]:
    """Every linear layer that has a LoRA: its parent, its name there, and the LoRA."""
    for block, lora in zip(unet.transformer_blocks(), adapter.unet, strict=True):
        for attn, pairs in ((block.attn1, lora.attn1), (block.attn2, lora.attn2)):
            for name, pair in pairs.items():
                yield (attn.to_out, "0", pair) if name == "out" else (attn, f"to_{name}", pair)
    for encoder, layers in zip(encoders, adapter.text, strict=False):
        for block, pairs in zip(encoder.encoder.layers, layers, strict=False):
            for name, pair in pairs.items():
                yield block.mlp if name.startswith("fc") else block.self_attn, name, pair


@torch.no_grad()
def merge(adapter: MMDiffAdapter, unet: UNet, encoders: Sequence[CLIPText]) -> None:
    """Add the LoRAs to the weights, in place, in float32.

    Args:
        adapter: with the LoRAs.
        unet: to change.
        encoders: the text encoders to change.
    """
    for parent, name, pair in targets(adapter, unet, encoders):
        weight = getattr(parent, name).weight
        weight.copy_(weight.float() + pair.product().to(weight.device))


def attach(adapter: MMDiffAdapter, unet: UNet, encoders: Sequence[CLIPText]) -> None:
    """Have the networks compute with the adapter's LoRAs, which stay parameters of its own.

    Args:
        adapter: with the LoRAs.
        unet: to change.
        encoders: the text encoders to change.
    """
    for parent, name, pair in list(targets(adapter, unet, encoders)):
        setattr(parent, name, LoRALinear(getattr(parent, name), pair.down, pair.up))
