"""DINO's vision transformers (Caron et al., arXiv 2104.14294); their class token measures subject fidelity.

Parameter names are those of the official backbone files (facebookresearch/dino, dino_deitsmall16_pretrain.pth
and dino_vitbase16_pretrain.pth).

Letters: B batch, N image patches, C width, S image side in pixels, H heads, D channels per head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention, merge_heads, split_heads
from models.clip import MLP


@dataclass(frozen=True)
class DINOConfig:
    """Sizes; the defaults are ViT-S/16's."""

    width: int = 384  # C
    layers: int = 12
    heads: int = 6
    mlp: int = 1536  # width of the hidden layer of each MLP
    image_size: int = 224  # S, pixels
    patch: int = 16  # pixels
    eps: float = 1e-6  # LayerNorm, as in the training code; transformers' conversion has 1e-12

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"DINO width {self.width}: expected a multiple of heads ({self.heads})")
        if self.image_size % self.patch:
            raise ValueError(
                f"DINO image_size {self.image_size}: expected a multiple of patch ({self.patch})"
            )

    @property
    def patches(self) -> int:
        """N."""
        return (self.image_size // self.patch) ** 2


PRESETS = {"s16": DINOConfig(), "b16": DINOConfig(width=768, heads=12, mlp=3072)}


class _PatchEmbed(nn.Module):
    def __init__(self, cfg: DINOConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, N, C)


class _Attention(nn.Module):
    def __init__(self, cfg: DINOConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)  # (B, 1+N, 3C) -> 3 of (B, 1+N, C)
        q, k, v = (split_heads(part, self.heads) for part in parts)  # (B, H, 1+N, D) each
        return self.proj(merge_heads(attention(q, k, v)))  # (B, 1+N, C)


class _Block(nn.Module):
    """One pre-norm transformer block, (B, 1+N, C) -> (B, 1+N, C)."""

    def __init__(self, cfg: DINOConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, cfg.eps)
        self.attn = _Attention(cfg)
        self.norm2 = nn.LayerNorm(cfg.width, cfg.eps)
        self.mlp = MLP(cfg.width, cfg.mlp, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DINO(nn.Module):
    """The backbone of the official code, without its projection head."""

    def __init__(self, cfg: DINOConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + cfg.patches, cfg.width))
        self.patch_embed = _PatchEmbed(cfg)
        self.blocks = nn.ModuleList(_Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width, cfg.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Class token after the last norm, (B, C).

        pixels: (B, 3, S, S), normalised by `models.dino_image`; ValueError for another size.
        """
        size = self.cfg.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"DINO image of shape {tuple(pixels.shape)}: expected (B, 3, {size}, {size})")
        patches = self.patch_embed(pixels)  # (B, 3, S, S) -> (B, N, C)
        cls = self.cls_token.expand(pixels.shape[0], -1, -1)  # (B, 1, C)
        x = torch.cat([cls, patches], dim=1) + self.pos_embed  # (B, 1+N, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])  # (B, C)
