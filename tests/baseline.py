"""What `moma.bench` compares with: a UNet step of diffusers, and one of the released MoMA on diffusers.

The release's attention processors are restated here: softmax with materialised probabilities, every key and
every query, masks and label maps at the size of the picture.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from models.attention import merge_heads
from models.unet import UNet
from moma.attention import ReferenceLayer
from moma.bench import Step

FACTOR = 8  # pixels per latent: masks are kept at the picture's size
THRESHOLD = 0.2  # of M_gen


def diffusers_unet(unet: UNet) -> UNet2DConditionModel:
    """diffusers' UNet with the weights of ours, not copied."""
    cfg = unet.cfg
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
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def plain(step: Step) -> Callable[[], Tensor]:
    """Stable Diffusion's step, with diffusers' default processors (SDPA)."""
    unet = diffusers_unet(step.unet)
    return lambda: unet(step.x, step.t, step.text).sample


def release(step: Step) -> Callable[[], Tensor]:
    """MoMA's step with the release's processors, and its mask for the next step."""
    unet, size = diffusers_unet(step.unet), tuple(FACTOR * side for side in step.x.shape[-2:])
    m_gen = F.interpolate(step.m_gen, size=size).to(step.x)  # (1, 1, H, W)
    label = int(step.cond.label[0].nonzero()[0, 0])
    state, processors = State(m_gen, label), {}
    names = sorted((n for n in unet.attn_processors), key=execution_order)
    for i, (own, cross) in enumerate(zip(names[::2], names[1::2], strict=True)):
        k, v = (merge_heads(x) for x in step.cond.context[i])  # (R, C, ·) each
        processors[own] = SubjectProcessor(state, step.layers[i], float(step.cond.lam[i]))
        processors[cross] = ContextProcessor(state, k, v)
    unet.set_attn_processor(processors)

    def run() -> Tensor:
        state.maps.clear()
        eps = unet(step.x, step.t, step.text).sample
        mean = torch.stack(state.maps).mean(dim=0)  # (R, 1, H, W)
        mean = (mean - mean.min()) / (mean.max() - mean.min())
        mean.masked_fill(mean <= THRESHOLD, 0)
        return eps

    return run


def execution_order(name: str) -> tuple[int, str]:
    """Of a processor's name: down, mid, up; the numbers in it have one digit."""
    return ("down", "mid", "up").index(name.split("_")[0]), name


@dataclass(eq=False)
class State:
    """What the processors share."""

    m_gen: Tensor  # (1, 1, H, W)
    label: int  # position of the subject's token
    maps: list[Tensor] = field(default_factory=list)  # of this step, each (R, 1, H, W)

    def gate(self, tokens: int) -> Tensor:
        """M_gen on a layer's grid (1, N, 1)."""
        side = int(tokens**0.5)
        return F.interpolate(self.m_gen, size=(side, side)).flatten(2).transpose(1, 2)


@dataclass(eq=False)
class SubjectProcessor:
    """Eq. 3 (IPAttnProcessor_Self)."""

    state: State
    reference: ReferenceLayer  # one row
    scale: float

    def __call__(self, attn: Attention, hidden_states: Tensor, **options: Any) -> Tensor:
        x, rows = hidden_states, len(hidden_states)
        q, k, v = (attn.head_to_batch_dim(to(x)) for to in (attn.to_q, attn.to_k, attn.to_v))
        z = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(q, k), v))  # (R, N, C)
        ref = self.reference
        k, v = (attn.head_to_batch_dim(merge_heads(y).expand(rows, -1, -1)) for y in (ref.k, ref.v))
        outside = torch.finfo(x.dtype).min
        bias = torch.ones_like(ref.keep, dtype=x.dtype).masked_fill(~ref.keep, outside)[:, None]  # (1, 1, N)
        bias = bias.expand(len(q), q.shape[1], -1)  # (R*H, N, N)
        z_ref = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(q, k, bias), v))  # (R, N, C)
        return attn.to_out[0](z + self.scale * self.state.gate(x.shape[1]) * z_ref)


@dataclass(eq=False)
class ContextProcessor:
    """Decoupled cross-attention (IPAttnProcessor)."""

    state: State
    k: Tensor  # (R, C, channels)
    v: Tensor

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
        self.state.maps.append(self.label_map(probs, len(x)))
        k, v = (attn.head_to_batch_dim(y) for y in (self.k, self.v))
        z_context = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(q, k), v))
        return attn.to_out[0](z + self.state.gate(x.shape[1]) * z_context)

    def label_map(self, probs: Tensor, rows: int) -> Tensor:
        """The attention that the label gets, scaled, at the picture's size (R, 1, H, W)."""
        side = int(probs.shape[1] ** 0.5)
        found = probs.unflatten(0, (rows, -1)).mean(dim=1)[..., self.state.label]  # (R, N)
        low, high = found.amin(1, keepdim=True), found.amax(1, keepdim=True)
        found = ((found - low) / (high - low)).reshape(rows, 1, side, side)
        return F.interpolate(found, size=self.state.m_gen.shape[-2:]).clamp(0, 1)
