"""Scaled dot-product attention in two forms that agree: readable ("explicit") and fast ("fused").

Letters: B batch, H heads, N queries, M keys, D channels per head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*D) -> (B, H, N, D)."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H*D)."""
    return rearrange(x, "b h n d -> b n (h d)")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    impl: str = "fused",
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v.

    A query whose mask is False everywhere attends to all keys alike (the mean of v), as masked scores are the
    lowest finite number rather than -inf. In float16 the fused form only comes near that mean.

    Args:
        q, k, v: (B, H, N, D), (B, H, M, D), (B, H, M, E), any float dtype.
        mask: bool, broadcastable to (B, H, N, M); True = attend.
        bias: float, broadcastable to (B, H, N, M).
        causal: query n sees keys 0..n (N == M).
        impl: "fused" calls torch's SDPA, "explicit" materialises the probabilities in float32.
        scale: None = 1/√D.

    Returns: (B, H, N, E) in q's dtype.
    """
    if impl == "explicit":
        return attention_probs(q, k, mask, bias=bias, causal=causal, scale=scale).to(v.dtype) @ v
    if impl != "fused":
        raise ValueError(f"attention impl {impl!r}: expected 'fused' or 'explicit'")
    if mask is None and bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    mask = _with_causal(mask, q, k) if causal else mask
    if mask is not None:
        # A boolean SDPA mask turns fully masked rows into zeros or NaN; the additive form does not.
        start = torch.zeros_like(mask, dtype=q.dtype) if bias is None else bias.to(q.dtype)
        bias = start.masked_fill(~mask, torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)


def attention_probs(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale + bias) in float32.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        mask: bool, broadcastable to (B, H, N, M), True = attend.
        bias: float, broadcastable likewise.
        causal: query n sees keys 0..n (N == M).
        scale: default 1/√D.

    Returns:
        (B, H, N, M).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q.float() @ k.float().transpose(-1, -2) * scale  # (B, H, N, M)
    if bias is not None:
        scores = scores + bias.float()
    mask = _with_causal(mask, q, k) if causal else mask
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def _with_causal(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """Restrict a mask so that query n sees keys 0..n."""
    causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()  # (N, M)
    return causal if mask is None else mask & causal
