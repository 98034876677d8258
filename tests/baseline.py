"""The baselines of `moma.bench`: diffusers' UNet, and the released MoMA on it in sampling and training.

The release's attention processors are restated here: softmax with materialised probabilities, all keys and
queries, masks and label maps at the size of the image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from models.attention import merge_heads, split_heads
from models.unet import UNetConfig
from moma.bench.step import Step
from moma.bench.training import PseudoTraining, Training
from moma.methods.moma.attention import ReferenceLayer
from moma.methods.moma.conditioning import MoMAHook, ReferenceHook
from moma.methods.moma.config import DEFAULT
from moma.training.denoising import Denoising

FACTOR = 8  # pixels per latent; masks have the image's size
EXPLICIT = replace(DEFAULT, attention="explicit")  # drops no key


def diffusers_unet(cfg: UNetConfig, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """diffusers' UNet that shares the weights of ours."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.depth]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.depth)]
    with torch.device("meta"):
        other = UNet2DConditionModel(
            block_out_channels=cfg.channels,
            down_block_types=down,
            up_block_types=up,
            layers_per_block=cfg.resnets,
            attention_head_dim=cfg.heads[0],
            cross_attention_dim=cfg.context_dim[0],
            norm_num_groups=cfg.norm_groups,
        )
    other.load_state_dict(dict(weights), assign=True)
    return other.eval().requires_grad_(False)


def plain(step: Step) -> Callable[[], Tensor]:
    """Stable Diffusion's step, with diffusers' default processors (SDPA)."""
    unet = diffusers_unet(step.networks.unet.cfg, step.networks.weights)
    return lambda: unet(step.x, step.t, step.states).sample


def release(step: Step) -> Callable[[], Tensor]:
    """MoMA's step with the release's processors, including its mask for the next step."""
    cfg = step.networks.unet.cfg
    unet = Released(diffusers_unet(cfg, step.networks.weights), cfg)
    cond = replace(step.cond, reference=step.layers, method=EXPLICIT)
    size = tuple(FACTOR * side for side in step.x.shape[-2:])
    m_gen = F.interpolate(cond.m_gen, size=size).to(step.x)  # (B, 1, H, W)
    maps = unet.install(MoMAHook(cond, True, torch.cat([m_gen, m_gen])))  # the same in all steps

    def run() -> Tensor:
        maps.clear()
        eps = unet.unet(step.x, step.t, step.states).sample
        mean = torch.stack(maps).mean(dim=0)  # (R, 1, H, W)
        mean = (mean - mean.min()) / (mean.max() - mean.min())
        mean.masked_fill(mean <= DEFAULT.m_gen_threshold, 0)
        return eps

    return run


def training(ours: Training) -> Training:
    """The same training step, with shared parameters, through diffusers and the release's processors."""
    model, base = ours.model, ours.model.trainable.base
    unet = Released(diffusers_unet(base.unet.cfg, base.unet.state_dict()), base.unet.cfg)
    other = PseudoTraining(replace(base, unet=unet), model.trainable.adapter, EXPLICIT)
    return replace(ours, model=Denoising(other, model.options).to(ours.batch["mean"].device))


class Released(nn.Module):
    """diffusers' UNet with the interface of ours; hooks become the release's processors."""

    def __init__(self, unet: UNet2DConditionModel, cfg: UNetConfig) -> None:
        super().__init__()
        self.unet, self.cfg = unet, cfg
        names = sorted(unet.attn_processors, key=execution_order)
        self.layers = list(zip(names[::2], names[1::2], strict=True))  # self- and cross-attention

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, hook: ReferenceHook | MoMAHook, added: None = None
    ) -> tuple[Tensor, Sequence[Any]]:
        records = self.install(hook)
        return self.unet(x, t, text).sample, records

    def install(self, hook: ReferenceHook | MoMAHook) -> list[Any]:
        """Install the processors that do what the hook does; returns the list that they fill."""
        records: list[Any] = []
        drawing = isinstance(hook, MoMAHook) and hook.cond.label.any()
        label = int(hook.cond.label[0].argmax()) if drawing else None
        processors: dict[str, Any] = {}
        for i, (own, cross) in enumerate(self.layers):
            if isinstance(hook, ReferenceHook):
                processors[own] = ReferenceProcessor(hook, i, records)
                processors[cross] = PlainProcessor()
            else:
                cond = hook.cond
                k, v = (merge_heads(y) for y in cond.context[i])  # (R, C, ·) each
                processors[own] = SubjectProcessor(hook.m_gen, cond.reference[i], cond.lam[i])
                processors[cross] = ContextProcessor(hook.m_gen, label, k, v, records)
        self.unet.set_attn_processor(processors)
        return records


