"""Weights as integers of 8 or 4 bits, with a scale for every group of inputs.

    weight[o, i] ≈ codes[o, i] · scale[o, group of i]

Activations keep their dtype: a layer restores its matrix in that dtype, multiplies, and drops it.

Letters: O outputs, I inputs, G groups of a row, g inputs of a group (I = G g).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.llama import Llama, QuantConfig
from models.llava import Llava, LlavaConfig

# bfloat16 has float32's range, so that no scale under- or overflows. Its 8 bits of precision are enough,
# as the codes are chosen for the scale as it is stored.
SCALE_DTYPE = torch.bfloat16
# Fractions of a group's largest value at which its grid may end; the search takes the one with the least
# squared error. With 16 levels it pays to clip a rare large value, 256 are fine enough without.
CLIPS = {8: (1.0,), 4: (1.0, 0.9, 0.8)}
CHUNK = 2**20  # weights worked on at a time, so that intermediate results stay in a CPU's caches

# One scale per output is enough for 256 levels. 16 levels need small groups; a scale for 32 codes is half a
# bit per weight.
PRESETS = {8: QuantConfig(8), 4: QuantConfig(4, group=32)}
UNSAFE = (4,)  # bits that lose too much of a real language model (tests/real.py measures it)


def group_size(cfg: QuantConfig, inputs: int) -> int:
    """g for a matrix with that many inputs: their largest divisor up to `cfg.group`.

    ValueError if the groups would be too small, or if 4-bit codes cannot share bytes in pairs.
    """
    limit = cfg.group or inputs
    size = max(d for d in range(1, limit + 1) if inputs % d == 0)
    if size < min(QuantConfig.MIN_GROUP, limit) or (cfg.bits == 4 and inputs % 2):
        raise ValueError(
            f"{cfg.bits} bits for a width of {inputs}: expected an even one with a divisor from "
            f"{QuantConfig.MIN_GROUP} to {limit}; use 8 bits, one scale per output"
        )
    return size


def quantise(weight: Tensor, cfg: QuantConfig) -> tuple[Tensor, Tensor]:
    """Round a matrix to codes and scales.

    The codes are the nearest of -2^(bits-1) .. 2^(bits-1) - 1. There is one more level below 0 than above, so
    the scale takes the sign that puts the group's largest value at the lowest level. There is no offset, as
    weights lie about evenly around 0.

    Args:
        weight: (O, I), any float dtype.
        cfg: bits and size of the groups.

    Returns: codes, int8 (O, I) or for 4 bits uint8 (O, I/2) of `pack`; scale (O, G) in SCALE_DTYPE.
    """
    parts = [_quantise_rows(rows, cfg) for rows in weight.split(_rows(weight.shape[1]))]
    codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, scale


def _rows(inputs: int) -> int:
    return max(1, CHUNK // inputs)


def _quantise_rows(weight: Tensor, cfg: QuantConfig) -> tuple[Tensor, Tensor]:
    groups = weight.float().unflatten(1, (-1, group_size(cfg, weight.shape[1])))  # (O, G, g)
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
    step = torch.where(scale == 0, 1, scale).float()[..., None]  # in a group of zeros any step will do
    return scale, (groups / step).round().clamp(-levels, levels - 1)


def _error(groups: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Sum of squared errors of each group, (O, G)."""
    return (codes * scale.float()[..., None] - groups).square().sum(dim=-1)


def dequantise(codes: Tensor, scale: Tensor, cfg: QuantConfig, dtype: torch.dtype) -> Tensor:
    """Restore a matrix: products in float32, rounded once.

    Args:
        codes, scale: as `quantise` returns them.
        cfg: what they were made with.
        dtype: of the result.

    Returns: (O, I).
    """
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
    """A linear layer without bias that stores its weight as codes and scales. It cannot be trained."""

    def __init__(self, inputs: int, outputs: int, cfg: QuantConfig) -> None:
        """The weight starts at zero. ValueError if cfg has no groups for that many inputs."""
        super().__init__()
        self.cfg = cfg
        columns, dtype = (inputs, torch.int8) if cfg.bits == 8 else (inputs // 2, torch.uint8)
        groups = inputs // group_size(cfg, inputs)
        self.register_buffer("codes", torch.zeros(outputs, columns, dtype=dtype))
        self.register_buffer("scale", torch.zeros(outputs, groups, dtype=SCALE_DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantise(self.codes, self.scale, self.cfg, x.dtype))  # (..., I) -> (..., O)


def use_quantised_layers(network: nn.Module, cfg: QuantConfig) -> None:
    """Replace each Linear layer below `network`, in place, by a QuantLinear of the same sizes at zero."""
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(network, name, QuantLinear(layer.in_features, layer.out_features, cfg))
        else:
            use_quantised_layers(layer, cfg)


def quantise_as_configured(llama: Llama) -> None:
    """Replace the blocks' Linear layers as `llama.cfg.quant` says. None leaves them."""
    if llama.cfg.quant is not None:
        use_quantised_layers(llama.layers, llama.cfg.quant)


def build_llava(cfg: LlavaConfig) -> Llava:
    """A Llava to load weights into that are stored as `cfg.llama.quant` says."""
    llava = Llava(cfg)
    quantise_as_configured(llava.llama)
    return llava
