"""Everything that MoMA trains, as one module outside the UNet, and the two hooks by which it acts.

Letters: B images, R = 2B rows of a UNet call (B unconditional, then B conditional), E embedding, L attention
layers in execution order (down, mid, up), H heads, N tokens of a layer, M reference keys, C context tokens,
T text tokens, D channels per head.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention, merge_heads, split_heads
from models.unet import AttentionLayer, TransformerBlock, UNet, UNetConfig, attention_layers
from moma.methods.moma.attention import (
    Gate,
    ReferenceLayer,
    context_cross_attention,
    drop_background,
    gate_inside,
    subject_self_attention,
)
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.masks import Grid, m_gen_of_layer, m_ref_of_layer, next_m_gen


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of the adapter beyond those of the UNet. Defaults: the released MoMA."""

    mllm_dim: int = 4096  # hidden width of the MLLM (LLaVA-7B)
    embed_dim: int = 1024  # width of the CLIP image embedding that the decoder predicts (Eq. 4)
    tokens: int = 4  # context tokens made of one embedding, as in IP-Adapter
    learnable_token: bool = False  # a new input embedding ends the instruction (paper); False: the word `*`


class Mapping(nn.Module):
    """MLLM hidden state (B, mllm_dim) -> image embedding (B, E). Official: LlamaMLP_mapping."""

    def __init__(self, cfg: AdapterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.mllm_dim, cfg.embed_dim, bias=False)
        self.up_proj = nn.Linear(cfg.mllm_dim, cfg.embed_dim, bias=False)
        self.down_proj = nn.Linear(cfg.embed_dim, cfg.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, E)


class Projector(nn.Module):
    """Image embedding (B, E) -> context tokens (B, C, context_dim). Official: ImageProjModel."""

    def __init__(self, cfg: AdapterConfig, context_dim: int) -> None:
        super().__init__()
        self.tokens = cfg.tokens
        self.proj = nn.Linear(cfg.embed_dim, cfg.tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))  # (B, C, context_dim)


class ContextProjection(nn.Module):
    """One layer's K, V of the context tokens, beside the UNet's of the text."""

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        self.to_k = nn.Linear(layer.context_dim, layer.channels, bias=False)
        self.to_v = nn.Linear(layer.context_dim, layer.channels, bias=False)


class SubjectProjection(nn.Module):
    """One layer's K', V' on top of the UNet's frozen K, V, and its λ of Eq. 3."""

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        self.to_k = nn.Linear(layer.channels, layer.channels, bias=False)
        self.to_v = nn.Linear(layer.channels, layer.channels, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))


