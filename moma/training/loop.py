"""The training loop of both stages: `fit`."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from moma.app.record import save_png
from moma.data.stream import Position
from moma.training.checkpoint import Saved, TrainState, load, prune, save
from moma.training.config import TrainConfig, learning_rate
from moma.training.log import cut_log, loss_curve, read_log, write_log
from moma.training.parallel import Ranks, gather_weights, local, spread, synced, whole
from moma.training.task import Batch, Task

LOG, CURVE, SAMPLES, EXPORT = "log.jsonl", "loss.png", "samples", "export"  # names in the run's folder
FUSED = ("cpu", "cuda", "mps")  # device types for which torch has AdamW as one kernel


@dataclass(frozen=True)
class Run:
    """A training in progress."""

    task: Task
    cfg: TrainConfig
    out: Path  # folder for checkpoints, log, images and export, written by rank 0
    ranks: Ranks
    identity: Mapping[str, Any]  # what a continuation must not change, for the checkpoints
    model: nn.Module  # `task.model` as it is called, spread over the ranks
    trainee: TrainState


def fit(
    task: Task, cfg: TrainConfig, out: Path, ranks: Ranks, identity: Mapping[str, Any], saved: Saved | None
) -> None:
    """Train until `cfg.steps`, from the beginning or from a checkpoint, and export the result; on all ranks.

    ValueError for a loss or gradient that is not finite; the checkpoints are from before it.
    """
    torch.manual_seed(cfg.seed + ranks.rank)
    run = prepare(task, cfg, out, ranks, identity)
    step, position = start(run, saved)
    data = task.deliveries(cfg.batch_size, ranks.rank, ranks.world, position)
    with tqdm(total=cfg.steps, initial=step, unit="step", disable=not ranks.main) as bar:
        while step < cfg.steps:
            clock, rate = time.perf_counter(), learning_rate(cfg, step)
            loss = torch.zeros((), device=ranks.device)
            for part in range(cfg.accumulate):
                batch, position = next(data)
                with synced(run.model, last=part == cfg.accumulate - 1):
                    losses = losses_of(run, batch)  # (B,)
                    share = losses.mean() / cfg.accumulate
                    share.backward()
                loss += share.detach()
            norm = clip_gradients(run)
            numbers = {"loss": ranks.mean(loss).item(), "grad_norm": norm, "lr": rate}
            check_finite(step, numbers)
            for group in run.trainee.optimizer.param_groups:
                group["lr"] = rate
            run.trainee.optimizer.step()
            run.trainee.optimizer.zero_grad()
            update_average(run)
            step += 1
            report(run, step, numbers, time.perf_counter() - clock, bar)
            milestones(run, step, position)
    finish(run)


# --- parts of a step ---------------------------------------------------------------------------------


def losses_of(run: Run, batch: Batch) -> Tensor:
    """Each sample's loss, (B,) float32."""
    device = run.ranks.device
    there = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with computing(run):
        return run.model(there)


@contextmanager
def computing(run: Run) -> Iterator[None]:
    """Mixed precision; on CPUs attention in plain operators: the fused kernel's backward is slow."""
    device = run.ranks.device.type
    kernel = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with torch.autocast(device, torch.bfloat16, enabled=run.cfg.dtype == "bf16"), kernel:
        yield


def clip_gradients(run: Run) -> float:
    """Scale all gradients to the norm `cfg.clip` if theirs is larger; returns what it was."""
    limit = math.inf if run.cfg.clip is None else run.cfg.clip
    return whole(nn.utils.clip_grad_norm_(run.trainee.weights.values(), limit)).item()


