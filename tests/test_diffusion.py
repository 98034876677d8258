"""The solvers against diffusers' schedulers, and DPM-Solver++'s order of accuracy on a known solution."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moma.sampling.diffusion import (
    SOLVERS,
    ScheduleConfig,
    add_noise,
    alphas_cumprod,
    solver_steps,
    timesteps,
)

diffusers = pytest.importorskip("diffusers")

CFG = ScheduleConfig()
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def eps_model(x: Tensor, t: int) -> Tensor:
    """Any smooth function of x and t serves as a model."""
    return torch.tanh(x * (0.5 + t / 1000))


def solve(solver: str, steps: int, x: Tensor, grid: str = "even") -> Tensor:
    history = None
    for step in solver_steps(CFG, steps, solver, grid):
        x, history = SOLVERS[solver](x, eps_model(x, step.t), step, history)
    return x


def solve_with_diffusers(scheduler, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(eps_model(x, int(t)), t, x).prev_sample
    return x


@pytest.mark.parametrize(("steps", "grid"), [(1, "even"), (50, "even"), (7, "leading")])
def test_ddim_equals_diffusers(steps: int, grid: str) -> None:
    """diffusers' own grid is "leading"; where the steps divide 1000 "even" is the same."""
    scheduler = diffusers.DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps(CFG, steps, "ddim", grid)
    found, expected = solve("ddim", steps, noise(0), grid), solve_with_diffusers(scheduler, noise(0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", ["first", "clean"])
@pytest.mark.parametrize("steps", [1, 4, 8])  # where they do not divide 1000, theirs steps past its own grid
def test_trailing_ddim_equals_diffusers(steps: int, end: str) -> None:
    """As the recipes for few steps have it."""
    cfg = ScheduleConfig(end=end)
    scheduler = diffusers.DDIMScheduler(
        **SD15, clip_sample=False, set_alpha_to_one=end == "clean", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps(cfg, steps, "ddim", "trailing")
    found, path = noise(0), solver_steps(cfg, steps, "ddim", "trailing")
    for step in path:
        found, _ = SOLVERS["ddim"](found, eps_model(found, step.t), step, None)
    torch.testing.assert_close(found, solve_with_diffusers(scheduler, noise(0)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", ["even", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_dpm_equals_diffusers(steps: int, grid: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD15, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(timesteps=timesteps(CFG, steps, "dpm", grid))
    found, expected = solve("dpm", steps, noise(0), grid), solve_with_diffusers(scheduler, noise(0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_grids() -> None:
    """Every stride of an even grid is the same but for rounding, the solver's last one included."""
    assert timesteps(CFG, 20, "dpm") == list(range(999, 0, -50))
    assert timesteps(CFG, 20, "dpm", "leading") == list(range(951, 0, -50)) == timesteps(CFG, 20)
    for solver, first, after in (("ddim", 1000, 1), ("dpm", 999, -1)):
        for steps in (1, 3, 6, 7, 11, 30, 300, 333, 999):
            found = timesteps(CFG, steps, solver)
            ends = [first, *found] if solver == "ddim" else [*found, after]
            strides = {a - b for a, b in pairwise(ends)}
            assert len(found) == steps and max(strides) - min(strides) <= 2, (steps, strides)
            assert max(found) <= 999 and min(found) >= 0


def test_add_noise_equals_diffusers() -> None:
    scheduler = diffusers.DDIMScheduler(**SD15)
    t = torch.tensor([0, 700])
    ours = add_noise(noise(0), noise(1), alphas_cumprod(CFG)[t][:, None, None, None])
    torch.testing.assert_close(ours, scheduler.add_noise(noise(0), noise(1), t), rtol=1e-6, atol=1e-6)


def test_solvers_recover_a_point() -> None:
    """Where the data is one point, eps is known exactly and DPM-Solver++ must return that point."""
    target, x = noise(2), noise(3)
    history = None
    for step in solver_steps(CFG, 10, "dpm"):
        eps = (x - step.alpha.sqrt() * target) / (1 - step.alpha).sqrt()
        x, history = SOLVERS["dpm"](x, eps, step, history)
    torch.testing.assert_close(x, target, rtol=0, atol=1e-4)


def test_dpm_needs_fewer_steps() -> None:
    """Data N(1.5, 1.5²): eps and the exact flow are known. DPM-Solver++ at 20 steps beats DDIM at 20."""
    mean, std, start = 1.5, 1.5, noise(0)
    errors = {}
    for solver in SOLVERS:
        x, history, path = start, None, solver_steps(CFG, 20, solver)
        for step in path:
            variance = step.alpha * std**2 + 1 - step.alpha
            eps = (x - step.alpha.sqrt() * mean) * (1 - step.alpha).sqrt() / variance
            x, history = SOLVERS[solver](x, eps, step, history)
        first, last = path[0].alpha, path[-1].alpha_next
        scale = ((last * std**2 + 1 - last) / (first * std**2 + 1 - first)).sqrt()
        exact = last.sqrt() * mean + scale * (start - first.sqrt() * mean)
        errors[solver] = (x - exact).abs().mean().item()
    assert errors["dpm"] < 0.5 * errors["ddim"] and errors["ddim"] < 0.1, errors


def test_every_row_alone() -> None:
    for solver in SOLVERS:
        torch.testing.assert_close(
            solve(solver, 5, noise(0))[1:], solve(solver, 5, noise(0)[1:]), rtol=0, atol=0
        )


@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_impossible_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 999"):
        timesteps(CFG, steps)


def test_unknown_solver() -> None:
    with pytest.raises(ValueError, match="ddim, dpm"):
        solver_steps(CFG, 5, "euler")
