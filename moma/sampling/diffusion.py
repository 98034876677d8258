"""The noise schedule and two solvers, as pure functions of float32 tensors.

Sources: DDPM (arXiv 2006.11239) for the forward process, DDIM (arXiv 2010.02502, Eq. 12 with eta = 0),
DPM-Solver++ (arXiv 2211.01095, Algorithm 2). Compared with diffusers' schedulers in tests/test_diffusion.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScheduleConfig:
    """Stable Diffusion 1.x's forward process."""

    train_steps: int = 1000
    beta_start: float = 0.00085  # betas are linear in their square roots ("scaled linear")
    beta_end: float = 0.012
    steps_offset: int = 1  # added to every sampling timestep, as the public models' scheduler configs say
    # Where DDIM ends: "first" = at ᾱ_0 (set_alpha_to_one=False, Stable Diffusion), "clean" = at x_0.
    end: Literal["first", "clean"] = "first"


def alphas_cumprod(cfg: ScheduleConfig) -> Tensor:
    """ᾱ_t for t = 0 .. train_steps-1, float32: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) noise."""
    roots = torch.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.train_steps, dtype=torch.float32)
    return torch.cumprod(1 - roots**2, dim=0)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """q(x_t | x_0).

    Args:
        x0: clean latents.
        noise: of the same shape.
        alpha: ᾱ_t, broadcastable to it.
    """
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise


class SolverStep(NamedTuple):
    """One solver step, from timestep t to the next lower one."""

    t: int
    alpha: Tensor  # ᾱ at t, ()
    alpha_next: Tensor  # ᾱ at the step's end, ()


class History(NamedTuple):
    """What a multistep solver keeps of the step before."""

    x0: Tensor
    half_log_snr: Tensor  # λ of DPM-Solver, ()


Solver = Callable[[Tensor, Tensor, SolverStep, History | None], tuple[Tensor, History | None]]


def timesteps(cfg: ScheduleConfig, steps: int, solver: str = "ddim", grid: str = "even") -> list[int]:
    """The timesteps of a solver's calls, high to low.

    DDIM ends at ᾱ_0, so its last call is at t = 1. DPM-Solver++ ends at the clean x_0, and a call where
    hardly any noise is left would be wasted: its grid starts at the top and stops a stride above 0.

    Args:
        cfg: the base's schedule.
        steps: how many, 1 to train_steps - 1.
        solver: a name of SOLVERS.
        grid: "even", in equal strides: 50 of "ddim" -> 981, 961, ..., 1; 20 of "dpm" -> 999, 949, ..., 49.
            "leading" = both solvers' as the release, with the stride rounded down: the same for "ddim" where
            `steps` divides train_steps. "trailing" = from the top, for both: what models and LoRAs for few
            steps were made for; the same as "even" for "dpm".
    """
    if not 1 <= steps < cfg.train_steps:
        raise ValueError(f"{steps} steps: expected 1 to {cfg.train_steps - 1}")
    if grid == "leading":
        return [i * (cfg.train_steps // steps) + cfg.steps_offset for i in reversed(range(steps))]
    if solver == "dpm" or grid == "trailing":
        return [round(i * cfg.train_steps / steps) - 1 for i in range(steps, 0, -1)]
    return [i * cfg.train_steps // steps + cfg.steps_offset for i in reversed(range(steps))]


def solver_steps(cfg: ScheduleConfig, steps: int, solver: str, grid: str = "even") -> list[SolverStep]:
    """The steps of a solver; DPM-Solver++ always ends at the clean x_0, DDIM where `cfg.end` says.

    Args:
        cfg: the base's schedule.
        steps: how many, 1 to train_steps - 1.
        solver: a name of SOLVERS.
        grid: of `timesteps`.

    Raises:
        ValueError: for another number or name.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    alphas, ts = alphas_cumprod(cfg), timesteps(cfg, steps, solver, grid)
    end = alphas[0] if solver == "ddim" and cfg.end == "first" else torch.ones(())
    ends = [alphas[t] for t in ts[1:]] + [end]
    return [SolverStep(t, alphas[t], alpha_next) for t, alpha_next in zip(ts, ends, strict=True)]


def ddim_step(x: Tensor, eps: Tensor, step: SolverStep, history: History | None) -> tuple[Tensor, None]:
    """DDIM, deterministic (eta = 0).

    Args:
        x: x_t, float32 (B, C, h, w).
        eps: the noise in it.
        step: the solver step.
        history: not used.

    Returns:
        x at the step's end, and None.
    """
    x0 = predict_x0(x, eps, step.alpha)
    return add_noise(x0, eps, step.alpha_next), None


def dpmpp_2m_step(
    x: Tensor, eps: Tensor, step: SolverStep, history: History | None
) -> tuple[Tensor, History]:
    """DPM-Solver++(2M), data prediction; the first and the last step are first order.

    Args:
        x: x_t, float32 (B, C, h, w).
        eps: the noise in it.
        step: the solver step.
        history: of the step before, None in the first.

    Returns:
        x at the step's end, and the history for the next step.
    """
    x0 = predict_x0(x, eps, step.alpha)
    now = half_log_snr(step.alpha)
    if step.alpha_next == 1:  # no noise left: λ is infinite, the solution is x0 itself
        return x0, History(x0, now)
    h = half_log_snr(step.alpha_next) - now
    d = x0
    if history is not None:
        r = (now - history.half_log_snr) / h
        d = x0 + (x0 - history.x0) / (2 * r)
    sigma_ratio = ((1 - step.alpha_next) / (1 - step.alpha)).sqrt()
    return sigma_ratio * x - step.alpha_next.sqrt() * torch.expm1(-h) * d, History(x0, now)


def predict_x0(x: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
    """The clean latents.

    Args:
        x: x_t.
        eps: the noise in it, of the same shape.
        alpha: ᾱ_t, broadcastable to it.
    """
    return (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()


def half_log_snr(alpha: Tensor) -> Tensor:
    """λ of DPM-Solver: log(√ᾱ / √(1-ᾱ))."""
    return 0.5 * (alpha.log() - (1 - alpha).log())


SOLVERS: dict[str, Solver] = {"ddim": ddim_step, "dpm": dpmpp_2m_step}
