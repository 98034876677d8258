"""Low-rank adaptation (Hu et al., arXiv 2106.09685) of linear layers: W x + (α/r) B A x with A, B trained."""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A linear layer with a trained update of rank r, which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        """Freeze `base` and add the update.

        Args:
            base: the layer to adapt.
            rank: r.
            alpha: α, which scales the update by α/r.
            generator: draws A, on the CPU.
        """
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        bound = 1 / math.sqrt(base.in_features)
        down = (2 * torch.rand(rank, base.in_features, generator=generator) - 1) * bound
        self.down = nn.Parameter(down.to(base.weight.device))  # A (r, in), float32
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))  # B (out, r)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * self.scaling  # (..., out)

    def merged(self) -> Tensor:
        """Weight of the single linear layer that computes the same, in the base's dtype."""
        weight = self.base.weight
        return (weight.float() + self.scaling * self.up @ self.down).to(weight.dtype)  # (out, in)


def add_lora(model: nn.Module, pattern: str, rank: int, alpha: float, seed: int) -> dict[str, LoRALinear]:
    """Replace linear layers by LoRALinear, in place.

    Args:
        model: network to adapt.
        pattern: regular expression for the whole name of a layer.
        rank, alpha: see `LoRALinear`.
        seed: of the updates' initial values.

    Returns: name -> new layer.
    """
    generator, added = torch.Generator().manual_seed(seed), {}
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        if re.fullmatch(pattern, name):
            parent, _, child = name.rpartition(".")
            added[name] = LoRALinear(linear, rank, alpha, generator)
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
