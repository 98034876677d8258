"""LLaMA (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no biases.

Parameter names are those of transformers' LlamaForCausalLM without the prefix `model.`.

Letters: B batch, T tokens, C width, V vocabulary, H heads, G key-value heads, D channels per head,
M cached keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import attention, merge_heads, split_heads

Rope = tuple[Tensor, Tensor]  # cos, sin, each (B or 1, 1, T, D) float32
KeyValue = tuple[Tensor, Tensor]  # keys (rotated), values, each (B, G, M, D)


@dataclass(frozen=True)
class QuantConfig:
    """How files store the matrices of the blocks; models/weights/quant.py has the layers that read them."""

    bits: Literal[8, 4]
    group: int | None = None  # inputs that share a scale; None = all of them

    MIN_GROUP: ClassVar[int] = 16  # in smaller groups scales would cost more than a bit per weight

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"weights of {self.bits!r} bits: expected 8 or 4")
        if self.group is not None and self.group < self.MIN_GROUP:
            raise ValueError(f"groups of {self.group} weights: expected at least {self.MIN_GROUP}")


@dataclass(frozen=True)
class LlamaConfig:
    """The defaults are Vicuna-7B's, the language model of LLaVA-1.5-7B."""

    vocab: int = 32000  # V
    width: int = 4096  # C
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None  # G; fewer than heads = grouped-query attention; None = as many
    mlp: int = 11008  # hidden width of the SwiGLU
    eps: float = 1e-5  # RMSNorm
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    positions: int = 4096  # longest sequence in training
    eos: int = 2  # token that ends a generated text
    lm_head: bool = True  # only `generate` needs it
    gradient_checkpointing: bool = False  # recompute each block in the backward pass to save memory
    # How files store the blocks' matrices, None = as plain weights. The loader swaps the layers, not `Llama`.
    # Rounding the rest (embedding, norms, lm_head, LLaVA's projector and tower) would save little.
    quant: QuantConfig | None = None

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"LLaMA width {self.width}: expected a multiple of 2 * heads ({2 * self.heads})")
        if self.heads % self.groups:
            raise ValueError(f"LLaMA kv_heads {self.kv_heads}: expected a divisor of heads ({self.heads})")

    @property
    def groups(self) -> int:
        """G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        """D."""
        return self.width // self.heads


def rope_at(positions: Tensor, cfg: LlamaConfig) -> Rope:
    """Cosines and sines of the rotary angles at `positions` (B or 1, T) int64."""
    exponent = torch.arange(0, cfg.head_dim, 2, device=positions.device).float() / cfg.head_dim  # (D/2,)
    angles = positions[..., None].float() * (1 / cfg.rope_theta**exponent)  # (B, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (B, 1, T, D)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate channel pairs (d, d + D/2) of x (B, H, T, D), as transformers' files pair them."""
    cos, sin = (a.to(x.dtype) for a in rope)
    a, b = x.chunk(2, dim=-1)  # (B, H, T, D/2)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis; the mean square is float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        scaled = full * torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class _SelfAttention(nn.Module):
    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.groups = cfg.heads, cfg.groups
        self.q_proj = nn.Linear(cfg.width, cfg.width, bias=False)
        self.k_proj = nn.Linear(cfg.width, cfg.groups * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.width, cfg.groups * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.width, cfg.width, bias=False)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        q = _rotate(split_heads(self.q_proj(x), self.heads), rope)  # (B, T, C) -> (B, H, T, D)
        k = _rotate(split_heads(self.k_proj(x), self.groups), rope)  # (B, G, T, D)
        v = split_heads(self.v_proj(x), self.groups)  # (B, G, T, D)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, G, M+T, D)
        share = self.heads // self.groups
        wide = (k, v) if share == 1 else [a.repeat_interleave(share, dim=1) for a in (k, v)]  # (B, H, M+T, D)
        out = attention(q, *wide, mask, causal=mask is None)  # (B, H, T, D)
        return self.o_proj(merge_heads(out)), (k, v)  # (B, T, C)


