"""IP-Adapter (arXiv 2308.06721), as its authors sample with it: an image as four more tokens of the prompt.

The image's CLIP embedding becomes context tokens, which a second cross-attention reads beside the text; the
unconditional row gets the tokens of a zero embedding. Self-attention is plain, nothing is masked.

Letters: B images, R rows of a UNet call, H heads, N tokens of a layer, T text tokens, C context tokens,
D channels per head, E embedding.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from models.attention import attention, split_heads
from models.clip import CLIPVision
from models.clip_image import clip_image
from models.unet import UNetConfig, attention_layers
from moma.inputs.preprocess import Reference, on_white
from moma.methods.moma.adapter import AdapterConfig, ContextProjection, Projector
from moma.methods.moma.masks import Grid


@dataclass(frozen=True)
class IPAdapterConfig:
    """How the adapter is used."""

    scale: float = 1.0  # of the second cross-attention: its authors' default; DreamBench++ takes 0.6
    # What its encoder looks at. The authors give it the photo as it is, background included; "white" shows it
    # the subject alone, as MoMA's language model sees it.
    image: Literal["photo", "white"] = "photo"

    def __post_init__(self) -> None:
        if self.image not in ("photo", "white"):
            raise ValueError(f"IP-Adapter's image {self.image!r}: expected photo or white")


class IPAdapter(nn.Module):
    """What an IP-Adapter trains; parameters are named as in `moma.methods.moma.adapter.Adapter`."""

    def __init__(self, cfg: AdapterConfig, unet_cfg: UNetConfig) -> None:
        super().__init__()
        self.layers = attention_layers(unet_cfg)
        self.projector = Projector(cfg, self.layers[0].context_dim)
        self.context = nn.ModuleList(ContextProjection(layer) for layer in self.layers)

    def forward(self, embedding: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Image embeddings (R, E) -> K, V of the context tokens for each layer, each (R, H, C, D)."""
        tokens = self.projector(embedding)  # (R, C, context_dim)
        return [
            (split_heads(new.to_k(tokens), layer.heads), split_heads(new.to_v(tokens), layer.heads))
            for new, layer in zip(self.context, self.layers, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """An image's way into the UNet: the encoder, the adapter made for it, and how both are used."""

    vision: CLIPVision
    adapter: IPAdapter
    cfg: IPAdapterConfig

    @property
    def embed_dim(self) -> int:
        return self.adapter.projector.proj.in_features

    @torch.no_grad()
    def embed(self, image: Image.Image, reference: Reference) -> Tensor:
        """CLIP's embedding (1, E) of the image as it came, or of the subject on white."""
        seen = on_white(image) if self.cfg.image == "photo" else reference.white
        weight = self.adapter.projector.proj.weight
        pixels = clip_image(seen, self.vision.cfg.image_size)[None].to(weight.device, weight.dtype)
        return self.vision(pixels)[1]  # (1, 3, S, S) -> (1, E)

    def guide(self, embedding: Tensor, text: Tensor, negative: Tensor) -> "ImagePrompted":
        """Both rows of guidance. embedding (B, E); text and negative (B, T, context_dim)."""
        context = self.adapter(torch.cat([torch.zeros_like(embedding), embedding]))  # R = 2B
        return ImagePrompted(torch.cat([negative, text]), context, self.cfg.scale)


@dataclass(frozen=True, eq=False)
class ImagePrompted:
    """The guide of a batch (`moma.sampling.sampler.Guide`), and its own attention hook: no step differs from
    another.

    Its calls can be recorded (`moma.sampling.cuda_graphs.RecordableHook`).
    """

    text: Tensor  # (R, T, context_dim)
    context: list[tuple[Tensor, Tensor]]  # of each layer K, V of the context tokens, each (R, H, C, D)
    scale: float

    def conditional(self) -> "ImagePrompted":
        half = slice(len(self.text) // 2, None)
        return replace(self, text=self.text[half], context=[(k[half], v[half]) for k, v in self.context])

    def hook(self, t: int, m_gen: Tensor | None) -> "ImagePrompted":
        return self

    def next_m_gen(self, records: list[Tensor], size: Grid) -> None:
        return None

    def self_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        return attention(q, k, v), None

    def cross_attn(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, None]:
        z_context = attention(q, *self.context[layer])  # (R, H, N, D)
        return attention(q, k, v) + self.scale * z_context, None

    def prepare(self, grids: Sequence[Grid]) -> None:
        pass

    def key(self) -> Hashable:
        return id(self)

    def inputs(self) -> list[Tensor]:
        return []

    def on(self, inputs: Sequence[Tensor]) -> "ImagePrompted":
        return self
