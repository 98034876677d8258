"""CLIP's text and vision transformers (Radford et al., arXiv 2103.00020), OpenAI's and OpenCLIP's weights.

Parameter names are those of transformers' CLIPTextModel and CLIPVisionModel, without the prefixes
`text_model.` and `vision_model.`.

Letters: B batch, T text tokens, N image patches, C width, P projection width, S image side in pixels,
H heads, D channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attention, merge_heads, split_heads
from models.tokenizers import END

# OpenAI's weights were trained with the approximation x·σ(1.702x), OpenCLIP's with the true GELU.
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}

Change = Callable[[Tensor], Tensor]  # token embeddings (B, T, C) -> others in their place


@dataclass(frozen=True)
class _BlockConfig:
    """Sizes of either transformer; the defaults are those of ViT-L/14's text encoder."""

    width: int = 768  # C
    layers: int = 12
    heads: int = 12
    mlp: int = 3072  # width of the hidden layer of each MLP
    act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: float = 1e-5  # LayerNorm
    projection: int | None = None  # P of the joint text-image space; None = without projection

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"CLIP width {self.width}: expected a multiple of heads ({self.heads})")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"CLIP activation {self.act!r}: expected one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class CLIPTextConfig(_BlockConfig):
    """Text encoder; the defaults are Stable Diffusion 1.5's, ViT-L/14 without projection."""

    vocab: int = 49408
    positions: int = 77  # longest text, BOS and EOS included
    end_id: int | None = None  # pool at its first occurrence; None = at the largest id (OpenAI's own rule)
    pad: str = END  # the token that fills short texts; "!" in SDXL's second encoder


@dataclass(frozen=True)
class CLIPVisionConfig(_BlockConfig):
    """Image encoder; the defaults are ViT-L/14 at 336 pixels without projection, as LLaVA uses it."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    image_size: int = 336  # S, pixels
    patch: int = 14  # pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch:
            raise ValueError(
                f"CLIP image_size {self.image_size}: expected a multiple of patch ({self.patch})"
            )

    @property
    def patches(self) -> int:
        """N."""
        return (self.image_size // self.patch) ** 2


TEXT_PRESETS = {
    "sd15": CLIPTextConfig(),
    "l14": CLIPTextConfig(projection=768),
    "b32": CLIPTextConfig(width=512, heads=8, mlp=2048, projection=512),
    # OpenCLIP ViT-bigG/14 laion2B-39B-b160k, SDXL's second text encoder
    "bigg": CLIPTextConfig(width=1280, layers=32, heads=20, mlp=5120, act="gelu", projection=1280, pad="!"),
}
VISION_PRESETS = {
    "l14": CLIPVisionConfig(image_size=224, projection=768),
    "l14_336": CLIPVisionConfig(projection=768),
    "b32": CLIPVisionConfig(
        width=768, layers=12, heads=12, mlp=3072, image_size=224, patch=32, projection=512
    ),
    # OpenCLIP ViT-H/14 laion2B-s32B-b79K, the image encoder of IP-Adapter
    "h14": CLIPVisionConfig(
        width=1280, layers=32, heads=16, mlp=5120, act="gelu", image_size=224, projection=1024
    ),
}


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers, projected to one width; the defaults are ViT-B/32's."""

    text: CLIPTextConfig = TEXT_PRESETS["b32"]
    vision: CLIPVisionConfig = VISION_PRESETS["b32"]

    def __post_init__(self) -> None:
        if self.text.projection is None or self.text.projection != self.vision.projection:
            raise ValueError(
                f"CLIP projects texts to {self.text.projection} and images to {self.vision.projection}: "
                "expected one width"
            )


PRESETS = {name: CLIPConfig(TEXT_PRESETS[name], VISION_PRESETS[name]) for name in ("b32", "l14")}


class _SelfAttention(nn.Module):
    def __init__(self, cfg: _BlockConfig) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.k_proj = nn.Linear(cfg.width, cfg.width)
        self.v_proj = nn.Linear(cfg.width, cfg.width)
        self.out_proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q = split_heads(self.q_proj(x), self.heads)  # (B, T, C) -> (B, H, T, D)
        k = split_heads(self.k_proj(x), self.heads)  # (B, H, T, D)
        v = split_heads(self.v_proj(x), self.heads)  # (B, H, T, D)
        return self.out_proj(merge_heads(attention(q, k, v, causal=causal)))  # (B, T, C)


class MLP(nn.Module):
    """Two layers with a nonlinearity between them."""

    def __init__(self, width: int, hidden: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # (B, T, C)


class CLIPBlock(nn.Module):
    """One pre-norm transformer block, (B, T, C) -> (B, T, C); text is causal, images are not."""

    def __init__(self, cfg: _BlockConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.width, cfg.eps)
        self.self_attn = _SelfAttention(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.width, cfg.eps)
        self.mlp = MLP(cfg.width, cfg.mlp, ACTIVATIONS[cfg.act])

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nn.Module):
    def __init__(self, cfg: _BlockConfig, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.layers = nn.ModuleList(CLIPBlock(cfg) for _ in range(cfg.layers))

    def forward(self, x: Tensor, layers: int) -> Tensor:
        for block in self.layers[:layers]:
            x = block(x, self.causal)
        return x


class _TextEmbeddings(nn.Module):
    def __init__(self, cfg: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab, cfg.width)
        self.position_embedding = nn.Embedding(cfg.positions, cfg.width)

    def forward(self, ids: Tensor, change: Change | None = None) -> Tensor:
        positions = self.position_embedding.weight[: ids.shape[1]]  # (T, C)
        words = self.token_embedding(ids)  # (B, T) -> (B, T, C)
        return (words if change is None else change(words)) + positions  # (B, T, C)


class _VisionEmbeddings(nn.Module):
    def __init__(self, cfg: CLIPVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(cfg.width) * cfg.width**-0.5)
        self.patch_embedding = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch, bias=False)
        self.position_embedding = nn.Embedding(cfg.patches + 1, cfg.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, N, C)
        cls = self.class_embedding.expand(pixels.shape[0], 1, -1)  # (B, 1, C)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight  # (B, 1+N, C)