class Adapter(nn.Module):
    """All parameters of MoMA. It computes nothing by itself: `condition` and the hooks below do."""

    def __init__(self, cfg: AdapterConfig, unet_cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layers = attention_layers(unet_cfg)
        self.mapping = Mapping(cfg)
        self.projector = Projector(cfg, self.layers[0].context_dim)
        self.context = nn.ModuleList(ContextProjection(layer) for layer in self.layers)
        self.subject = nn.ModuleList(SubjectProjection(layer) for layer in self.layers)
        self.token = nn.Parameter(torch.zeros(cfg.mllm_dim)) if cfg.learnable_token else None

    @torch.no_grad()
    def init_from_base(
        self, unet: UNet, method: MethodConfig, ip_adapter: dict[str, Tensor] | None = None
    ) -> None:
        """The start of stage 2 (Sec. 3.4): λ, K', V' and the context K, V as `method` says.

        ip_adapter: the tensors of the bundle's network "ip_adapter" (projector and context K, V), needed for
        `method.context_init` "ip_adapter"; ValueError if they are missing or of another shape.
        """
        own: dict[str, nn.Parameter] = {}  # what an IP-Adapter brings along
        if method.context_init == "ip_adapter":
            own = {
                name: p for name, p in self.named_parameters() if name.startswith(("projector.", "context."))
            }
            given = {name: tuple(t.shape) for name, t in (ip_adapter or {}).items()}
            if given != {name: tuple(p.shape) for name, p in own.items()}:
                raise ValueError(
                    f"context_init 'ip_adapter' needs an IP-Adapter of {len(own)} fitting tensors, got "
                    f"{len(given)}: convert one for this base model, or use context_init 'base'"
                )
        for block in (m for m in unet.modules() if isinstance(m, TransformerBlock)):
            context, subject = self.context[block.layer], self.subject[block.layer]
            context.to_k.weight.copy_(block.attn2.to_k.weight)
            context.to_v.weight.copy_(block.attn2.to_v.weight)
            init = nn.init.eye_ if method.subject_init == "identity" else nn.init.zeros_
            init(subject.to_k.weight)
            init(subject.to_v.weight)
            subject.scale.fill_(method.lambda_init)
        for name, parameter in own.items():
            parameter.copy_(ip_adapter[name])


@dataclass(frozen=True)
class ReferenceHook:
    """The reference pass (Sec. 3.3): plain attention, and each self-attention layer's K', V', M_ref recorded.

    The text given to the UNet is the label's states without their last `method.reference_text_cut` tokens.
    Official: the "extract" mode of IPAttnProcessor_Self.
    """

    adapter: Adapter
    m_ref: Tensor  # (B, 1, H, W) in {0, 1}
    method: MethodConfig

    def self_attn(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid
    ) -> tuple[Tensor, ReferenceLayer]:
        new, heads = self.adapter.subject[layer], q.shape[1]
        k_ref = split_heads(new.to_k(merge_heads(k)), heads)  # (B, H, M, D)
        v_ref = split_heads(new.to_v(merge_heads(v)), heads)  # (B, H, M, D)
        keep = m_ref_of_layer(self.m_ref, grid, self.method.keep_one_key)  # (B, M)
        return attention(q, k, v, impl=self.method.attention), ReferenceLayer(k_ref, v_ref, keep)

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        return attention(q, k, v, impl=self.method.attention), None


def reference_features(
    unet: UNet, adapter: Adapter, latent: Tensor, label: Tensor, m_ref: Tensor, method: MethodConfig
) -> list[ReferenceLayer]:
    """K', V' and M_ref of every self-attention layer: one UNet call at t = 0 with the label as text.

    latent (B, Z, h, w) of the reference; label (B, T, context_dim), the text states of the label alone;
    m_ref (B, 1, any, any) in {0, 1}. A frozen UNet leaves no graph: gradients reach K', V' and nothing else.
    """
    label = label[:, : label.shape[1] - method.reference_text_cut]  # (B, T - cut, context_dim)
    t = torch.zeros(len(latent), device=latent.device, dtype=torch.long)  # (B,)
    return unet(latent, t, label, ReferenceHook(adapter, m_ref, method))[1]


@dataclass(frozen=True)
class Conditioning:
    """All that the UNet is told about B images. It does not change over the denoising steps."""

    text: Tensor  # (R, T, context_dim) text states
    label: Tensor  # (R, T), 1 at the label's tokens (of the conditional prompt, in both rows: as the release)
    context: list[tuple[Tensor, Tensor]]  # L x K, V of the context tokens, each (R, H, C, D)
    reference: list[ReferenceLayer]  # L x K', V', M_ref, R rows
    lam: list[Tensor]  # L x (1,)
    beta: Tensor  # (R, 1, 1, 1), the strength
    method: MethodConfig
    rows_per_image: int = 2  # both of guidance, or 1, the conditional one

    def conditional(self) -> "Conditioning":
        """The conditional half of both rows of guidance, R = B: where guidance is left out."""
        half = slice(len(self.text) // 2, None)
        return replace(
            self,
            text=self.text[half],
            label=self.label[half],
            context=[(k[half], v[half]) for k, v in self.context],
            reference=[layer.rows(half) for layer in self.reference],
            beta=self.beta[half],
            rows_per_image=1,
        )

    def hook(self, t: int, m_gen: Tensor | None) -> "MoMAHook":
        """The attention of the UNet call at timestep t; m_gen (B, 1, h, w) of the step before, or None."""
        if m_gen is not None:
            m_gen = torch.cat([m_gen] * self.rows_per_image).to(self.text.dtype)  # (R, 1, h, w)
        return MoMAHook(self, t < self.method.subject_below_t, m_gen)

    def next_m_gen(self, records: list[Tensor], size: Grid) -> Tensor:
        """The mask for the next step out of this call's records, float32 (B, 1, *size)."""
        return next_m_gen(records, size, self.method, self.rows_per_image)


@dataclass(frozen=True)
class MoMAHook:
    """Eq. 3 in every self-attention, decoupled cross-attention with the label's map recorded.

    m_gen (R, 1, h, w) or None; subject_on: whether the subject term of Eq. 3 acts at this timestep; gates:
    M_gen of the grids met so far in this call. Calls can be recorded
    (`moma.sampling.cuda_graphs.RecordableHook`): the gates are all that changes between steps of one kind.
    """

    cond: Conditioning
    subject_on: bool
    m_gen: Tensor | None
    gates: dict[Grid, Gate] = field(default_factory=dict)

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        cond, impl = self.cond, self.cond.method.attention
        if not self.subject_on:
            return attention(q, k, v, impl=impl), None
        reference, lam = cond.reference[layer], cond.lam[layer]
        return subject_self_attention(q, k, v, reference, self._gate(grid), lam, cond.beta, impl), None

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        cond = self.cond
        gate = self._gate(grid) if cond.method.context_masked else Gate(1.0)
        k_context, v_context = cond.context[layer]
        z, label_map = context_cross_attention(
            q, k, v, k_context, v_context, gate, cond.label, cond.method.attention
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

    def on(self, inputs: Sequence[Tensor]) -> "MoMAHook":
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


def condition(
    adapter: Adapter,
    embedding: Tensor,
    text: Tensor,
    negative: Tensor,
    label: Tensor,
    references: Sequence[list[ReferenceLayer]],
    beta: Tensor,
    method: MethodConfig,
) -> Conditioning:
    """The conditioning of B images with both rows of classifier-free guidance.

    embedding (B, E) from the decoder; text and negative (B, T, context_dim) states of the prompts; label
    (B, T); references: one list of L layers with one row per image; beta (B,). The unconditional rows get the
    context tokens of a zero embedding, and the subject's features like the conditional ones (release).
    """
    return condition_rows(
        adapter,
        torch.cat([torch.zeros_like(embedding), embedding]),
        torch.cat([negative, text]),
        torch.cat([label, label]),
        [_both_rows(rows) for rows in zip(*references, strict=True)],
        torch.cat([beta, beta]),
        method,
    )


def condition_rows(
    adapter: Adapter,
    embedding: Tensor,
    text: Tensor,
    label: Tensor,
    reference: Sequence[ReferenceLayer],
    beta: Tensor,
    method: MethodConfig,
) -> Conditioning:
    """The conditioning of R rows, each its own: of both rows of guidance, or of a training batch.

    embedding (R, E); text (R, T, context_dim); label (R, T); reference: L layers of R rows; beta (R,).
    """
    tokens = adapter.projector(embedding)  # (R, C, context_dim)
    context = [  # L x K, V, each (R, H, C, D)
        (split_heads(new.to_k(tokens), layer.heads), split_heads(new.to_v(tokens), layer.heads))
        for new, layer in zip(adapter.context, adapter.layers, strict=True)
    ]
    if method.attention == "fused":
        reference = [drop_background(layer) for layer in reference]
    return Conditioning(
        text=text,
        label=label,
        context=context,
        reference=list(reference),
        lam=[new.scale for new in adapter.subject],
        beta=beta[:, None, None, None].to(text.dtype),  # (R, 1, 1, 1)
        method=method,
    )


def _both_rows(rows: Sequence[ReferenceLayer]) -> ReferenceLayer:
    """B references of one row -> one of R rows: B for the unconditional, B for the conditional half."""
    k, v, keep = (torch.cat([getattr(r, name) for r in rows] * 2) for name in ("k", "v", "keep"))
    return ReferenceLayer(k, v, keep)  # (R, H, M, D) twice, (R, M)