class GatedMLP(nn.Module):
    """Two layers with a gate between them, (..., width) -> (..., out)."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (..., out)


class LlamaBlock(nn.Module):
    """One pre-norm transformer block, (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.self_attn = _SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = GatedMLP(cfg.width, cfg.mlp, cfg.width)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C); mask: bool, broadcastable to (B, H, T, T); None = causal."""
        return self.step(x, rope, mask)[0]

    def step(
        self, x: Tensor, rope: Rope, mask: Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """As `forward`, and also attend to cached keys and values.

        Args:
            x: (B, T, C).
            rope: angles of the T positions.
            mask: bool, broadcastable to (B, H, T, M+T); None = causal, without `past` only.
            past: M cached keys and values.

        Returns: (B, T, C), and keys and values including past's.
        """
        out, cache = self.self_attn(self.input_layernorm(x), rope, mask, past)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nn.Module):
    """The language model over input embeddings, into which LLaVA splices images."""

    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.width)
        self.layers = nn.ModuleList(LlamaBlock(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.width, cfg.eps)
        if cfg.lm_head:
            self.lm_head = nn.Linear(cfg.width, cfg.vocab, bias=False)

    def forward(self, embeds: Tensor, layers: int | None = None) -> Tensor:
        """Hidden states after the final RMSNorm, (B, T, C).

        embeds: (B, T, C), right-padded. Attention is causal, so that valid positions never see the padding,
        whose own states have no meaning.
        layers: number of blocks to run; None = all. ValueError if it or T is out of range.
        """
        rope, count = self.rope(embeds), self.depth(layers)
        x = embeds
        for block in self.layers[:count]:
            if self.cfg.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.norm(x)  # (B, T, C)

    def each(self, embeds: Sequence[Tensor], layers: int | None = None) -> list[Tensor]:
        """`forward` of each on its own, so that the others do not change even the rounding."""
        return [self(x, layers) for x in embeds]

    def depth(self, layers: int | None) -> int:
        """Number of blocks to run, see `forward`."""
        count = self.cfg.layers if layers is None else layers
        if not 1 <= count <= self.cfg.layers:
            raise ValueError(f"LLaMA layers {layers}: expected 1..{self.cfg.layers}")
        return count

    def rope(self, embeds: Tensor) -> Rope:
        """Rotary angles of positions 0..T-1 for embeds (B, T, C); ValueError if T exceeds cfg.positions."""
        self._check_length(embeds.shape[1])
        return rope_at(torch.arange(embeds.shape[1], device=embeds.device)[None], self.cfg)  # (1, 1, T, D)

    def generate(self, embeds: Tensor, lengths: Tensor, max_new: int) -> list[list[int]]:
        """Continue each row with its likeliest tokens, independently of the other rows.

        Args:
            embeds: prompts (B, T, C), right-padded.
            lengths: valid positions of each row, (B,) int64.
            max_new: largest number of tokens to add.

        Returns: B lists of ids, without the end token.
        """
        if not self.cfg.lm_head:
            raise ValueError("LLaMA without lm_head cannot generate: set lm_head=True and load its weight")
        rows, total = embeds.shape[:2]
        self._check_length(total + max_new)
        device = embeds.device
        # Keys in the cache: 0..T-1 the prompt (a shorter row ends in padding, masked), then the new tokens.
        mask = torch.arange(total, device=device) < lengths[:, None]  # (B, T)
        rope, x, step_mask = self.rope(embeds), embeds, None
        caches: list[KeyValue | None] = [None] * self.cfg.layers
        position = lengths  # (B,) of the next token
        last = lengths - 1  # (B,) where x holds the newest token
        texts: list[list[int]] = [[] for _ in range(rows)]
        done = [False] * rows
        for _ in range(max_new):
            for i, block in enumerate(self.layers):
                x, caches[i] = block.step(x, rope, step_mask, caches[i])
            newest = x[torch.arange(rows, device=device), last]  # (B, C)
            ids = self.lm_head(self.norm(newest)).float().argmax(dim=-1)  # (B,)
            for row, token in enumerate(ids.tolist()):
                done[row] = done[row] or token == self.cfg.eos
                if not done[row]:
                    texts[row].append(token)
            if all(done):
                break
            x = self.embed_tokens(ids)[:, None]  # (B, 1, C)
            rope = rope_at(position[:, None], self.cfg)  # (B, 1, 1, D)
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)  # (B, M+1)
            step_mask = mask[:, None, None]  # (B, 1, 1, M+1)
            position, last = position + 1, torch.zeros_like(last)
        return texts

    def _check_length(self, length: int) -> None:
        if length > self.cfg.positions:
            raise ValueError(f"LLaMA sequence of {length} tokens: expected at most {self.cfg.positions}")
