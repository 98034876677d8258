"""Networks that take turns in memory: each is loaded when it is used, and freed when another one is."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moma.sampling.memory import return_freed


class Turns:
    """Holds one network at a time."""

    def __init__(self) -> None:
        self.holder: Turn | None = None
        self.network: nn.Module | None = None

    def of(self, holder: "Turn") -> nn.Module:
        """The holder's network; whichever was there before is freed first."""
        if self.holder is not holder:
            self.holder = self.network = None
            return_freed()
            self.network, self.holder = holder.load(), holder
        return self.network


class Turn:
    """Stands in for a network: its config, device and dtype are at hand, for all else it is loaded."""

    def __init__(
        self,
        turns: Turns,
        load: Callable[[], nn.Module],
        cfg: Any,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """A network that is not loaded yet.

        Args:
            turns: of all networks of which one is in memory.
            load: makes the network.
            cfg: its config.
            device: where it will be.
            dtype: that it computes in.
        """
        self.turns, self.load, self.cfg, self.device, self.dtype = turns, load, cfg, device, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.turns.of(self)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python looks for in any object
            raise AttributeError(name)
        return getattr(self.turns.of(self), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A network of its own, without turns."""
        return copy.deepcopy(self.turns.of(self), memo)