class CLIPText(nn.Module):
    """CLIP's text encoder (transformers' CLIPTextModel, or ...WithProjection when cfg.projection is set)."""

    def __init__(self, cfg: CLIPTextConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embeddings = _TextEmbeddings(cfg)
        self.encoder = _Encoder(cfg, causal=True)
        self.final_layer_norm = nn.LayerNorm(cfg.width, cfg.eps)
        if cfg.projection is not None:
            self.text_projection = nn.Linear(cfg.width, cfg.projection, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Encode texts; the mask is causal and does not cover padding, as in Stable Diffusion.

        ids: (B, T) int64, T <= cfg.positions, padding included; ValueError if T is larger.
        Returns: states after the final LayerNorm (B, T, C), and the state at the end token (B, C), or
        (B, P) if cfg.projection is set.
        """
        return self.states(ids)[1:]

    def states(self, ids: Tensor, change: Change | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The states before the last block, which SDXL reads, (B, T, C), and what `forward` returns.

        ids: as there. change: gives the token embeddings that are read instead, before positions are added.
        """
        if ids.shape[1] > self.cfg.positions:
            raise ValueError(f"text of {ids.shape[1]} tokens: expected at most {self.cfg.positions}")
        before = self.encoder(self.embeddings(ids, change), self.cfg.layers - 1)  # (B, T, C)
        hidden = self.final_layer_norm(self.encoder.layers[-1](before, self.encoder.causal))
        # argmax finds the first 1, or in the ids the end token, which is the last of OpenAI's vocabulary
        score = ids if self.cfg.end_id is None else (ids == self.cfg.end_id).int()  # (B, T)
        pooled = hidden[torch.arange(ids.shape[0], device=ids.device), score.argmax(dim=1)]  # (B, C)
        if self.cfg.projection is not None:
            pooled = self.text_projection(pooled)  # (B, P)
        return before, hidden, pooled


class CLIPVision(nn.Module):
    """CLIP's image encoder (transformers' CLIPVisionModel, ...WithProjection when cfg.projection is set)."""

    def __init__(self, cfg: CLIPVisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embeddings = _VisionEmbeddings(cfg)
        self.pre_layrnorm = nn.LayerNorm(cfg.width, cfg.eps)  # misspelt in every public file
        self.encoder = _Encoder(cfg, causal=False)
        self.post_layernorm = nn.LayerNorm(cfg.width, cfg.eps)
        if cfg.projection is not None:
            self.visual_projection = nn.Linear(cfg.width, cfg.projection, bias=False)

    def hidden(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """Hidden states (B, 1+N, C), the class token first, before `post_layernorm`.

        pixels: (B, 3, S, S), normalised by `models.clip_image`; ValueError for another size.
        layer: as in transformers' `hidden_states`, 0 = before the first block, -1 = after the last, -2 = what
        LLaVA reads. Later blocks do not run.
        """
        size = self.cfg.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"CLIP image of shape {tuple(pixels.shape)}: expected (B, 3, {size}, {size})")
        count = layer + self.cfg.layers + 1 if layer < 0 else layer
        if not 0 <= count <= self.cfg.layers:
            raise ValueError(f"CLIP layer {layer}: expected {-self.cfg.layers - 1}..{self.cfg.layers}")
        x = self.pre_layrnorm(self.embeddings(pixels))  # (B, 3, S, S) -> (B, 1+N, C)
        return self.encoder(x, count)  # (B, 1+N, C)

    def pool(self, hidden: Tensor) -> Tensor:
        """Normalised class token (B, C) of the last layer's states (B, 1+N, C): the target of Eq. 4."""
        return self.post_layernorm(hidden[:, 0])  # (B, C)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, S, S) -> states of the last layer (B, 1+N, C), and the embedding (B, P).

        Without cfg.projection the embedding is the normalised class token (B, C).
        """
        hidden = self.hidden(pixels)  # (B, 1+N, C)
        pooled = self.pool(hidden)  # (B, C)
        if self.cfg.projection is not None:
            pooled = self.visual_projection(pooled)  # (B, P)
        return hidden, pooled


class CLIP(nn.Module):
    """Both towers (transformers' CLIPModel); the projections belong to the towers."""

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.text_model = CLIPText(cfg.text)
        self.vision_model = CLIPVision(cfg.vision)

    def text_features(self, ids: Tensor) -> Tensor:
        """ids (B, T) int64, see `CLIPText.forward` -> (B, P), not normalised."""
        return self.text_model(ids)[1]

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S), see `CLIPVision.hidden` -> (B, P), not normalised."""
        return self.vision_model(pixels)[1]
