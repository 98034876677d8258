"""The denoising loop with classifier-free guidance.

It knows the UNet and a conditioning (`moma.sampling.interface`), and no method: whatever a method carries
from step to step, such as MoMA's M_gen (Sec. 3.3), is its own state, which the loop hands back to it.

Letters: B images, R rows of a UNet call (2B under guidance, else B), Z latent channels, h w latents.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.unet import UNet
from moma.sampling.config import TIMESTEPS
from moma.sampling.cuda_graphs import GraphedUNet
from moma.sampling.diffusion import SOLVERS, History, SolverStep
from moma.sampling.interface import Conditioning, State


class Step(NamedTuple):
    """The state after one denoising step: all that the next steps need beside the conditioning."""

    index: int
    t: int
    latents: Tensor  # float32 (B, Z, h, w)
    noise_pred: Tensor  # float32 (B, Z, h, w), after guidance
    state: State  # of the method, for the next step
    history: History | None  # of the solver

    def to(self, device: torch.device | str) -> "Step":
        """The same on a device; the solver's half log SNR is a number of the schedule and stays on the
        CPU."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self, part: slice) -> "Step":
        """The step of some of the images."""
        return self._map(lambda tensor: tensor[part].clone())

    def _map(self, change) -> "Step":
        return self._replace(
            latents=change(self.latents),
            noise_pred=change(self.noise_pred),
            state={name: change(tensor) for name, tensor in self.state.items()},
            history=self.history and self.history._replace(x0=change(self.history.x0)),
        )


def is_guided(t: int, guidance_interval: tuple[int, int]) -> bool:
    """Whether guidance acts at timestep t (`SampleConfig.guidance_interval`)."""
    low, high = guidance_interval
    return low <= t < high


def denoise(
    unet: UNet | GraphedUNet,
    conditioning: Conditioning,
    schedule: Sequence[SolverStep],
    latents: Tensor,
    guidance: float,
    solver: str,
    guidance_interval: tuple[int, int] = (0, TIMESTEPS),
    after: Step | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Yield the state after each step of the schedule, from noise to clean latents.

    Args:
        unet: predicts the noise.
        conditioning: of these B images.
        schedule: of `moma.sampling.diffusion.solver_steps`.
        latents: float32 (B, Z, h, w), standard normal noise.
        guidance: classifier-free guidance scale; 1 = the conditional prediction alone.
        solver: one of `moma.sampling.diffusion.SOLVERS`.
        guidance_interval: timesteps at which guidance acts; the others take half the work.
        after: a step of the same drawing, on the device, to go on from.
        dtype: of the UNet's weights.
    """
    alone = conditioning.conditional()
    x, state, history, start = latents, {}, None, 0
    if after is not None:
        x, state, history, start = after.latents, after.state, after.history, after.index + 1
    for index, step in enumerate(schedule[start:], start):
        guided = is_guided(step.t, guidance_interval)
        steering = conditioning if guided else alone
        rows = (torch.cat([x, x]) if guided else x).to(dtype)  # (R, Z, h, w)
        t = torch.full((rows.shape[0],), step.t, device=x.device)  # (R,)
        text, added, hook = steering.at(step, state)
        eps, maps = unet(rows, t, text, hook, added)  # (R, Z, h, w)
        noise_pred = (
            classifier_free_guidance(eps.float(), guidance) if guided else eps.float()
        )  # (B, Z, h, w)
        x, history = SOLVERS[solver](x, noise_pred, step, history)
        state = steering.next_state(maps, (x.shape[-2], x.shape[-1]))
        yield Step(index, step.t, x, noise_pred, state, history)


def classifier_free_guidance(eps: Tensor, guidance: float) -> Tensor:
    """Both rows' noise predictions (2B, Z, h, w) -> (B, Z, h, w) (arXiv 2207.12598)."""
    unconditional, conditional = eps.chunk(2)  # 2 x (B, Z, h, w)
    return unconditional + guidance * (conditional - unconditional)