def check_finite(step: int, numbers: Mapping[str, float]) -> None:
    """ValueError for the first number that is infinite or NaN; step: finished ones."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is {value} after {step} steps: stopped; checkpoints are from before it; "
                "try a lower --lr, or --dtype fp32"
            )


@torch.no_grad()
def update_average(run: Run) -> None:
    """average <- ema * average + (1 - ema) * weights."""
    for name, average in run.trainee.average.items():
        local(average).lerp_(local(run.trainee.weights[name]), 1 - run.cfg.ema)


# --- around the steps --------------------------------------------------------------------------------


def prepare(task: Task, cfg: TrainConfig, out: Path, ranks: Ranks, identity: Mapping[str, Any]) -> Run:
    """The model spread over the ranks, and what of it is trained."""
    if cfg.compile:
        for part in task.shards or [task.model]:
            part.compile()
    model = spread(task.model, task.shards, ranks)
    weights = {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}
    assert all(weight.dtype == torch.float32 for weight in weights.values()), "trained weights are float32"
    kept = task.model.state_dict()
    rule = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    trainee = TrainState(
        weights=weights,
        buffers={name: buffer for name, buffer in task.model.named_buffers() if name in kept},
        average={} if cfg.ema is None else {name: w.detach().clone() for name, w in weights.items()},
        optimizer=torch.optim.AdamW(weights.values(), **rule, fused=ranks.device.type in FUSED),
    )
    return Run(task, cfg, out, ranks, identity, model, trainee)


def start(run: Run, saved: Saved | None) -> tuple[int, Position]:
    """Load the checkpoint, cut the log back to it; returns finished steps and the data's position."""
    if saved:
        load(saved, run.trainee, run.ranks)
    if run.ranks.main:
        run.out.mkdir(parents=True, exist_ok=True)
        prune(run.out, run.cfg.keep_last)
        cut_log(run.out / LOG, saved.step if saved else -1)
    if saved:
        return saved.step, saved.position
    validate(run, 0)
    return 0, {}


def report(run: Run, step: int, numbers: Mapping[str, float], seconds: float, bar: tqdm) -> None:
    """One step on the screen and in the log."""
    speed = run.cfg.batch_size * run.cfg.accumulate * run.ranks.world / seconds
    bar.set_postfix({"loss": f"{numbers['loss']:.4f}", "img/s": f"{speed:.3g}"}, refresh=False)
    bar.update()
    if run.ranks.main and due(run, step, run.cfg.log_every):
        line = {"step": step, **numbers, "img_per_s": round(speed, 3)}
        if run.ranks.device.type == "cuda":
            line["memory_gb"] = round(torch.cuda.max_memory_allocated(run.ranks.device) / 1e9, 3)
        write_log(run.out / LOG, line)


def due(run: Run, step: int, every: int) -> bool:
    return step % every == 0 or step == run.cfg.steps


def milestones(run: Run, step: int, position: Position) -> None:
    """Validation, images and checkpoint when they are due, the checkpoint last: it holds what they drew."""
    saving, validation = due(run, step, run.cfg.save_every), None
    if saving or due(run, step, run.cfg.validate_every):
        validation = validate(run, step)
    if due(run, step, run.cfg.sample_every):
        draw(run, step)
    if saving:
        state = {"step": step, "position": position, "identity": run.identity, "validation": validation}
        save(run.out, run.trainee, run.ranks, state, run.cfg.keep_last)
        draw_curve(run)


@torch.no_grad()
def validate(run: Run, step: int) -> float | None:
    """Mean loss of the task's fixed batches, also written to the log; None where there are none."""
    with averaged(run.trainee):
        losses = [losses_of(run, batch).double() for batch in run.task.validation()]  # each (B,)
    if not losses:
        return None
    loss = torch.cat(losses).mean().item()
    check_finite(step, {"validation loss": loss})
    if run.ranks.main:
        write_log(run.out / LOG, {"step": step, "validation": loss})
    return loss


@torch.no_grad()
def draw(run: Run, step: int) -> None:
    """The task's images; every rank draws them, as under FSDP2 none can alone."""
    with averaged(run.trainee), computing(run):
        parts = gather_weights(run.task.model)
        image = run.task.sample_grid()
        for part in parts:
            part.reshard()
    if image is not None and run.ranks.main:
        (run.out / SAMPLES).mkdir(exist_ok=True)
        save_png(run.out / SAMPLES / f"step-{step:08}.png", image)


def draw_curve(run: Run) -> None:
    if run.ranks.main:
        save_png(run.out / CURVE, loss_curve(read_log(run.out / LOG)))


def finish(run: Run) -> None:
    """The image of the losses and the export; also what a run that was killed after its last step lacks."""
    draw_curve(run)
    with averaged(run.trainee):
        gather_weights(run.task.model)  # for good: the run ends here
        if run.ranks.main:
            run.task.export(run.out / EXPORT)


@contextmanager
def averaged(trainee: TrainState) -> Iterator[None]:
    """Within, the weights are their average, if one is kept."""
    swap(trainee)
    try:
        yield
    finally:
        swap(trainee)


@torch.no_grad()
def swap(trainee: TrainState) -> None:
    """Exchange the weights with their average, bit for bit."""
    for name, average in trainee.average.items():
        weight, held = local(trainee.weights[name]), local(average).clone()
        local(average).copy_(weight)
        weight.copy_(held)
