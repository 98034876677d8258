"""Segment Anything (Kirillov et al., arXiv 2304.02643): ViT image encoder, prompt encoder, mask decoder.

Parameter names are those of the official files (sam_vit_b_01ec64.pth and its kind).

Letters: B images, P prompts per image, N points of a prompt, S side of the input in pixels, h and w the
grid of patches, C channels (the encoder's width, after its neck and in the decoder `out_channels`), H heads,
D channels per head, T tokens of the decoder.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.attention import attention, merge_heads, split_heads
from models.sam_config import KINDS, MASK_SCALE, MASKS, MLP_LAYERS, UPSCALING, SAMConfig

FOREGROUND, BACKGROUND, BOX_START, BOX_END = 1, 0, 2, 3  # labels of points; a box is two of them
NOT_A_POINT = -1  # a token of its own that takes the place of the box where a prompt has none
IGNORED = -10  # fills up prompts of fewer points than others of the batch; takes no part at all
DECODER_EPS = 1e-5  # of the decoder's LayerNorms; transformers has 1e-6, which SAM was not trained with


class Prompts(NamedTuple):
    """What to segment, P prompts for each of B images.

    points: (B, P, N, 2) float, x and y in pixels of the S x S input; labels: (B, P, N) int64, the constants
    above. A box is two points, its upper left and lower right corners. Prompts without a box get the official
    NOT_A_POINT token from `decode`; prompts of unequal numbers of points are filled up with IGNORED.
    """

    points: Tensor
    labels: Tensor


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.act(self.lin1(x)))


# --- image encoder -----------------------------------------------------------------------------------


def to_windows(x: Tensor, side: int) -> Tensor:
    """(B, h, w, C) -> (B*windows, side, side, C), zeros at the right and bottom filling up the last ones."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    return rearrange(x, "b (rows i) (columns j) c -> (b rows columns) i j c", i=side, j=side)


