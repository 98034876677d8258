"""How MoMA acts on the UNet: the hook of the reference pass, and the conditioning and hook of each step.

Letters: B images, R rows of a UNet call (B unconditional, then B conditional, or the latter alone), E
embedding, L attention layers in execution order (down, mid, up), H heads, N tokens of a layer, M reference
keys, C context tokens, T text tokens, D channels per head.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from models.attention import attention, merge_heads, split_heads
from models.unet import Grid, KeysValues, UNet, attention_grids
from moma.methods.moma.adapter import Adapter
from moma.methods.moma.attention import (
    Gate,
    ReferenceLayer,
    context_cross_attention,
    drop_background,
    gate_inside,
    subject_self_attention,
)
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.masks import m_gen_of_layer, m_ref_of_layer, next_m_gen
from moma.methods.text import TextConditioning, half
from moma.sampling.diffusion import SolverStep
from moma.sampling.interface import State, StepInputs, TextInput

# --- the reference pass --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceHook:
    """The reference pass (Sec. 3.3): plain attention that also returns each layer's K', V' and M_ref.

    Official: the "extract" mode of IPAttnProcessor_Self.
    """

    adapter: Adapter
    key_masks: Mapping[Grid, Tensor]  # M_ref on each grid, bool (B, M)
    impl: str

    def self_attn(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid
    ) -> tuple[Tensor, ReferenceLayer]:
        new, heads = self.adapter.subject[layer], q.shape[1]
        k_ref = split_heads(new.to_k(merge_heads(k)), heads)  # (B, H, M, D)
        v_ref = split_heads(new.to_v(merge_heads(v)), heads)  # (B, H, M, D)
        return attention(q, k, v, impl=self.impl), ReferenceLayer(k_ref, v_ref, self.key_masks[grid])

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        return attention(q, k, v, impl=self.impl), None


def reference_features(
    unet: UNet,
    adapter: Adapter,
    latent: Tensor,
    label: Tensor,
    m_ref: Tensor,
    method: MethodConfig,
    added: Tensor | None = None,
) -> list[ReferenceLayer]:
    """K', V' and M_ref of every self-attention layer: one UNet call at t = 0 with the label as text.

    A frozen UNet leaves no graph: gradients reach K', V' and nothing else.

    Args:
        unet: of the base.
        adapter: MoMA's.
        latent: of the reference, (B, Z, h, w).
        label: text states of the label alone, (B, T, context_dim), of which the last
            `method.reference_text_cut` tokens are left out.
        m_ref: (B, 1, H, W) in {0, 1}, of any size.
        method: MoMA's config.
        added: conditioning of the label, (B, A), where the UNet has one.

    Returns:
        L layers of B rows.
    """
    label = label[:, : label.shape[1] - method.reference_text_cut]  # (B, T - cut, context_dim)
    t = torch.zeros(len(latent), device=latent.device, dtype=torch.long)  # (B,)
    grids = dict.fromkeys(attention_grids(unet.cfg, (latent.shape[-2], latent.shape[-1])))
    key_masks = {grid: m_ref_of_layer(m_ref, grid, method.keep_one_key) for grid in grids}
    return unet(latent, t, label, ReferenceHook(adapter, key_masks, method.attention), added)[1]


# --- denoising -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MoMAConditioning(TextConditioning):
    """What the UNet is told about B images, constant over the steps; M_gen is the state."""

    label: Tensor  # (R, T), 1 at the label's tokens (of the conditional prompt, in both rows: as the release)
    context: list[KeysValues]  # L x K, V of the context tokens, each (R, H, C, D)
    reference: list[ReferenceLayer]  # L x K', V', M_ref, R rows
    lam: list[Tensor]  # L x λ (1,)
    beta: Tensor  # (R, 1, 1, 1), the strength
    method: MethodConfig

    def at(self, step: SolverStep, state: State) -> StepInputs:
        return StepInputs(self.text, self.added, self.hook(step.t, state.get("m_gen")))

    def hook(self, t: int, m_gen: Tensor | None) -> "MoMAHook":
        """The attention of the UNet call at timestep t; m_gen (B, 1, h, w) of the step before, or None."""
        if m_gen is not None:
            if self.method.m_gen_share < 1:  # the ablation of Table 3
                m_gen = 1 - self.method.m_gen_share * (1 - m_gen)
            m_gen = torch.cat([m_gen] * self.rows_per_image).to(self.beta.dtype)  # (R, 1, h, w)
        return MoMAHook(self, t < self.method.subject_below_t, m_gen)

    def next_state(self, maps: list[Tensor], grid: Grid) -> State:
        """The mask for the next step, float32 (B, 1, *grid)."""
        return {"m_gen": next_m_gen(maps, grid, self.method, self.rows_per_image)}

    def conditional(self) -> Self:
        return replace(
            super().conditional(),
            label=half(self.label),
            context=[(half(k), half(v)) for k, v in self.context],
            reference=[layer.rows(slice(len(layer.k) // 2, None)) for layer in self.reference],
            beta=half(self.beta),
        )


@dataclass(frozen=True, eq=False)
class MoMAHook:
    """Eq. 3 in every self-attention, decoupled cross-attention that also returns the label's map.

    Its calls can be recorded (`moma.sampling.cuda_graphs.RecordableHook`): the gates are all that changes
    between steps of one kind.
    """

    cond: MoMAConditioning
    subject_on: bool  # whether the subject term of Eq. 3 acts at this timestep
    m_gen: Tensor | None  # (R, 1, h, w)
    gates: dict[Grid, Gate] = field(default_factory=dict)  # M_gen on the grids of this call so far

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        cond, impl = self.cond, self.cond.method.attention
        if not self.subject_on:
            return attention(q, k, v, impl=impl), None
        reference, lam = cond.reference[layer], cond.lam[layer]
        return subject_self_attention(q, k, v, reference, self._gate(grid), lam, cond.beta, impl), None

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        cond = self.cond
        gate = self._gate(grid) if cond.method.context_masked else Gate(1.0)
        z, label_map = context_cross_attention(
            q, k, v, *cond.context[layer], gate, cond.label, cond.method.attention
        )
        return z, label_map.unflatten(-1, (1, *grid))  # (R, H, N, D), (R, 1, h, w)

    def prepare(self, grids: Sequence[Grid]) -> None:
        for grid in grids if self.subject_on or self.cond.method.context_masked else ():
            self._gate(grid, recorded=True)

    def key(self) -> Hashable:
        picked = tuple((grid, gate.inside is not None) for grid, gate in self.gates.items())
        return id(self.cond), self.subject_on, picked

    def inputs(self) -> list[Tensor]:
        tensors = (tensor for gate in self.gates.values() for tensor in (gate.m_gen, gate.inside))
        return [tensor for tensor in tensors if tensor is not None]

    def with_inputs(self, inputs: Sequence[Tensor]) -> "MoMAHook":
        rest = iter(inputs)
        gates = {
            grid: Gate(next(rest), None if gate.inside is None else next(rest))
            for grid, gate in self.gates.items()
        }
        return replace(self, gates=gates)

    def _gate(self, grid: Grid, recorded: bool = False) -> Gate:
        """M_gen on a grid, made once per call; recorded: whether the call may be recorded."""
        if self.m_gen is None:
            return Gate(1.0)
        if grid not in self.gates:
            m_gen, fused = m_gen_of_layer(self.m_gen, grid), self.cond.method.attention == "fused"
            self.gates[grid] = gate_inside(m_gen, recorded) if fused else Gate(m_gen)  # m_gen (R, 1, N, 1)
        return self.gates[grid]


def condition_rows(
    adapter: Adapter,
    embedding: Tensor,
    text: TextInput,
    added: Tensor | None,
    label: Tensor,
    reference: Sequence[ReferenceLayer],
    beta: Tensor,
    method: MethodConfig,
) -> MoMAConditioning:
    """The conditioning of R rows: of both rows of guidance, or of a training batch.

    Args:
        adapter: MoMA's.
        embedding: (R, E), of the feature decoder.
        text: K, V of the prompts' states, or the states (R, T, context_dim).
        added: (R, A) of SDXL, or None.
        label: (R, T), 1 at the label's tokens.
        reference: L layers of R rows.
        beta: β of Eq. 3, (R,), in the UNet's dtype.
        method: MoMA's config.
    """
    if method.attention == "fused":
        reference = [drop_background(layer) for layer in reference]
    return MoMAConditioning(
        text=text,
        added=added,
        label=label,
        context=adapter.context_keys_values(embedding),
        reference=list(reference),
        lam=[new.scale for new in adapter.subject],
        beta=beta[:, None, None, None],  # (R, 1, 1, 1)
        method=method,
    )


def both_rows(references: Sequence[Sequence[ReferenceLayer]]) -> list[ReferenceLayer]:
    """References of B subjects, one row each -> L layers of R = 2B rows, the unconditional half first.

    M is the largest subject's: several images of one have more keys than one.
    """
    layers = []
    for rows in zip(*references, strict=True):
        rows = [r.padded(max(r.k.shape[2] for r in rows)) for r in rows]
        k, v, key_mask = (torch.cat([getattr(r, name) for r in rows] * 2) for name in ("k", "v", "key_mask"))
        layers.append(ReferenceLayer(k, v, key_mask))  # (R, H, M, D) twice, (R, M)
    return layers
