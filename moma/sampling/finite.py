"""What networks give is checked where it leaves them, so that nothing that is not finite goes on unseen."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from models.vae import VAE


def check_finite(network: str, *outputs: Tensor) -> None:
    """ValueError, naming the network, unless all values are finite. Waits once for the device."""
    if not torch.stack([output.isfinite().all() for output in outputs]).all():
        raise ValueError(
            f"the output of the {network} is not finite: try --dtype bf16 or fp32, or a lower strength or"
            " guidance; if that does not help, the weights are damaged"
        )


class Autoencoder:
    """A VAE that is run again in float32, and from then on, once 16 bits have overflowed."""

    def __init__(self, vae: VAE) -> None:
        self.vae = vae

    def __call__(self, run: Callable[[VAE], Tensor]) -> Tensor:
        """What `run` makes of the VAE; it gives it its input in the VAE's dtype. ValueError: not finite."""
        found = run(self.vae)
        if not found.isfinite().all():
            if self.vae.dtype.itemsize < torch.float32.itemsize:
                warnings.warn(f"the VAE overflows in {self.vae.dtype}: it is run in fp32", stacklevel=2)
                self.vae = copy.deepcopy(self.vae).float()
                found = run(self.vae)
            check_finite("VAE", found)
        return found