def from_windows(x: Tensor, h: int, w: int) -> Tensor:
    """(B*windows, side, side, C) -> (B, h, w, C), the filling cut off."""
    rows, columns = math.ceil(h / x.shape[1]), math.ceil(w / x.shape[2])
    x = rearrange(x, "(b rows columns) i j c -> b (rows i) (columns j) c", rows=rows, columns=columns)
    return x[:, :h, :w]


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Rows of a table (2L-1, D), one for each distance -L+1..L-1, by query and key: (size, size, D).

    Where size is not L, the table is stretched or shrunk linearly.
    """
    length = 2 * size - 1
    if table.shape[0] != length:
        table = F.interpolate(table.T[None], length, mode="linear")[0].T  # (2*size-1, D)
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None, :] + size - 1]


def relative_bias(q: Tensor, table_h: Tensor, table_w: Tensor, h: int, w: int) -> Tensor:
    """q · (vertical + horizontal relative position of each key): q (B, H, h*w, D) -> (B, H, h*w, h*w)."""
    q = q.unflatten(2, (h, w))  # (B, H, h, w, D)
    vertical = torch.einsum("bnhwd,hkd->bnhwk", q, relative_positions(table_h, h))
    horizontal = torch.einsum("bnhwd,wkd->bnhwk", q, relative_positions(table_w, w))
    bias = vertical[..., :, None] + horizontal[..., None, :]  # (B, H, h, w, h, w)
    return bias.flatten(4).flatten(2, 3)


class _EncoderAttention(nn.Module):
    def __init__(self, cfg: SAMConfig, size: int) -> None:
        super().__init__()
        self.heads = cfg.heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size - 1, cfg.width // cfg.heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size - 1, cfg.width // cfg.heads))

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        qkv = rearrange(self.qkv(x), "b h w (three n d) -> three b n (h w) d", three=3, n=self.heads)
        q, k, v = qkv  # (B, H, h*w, D) each
        x = attention(q, k, v, bias=relative_bias(q, self.rel_pos_h, self.rel_pos_w, h, w))
        return self.proj(merge_heads(x).unflatten(1, (h, w)))  # (B, h, w, C)


class _EncoderBlock(nn.Module):
    """(B, h, w, C) -> the same; window: side of its windows, 0 = the whole image."""

    def __init__(self, cfg: SAMConfig, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(cfg.width, cfg.eps)
        self.attn = _EncoderAttention(cfg, window or cfg.grid)
        self.norm2 = nn.LayerNorm(cfg.width, cfg.eps)
        self.mlp = _MLP(cfg.width, cfg.mlp, F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.window:
            y = from_windows(self.attn(to_windows(y, self.window)), *x.shape[1:3])
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).movedim(1, -1)  # (B, 3, S, S) -> (B, h, w, C)


class _ImageEncoder(nn.Module):
    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        channels = cfg.out_channels
        self.patch_embed = _PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.grid, cfg.grid, cfg.width))
        self.blocks = nn.ModuleList(
            _EncoderBlock(cfg, 0 if i in cfg.global_blocks else cfg.window) for i in range(cfg.layers)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(cfg.width, channels, 1, bias=False),
            LayerNorm2d(channels, cfg.eps),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels, cfg.eps),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)  # (B, h, w, width)
        x = x + self._positions(x.shape[1])
        for block in self.blocks:
            x = block(x)
        return self.neck(x.movedim(-1, 1))  # (B, C, h, w)

    def _positions(self, grid: int) -> Tensor:
        """(1, grid, grid, width), resampled where the image has another size than cfg.image_size."""
        if grid == self.pos_embed.shape[1]:
            return self.pos_embed
        x = F.interpolate(self.pos_embed.movedim(-1, 1), (grid, grid), mode="bicubic", align_corners=False)
        return x.movedim(1, -1)


# --- prompt encoder ----------------------------------------------------------------------------------


class _PositionEncoding(nn.Module):
    """Sine and cosine of random frequencies (Tancik et al., arXiv 2006.10739), fixed when SAM is made."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, channels // 2))

    def forward(self, xy: Tensor) -> Tensor:
        """xy (..., 2) in [0, 1] of the input -> (..., C), float32."""
        angles = 2 * math.pi * (2 * xy.float() - 1) @ self.positional_encoding_gaussian_matrix.float()
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class _PromptEncoder(nn.Module):
    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        channels, narrow, wide = cfg.out_channels, cfg.mask_channels // MASK_SCALE, cfg.mask_channels
        self.pe_layer = _PositionEncoding(channels)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, channels) for _ in range(KINDS))
        self.not_a_point_embed = nn.Embedding(1, channels)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, narrow, 2, 2),
            LayerNorm2d(narrow, cfg.eps),
            nn.GELU(),
            nn.Conv2d(narrow, wide, 2, 2),
            LayerNorm2d(wide, cfg.eps),
            nn.GELU(),
            nn.Conv2d(wide, channels, 1),
        )
        self.no_mask_embed = nn.Embedding(1, channels)

    def points(self, prompts: Prompts, side: int) -> tuple[Tensor, Tensor]:
        """(tokens (B, P, N+1, C), which of them take part: bool (B, P, N+1)); side: S."""
        points, labels = prompts
        no_box = (labels != BOX_START).all(dim=-1, keepdim=True)  # (B, P, 1)
        labels = torch.cat([labels, torch.where(no_box, NOT_A_POINT, IGNORED)], dim=-1)  # (B, P, N+1)
        points = F.pad(points, (0, 0, 0, 1))  # (B, P, N+1, 2)
        kinds = [embedding.weight for embedding in (*self.point_embeddings, self.not_a_point_embed)]
        kind = torch.where(labels < 0, KINDS, labels)
        places = self.pe_layer((points + 0.5) / side)  # (B, P, N+1, C); of a pixel its middle counts
        places = torch.where(labels[..., None] < 0, 0, places).to(kinds[0].dtype)
        return places + F.embedding(kind, torch.cat(kinds)), labels != IGNORED

    def masks(self, masks: Tensor | None) -> Tensor:
        """Logits (B, P, 4h, 4w) -> (B, P, C, h, w); without any (1, 1, C, 1, 1) for all places."""
        if masks is None:
            return self.no_mask_embed.weight[None, :, :, None, None]
        x = masks.to(self.no_mask_embed.weight.dtype).flatten(0, 1)[:, None]  # (B*P, 1, 4h, 4w)
        return self.mask_downscaling(x).unflatten(0, masks.shape[:2])

    def grid(self, h: int, w: int) -> Tensor:
        """Position encoding of the features, (1, 1, h*w, C)."""
        device, dtype = self.no_mask_embed.weight.device, self.no_mask_embed.weight.dtype
        y, x = ((torch.arange(size, device=device) + 0.5) / size for size in (h, w))
        xy = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (h, w, 2)
        return self.pe_layer(xy).to(dtype).flatten(0, 1)[None, None]


