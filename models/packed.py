"""Weights laid out as oneDNN multiplies them, for networks that only compute, on CPUs.

torch keeps a weight row by row. In every call oneDNN then rearranges it, or torch hands float32 matrices to a
library that is slower on some processors. `pack_weights` rearranges each weight once. Outputs are the same
up to rounding (tests/test_packed.py); there are no gradients, and no way back.

Letters: I inputs, O outputs, B batch, h w grid.
"""

import torch
from torch import Tensor, nn

PLAIN = ("none", [], "")  # the operators' last arguments: no activation follows the product


class PackedLinear(nn.Module):
    """A Linear layer: x (..., I) -> (..., O)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten(1)  # (O, I)
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight), persistent=False)
        self.register_buffer("bias", _detached(layer.bias), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *PLAIN)


class PackedPointwise(PackedLinear):
    """A convolution of single pixels, which is a Linear layer: x (B, I, h, w), or tokens (B, h*w, I)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return super().forward(x)  # (B, h*w, O)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, O, h, w), channels last


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
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *self.where, *PLAIN)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have what `pack_weights` needs."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    known = {
        torch.float32: lambda: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in known and known[dtype]()


def pack_weights(network: nn.Module) -> nn.Module:
    """The network with every Linear and Conv2d replaced, in place; no weight is kept twice.

    Where `can_pack` says so.
    """
    for name, layer in list(network.named_children()):
        match layer:
            case nn.Linear():
                packed = PackedLinear(layer)
            case nn.Conv2d(kernel_size=(1, 1), stride=(1, 1), padding=(0, 0)):
                packed = PackedPointwise(layer)
            case nn.Conv2d():
                packed = PackedConv(layer)
            case _:
                packed = pack_weights(layer)
        setattr(network, name, packed)
    return network
