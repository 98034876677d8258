"""Low-rank adaptation (Hu et al., arXiv 2106.09685) of linear layers: W x + (α/r) B A x with A, B trained."""

import math
import re
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A linear layer with a trained update of rank r."""

    def __init__(self, base: nn.Linear, down: nn.Parameter, up: nn.Parameter, scaling: float = 1.0) -> None:
        """Freeze `base` and add the update.

        Args:
            base: the layer to adapt.
            down: A (r, in).
            up: B (out, r).
            scaling: α/r.
        """
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        self.down, self.up = down, up

    @classmethod
    def start(cls, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> Self:
        """With a new update, float32.

        Args:
            base: the layer to adapt.
            rank: r.
            alpha: α, which scales the update by α/r.
            generator: draws A, on the CPU.
        """
        bound, device = 1 / math.sqrt(base.in_features), base.weight.device
        down = (2 * torch.rand(rank, base.in_features, generator=generator) - 1) * bound
        up = torch.zeros(base.out_features, rank, device=device)
        return cls(base, nn.Parameter(down.to(device)), nn.Parameter(up), alpha / rank)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (..., out)
        update = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up) * self.scaling  # (..., out)
        return y + update.to(y.dtype)

    def merged(self) -> Tensor:
        """Weight of the single linear layer that computes the same, in the base's dtype."""
        weight = self.base.weight
        return (weight.float() + self.scaling * self.up @ self.down).to(weight.dtype)  # (out, in)


def add_lora(model: nn.Module, pattern: str, rank: int, alpha: float, seed: int) -> dict[str, LoRALinear]:
    """Replace linear layers by LoRALinear, in place.

    Args:
        model: network to adapt.
        pattern: regular expression for the whole name of a layer.
        rank, alpha: see `LoRALinear.start`.
        seed: of the updates' initial values.

    Returns: name -> new layer.
    """
    generator, added = torch.Generator().manual_seed(seed), {}
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        if re.fullmatch(pattern, name):
            parent, _, child = name.rpartition(".")
            added[name] = LoRALinear.start(linear, rank, alpha, generator)
            setattr(model.get_submodule(parent), child, added[name])
    return added


def merged_tensors(model: nn.Module, added: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """Parameters of the model under their names from before `add_lora`, with the updates merged in."""
    inside = tuple(f"{name}." for name in added)
    plain = {name: p for name, p in model.named_parameters() if not name.startswith(inside)}
    for name, layer in added.items():
        plain[f"{name}.weight"] = layer.merged()
        if layer.base.bias is not None:
            plain[f"{name}.bias"] = layer.base.bias
    return plain
