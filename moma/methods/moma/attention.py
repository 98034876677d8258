"""MoMA's two attention blocks: masked subject self-attention (Eq. 3) and decoupled cross-attention.

Each is written twice: `explicit`, the formula with materialised probabilities, and `fused`, which calls
torch's scaled_dot_product_attention, never sees background keys, computes only the queries where M_gen is not
zero, and gets the label's attention map from the same call. They agree (tests/test_moma_attention.py).

Letters: R rows of a UNet call, H heads, N queries, Q queries where M_gen is not 0, M reference keys, T text
tokens, C context tokens, D channels per head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import attention, attention_probs

# Head sizes of fused kernels are multiples of this; the label's column of V is padded to it.
HEAD_ALIGNMENT = 8
# Queries inside M_gen are gathered in multiples of a bucket, which fills a kernel's tile. M_gen moves a
# little with every step, and under CUDA graphs each number of queries is a graph of its own, which takes as
# long as several steps to record: there a bucket is 1 / RECORDED_BUCKETS of the layer. Above QUERY_SHARE all
# queries are computed, because gathering costs more than it saves.
QUERY_BUCKET = 64
RECORDED_BUCKETS = 4
QUERY_SHARE = 0.9


@dataclass(frozen=True)
class ReferenceLayer:
    """One layer's subject features K', V' and M_ref on its grid; key_mask None keeps every key."""

    k: Tensor  # (R, H, M, D)
    v: Tensor  # (R, H, M, D)
    key_mask: Tensor | None  # bool (R, M)

    @property
    def mask(self) -> Tensor | None:
        """M_ref as an attention mask, bool (R, 1, 1, M)."""
        return None if self.key_mask is None else self.key_mask[:, None, None, :]

    def rows(self, some: slice) -> "ReferenceLayer":
        """Some of the R rows."""
        key_mask = None if self.key_mask is None else self.key_mask[some]
        return ReferenceLayer(self.k[some], self.v[some], key_mask)

    def absent(self) -> "ReferenceLayer":
        """One key, for a row whose M_gen is zero."""
        k = torch.zeros_like(self.k[:, :, :1])  # (R, H, 1, D)
        return ReferenceLayer(k, k, k.new_ones(len(k), 1, dtype=torch.bool))

    def padded(self, keys: int) -> "ReferenceLayer":
        """The same attention with more keys, which are outside M_ref.

        Rows without any M_ref give the plain mean of their V', as `drop_background` leaves it.
        """
        more = keys - self.k.shape[2]
        if not more:
            return self
        empty = ~self.key_mask.any(dim=1, keepdim=True)  # (R, 1)
        k, v = (
            F.pad(self.k.masked_fill(empty[..., None, None], 0.0), (0, 0, 0, more)),
            F.pad(self.v, (0, 0, 0, more)),
        )
        return ReferenceLayer(k, v, F.pad(self.key_mask | empty, (0, more)))


@dataclass(frozen=True)
class Gate:
    """M_gen on one layer's grid: how much of the subject and of the context each query gets.

    inside None: every query is computed, with m_gen (R, 1, N, 1) in [0, 1], or 1.0 before there is one. Else
    only the queries where M_gen is not 0 (`gate_inside`), with their m_gen (R, 1, Q, 1).
    """

    m_gen: Tensor | float
    inside: Tensor | None = None  # int64 (R, Q), counted through the queries of all rows: row * N + query

    @property
    def empty(self) -> bool:
        """Whether no query is computed."""
        return self.inside is not None and not self.inside.numel()

    def gather(self, q: Tensor) -> Tensor:
        """The queries inside: q (R, H, N, D) -> (R, H, Q, D)."""
        return q if self.inside is None else _take(q, self.inside)

    def scatter_add(self, z: Tensor, part: Tensor) -> Tensor:
        """z (R, H, N, D) plus the part (R, H, Q, D) of those queries. z may be overwritten."""
        return z + part.to(z.dtype) if self.inside is None else _add(z, self.inside, part)


