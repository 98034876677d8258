"""Everything that MoMA trains, as one module outside the UNet.

Letters: B images, E embedding, L attention layers in execution order (down, mid, up), C context tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention import split_heads
from models.llama import GatedMLP
from models.unet import AttentionLayer, KeysValues, UNet, UNetConfig, attention_layers
from moma.methods.moma.config import MethodConfig


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of the adapter beyond those of the UNet. Defaults: the released MoMA."""

    mllm_dim: int = 4096  # hidden width of the MLLM (LLaVA-7B)
    embed_dim: int = 1024  # width of the CLIP image embedding that the decoder predicts (Eq. 4)
    tokens: int = 4  # context tokens made of one embedding, as in IP-Adapter
    learnable_token: bool = False  # a new input embedding ends the instruction (paper); False: the word `*`


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
    """All parameters of MoMA; `moma.methods.moma.conditioning` computes with them."""

    def __init__(self, cfg: AdapterConfig, unet_cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layers = attention_layers(unet_cfg)
        # MLLM hidden state (B, mllm_dim) -> image embedding (B, E); official: LlamaMLP_mapping
        self.mapping = GatedMLP(cfg.mllm_dim, cfg.embed_dim, cfg.embed_dim)
        self.projector = Projector(cfg, self.layers[0].context_dim)
        self.context = nn.ModuleList(ContextProjection(layer) for layer in self.layers)
        self.subject = nn.ModuleList(SubjectProjection(layer) for layer in self.layers)
        self.token = nn.Parameter(torch.zeros(cfg.mllm_dim)) if cfg.learnable_token else None

    @torch.no_grad()
    def init_from_base(
        self, unet: UNet, method: MethodConfig, ip_adapter: dict[str, Tensor] | None = None
    ) -> None:
        """The start of stage 2 (Sec. 3.4): λ, K', V' and the context K, V as `method` says.

        Args:
            unet: of the base.
            method: its `context_init`, `subject_init` and `lambda_init`.
            ip_adapter: tensors of the network "ip_adapter" (projector, context K, V), for "ip_adapter"; of
                one for other embeddings the context K, V alone.

        Raises:
            ValueError: if those are missing or of another shape.
        """
        own: dict[str, nn.Parameter] = {}  # what an IP-Adapter provides
        if method.context_init == "ip_adapter":
            projector = any(name.startswith("projector.") for name in ip_adapter or {})
            parts = ("context.", "projector.")[: 1 + projector]
            own = {name: p for name, p in self.named_parameters() if name.startswith(parts)}
            given = {name: tuple(t.shape) for name, t in (ip_adapter or {}).items()}
            if given != {name: tuple(p.shape) for name, p in own.items()}:
                raise ValueError(
                    f"context_init 'ip_adapter' needs an IP-Adapter of {len(own)} fitting tensors, got "
                    f"{len(given)}: convert one for this base model, or use context_init 'base'"
                )
        for block in unet.transformer_blocks():
            context, subject = self.context[block.layer], self.subject[block.layer]
            context.to_k.weight.copy_(block.attn2.to_k.weight)
            context.to_v.weight.copy_(block.attn2.to_v.weight)
            init = nn.init.eye_ if method.subject_init == "identity" else nn.init.zeros_
            init(subject.to_k.weight)
            init(subject.to_v.weight)
            subject.scale.fill_(method.lambda_init)
        for name, parameter in own.items():
            parameter.copy_(ip_adapter[name])

    def context_keys_values(self, embedding: Tensor) -> list[KeysValues]:
        """K, V of the context tokens of R embeddings (R, E) for each layer, each (R, H, C, D)."""
        return context_keys_values(self.projector(embedding), self.context, self.layers)


def context_keys_values(
    tokens: Tensor, context: Sequence[ContextProjection], layers: Sequence[AttentionLayer]
) -> list[KeysValues]:
    """K, V of context tokens.

    Args:
        tokens: (R, C, context_dim).
        context: the projections of each layer.
        layers: their sizes.

    Returns:
        For each layer K and V, each (R, H, C, D).
    """
    return [
        (split_heads(new.to_k(tokens), layer.heads), split_heads(new.to_v(tokens), layer.heads))
        for new, layer in zip(context, layers, strict=True)
    ]
