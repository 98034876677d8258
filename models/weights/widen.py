"""Weights that stay as stored, in 16 bits, while a network computes in 32: layers widen them when they run.

There is no copy of all weights in 32 bits, at the price of that cast in every call. Outputs are those of the
network in 32 bits, bit for bit (tests/test_turns.py).
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization


class Widened(nn.Module):
    """A parameter as it is read: in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, stored: Tensor) -> Tensor:
        return stored.to(self.dtype)


def widen(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Have a network compute in `dtype`, in place; vectors are cast once, as they are small."""
    for module in list(network.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > 1:
                register_parametrization(module, name, Widened(dtype), unsafe=True)
            else:
                setattr(module, name, nn.Parameter(parameter.to(dtype), parameter.requires_grad))
    return network
