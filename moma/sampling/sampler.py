"""The denoising loop with classifier-free guidance and iterative masking (Sec. 3.3).

It knows nothing of networks but the UNet, and nothing of MoMA but that each step's mask shapes the next step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.unet import AttentionHook, UNet
from moma.sampling.config import TIMESTEPS
from moma.sampling.cuda_graphs import GraphedUNet
from moma.sampling.diffusion import SOLVERS, History, SolverStep


class Guide(Protocol):
    """What steers the UNet: `moma.methods.moma.adapter.Conditioning`, or `TextOnly` for plain Stable
    Diffusion."""

    text: Tensor  # (2B, T, context_dim): B unconditional rows, then B conditional ones

    def conditional(self) -> "Guide": ...  # the same of the conditional rows alone, text (B, T, context_dim)

    def hook(self, t: int, m_gen: Tensor | None) -> AttentionHook | None: ...

    def next_m_gen(self, records: list, size: tuple[int, int]) -> Tensor | None: ...


@dataclass(frozen=True)
class TextOnly:
    """Plain text-to-image: no hook, no mask."""

    text: Tensor

    def conditional(self) -> "TextOnly":
        return TextOnly(self.text.chunk(2)[1])

    def hook(self, t: int, m_gen: Tensor | None) -> None:
        return None

    def next_m_gen(self, records: list, size: tuple[int, int]) -> None:
        return None


class Step(NamedTuple):
    """The state after one denoising step: all that the steps after it need beside the conditioning."""

    index: int
    t: int
    latents: Tensor  # float32 (B, Z, h, w)
    noise_pred: Tensor  # float32 (B, Z, h, w), after guidance
    m_gen: Tensor | None  # float32 (B, 1, h, w), made in this step and used in the next
    history: History | None  # of the solver

    def to(self, device: torch.device | str) -> "Step":
        """The same on a device; λ, a number of the path, stays with the path on the CPU."""
        history = self.history and self.history._replace(x0=self.history.x0.to(device))
        m_gen = None if self.m_gen is None else self.m_gen.to(device)
        latents, noise_pred = self.latents.to(device), self.noise_pred.to(device)
        return self._replace(latents=latents, noise_pred=noise_pred, m_gen=m_gen, history=history)


class ResumeState(Protocol):
    """Where the state of one batch under way is kept, so that a drawing that was stopped can go on."""

    def read(self) -> Step | None:
        """The latest step that was kept, if any."""

    def keep(self, step: Step) -> None:
        """Called after every step; may pass over some, but not over the last one."""


def is_guided(t: int, interval: tuple[int, int]) -> bool:
    """Whether guidance acts at timestep t (`SampleConfig.guidance_interval`)."""
    low, high = interval
    return low <= t < high


def denoise(
    unet: UNet | GraphedUNet,
    guide: Guide,
    path: Sequence[SolverStep],
    latents: Tensor,
    guidance: float,
    solver: str,
    interval: tuple[int, int] = (0, TIMESTEPS),
    after: Step | None = None,
) -> Iterator[Step]:
    """Yields the state after each step of `path` (moma.sampling.diffusion.solver_steps), from noise to clean
    latents.

    latents: float32 (B, Z, h, w), standard normal noise; guidance: 1 = the conditional prediction alone;
    interval: timesteps at which guidance acts (`is_guided`), the others take half the work; after: a state
    of the same drawing, on the device, that it goes on from.
    """
    both, alone = guide, guide.conditional()
    x, m_gen, history, start = latents, None, None, 0
    if after is not None:
        x, m_gen, history, start = after.latents, after.m_gen, after.history, after.index + 1
    for index, step in enumerate(path[start:], start):
        guided = is_guided(step.t, interval)
        guide = both if guided else alone
        rows = (torch.cat([x, x]) if guided else x).to(guide.text.dtype)  # (2B | B, Z, h, w)
        t = torch.full((rows.shape[0],), step.t, device=x.device)  # (2B | B,)
        eps, records = unet(rows, t, guide.text, guide.hook(step.t, m_gen))  # (2B | B, Z, h, w)
        noise_pred = (
            classifier_free_guidance(eps.float(), guidance) if guided else eps.float()
        )  # (B, Z, h, w)
        x, history = SOLVERS[solver](x, noise_pred, step, history)
        m_gen = guide.next_m_gen(records, (x.shape[-2], x.shape[-1]))
        yield Step(index, step.t, x, noise_pred, m_gen, history)


def classifier_free_guidance(eps: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): both rows' predictions (2B, Z, h, w) -> (B, Z, h, w)."""
    unconditional, conditional = eps.chunk(2)  # 2 x (B, Z, h, w)
    return unconditional + guidance * (conditional - unconditional)
