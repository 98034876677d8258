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
from models.sam_config import MASK_SCALE, MASKS, MLP_LAYERS, POINT_LABELS, UPSCALING, SAMConfig

FOREGROUND, BACKGROUND, BOX_START, BOX_END = 1, 0, 2, 3  # labels of points; a box is two points
NOT_A_POINT = -1  # the token that replaces the box in a prompt without one
IGNORED = -10  # pads prompts with fewer points than others in the batch; masked out
DECODER_EPS = 1e-5  # of the decoder's LayerNorms in training; transformers has 1e-6


class Prompts(NamedTuple):
    """P prompts for each of B images.

    A box is two points, its upper left and lower right corners. `decode` adds the official NOT_A_POINT token
    to prompts without a box. IGNORED pads prompts to the same number of points.
    """

    points: Tensor  # (B, P, N, 2) float, x and y in pixels of the S x S input
    labels: Tensor  # (B, P, N) int64, the constants above


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, h, w)."""

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
    """(B, h, w, C) -> (B*windows, side, side, C), padded with zeros at the right and bottom."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % side, 0, -x.shape[1] % side))
    return rearrange(x, "b (rows i) (columns j) c -> (b rows columns) i j c", i=side, j=side)


def from_windows(x: Tensor, h: int, w: int) -> Tensor:
    """(B*windows, side, side, C) -> (B, h, w, C), without the padding."""
    rows, columns = math.ceil(h / x.shape[1]), math.ceil(w / x.shape[2])
    x = rearrange(x, "(b rows columns) i j c -> b (rows i) (columns j) c", rows=rows, columns=columns)
    return x[:, :h, :w]


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Look up a table (2L-1, D) of distances -L+1..L-1 for every query and key: (size, size, D).

    Where size is not L, the table is resampled linearly.
    """
    length = 2 * size - 1
    if table.shape[0] != length:
        table = F.interpolate(table.T[None], length, mode="linear")[0].T  # (2*size-1, D)
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index[None, :] + size - 1]  # (size, size, D)


def relative_bias(q: Tensor, table_h: Tensor, table_w: Tensor, h: int, w: int) -> Tensor:
    """q · (vertical + horizontal relative position of each key).

    Args:
        q: (B, H, h*w, D).
        table_h, table_w: see `relative_positions`.
        h, w: grid of the tokens.

    Returns: (B, H, h*w, h*w).
    """
    q = q.unflatten(2, (h, w))  # (B, H, h, w, D)
    vertical = torch.einsum("bnhwd,hkd->bnhwk", q, relative_positions(table_h, h))
    horizontal = torch.einsum("bnhwd,wkd->bnhwk", q, relative_positions(table_w, w))
    bias = vertical[..., :, None] + horizontal[..., None, :]  # (B, H, h, w, h, w)
    return bias.flatten(4).flatten(2, 3)  # (B, H, h*w, h*w)


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
    """(B, h, w, C) -> (B, h, w, C); window: side of its windows in patches, 0 = global attention."""

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
        """(1, grid, grid, width), resampled for images of another size than cfg.image_size."""
        if grid == self.pos_embed.shape[1]:
            return self.pos_embed
        x = F.interpolate(self.pos_embed.movedim(-1, 1), (grid, grid), mode="bicubic", align_corners=False)
        return x.movedim(1, -1)


# --- prompt encoder ----------------------------------------------------------------------------------


class _PositionEncoding(nn.Module):
    """Random Fourier features (Tancik et al., arXiv 2006.10739), with frequencies fixed in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, channels // 2))

    def forward(self, xy: Tensor) -> Tensor:
        """xy (..., 2), fractions of the input in [0, 1] -> (..., C), float32."""
        angles = 2 * math.pi * (2 * xy.float() - 1) @ self.positional_encoding_gaussian_matrix.float()
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class _PromptEncoder(nn.Module):
    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        channels, narrow, wide = cfg.out_channels, cfg.mask_channels // MASK_SCALE, cfg.mask_channels
        self.pe_layer = _PositionEncoding(channels)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, channels) for _ in range(POINT_LABELS))
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
        """Tokens (B, P, N+1, C) and their mask, bool (B, P, N+1); side: S."""
        points, labels = prompts
        no_box = (labels != BOX_START).all(dim=-1, keepdim=True)  # (B, P, 1)
        labels = torch.cat([labels, torch.where(no_box, NOT_A_POINT, IGNORED)], dim=-1)  # (B, P, N+1)
        points = F.pad(points, (0, 0, 0, 1))  # (B, P, N+1, 2)
        weights = [embedding.weight for embedding in (*self.point_embeddings, self.not_a_point_embed)]
        index = torch.where(labels < 0, POINT_LABELS, labels)  # (B, P, N+1)
        positions = self.pe_layer((points + 0.5) / side)  # (B, P, N+1, C) of pixel centres
        positions = torch.where(labels[..., None] < 0, 0, positions).to(weights[0].dtype)
        return positions + F.embedding(index, torch.cat(weights)), labels != IGNORED

    def masks(self, masks: Tensor | None) -> Tensor:
        """Logits (B, P, 4h, 4w) -> (B, P, C, h, w); None -> (1, 1, C, 1, 1)."""
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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """q (B, P, N, C), k and v (B, P, M, C), key_mask: bool (B, P, M) -> (B, P, N, C).

        Image features that all prompts share have P = 1, so that they are projected once.
        """
        prompts = max(q.shape[1], k.shape[1])
        projected = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        flat = (x.expand(-1, prompts, -1, -1).flatten(0, 1) for x in projected)  # (B*P, N or M, inner)
        q, k, v = (split_heads(x, self.heads) for x in flat)  # (B*P, H, N or M, D)
        mask = None if key_mask is None else key_mask.flatten(0, 1)[:, None, None]  # (B*P, 1, 1, M)
        x = merge_heads(attention(q, k, v, mask))  # (B*P, N, inner)
        return self.out_proj(x).unflatten(0, (-1, prompts))