def subject_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reference: ReferenceLayer,
    gate: Gate,
    lam: Tensor,
    beta: Tensor | float,
    impl: str,
) -> Tensor:
    """Eq. 3: Z = Attn(Q, K, V) + λ · Attn(Q, K', V', M_ref) · M_gen · β. Official: IPAttnProcessor_Self.

    Args:
        q: (R, H, N, D).
        k: (R, H, N, D).
        v: (R, H, N, D).
        reference: K', V' and M_ref.
        gate: M_gen.
        lam: λ (1,), learned per layer.
        beta: β (R, 1, 1, 1) or a number, the strength.
        impl: "fused" or "explicit".

    Returns:
        Z (R, H, N, D).
    """
    return add_subject(attention(q, k, v, impl=impl), q, reference, gate, lam, beta, impl)


def add_subject(
    z: Tensor,
    q: Tensor,
    reference: ReferenceLayer,
    gate: Gate,
    lam: Tensor,
    beta: Tensor | float,
    impl: str,
) -> Tensor:
    """One subject's term of Eq. 3: Z + λ · Attn(Q, K', V', M_ref) · M_gen · β. z may be overwritten.

    Args:
        z: (R, H, N, D).
        q: (R, H, N, D).
        reference: K', V' and M_ref.
        gate: M_gen.
        lam: λ (1,), learned per layer.
        beta: β (R, 1, 1, 1) or a number, the strength.
        impl: "fused" or "explicit".
    """
    if gate.empty:
        return z
    z_ref = attention(gate.gather(q), reference.k, reference.v, reference.mask, impl=impl)  # (R, H, Q, D)
    return gate.scatter_add(z, z_ref * (lam * gate.m_gen * beta))


def gate_inside(m_gen: Tensor, recorded: bool = False) -> Gate:
    """The gate of M_gen (R, 1, N, 1) with only the queries where it is not zero, unless those are nearly all.

    Q is the largest row's count, rounded up to a bucket, a large one if the call is to be recorded; rows with
    fewer are filled up with other queries, whose M_gen is zero. Q = 0 if M_gen is zero everywhere. Q is a
    shape, so this synchronises with the device.
    """
    nonzero = (m_gen != 0).flatten(1)  # (R, N)
    count = gathered_queries(int(nonzero.sum(dim=1).max()), nonzero.shape[1], recorded)
    if count is None:
        return Gate(m_gen)
    starts = torch.arange(0, nonzero.numel(), nonzero.shape[1], device=m_gen.device)  # (R,)
    inside = _true_first(nonzero, count) + starts[:, None]  # (R, Q)
    return Gate(_take(m_gen, inside), inside)


def gathered_queries(inside: int, of: int, recorded: bool = False) -> int | None:
    """How many queries to compute; None = all.

    Args:
        inside: queries inside M_gen, of the row with the most.
        of: queries of the layer.
        recorded: whether the call may become a CUDA graph.
    """
    bucket = max(QUERY_BUCKET, of // RECORDED_BUCKETS) if recorded else QUERY_BUCKET
    count = -(-inside // bucket) * bucket
    return None if count > QUERY_SHARE * of else count


def _true_first(x: Tensor, count: int) -> Tensor:
    """x bool (R, N) -> int64 (R, count): indices where it is True, in order, then those where it is not."""
    return x.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Queries `index` (R, Q) of x (R, H, N, D): (R, H, Q, D). A query's heads lie together in memory."""
    rows = x.transpose(1, 2).flatten(0, 1)  # (R*N, H, D)
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)  # (R, H, Q, D)


def _add(x: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """x (R, H, N, D) with part (R, H, Q, D) added at `index` (R, Q).

    x is overwritten where no backward needs it and its queries' heads lie together, as attention leaves them.
    """
    rows, part = x.transpose(1, 2).flatten(0, 1), part.transpose(1, 2).flatten(0, 1)  # (R*N | R*Q, H, D)
    add = rows.index_add if torch.is_grad_enabled() else rows.index_add_
    full = add(0, index.flatten(), part.to(x.dtype))  # (R*N, H, D)
    return full.unflatten(0, (len(x), -1)).transpose(1, 2)  # (R, H, N, D)


def side_by_side(layers: Sequence[ReferenceLayer]) -> ReferenceLayer:
    """The keys of several images of a subject as those of one."""
    k, v = (torch.cat([getattr(one, name) for one in layers], dim=2) for name in ("k", "v"))
    return ReferenceLayer(k, v, torch.cat([one.key_mask for one in layers], dim=1))


def drop_background(reference: ReferenceLayer) -> ReferenceLayer:
    """The same attention with the keys outside M_ref left out: M shrinks to the largest subject's.

    Rows with fewer keys are padded and masked. A row without any subject gives the plain mean of its V', as
    the release: all its keys stay, as zeros.
    """
    if reference.key_mask is None:
        return reference
    empty = ~reference.key_mask.any(dim=1)  # (R,)
    k = reference.k.masked_fill(empty[:, None, None, None], 0.0)
    v, keep = reference.v, reference.key_mask | empty[:, None]
    order = _true_first(keep, int(keep.sum(dim=1).max()))  # (R, M')
    index = order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])  # (R, H, M', D)
    kept = keep.gather(1, order)  # (R, M')
    return ReferenceLayer(k.gather(2, index), v.gather(2, index), None if kept.all() else kept)


