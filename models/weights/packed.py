"""Faster layouts for inference: weights packed for oneDNN on CPUs, channels last on GPUs.

torch keeps a weight row by row. In every call oneDNN then rearranges it, or torch hands float32 matrices to a
library that is slower on some processors. `pack_weights` rearranges each weight once. Outputs are the same up
to rounding (tests/test_packed.py); the packed network has no gradients and cannot be unpacked.

cuDNN's 16-bit convolutions read pixels channels last and rearrange other layouts; its float32 ones do not.

Letters: I inputs, O outputs, B batch, N tokens, C channels, h w grid.
"""

from functools import cache

import torch
from torch import Tensor, nn

from models.unet import FeedForward, TransformerBlock

PROBE = 0.05  # largest difference over the largest value that a probe may have: 16-bit types round to 0.01
PLAIN = ("none", [], "")  # the operators' last arguments: no activation follows the product
# Tokens that a CPU's feed-forward layer takes at a time. Its inner activations, eight times as wide as a
# token, then stay in the caches, and below the size from which the C library returns memory after each use.
MAX_TOKENS = 2048


class PackedLinear(nn.Module):
    """A Linear layer: x (..., I) -> (..., O)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten(1)  # (O, I)
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight), persistent=False)
        self.register_buffer("bias", _detached(layer.bias), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *PLAIN)  # (..., O)


class PackedPointwise(PackedLinear):
    """A convolution of single pixels, which is a Linear layer: x (B, I, h, w), or tokens (B, h*w, I)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return super().forward(x)  # (B, h*w, O)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, O, h, w), channels last


class ChunkedFeedForward(FeedForward):
    """The UNet's feed-forward layer on at most MAX_TOKENS tokens at a time; it shares the layer's weights."""

    def __init__(self, layer: FeedForward) -> None:
        nn.Module.__init__(self)
        self.net = layer.net

    def forward(self, x: Tensor) -> Tensor:
        parts = x.flatten(0, 1).split(MAX_TOKENS)  # (n, C) each
        return torch.cat([self.net[2](self.net[0](part)) for part in parts]).view_as(x)  # (B, N, C)


class PackedConv(nn.Module):
    """A Conv2d: x (B, I, h, w) in any memory format -> (B, O, h', w'), channels last."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.where = list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups
        weight = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.detach().to_mkldnn(), *self.where)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", _detached(layer.bias), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = self.weight, self.bias
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *self.where, *PLAIN)  # (B, O, h', w')


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def optimize_layout(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Lay the weights of a network out for speed, in place.

    Args:
        network: on `device` in `dtype`, for inference only.
        device: decides on packing (CPU) or channels last (CUDA, 16 bits).
        dtype: of the parameters.

    Returns: the network itself.
    """
    if device.type == "cpu":
        for block in [m for m in network.modules() if isinstance(m, TransformerBlock)]:
            block.ff = ChunkedFeedForward(block.ff)
    if can_pack(device, dtype):
        return pack_weights(network)
    if device.type == "cuda" and dtype.itemsize == 2:
        return network.to(memory_format=torch.channels_last)
    return network


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have what `pack_weights` needs."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.mkldnn.enabled and _agrees(dtype)


@cache
@torch.no_grad()
def _agrees(dtype: torch.dtype) -> bool:
    """Whether two small packed layers compute the same. torch does not promise the packing operators."""
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)).requires_grad_(False)
    for parameter in layers.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(1, 16, 4, 4, generator=generator)
    expected = layers(x)
    try:
        found = pack_weights(layers.to(dtype))(x.to(dtype)).float()
    except (AttributeError, RuntimeError):  # not this build, or not this processor
        return False
    return bool((found - expected).abs().max() < PROBE * expected.abs().max())


def pack_weights(network: nn.Module) -> nn.Module:
    """Replace the Linear and Conv2d layers below the network, in place, where `can_pack` allows it.

    `state_dict` then lacks their weights.
    """
    for name, layer in list(network.named_children()):
        match layer:
            case nn.Linear():
                packed = PackedLinear(layer)
            case nn.Conv2d(kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), groups=1):
                packed = PackedPointwise(layer)
            case nn.Conv2d(padding_mode="zeros"):
                packed = PackedConv(layer)
            case _:
                packed = pack_weights(layer)
        setattr(network, name, packed)
    return network