# --- mask decoder ------------------------------------------------------------------------------------


class _DecoderAttention(nn.Module):
    def __init__(self, cfg: SAMConfig, downsample: int) -> None:
        super().__init__()
        self.heads = cfg.decoder_heads
        inner = cfg.out_channels // downsample
        self.q_proj = nn.Linear(cfg.out_channels, inner)
        self.k_proj = nn.Linear(cfg.out_channels, inner)
        self.v_proj = nn.Linear(cfg.out_channels, inner)
        self.out_proj = nn.Linear(inner, cfg.out_channels)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, known: Tensor | None = None) -> Tensor:
        """q (B, P, N, C), k and v (B, P, M, C), known: keys to attend to, bool (B, P, M) -> (B, P, N, C).

        An image's features come with P = 1 as long as they are the same for all its prompts, to be projected
        once.
        """
        prompts = max(q.shape[1], k.shape[1])
        projected = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        flat = (x.expand(-1, prompts, -1, -1).flatten(0, 1) for x in projected)  # (B*P, N or M, inner)
        q, k, v = (split_heads(x, self.heads) for x in flat)  # (B*P, H, N or M, D)
        mask = None if known is None else known.flatten(0, 1)[:, None, None]  # (B*P, 1, 1, M)
        x = merge_heads(attention(q, k, v, mask))  # (B*P, N, inner)
        return self.out_proj(x).unflatten(0, (-1, prompts))