class _TwoWayBlock(nn.Module):
    """Tokens attend to each other and to the image, then the image attends to the tokens."""

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
        self, x: Tensor, image: Tensor, start: Tensor, positions: Tensor, key_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One round of attention.

        Args:
            x, start: tokens of this block and of the first one (B, P, T, C).
            image: features (B, P or 1, h*w, C).
            positions: position encoding of the features (1, 1, h*w, C).
            key_mask: valid tokens, bool (B, P, T).
        """
        if self.first:  # x is start
            x = self.self_attn(x, x, x, key_mask)
        else:
            x = x + self.self_attn(x + start, x + start, x, key_mask)
        x = self.norm1(x)
        x = self.norm2(x + self.cross_attn_token_to_image(x + start, image + positions, image))
        x = self.norm3(x + self.mlp(x))
        image = self.norm4(image + self.cross_attn_image_to_token(image + positions, x + start, x, key_mask))
        return x, image  # (B, P, T, C), (B, P, h*w, C)


class _TwoWayTransformer(nn.Module):
    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TwoWayBlock(cfg, first=i == 0) for i in range(cfg.decoder_layers))
        self.final_attn_token_to_image = _DecoderAttention(cfg, cfg.downsample)
        self.norm_final_attn = nn.LayerNorm(cfg.out_channels, DECODER_EPS)

    def forward(
        self, tokens: Tensor, image: Tensor, positions: Tensor, key_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = tokens
        for layer in self.layers:
            x, image = layer(x, image, tokens, positions, key_mask)
        x = x + self.final_attn_token_to_image(x + tokens, image + positions, image)
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

    def forward(
        self, image: Tensor, positions: Tensor, tokens: Tensor, key_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Masks and predicted IoU of `SAM.decode`.

        Args:
            image: features (B, P or 1, C, h, w).
            positions: their position encoding (1, 1, h*w, C).
            tokens: prompts (B, P, N+1, C).
            key_mask: valid tokens, bool (B, P, N+1).
        """
        h, batch = image.shape[-2], tokens.shape[:2]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1+MASKS, C)
        tokens = torch.cat([own.expand(*batch, -1, -1), tokens], dim=2)  # (B, P, T, C)
        key_mask = torch.cat([key_mask.new_ones(*batch, len(own)), key_mask], dim=2)  # (B, P, T)
        image = rearrange(image, "b p c h w -> b p (h w) c")
        x, image = self.transformer(tokens, image, positions, key_mask)
        image = rearrange(image, "b p (h w) c -> (b p) c h w", h=h)
        fine = self.output_upscaling(image).unflatten(0, batch)  # (B, P, C/8, 4h, 4w)
        weights = [head(x[:, :, 1 + i]) for i, head in enumerate(self.output_hypernetworks_mlps)]
        logits = torch.einsum("bpmc,bpchw->bpmhw", torch.stack(weights, dim=2), fine)
        return logits.float(), self.iou_prediction_head(x[:, :, 0]).float()


class SAM(nn.Module):
    """`encode` each image once, then `decode` prompts in batches of any size."""

    def __init__(self, cfg: SAMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.image_encoder = _ImageEncoder(cfg)
        self.prompt_encoder = _PromptEncoder(cfg)
        self.mask_decoder = _MaskDecoder(cfg)

    def encode(self, pixels: Tensor) -> Tensor:
        """Features (B, C, h, w) of images.

        pixels: (B, 3, S, S) of `models.sam_image.preprocess`, in the parameters' dtype. S is cfg.image_size,
        or another multiple of cfg.patch at some loss of accuracy, as positions are then resampled.
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
        """Masks for every prompt, independently of the other prompts. Memory grows with B * P.

        Args:
            features: (B, C, h, w) of `encode`.
            prompts: N >= 1 points each.
            masks: logits of an earlier result to refine, (B, P, 4h, 4w), or None.

        Returns: logits (B, P, 4, 4h, 4w), positive = inside, and predicted IoU (B, P, 4), float32. Mask 0 is
        for an unambiguous prompt; 1..3 are what an ambiguous one, such as a point, may mean (part, whole).
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
        tokens, key_mask = self.prompt_encoder.points(prompts, w * self.cfg.patch)
        image = features[:, None] + self.prompt_encoder.masks(masks)  # (B, P or 1, C, h, w)
        return self.mask_decoder(image, self.prompt_encoder.grid(h, w), tokens, key_mask)
