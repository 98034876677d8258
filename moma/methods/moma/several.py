"""MoMA for several subjects in one image: Eq. 3 summed, and which subject a cell of the image belongs to.

    Z = Attn(Q, K, V) + Σ_s λ · Attn(Q, K'_s, V'_s, M_ref,s) · M_gen,s · β_s

Each M_gen,s is the foreground, where any subject's words get attention, cut down to the cells of s; the
context tokens of s act there too. Words alone hardly say which of two subjects a cell shows, so that by
default the subjects' keys compete for it: the owner is the one whose K'_s the cell's queries match best
(`MethodConfig.ownership`).

Letters: B images, R rows of a UNet call (B unconditional, then B conditional, or the latter alone),
S subjects of the image with most (others lack the last ones), L attention layers in execution order, H heads,
N queries, Q queries that are asked, M reference keys, C context tokens, T text tokens, D channels per head.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import attention
from models.unet import Grid, KeysValues
from moma.methods.moma.adapter import Adapter
from moma.methods.moma.attention import (
    HEAD_ALIGNMENT,
    Gate,
    ReferenceLayer,
    add_context,
    add_subject,
    drop_background,
    gate_inside,
    text_attention,
)
from moma.methods.moma.conditioning import both_rows
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.masks import m_gen_of_layer, next_m_gen
from moma.methods.text import TextConditioning, half
from moma.sampling.diffusion import SolverStep
from moma.sampling.interface import Region, State, StepInputs

# What a score loses between two subjects' cells, beyond what any score reaches and within float16.
APART = 1e4


class Shown(NamedTuple):
    """One subject in one image."""

    embedding: Tensor  # (1, E), of the feature decoder
    layers: Sequence[ReferenceLayer]  # L x K', V', M_ref, one row each
    strength: float  # β


@dataclass(frozen=True, eq=False)
class SubjectRows:
    """Subject s of every image, R rows; where an image has no such subject, its M_gen is zero."""

    context: list[KeysValues]  # L x K, V of the context tokens, each (R, H, C, D)
    reference: list[ReferenceLayer]  # L x K', V', M_ref
    beta: Tensor  # (R, 1, 1, 1), the strength

    def conditional(self) -> Self:
        return replace(
            self,
            context=[(half(k), half(v)) for k, v in self.context],
            reference=[layer.rows(slice(len(layer.k) // 2, None)) for layer in self.reference],
            beta=half(self.beta),
        )


@dataclass(frozen=True, eq=False)
class SeveralConditioning(TextConditioning):
    """What the UNet is told about B images of any number of subjects; every M_gen is the state."""

    label: Tensor  # (R, S, T), weights of each subject's tokens, 1 together
    subjects: list[SubjectRows]  # S
    lam: list[Tensor]  # L x λ (1,)
    allowed: Tensor  # bool (B, S, h, w): where each subject may be, nowhere if it is absent
    reads: Tensor | None  # float (R, P, h, w), 1 where a cell reads text p of P; None = there is one text
    competing: frozenset[int]  # self-attention layers in which the subjects' keys compete
    method: MethodConfig

    @property
    def start(self) -> Tensor:
        """M_gen of the first step, float32 (B, S, h, w): 1 where one subject alone may be."""
        return (self.allowed & (self.allowed.sum(dim=1, keepdim=True) == 1)).float()

    def at(self, step: SolverStep, state: State) -> StepInputs:
        return StepInputs(self.text, self.added, self.hook(step.t, state.get("m_gen")))

    def hook(self, t: int, m_gen: Tensor | None) -> "SeveralHook":
        """The attention of the UNet call at timestep t; m_gen (B, S, h, w) of the step before, or None."""
        given = self.start if m_gen is None else m_gen
        foreground = torch.ones_like(given) if m_gen is None else given
        present = self.allowed.any(dim=(2, 3), keepdim=True)  # (B, S, 1, 1)
        if self.method.m_gen_share < 1:  # the ablation of Table 3
            given = (1 - self.method.m_gen_share * (1 - given)) * present
        masks = {"subject": torch.cat([given] * self.rows_per_image)}  # (R, S, h, w)
        if not self.method.context_masked:  # everywhere, where the context is that of one subject
            alone = present & (present.sum(dim=1, keepdim=True) == 1)  # (B, S, 1, 1)
            masks["context"] = torch.cat([given.masked_fill(alone, 1.0)] * self.rows_per_image)
        if self.competing:
            masks["foreground"] = foreground.amax(dim=1, keepdim=True)  # (B, 1, h, w)
        masks = {name: mask.to(self.lam[0].dtype) for name, mask in masks.items()}
        return SeveralHook(self, t < self.method.subject_below_t, masks)

    def next_state(self, maps: list[Tensor], grid: Grid) -> State:
        """Every M_gen for the next step, float32 (B, S, *grid)."""
        rest, words, scores = iter(maps), [], []
        for layer in range(len(self.lam)):
            if layer in self.competing:
                scores.append(next(rest))  # (B, S, h_l, w_l)
            words.append(next(rest))  # (R, S, h_l, w_l)
        present = self.allowed.any(dim=(2, 3), keepdim=True)  # (B, S, 1, 1)
        seen = torch.cat([present] * self.rows_per_image)  # (R, S, 1, 1)
        words = [torch.where(seen, one, one[:, :1]) for one in words]  # absent ones change no range
        found = next_m_gen(words, grid, self.method, self.rows_per_image).masked_fill(~present, 0.0)
        score = blurred(mean_score(scores, grid), self.method.ownership_blur) if scores else found
        return {"m_gen": owned(found, score, self.allowed)}

    def conditional(self) -> Self:
        return replace(
            super().conditional(),
            label=half(self.label),
            subjects=[one.conditional() for one in self.subjects],
            reads=None if self.reads is None else half(self.reads),
        )


def subject_rows(
    adapter: Adapter, shown: Sequence[Sequence[Shown]], method: MethodConfig
) -> list[SubjectRows]:
    """Rows of both halves of guidance; as in `condition_rows`, the unconditional ones have no context.

    Args:
        adapter: MoMA's.
        shown: the subjects of each of B images; at least one in all.
        method: MoMA's config.
    """
    like = next(one for row in shown for one in row)
    absent = Shown(torch.zeros_like(like.embedding), [layer.absent() for layer in like.layers], 0.0)
    found = []
    for column in zip_longest(*shown, fillvalue=absent):
        embedding = torch.cat([one.embedding for one in column])  # (B, E)
        reference = both_rows([one.layers for one in column])
        beta = torch.tensor([one.strength for one in column]).to(embedding)  # (B,)
        beta = torch.cat([method.unconditional_beta * beta, beta])  # (R,)
        found.append(
            SubjectRows(
                adapter.context_keys_values(torch.cat([torch.zeros_like(embedding), embedding])),
                [drop_background(x) for x in reference] if method.attention == "fused" else reference,
                beta[:, None, None, None],  # (R, 1, 1, 1)
            )
        )
    return found


def label_weights(labels: Sequence[Sequence[Sequence[int]]], subjects: int, tokens: int) -> Tensor:
    """The weights of each subject's tokens, which sum to 1, so that a longer name does not count more.

    Args:
        labels: of each image and subject, the positions of its tokens.
        subjects: S.
        tokens: T.

    Returns:
        float32 (B, S, T).
    """
    found = torch.zeros(len(labels), subjects, tokens)
    for rows, image in zip(found, labels, strict=True):
        for row, positions in zip(rows, image, strict=False):
            row[list(positions)] = 1 / max(len(positions), 1)
    return found


def allowed_of(regions: Sequence[Sequence[Region | None]], grid: Grid) -> Tensor:
    """Where each subject may be, bool (B, S, *grid).

    Args:
        regions: of each image's subjects, None = everywhere.
        grid: (h, w) of the latents; a region has at least one cell of it.
    """
    h, w = grid
    allowed = torch.zeros(len(regions), max(map(len, regions)), h, w, dtype=torch.bool)
    for i, row in enumerate(regions):
        for s, region in enumerate(row):
            left, top, right, bottom = region or (0.0, 0.0, 1.0, 1.0)
            x, y = min(round(left * w), w - 1), min(round(top * h), h - 1)
            allowed[i, s, y : max(round(bottom * h), y + 1), x : max(round(right * w), x + 1)] = True
    return allowed


def reads_of(regions: Sequence[Sequence[Region | None]], grid: Grid) -> Tensor:
    """Which of its texts a cell reads: those of the subjects in whose regions it lies, else the first,
    which is the whole prompt; in the unconditional rows the first alone.

    Args:
        regions: of each image's subjects, None = none.
        grid: (h, w) of the latents.

    Returns:
        float (R, 1 + S, *grid).
    """
    inside = allowed_of(regions, grid)  # (B, S, h, w)
    for one, row in zip(inside, regions, strict=True):
        one[[i for i, region in enumerate(row) if region is None]] = False
    own = torch.cat([torch.zeros_like(inside), inside])  # (R, S, h, w)
    return torch.cat([~own.any(dim=1, keepdim=True), own], dim=1).float()


def competing_layers(grids: Sequence[Grid], subjects: int, method: MethodConfig) -> frozenset[int]:
    """The self-attention layers in which the keys of several subjects compete.

    Args:
        grids: of each layer.
        subjects: S.
        method: MoMA's config.
    """
    if method.ownership != "reference" or subjects < 2:
        return frozenset()
    if method.ownership_layers is not None:
        return frozenset(method.ownership_layers)
    return frozenset(i for i, grid in enumerate(grids) if grid == max(grids))


def owned(m_gen: Tensor, scores: Tensor, allowed: Tensor) -> Tensor:
    """The foreground, each cell for its owner alone.

    Args:
        m_gen: where the words of each subject get attention, (B, S, h, w).
        scores: the subject with the largest owns a cell, (B, S, h, w).
        allowed: bool (B, S, h, w), who may own it.

    Returns:
        (B, S, h, w); of S values at most one is not 0.
    """
    foreground = m_gen.amax(dim=1, keepdim=True)  # (B, 1, h, w)
    owner = scores.masked_fill(~allowed, -torch.inf).argmax(dim=1)  # (B, h, w)
    mine = F.one_hot(owner, scores.shape[1]).movedim(-1, 1).bool() & allowed  # (B, S, h, w)
    return torch.where(mine, foreground, 0.0)


def key_scores(q: Tensor, references: Sequence[ReferenceLayer], foreground: Gate) -> Tensor:
    """How well queries match each subject's keys: log of the sum over M_ref,s of exp(Q K'_s / √D), mean over
    heads, less its mean over the foreground (and with it the number of keys), in its standard deviations.

    Args:
        q: (B, H, N, D).
        references: S layers of B rows.
        foreground: the queries that are asked; its m_gen is not 0 there.

    Returns:
        float32 (B, S, N), 0 outside.
    """
    asked, inside = foreground.gather(q), (foreground.m_gen != 0)[..., 0]  # (B, H, Q, D), (B, 1, Q)
    each = torch.stack([_log_sum_exp(asked, one) for one in references], dim=1)  # (B, S, Q)
    count = inside.sum(dim=-1, keepdim=True).clamp(min=1)  # (B, 1, 1)
    each = (each - (each * inside).sum(dim=-1, keepdim=True) / count) * inside
    deviation = (each.square().sum(dim=-1, keepdim=True) / count).sqrt()  # (B, S, 1)
    each = each / deviation.clamp(min=torch.finfo(each.dtype).eps)
    nothing = each.new_zeros(len(q), 1, q.shape[2], len(references))  # (B, 1, N, S)
    return foreground.scatter_add(nothing, each.mT[:, None])[:, 0].mT  # (B, S, N)


def _log_sum_exp(q: Tensor, reference: ReferenceLayer) -> Tensor:
    """log Σ exp(Q K' / √D) over M_ref, mean over heads, 0 without any key: q (B, H, Q, D) -> (B, Q)."""
    scores = q.float() @ reference.k.float().mT * q.shape[-1] ** -0.5  # (B, H, Q, M)
    if reference.mask is None:
        return scores.logsumexp(dim=-1).mean(dim=1)
    some = reference.mask.any(dim=-1)[:, 0]  # (B, 1)
    scores = scores.masked_fill(~reference.mask, torch.finfo(scores.dtype).min)
    return scores.logsumexp(dim=-1).mean(dim=1).masked_fill(~some, 0.0)  # (B, Q)


def mean_score(scores: Sequence[Tensor], size: Grid) -> Tensor:
    """The mean over layers of (B, S, h_l, w_l) -> (B, S, *size)."""
    return torch.stack([F.interpolate(one, size=size, mode="nearest") for one in scores]).mean(dim=0)


def blurred(scores: Tensor, side: int) -> Tensor:
    """Each cell's mean over a square of `side` cells, an odd number, around it; (B, S, h, w)."""
    return F.avg_pool2d(scores, side, stride=1, padding=side // 2, count_include_pad=False)


def attention_apart(q: Tensor, k: Tensor, v: Tensor, owners: Tensor, impl: str) -> Tensor:
    """Self-attention in which no cell of a subject attends to a cell of another.

    Args:
        q: (R, H, N, D).
        k: (R, H, N, D).
        v: (R, H, N, D).
        owners: (R, N, S), 1 at the owner of a cell, 0 everywhere in the background.
        impl: "explicit" masks those scores; "fused" lowers them by `APART` through more channels of Q and K.
    """
    own, some = owners, owners.amax(dim=-1, keepdim=True)  # (R, N, S), (R, N, 1)
    if impl == "explicit":
        foreign = own @ (some - own).mT > 0  # (R, N, N)
        return attention(q, k, v, ~foreign[:, None], impl=impl)
    shape, d = (-1, q.shape[1], -1, -1), q.shape[-1]
    pad = (0, -own.shape[-1] % HEAD_ALIGNMENT)
    more = (F.pad(x.to(q.dtype), pad)[:, None].expand(shape) for x in (-APART * own, some - own))
    q, k = (torch.cat(pair, dim=-1) for pair in zip((q, k), more, strict=True))  # (R, H, N, D + 8)
    return attention(q, k, v, scale=d**-0.5)  # (R, H, N, D)


@dataclass(frozen=True, eq=False)
class SeveralHook:
    """Eq. 3 summed in every self-attention, decoupled cross-attention that also returns the labels' maps.

    Where the subjects' keys compete, self-attention returns their scores.

    Its calls can be recorded (`moma.sampling.cuda_graphs.RecordableHook`), as `MoMAHook`'s.
    """

    cond: SeveralConditioning
    subject_on: bool  # whether the subject terms act at this timestep
    # "subject": M_gen (R, S, h, w); "context", if it is another, likewise; "foreground" (B, 1, h, w), if any
    # layer's keys compete: the queries that are asked.
    masks: dict[str, Tensor]
    gates: dict[Grid, dict[str, list[Gate]]] = field(default_factory=dict)  # of the masks on grids so far

    def self_attn(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid
    ) -> tuple[Tensor, Tensor | None]:
        cond, impl = self.cond, self.cond.method.attention
        gates = self._gates(grid)
        if cond.method.subjects_apart:
            owners = (m_gen_of_layer(self.masks["subject"], grid)[..., 0] != 0).mT.to(q.dtype)  # (R, N, S)
            z = attention_apart(q, k, v, owners, impl)  # (R, H, N, D)
        else:
            z = attention(q, k, v, impl=impl)  # (R, H, N, D)
        if self.subject_on:
            for one, gate in zip(cond.subjects, gates["subject"], strict=True):
                z = add_subject(z, q, one.reference[layer], gate, cond.lam[layer], one.beta, impl)
        if layer not in cond.competing:
            return z, None
        rows = slice(len(q) - len(cond.allowed), None)  # the conditional ones
        references = [one.reference[layer].rows(rows) for one in cond.subjects]
        return z, key_scores(q[rows], references, gates["foreground"][0]).unflatten(-1, grid)  # (B, S, h, w)

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        cond, impl = self.cond, self.cond.method.attention
        z, maps = text_attention(q, k, v, cond.label, impl, self._read(grid, k.shape[2]))
        gates = self._gates(grid)
        for one, gate in zip(cond.subjects, gates.get("context", gates["subject"]), strict=True):
            z = add_context(z, q, *one.context[layer], gate, impl)
        return z, maps.unflatten(-1, grid)  # (R, H, N, D), (R, S, h, w)

    def _read(self, grid: Grid, tokens: int) -> Tensor | None:
        """Which tokens each query reads, bool (R, 1, N, T)."""
        if self.cond.reads is None:
            return None
        texts = m_gen_of_layer(self.cond.reads, grid)[..., 0].mT > 0  # (R, N, P)
        return texts.repeat_interleave(tokens // texts.shape[-1], dim=-1)[:, None]  # (R, 1, N, T)

    def prepare(self, grids: Sequence[Grid]) -> None:
        for grid in grids:
            self._gates(grid, recorded=True)

    def key(self) -> Hashable:
        picked = tuple(gate.inside is not None for gate in self._all_gates())
        return id(self.cond), self.subject_on, tuple(self.gates), picked

    def inputs(self) -> list[Tensor]:
        tensors = (tensor for gate in self._all_gates() for tensor in (gate.m_gen, gate.inside))
        return [self.masks["subject"], *(tensor for tensor in tensors if tensor is not None)]

    def with_inputs(self, inputs: Sequence[Tensor]) -> "SeveralHook":
        m_gen, *others = inputs
        rest = iter(others)
        gates = {
            grid: {
                name: [Gate(next(rest), None if gate.inside is None else next(rest)) for gate in row]
                for name, row in named.items()
            }
            for grid, named in self.gates.items()
        }
        return replace(self, masks=self.masks | {"subject": m_gen}, gates=gates)

    def _all_gates(self) -> list[Gate]:
        return [gate for named in self.gates.values() for row in named.values() for gate in row]

    def _gates(self, grid: Grid, recorded: bool = False) -> dict[str, list[Gate]]:
        """The masks on a grid, one gate per subject, made once per call; recorded: it may be recorded."""
        if grid not in self.gates:
            fused = self.cond.method.attention == "fused"
            self.gates[grid] = {
                name: [
                    gate_inside(one, recorded) if fused else Gate(one)  # one (R | B, 1, N, 1)
                    for one in m_gen_of_layer(mask, grid).split(1, dim=1)
                ]
                for name, mask in self.masks.items()
            }
        return self.gates[grid]
