"""One comparison of a full-size network with its public implementation."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """`run` builds both networks with the same weights and returns (our output, the reference's)."""

    name: str
    run: Callable[[], tuple[Tensor, Tensor]]