class _TwoWayBlock(nn.Module):
    """Tokens look at each other and at the image, then the image looks at the tokens."""

    def __init__(self, cfg: SAMConfig, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = _DecoderAttention(cfg, 1)
        self.norm1 = nn.LayerNorm(cfg.out_channels, DECODER_EPS)
        self.cross_attn_token_to_image = _DecoderAttention(cfg, cfg.downsample)
        self.norm2 = nn.LayerNorm(cfg.out_channels, DECODER_EPS)
        self.mlp = _MLP(cfg.out_channels, cfg.decoder_mlp, F.relu)
        self.norm3 = nn.LayerNorm(cfg.out_channels, DECODER_EPS)
        self.norm4 = nn.LayerNorm(cfg.out_channels, DECODER_EPS)
        self.cross_attn_image_to_token = _DecoderAttention(cfg, cfg.downsample)

    def forward(
        self, x: Tensor, image: Tensor, start: Tensor, places: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, start: tokens now and at first (B, P, T, C); image (B, P or 1, h*w, C); places: its encoding."""
        if self.first:  # x is `start` itself
            x = self.self_attn(x, x, x, known)
        else:
            x = x + self.self_attn(x + start, x + start, x, known)
        x = self.norm1(x)
        x = self.norm2(x + self.cross_attn_token_to_image(x + start, image + places, image))
        x = self.norm3(x + self.mlp(x))
        image = self.norm4(image + self.cross_attn_image_to_token(image + places, x + start, x, known))
        return x, image  # (B, P, T, C), (B, P, h*w, C)


class _TwoWayTransformer(nn.Module):
    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TwoWayBlock(cfg, first=i == 0) for i in range(cfg.decoder_layers))
        self.final_attn_token_to_image = _DecoderAttention(cfg, cfg.downsample)
        self.norm_final_attn = nn.LayerNorm(cfg.out_channels, DECODER_EPS)

    def forward(self, tokens: Tensor, image: Tensor, places: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        x = tokens
        for layer in self.layers:
            x, image = layer(x, image, tokens, places, known)
        x = x + self.final_attn_token_to_image(x + tokens, image + places, image)
        return self.norm_final_attn(x), image


class _Head(nn.Module):
    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        widths = [width, *[hidden] * (MLP_LAYERS - 1), out]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class _MaskDecoder(nn.Module):
    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        channels = cfg.out_channels
        middle, fine = (channels // divisor for divisor in UPSCALING)
        self.transformer = _TwoWayTransformer(cfg)
        self.iou_token = nn.Embedding(1, channels)
        self.mask_tokens = nn.Embedding(MASKS, channels)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(channels, middle, 2, 2),
            LayerNorm2d(middle, cfg.eps),
            nn.GELU(),
            nn.ConvTranspose2d(middle, fine, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(_Head(channels, channels, fine) for _ in range(MASKS))
        self.iou_prediction_head = _Head(channels, cfg.iou_width, MASKS)

    def forward(self, image: Tensor, places: Tensor, tokens: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, P or 1, C, h, w), places (1, 1, h*w, C), tokens (B, P, N+1, C), known (B, P, N+1)."""
        h, batch = image.shape[-2], tokens.shape[:2]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1+MASKS, C)
        tokens = torch.cat([own.expand(*batch, -1, -1), tokens], dim=2)  # (B, P, T, C)
        known = torch.cat([known.new_ones(*batch, len(own)), known], dim=2)  # (B, P, T)
        image = rearrange(image, "b p c h w -> b p (h w) c")
        x, image = self.transformer(tokens, image, places, known)
        image = rearrange(image, "b p (h w) c -> (b p) c h w", h=h)
        fine = self.output_upscaling(image).unflatten(0, batch)  # (B, P, C/8, 4h, 4w)
        weights = [head(x[:, :, 1 + i]) for i, head in enumerate(self.output_hypernetworks_mlps)]
        logits = torch.einsum("bpmc,bpchw->bpmhw", torch.stack(weights, dim=2), fine)
        return logits.float(), self.iou_prediction_head(x[:, :, 0]).float()


class SAM(nn.Module):
    """Images are encoded once, prompts decoded in batches of any size: `encode`, then `decode`."""

    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.image_encoder = _ImageEncoder(cfg)
        self.prompt_encoder = _PromptEncoder(cfg)
        self.mask_decoder = _MaskDecoder(cfg)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) from `models.sam_image.preprocess`, in the parameters' dtype -> (B, C, h, w).

        S is cfg.image_size, or another multiple of cfg.patch at some loss: positions are then resampled.
        """
        side, patch = pixels.shape[-1], self.cfg.patch
        if pixels.dim() != 4 or tuple(pixels.shape[1:3]) != (3, side) or side % patch:
            raise ValueError(
                f"SAM image of shape {tuple(pixels.shape)}: expected (B, 3, S, S), S a multiple of {patch}"
            )
        return self.image_encoder(pixels)

    def decode(
        self, features: Tensor, prompts: Prompts, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masks for every prompt; a prompt's result does not depend on the others it is decoded with.

        features (B, C, h, w) of `encode`; prompts: `Prompts`, N >= 1; masks: logits of an earlier result to
        refine, (B, P, 4h, 4w), or None. Returns (logits (B, P, 4, 4h, 4w), positive = inside; predicted IoU
        (B, P, 4)), float32. Of the four, number 0 is the one mask of an unambiguous prompt; 1..3 are what an
        ambiguous one, such as a single point, may mean (part, whole). Memory grows with B * P.
        """
        batch, _, h, w = features.shape
        points, labels = prompts
        shape = (batch, *labels.shape[1:])
        if labels.dim() != 3 or tuple(labels.shape) != shape or tuple(points.shape) != (*shape, 2):
            raise ValueError(
                f"SAM prompts: points {tuple(points.shape)}, labels {tuple(labels.shape)}; expected "
                f"({batch}, P, N, 2) and ({batch}, P, N)"
            )
        kinds = (FOREGROUND, BACKGROUND, BOX_START, BOX_END, NOT_A_POINT, IGNORED)
        if unknown := set(labels.unique().tolist()) - set(kinds):
            raise ValueError(f"SAM prompts: label {unknown.pop()}, expected one of {sorted(kinds)}")
        if masks is not None and tuple(masks.shape) != (*labels.shape[:2], MASK_SCALE * h, MASK_SCALE * w):
            expected = (*labels.shape[:2], MASK_SCALE * h, MASK_SCALE * w)
            raise ValueError(f"SAM masks {tuple(masks.shape)}: expected {expected}")
        tokens, known = self.prompt_encoder.points(prompts, w * self.cfg.patch)
        image = features[:, None] + self.prompt_encoder.masks(masks)  # (B, P or 1, C, h, w)
        return self.mask_decoder(image, self.prompt_encoder.grid(h, w), tokens, known)