def execution_order(name: str) -> tuple[int, str]:
    """Sort key of a processor's name: down, mid, up; its numbers have one digit."""
    return ("down", "mid", "up").index(name.split("_")[0]), name


def gate(m_gen: Tensor, tokens: int) -> Tensor:
    """M_gen (R, 1, H, W) on a layer's grid (R, N, 1)."""
    side = int(tokens**0.5)
    return F.interpolate(m_gen, size=(side, side)).flatten(2).transpose(1, 2)


@dataclass(eq=False)
class PlainProcessor:
    """Attention with materialised probabilities."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        x = hidden_states
        text = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(x), attn.to_k(text), attn.to_v(text)  # (R, N or T, channels)
        return attn.to_out[0](self.attend(attn, attn.head_to_batch_dim(q), k, v))

    def attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q (R*H, N, D), k and v (R, N or T, channels) -> (R, N, channels)."""
        k, v = (attn.head_to_batch_dim(y) for y in (k, v))  # (R*H, N or T, D)
        return attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(q, k, bias), v))  # (R, N, C)


@dataclass(eq=False)
class ReferenceProcessor(PlainProcessor):
    """Records K', V' and M_ref (IPAttnProcessor_Self, mode "extract")."""

    hook: ReferenceHook
    layer: int
    records: list[ReferenceLayer]

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        x, side = hidden_states, int(hidden_states.shape[1] ** 0.5)
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        new = self.hook.adapter.subject[self.layer]
        k_ref, v_ref = (split_heads(y, attn.heads) for y in (new.to_k(k), new.to_v(v)))
        self.records.append(ReferenceLayer(k_ref, v_ref, self.hook.key_masks[side, side]))
        return attn.to_out[0](self.attend(attn, attn.head_to_batch_dim(q), k, v))


@dataclass(eq=False)
class SubjectProcessor(PlainProcessor):
    """Eq. 3 (IPAttnProcessor_Self)."""

    m_gen: Tensor  # (R, 1, H, W)
    reference: ReferenceLayer  # one row, or R
    lam: Tensor

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        x, rows, ref = hidden_states, len(hidden_states), self.reference
        q, k, v = attn.head_to_batch_dim(attn.to_q(x)), attn.to_k(x), attn.to_v(x)
        z = self.attend(attn, q, k, v)  # (R, N, C)
        k, v = (merge_heads(y).expand(rows, -1, -1) for y in (ref.k, ref.v))
        outside = torch.finfo(q.dtype).min
        bias = torch.ones_like(ref.key_mask, dtype=q.dtype).masked_fill(~ref.key_mask, outside)  # (1 or R, N)
        bias = bias.expand(rows, -1).repeat_interleave(attn.heads, dim=0)[:, None]  # (R*H, 1, N)
        z_ref = self.attend(attn, q, k, v, bias.expand(-1, x.shape[1], -1))  # (R, N, C)
        return attn.to_out[0](z + self.lam * gate(self.m_gen, x.shape[1]) * z_ref)


@dataclass(eq=False)
class ContextProcessor(PlainProcessor):
    """Decoupled cross-attention (IPAttnProcessor)."""

    m_gen: Tensor  # (R, 1, H, W)
    label: int | None  # position of the subject's token; None records no map
    k: Tensor  # (R, C, channels)
    v: Tensor
    records: list[Tensor]  # maps (R, 1, H, W)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(y) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text))
        )  # (R*H, N or T, D)
        probs = attn.get_attention_scores(q, k)  # (R*H, N, T)
        z = attn.batch_to_head_dim(torch.bmm(probs, v))  # (R, N, C)
        if self.label is not None:
            self.records.append(self.label_map(probs, len(x)))
        z_context = self.attend(attn, q, self.k, self.v)
        return attn.to_out[0](z + gate(self.m_gen, x.shape[1]) * z_context)

    def label_map(self, probs: Tensor, rows: int) -> Tensor:
        """The label's attention map, scaled, at the image's size (R, 1, H, W)."""
        side = int(probs.shape[1] ** 0.5)
        found = probs.unflatten(0, (rows, -1)).mean(dim=1)[..., self.label]  # (R, N)
        low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
        found = ((found - low) / (high - low)).reshape(rows, 1, side, side)
        return F.interpolate(found, size=self.m_gen.shape[-2:]).clamp(0, 1)
