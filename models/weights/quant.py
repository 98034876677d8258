"""Weight-only quantisation: a matrix as integers of 8 or 4 bits and a scale for every group of inputs.

    weight[o, i] ≈ codes[o, i] · scale[o, group of i]

Activations are not rounded: a layer makes its matrix in their dtype, multiplies, and drops it.

Letters: O outputs, I inputs, G groups of a row, g inputs of a group (I = G g).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# bfloat16 has float32's range, so that no group's scale under- or overflows, and its 8 bits of precision are
# enough: codes are chosen for the scale as it is stored.
SCALE_DTYPE = torch.bfloat16
MIN_GROUP = 16  # in smaller groups scales would cost more than a bit per weight
# Shares of a group's largest value that may become the end of its grid; the one with the least squared error
# is taken. With 16 levels it pays to cut off a rare large value: on MoMA-mini's decoder the root of the mean
# squared error falls by 3 to 4%, on Gaussian weights by 5%; smaller steps of the search gain 1% more. 256
# levels are fine enough.
CLIPS = {8: (1.0,), 4: (1.0, 0.9, 0.8)}
# Weights that are worked on at a time: intermediate results of whole matrices would fall out of a CPU's
# caches, which makes both directions about twice as slow.
CHUNK = 2**20


@dataclass(frozen=True)
class QuantConfig:
    """How the matrices of LLaMA's blocks are stored."""

    bits: Literal[8, 4]
    group: int | None = None  # g, inputs that share a scale; None = all of an output's

    def __post_init__(self) -> None:
        if self.bits not in CLIPS:
            raise ValueError(f"weights of {self.bits!r} bits: expected 8 or 4")
        if self.group is not None and self.group < MIN_GROUP:
            raise ValueError(f"groups of {self.group} weights: expected at least {MIN_GROUP}")

    def group_of(self, inputs: int) -> int:
        """g for a matrix with that many inputs: the largest divisor of them that is not above `group`.

        LLaMA's widths are multiples of 128, smaller models' need not be. ValueError if such groups would be
        too small, or if 4-bit codes cannot share bytes in pairs.
        """
        limit = self.group or inputs
        size = max(d for d in range(1, limit + 1) if inputs % d == 0)
        if size < min(MIN_GROUP, limit) or (self.bits == 4 and inputs % 2):
            raise ValueError(
                f"{self.bits} bits for a width of {inputs}: expected an even one with a divisor from "
                f"{MIN_GROUP} to {limit}; use 8 bits, one scale per output"
            )
        return size


# One scale per output is enough for 256 levels; 16 need groups, of the usual size: 16 bits of scale for 128
# codes are 1/8 bit per weight.
PRESETS = {8: QuantConfig(8), 4: QuantConfig(4, group=128)}


def quantise(weight: Tensor, cfg: QuantConfig) -> tuple[Tensor, Tensor]:
    """weight (O, I), any float dtype -> codes (int8 (O, I), or uint8 (O, I/2) of `pack`), scale (O, G).

    Codes are the nearest of -2^(bits-1) .. 2^(bits-1) - 1. There is one more level below 0 than above, so the
    scale takes its sign from the group's largest value, which gets that level. No offset besides: weights lie
    about evenly around 0, and a second number per group would gain 2 to 3% of the error for another 1/8 bit.
    """
    parts = [_quantise_rows(rows, cfg) for rows in weight.split(_rows(weight.shape[1]))]
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scale


def _rows(inputs: int) -> int:
    return max(1, CHUNK // inputs)


def _quantise_rows(weight: Tensor, cfg: QuantConfig) -> tuple[Tensor, Tensor]:
    groups = weight.float().unflatten(1, (-1, cfg.group_of(weight.shape[1])))  # (O, G, g)
    low, high = groups.aminmax(dim=-1)  # (O, G)
    extreme = torch.where(high > -low, high, low)  # (O, G)
    scale, codes = _rounded(groups, extreme, cfg.bits)
    for clip in CLIPS[cfg.bits][1:]:
        other = _rounded(groups, extreme * clip, cfg.bits)
        better = _error(groups, *other) < _error(groups, scale, codes)  # (O, G)
        scale = torch.where(better, other[0], scale)
        codes = torch.where(better[..., None], other[1], codes)
    whole = codes.flatten(1).to(torch.int8)  # (O, I)
    return whole if cfg.bits == 8 else pack(whole), scale


def _rounded(groups: Tensor, extreme: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales (O, G) that put `extreme` at the lowest level, and the codes (O, G, g), float32."""
    levels = 2 ** (bits - 1)
    scale = (extreme / -levels).to(SCALE_DTYPE)
    step = torch.where(scale == 0, 1, scale).float()[..., None]  # of a group of zeros, any will do
    return scale, (groups / step).round().clamp(-levels, levels - 1)


def _error(groups: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Sum of squared errors of each group, (O, G)."""
    return (codes * scale.float()[..., None] - groups).square().sum(dim=-1)


def dequantise(codes: Tensor, scale: Tensor, cfg: QuantConfig, dtype: torch.dtype) -> Tensor:
    """codes and scale of `quantise` -> the matrix (O, I) in `dtype`: products in float32, rounded once."""
    inputs = codes.shape[1] * 8 // cfg.bits
    weight = torch.empty(len(codes), inputs, dtype=dtype, device=codes.device)
    parts = (tensor.split(_rows(inputs)) for tensor in (weight, codes, scale))
    for rows, some, scales in zip(*parts, strict=True):
        whole = some if cfg.bits == 8 else unpack(some)  # (o, I) int8
        groups = whole.unflatten(1, (scale.shape[1], -1)) * scales.float()[..., None]  # (o, G, g)
        rows.copy_(groups.flatten(1))
    return weight


def pack(codes: Tensor) -> Tensor:
    """Integers -8..7, int8 (O, I) -> uint8 (O, I/2): input j in the low bits, j + I/2 in the high ones."""
    low, high = codes.chunk(2, dim=1)  # (O, I/2)
    return (low & 15 | high << 4).view(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: uint8 (O, I/2) -> int8 (O, I)."""
    signed = packed.view(torch.int8)  # whose >> keeps the sign
    return torch.cat([signed << 4 >> 4, signed >> 4], dim=1)


class QuantLinear(nn.Module):
    """A linear layer without bias whose weight is stored as codes and scales. It cannot be trained."""

    def __init__(self, inputs: int, outputs: int, cfg: QuantConfig) -> None:
        """cfg: ValueError if it has no groups for that many inputs. The weight starts at zero."""
        super().__init__()
        self.cfg = cfg
        columns, kind = (inputs, torch.int8) if cfg.bits == 8 else (inputs // 2, torch.uint8)
        groups = inputs // cfg.group_of(inputs)
        self.register_buffer("codes", torch.zeros(outputs, columns, dtype=kind))
        self.register_buffer("scale", torch.zeros(outputs, groups, dtype=SCALE_DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantise(self.codes, self.scale, self.cfg, x.dtype))  # (..., I) -> (..., O)


def linear(inputs: int, outputs: int, cfg: QuantConfig | None) -> nn.Module:
    """A linear layer without bias, stored as `cfg` says; None = as a plain weight."""
    return nn.Linear(inputs, outputs, bias=False) if cfg is None else QuantLinear(inputs, outputs, cfg)