def context_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    gate: Gate,
    label: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Decoupled cross-attention, Z = Attn(Q, K, V) + Attn(Q, K_context, V_context) · M_gen, and the label's
    map.

    Official: IPAttnProcessor.

    Args:
        q: (R, H, N, D).
        k: of the text, (R, H, T, D).
        v: of the text, (R, H, T, D).
        k_context: of the context tokens, (R, H, C, D).
        v_context: of the context tokens, (R, H, C, D).
        gate: M_gen.
        label: (R, T), 1 at the label's tokens.
        impl: "fused" or "explicit".

    Returns:
        Z (R, H, N, D), and the attention that the label's tokens get, averaged over heads, (R, N).
    """
    z, label_map = text_attention(q, k, v, label[:, None], impl)  # (R, H, N, D), (R, 1, N)
    return add_context(z, q, k_context, v_context, gate, impl), label_map[:, 0]


def add_context(z: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Gate, impl: str) -> Tensor:
    """Z + Attn(Q, K, V) · M_gen of one subject's context tokens. z may be overwritten.

    Args:
        z: (R, H, N, D).
        q: (R, H, N, D).
        k: (R, H, C, D).
        v: (R, H, C, D).
        gate: M_gen.
        impl: "fused" or "explicit".
    """
    if gate.empty:
        return z
    z_context = attention(gate.gather(q), k, v, impl=impl)  # (R, H, Q, D)
    return gate.scatter_add(z, z_context * gate.m_gen)


def text_attention(
    q: Tensor, k: Tensor, v: Tensor, label: Tensor, impl: str, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-attention to the text, and the maps of labels.

    Args:
        q: (R, H, N, D).
        k: (R, H, T, D).
        v: (R, H, T, D).
        label: (R, S, T), the weights of each label's tokens; S is at most HEAD_ALIGNMENT.
        impl: "fused" or "explicit".
        mask: bool (R, 1, N, T), the tokens that a query reads; None = all.

    Returns:
        Z (R, H, N, D), and the attention that each label's tokens get, averaged over heads, (R, S, N).
    """
    return (_text_fused if impl == "fused" else _text_explicit)(q, k, v, label, mask)


def _text_explicit(
    q: Tensor, k: Tensor, v: Tensor, label: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    probs = attention_probs(q, k, mask)  # (R, H, N, T)
    maps = [(probs * one[:, None, None, :]).sum(dim=-1).mean(dim=1) for one in label.unbind(1)]  # S x (R, N)
    return probs.to(v.dtype) @ v, torch.stack(maps, dim=1)


def _text_fused(q: Tensor, k: Tensor, v: Tensor, label: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ_label softmax(QKᵀ) is attention's output for one more column of V, 1 at the label's keys."""
    d, s = q.shape[-1], label.shape[1]
    columns = label.to(v.dtype).mT[:, None].expand(-1, v.shape[1], -1, -1)  # (R, H, T, S)
    v = torch.cat([v, columns, _zeros(v, HEAD_ALIGNMENT - s)], dim=-1)  # (R, H, T, D + 8)
    q, k = (torch.cat([x, _zeros(x, HEAD_ALIGNMENT)], dim=-1) for x in (q, k))  # scores stay
    z = attention(q, k, v, mask, scale=d**-0.5)  # (R, H, N, D + 8)
    return z[..., :d], z[..., d : d + s].mean(dim=1).mT  # (R, H, N, D), (R, S, N)


def _zeros(x: Tensor, columns: int) -> Tensor:
    """Zeros (..., columns) to put beside x (..., D): one copy, where F.pad would fill all of it first."""
    return x.new_zeros(1).expand(*x.shape[:-1], columns)
