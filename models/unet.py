"""The Stable Diffusion UNet, which methods extend through one seam: an attention hook.

Parameter names are diffusers' (`UNet2DConditionModel`), so a public state dict loads as it is.
Sources: LDM (arXiv 2112.10752) and diffusers' unet_2d_condition.py; compared in tests/test_unet.py.

Letters: B batch, C channels, h w grid of a level, N = h*w tokens, T text tokens, H heads, D = C / H.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import attention, merge_heads, split_heads

Grid = tuple[int, int]
KeysValues = tuple[Tensor, Tensor]  # k and v of one attention layer, (B, H, T, D) each
Text = Tensor | Sequence[KeysValues]  # text states (B, T, context_dim), or k and v of every layer


class AttentionHook(Protocol):
    """Replaces the core of every attention layer, softmax(QKᵀ)V.

    The UNet calls it between a layer's input and output projections. A hook serves one UNet call.
    """

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Any]:
        """Replace one self-attention.

        Args:
            layer: its number in execution order (down, mid, up).
            q: (B, H, N, D).
            k: (B, H, N, D).
            v: (B, H, N, D).
            grid: (h, w) of the layer, h * w = N.

        Returns:
            z (B, H, N, D), and an attention map of any kind (or None), which the UNet collects.
        """

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Any]:
        """Replace one cross-attention: as `self_attn`, with k and v (B, H, T, D) of the text."""


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet, level by level from fine to coarse; the defaults are Stable Diffusion 1.5's."""

    in_channels: int = 4  # latent channels
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    depth: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks per attention; 0 = a level without attention
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: tuple[int, ...] = (768, 768, 768, 768)  # width of the text states
    linear_projection: bool = False  # proj_in and proj_out are Linear (SD2, SDXL), else 1x1 convolutions
    resnets: int = 2  # per level on the way down; one more on the way up
    norm_groups: int = 32
    norm_eps: float = 1e-5  # of the residual blocks
    transformer_norm_eps: float = 1e-6  # of the transformers' GroupNorm, which differs in the public models
    ff_mult: int = 4  # width of the feed-forward layer / width of the level
    time_mult: int = 4  # width of the time embedding / channels[0]
    time_period: int = 10_000  # longest period of the sinusoids
    added_cond_dim: int | None = None  # width of SDXL's pooled text and sizes; None = without
    gradient_checkpointing: bool = False  # recompute each block in the backward pass to save memory

    def __post_init__(self) -> None:
        for name in ("channels", "depth", "heads", "context_dim"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(f"UNet {name} {getattr(self, name)}: expected {len(self.channels)} levels")
        if any(width % heads for width, heads in zip(self.channels, self.heads, strict=True)):
            raise ValueError(f"UNet channels {self.channels}: expected multiples of heads {self.heads}")

    @property
    def levels(self) -> int:
        return len(self.channels)

    @property
    def time_dim(self) -> int:
        return self.channels[0] * self.time_mult


SD15 = UNetConfig()
SDXL = UNetConfig(
    channels=(320, 640, 1280),
    depth=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    context_dim=(2048, 2048, 2048),
    linear_projection=True,
    added_cond_dim=2816,
)


class AttentionLayer(NamedTuple):
    """Sizes of one transformer block's attention layers."""

    channels: int
    heads: int
    context_dim: int


def _levels_of_layers(cfg: UNetConfig) -> list[int]:
    """Level of each attention layer in execution order: down, mid, up."""
    levels = range(cfg.levels)
    down = [i for i in levels for _ in range(cfg.depth[i] * cfg.resnets)]
    up = [i for i in reversed(levels) for _ in range(cfg.depth[i] * (cfg.resnets + 1))]
    return down + [levels[-1]] * cfg.mid_depth + up


def attention_layers(cfg: UNetConfig) -> list[AttentionLayer]:
    """The attention layers in execution order. SD1.5 has 6 + 1 + 9."""
    return [AttentionLayer(cfg.channels[i], cfg.heads[i], cfg.context_dim[i]) for i in _levels_of_layers(cfg)]


def attention_grids(cfg: UNetConfig, grid: Grid) -> list[Grid]:
    """The grid of each attention layer in execution order, for latents of the size `grid`."""
    h, w = grid
    return [(-(-h // 2**i), -(-w // 2**i)) for i in _levels_of_layers(cfg)]


class Attention(nn.Module):
    """Projections of one attention layer. Self-attention: context_dim == dim."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def keys_values(self, context: Tensor) -> KeysValues:
        """Project context (B, T, context_dim) to k and v, (B, H, T, D) each."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def forward(self, x: Tensor, context: Tensor | KeysValues, core: Callable | None) -> tuple[Tensor, Any]:
        """Attend from x to context and project the result.

        Args:
            x: queries' tokens (B, N, C).
            context: tokens (B, T, context_dim), or the keys and values that `keys_values` makes of them.
            core: core(q, k, v) -> (z, maps) computes attention; None = plain attention without maps.

        Returns: (B, N, C) and the maps.
        """
        q = split_heads(self.to_q(x), self.heads)  # (B, H, N, D)
        k, v = self.keys_values(context) if isinstance(context, Tensor) else context  # (B, H, T, D) each
        z, maps = (attention(q, k, v), None) if core is None else core(q, k, v)  # (B, H, N, D)
        return self.to_out[0](merge_heads(z)), maps  # (B, N, C)


class GEGLU(nn.Module):
    """Gated linear unit with GELU (arXiv 2002.05202)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)  # 2 x (B, N, 4C)
        return value * F.gelu(gate)  # (B, N, 4C)


class FeedForward(nn.Module):
    """The two layers after attention; `net` is numbered as in the public files, where 1 is a dropout."""

    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, dim * mult), nn.Identity(), nn.Linear(dim * mult, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))  # (B, N, C)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; `layer` is its number in execution order."""

    def __init__(self, dim: int, context_dim: int, heads: int, ff_mult: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim, ff_mult)

    def forward(
        self, x: Tensor, text: Text, hook: AttentionHook | None, grid: Grid
    ) -> tuple[Tensor, list[Any]]:
        """x (B, N, C), text as in `UNet.forward` -> (B, N, C) and the maps of the two layers."""
        self_core = None if hook is None else partial(hook.self_attn, self.layer, grid=grid)
        cross_core = None if hook is None else partial(hook.cross_attn, self.layer, grid=grid)
        y = self.norm1(x)
        z, self_maps = self.attn1(y, y, self_core)
        x = x + z
        context = text if isinstance(text, Tensor) else text[self.layer]
        z, cross_maps = self.attn2(self.norm2(x), context, cross_core)
        x = x + z
        x = x + self.ff(self.norm3(x))
        return x, [maps for maps in (self_maps, cross_maps) if maps is not None]


def _on_tokens(projection: nn.Module, x: Tensor) -> Tensor:
    """Apply a Linear layer or a 1x1 convolution, which is the same, to tokens x (B, N, C)."""
    if isinstance(projection, nn.Conv2d):
        return F.linear(x, projection.weight.flatten(1), projection.bias)
    return projection(x)


class Transformer(nn.Module):
    """GroupNorm, projection in, transformer blocks on the grid's tokens, projection out, residual."""

    def __init__(self, cfg: UNetConfig, level: int, depth: int, first_layer: int) -> None:
        super().__init__()
        dim = cfg.channels[level]
        self.norm = nn.GroupNorm(cfg.norm_groups, dim, eps=cfg.transformer_norm_eps)
        projection = nn.Linear if cfg.linear_projection else lambda i, o: nn.Conv2d(i, o, kernel_size=1)
        self.proj_in, self.proj_out = projection(dim, dim), projection(dim, dim)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, cfg.context_dim[level], cfg.heads[level], cfg.ff_mult, first_layer + i)
            for i in range(depth)
        )

    def forward(self, x: Tensor, text: Text, hook: AttentionHook | None) -> tuple[Tensor, list[Any]]:
        h, w = x.shape[-2:]
        y = rearrange(self.norm(x), "b c h w -> b (h w) c")  # (B, N, C); a view of channels_last x
        y = _on_tokens(self.proj_in, y)  # (B, N, C)
        maps: list[Any] = []
        for block in self.transformer_blocks:
            y, new = block(y, text, hook, (h, w))
            maps += new
        y = _on_tokens(self.proj_out, y)  # (B, N, C)
        return x + rearrange(y, "b (h w) c -> b c h w", h=h), maps  # (B, C, h, w)


class Resnet(nn.Module):
    """Residual block of two convolutions; the time embedding enters between them."""

    def __init__(self, cfg: UNetConfig, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.norm_groups, dim_in, eps=cfg.norm_eps)
        self.conv1 = nn.Conv2d(dim_in, dim_out, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(cfg.time_dim, dim_out)
        self.norm2 = nn.GroupNorm(cfg.norm_groups, dim_out, eps=cfg.norm_eps)
        self.conv2 = nn.Conv2d(dim_out, dim_out, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim_in, dim_out, kernel_size=1) if dim_in != dim_out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, C_in, h, w), time (B, time_dim) after its SiLU."""
        y = self.conv1(F.silu(self.norm1(x)))  # (B, C, h, w)
        y = y + self.time_emb_proj(time)[:, :, None, None]  # one number per channel
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C, ceil(h/2), ceil(w/2))


class Upsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor, size: Grid) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # (B, C, *size)


class Level(nn.Module):
    """One resolution on the way down, in the middle or on the way up: residual block i, then attention i."""

    def __init__(
        self, cfg: UNetConfig, level: int, dims_in: list[int], attentions: int, depth: int, first_layer: int
    ) -> None:
        super().__init__()
        dim = cfg.channels[level]
        self.resnets = nn.ModuleList(Resnet(cfg, dim_in, dim) for dim_in in dims_in)
        self.attentions = nn.ModuleList(
            Transformer(cfg, level, depth, first_layer + i * depth) for i in range(attentions if depth else 0)
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        self.checkpointing = cfg.gradient_checkpointing

    def block(
        self, i: int, x: Tensor, time: Tensor, text: Text, hook: AttentionHook | None
    ) -> tuple[Tensor, list[Any]]:
        """x (B, C_in, h, w) -> (B, C, h, w) and the maps of its attention layers."""

        def run(x: Tensor, time: Tensor, text: Text) -> tuple[Tensor, list[Any]]:
            x = self.resnets[i](x, time)  # (B, C, h, w)
            return self.attentions[i](x, text, hook) if i < len(self.attentions) else (x, [])

        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(run, x, time, text, use_reentrant=False)
        return run(x, time, text)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (or SDXL's added conditioning) (B, ·) -> (B, time_dim)."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))  # (B, time_dim)


class UNet(nn.Module):
    """The noise prediction eps(x_t, t, text); `UNetConfig` has the sizes, `AttentionHook` is the seam."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        ch, last = cfg.channels, cfg.levels - 1
        self.conv_in = nn.Conv2d(cfg.in_channels, ch[0], kernel_size=3, padding=1)
        self.time_embedding = TimeEmbedding(ch[0], cfg.time_dim)
        self.add_embedding = TimeEmbedding(cfg.added_cond_dim, cfg.time_dim) if cfg.added_cond_dim else None

        # number of the next attention layer, channels of x, channels of the skips
        layer, dim, skips = 0, ch[0], [ch[0]]
        self.down_blocks = nn.ModuleList()
        for i in range(cfg.levels):
            dims_in = [dim] + [ch[i]] * (cfg.resnets - 1)
            level = Level(cfg, i, dims_in, cfg.resnets, cfg.depth[i], layer)
            layer, dim, skips = layer + cfg.depth[i] * cfg.resnets, ch[i], skips + [ch[i]] * cfg.resnets
            if i < last:
                level.downsamplers.append(Downsample(dim))
                skips.append(dim)
            self.down_blocks.append(level)
        self.mid_block = Level(cfg, last, [dim, dim], 1, cfg.mid_depth, layer)
        layer += cfg.mid_depth
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(cfg.levels)):
            dims_in = [(dim if j == 0 else ch[i]) + skips.pop() for j in range(cfg.resnets + 1)]
            level = Level(cfg, i, dims_in, cfg.resnets + 1, cfg.depth[i], layer)
            layer, dim = layer + cfg.depth[i] * (cfg.resnets + 1), ch[i]
            if i > 0:
                level.upsamplers.append(Upsample(dim))
            self.up_blocks.append(level)

        self.conv_norm_out = nn.GroupNorm(cfg.norm_groups, ch[0], eps=cfg.norm_eps)
        self.conv_out = nn.Conv2d(ch[0], cfg.out_channels, kernel_size=3, padding=1)

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def transformer_blocks(self) -> Iterator[TransformerBlock]:
        """The transformer blocks in execution order: down, mid, up."""
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for transformer in level.attentions:
                yield from transformer.transformer_blocks

    def text_kv(self, text: Tensor) -> list[KeysValues]:
        """Keys and values of text states (B, T, context_dim) in every cross-attention layer.

        They do not depend on the step: compute them once per drawing and pass them to `forward` as `text`.
        """
        return [block.attn2.keys_values(text) for block in self.transformer_blocks()]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        hook: AttentionHook | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Predict the noise of latents.

        Args:
            x: noisy latents (B, in_channels, h, w) of any size.
            t: timesteps (B,), 0..999, int or float.
            text: text states (B, T, context_dim), or what `text_kv` makes of them.
            hook: replaces the core of the attention layers; None = the plain UNet.
            added: SDXL's pooled text and sizes (B, added_cond_dim).

        Returns: eps (B, out_channels, h, w) and the hook's attention maps in execution order.
        """
        # (B, time_dim)
        time = self.time_embedding(sinusoids(t, self.cfg.channels[0], self.cfg.time_period).to(x.dtype))
        if self.add_embedding is not None:
            time = time + self.add_embedding(added)
        time = F.silu(time)  # every residual block begins with it

        maps: list[Any] = []
        x = self.conv_in(x)  # (B, C0, h, w)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x, new = level.block(i, x, time, text, hook)  # (B, C, h, w)
                maps += new
                skips.append(x)
            for downsample in level.downsamplers:
                x = downsample(x)  # (B, C, h/2, w/2)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x, new = self.mid_block.block(i, x, time, text, hook)
            maps += new
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = torch.cat([x, skips.pop()], dim=1)  # (B, C + C_skip, h, w)
                x, new = level.block(i, x, time, text, hook)  # (B, C, h, w)
                maps += new
            for upsample in level.upsamplers:
                x = upsample(x, skips[-1].shape[-2:])  # (B, C, 2h, 2w), or the skip's odd size
        return self.conv_out(F.silu(self.conv_norm_out(x))), maps  # (B, out_channels, h, w)


def sinusoids(t: Tensor, dim: int, period: float) -> Tensor:
    """Sinusoidal features of numbers t (B,), cosines first.

    Args:
        t: timesteps, or SDXL's sizes in pixels.
        dim: of the features, even.
        period: the longest one.

    Returns:
        float32 (B, dim).
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(period) * steps)  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)
