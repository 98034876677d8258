"""The training loop: `fit`."""

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

from models.weights.files import remove_parts
from moma.app.record import save_png
from moma.data.stream import Position
from moma.training.checkpoint import Saved, TrainState, load, prune, remove_after, save
from moma.training.config import TrainConfig, average_decay, learning_rate
from moma.training.log import cut_log, loss_curve, read_log, write_log
from moma.training.parallel import Ranks, gather_weights, local, synced, whole, wrap_parallel
from moma.training.stopping import Stopped, noted_signals
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
    model: nn.Module  # `task.model` as it is called, distributed over the ranks
    state: TrainState


def fit(
    task: Task, cfg: TrainConfig, out: Path, ranks: Ranks, identity: Mapping[str, Any], saved: Saved | None
) -> None:
    """Train until `cfg.steps` and export the result; on all ranks.

    SIGTERM or SIGINT on any rank ends it after the step under way.

    Args:
        task: model and data.
        cfg: of the loop.
        out: folder for checkpoints, log, images and export.
        ranks: this process and the others.
        identity: what a continuation must not change, for the checkpoints.
        saved: checkpoint to continue from; None = the beginning.

    Raises:
        ValueError: for a loss or gradient that is not finite; the checkpoints are from before it.
        Stopped: after a signal; there is a checkpoint of the last step.
        ChildProcessError: a process that reads the data has died.
    """
    torch.manual_seed(cfg.seed + ranks.rank)
    run = _prepare(task, cfg, out, ranks, identity)
    step, position = _start(run, saved)
    data = task.batches(cfg.batch_size, ranks.rank, ranks.world, position)
    bar = tqdm(total=cfg.steps, initial=step, unit="step", disable=not ranks.main)
    with noted_signals() as stop, bar, _worker_deaths(out):
        while step < cfg.steps:
            clock, rate = time.perf_counter(), learning_rate(cfg, step)
            loss = torch.zeros((), device=ranks.device)
            for part in range(cfg.accumulate):
                batch, position = next(data)
                with synced(run.model, last=part == cfg.accumulate - 1):
                    losses = _losses_of(run, batch)  # (B,)
                    share = losses.mean() / cfg.accumulate
                    share.backward()
                loss += share.detach()
            norm = _clip_gradients(run)
            asked = loss.new_tensor(stop.signal > 0, dtype=loss.dtype)
            loss, stopping = ranks.mean(torch.stack([loss, asked])).tolist()
            numbers = {"loss": loss, "grad_norm": norm, "lr": rate}
            _check_finite(step, numbers)
            for group in run.state.optimizer.param_groups:
                group["lr"] = rate
            run.state.optimizer.step()
            run.state.optimizer.zero_grad()
            _update_average(run, step)
            step += 1
            _report(run, step, numbers, time.perf_counter() - clock, bar)
            saved_now = _milestones(run, step, position)
            if stopping and step < cfg.steps:
                if not saved_now:
                    _save(run, step, position, None)
                text = f"stopped after step {step}, which is saved; --resume continues"
                raise Stopped(max(ranks.gather(stop.signal)), text)
        _finish(run)


# --- parts of a step ---------------------------------------------------------------------------------


def _losses_of(run: Run, batch: Batch) -> Tensor:
    """Each sample's loss, (B,) float32."""
    device = run.ranks.device
    there = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with _computing(run):
        return run.model(there)


@contextmanager
def _computing(run: Run) -> Iterator[None]:
    """Mixed precision; on CPUs attention in plain operators, as the fused kernel's backward is slow."""
    device = run.ranks.device.type
    kernel = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    with torch.autocast(device, torch.bfloat16, enabled=run.cfg.dtype == "bf16"), kernel:
        yield


def _clip_gradients(run: Run) -> float:
    """Clip the gradients' norm to `cfg.clip`; returns the norm before."""
    limit = math.inf if run.cfg.clip is None else run.cfg.clip
    return whole(nn.utils.clip_grad_norm_(run.state.weights.values(), limit)).item()


def _check_finite(step: int, numbers: Mapping[str, float]) -> None:
    """ValueError for the first number that is infinite or NaN; step: finished ones."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(
                f"{name} is {value} after {step} steps: stopped; checkpoints are from before it; "
                "go on with --resume and --lr LOWER --change train.lr, or --dtype fp32 --change train.dtype"
            )


@torch.no_grad()
def _update_average(run: Run, step: int) -> None:
    """average <- decay * average + (1 - decay) * weights, after `step` finished ones."""
    for name, average in run.state.average.items():
        local(average).lerp_(local(run.state.weights[name]), 1 - average_decay(run.cfg, step))


@contextmanager
def _worker_deaths(out: Path) -> Iterator[None]:
    """ChildProcessError for the RuntimeError by which torch tells of a data process that was killed."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"{out}: stopped, a process that reads the data has died, perhaps of too little memory "
            f"({error}): use fewer --workers; --resume continues"
        ) from None


# --- around the steps --------------------------------------------------------------------------------


def _prepare(task: Task, cfg: TrainConfig, out: Path, ranks: Ranks, identity: Mapping[str, Any]) -> Run:
    """Distribute the model and set up what of it is trained."""
    if cfg.compile:
        for part in task.shards or [task.model]:
            part.compile()
    model = wrap_parallel(task.model, task.shards, ranks)
    named = [(name, weight) for name, weight in task.model.named_parameters() if weight.requires_grad]
    # Decayed ones first: the optimizer numbers weights by its groups.
    decayed, others = (
        [pair for pair in named if pair[0].startswith(tuple(task.decayed)) == own] for own in (True, False)
    )
    weights = dict(decayed + others)
    assert all(weight.dtype == torch.float32 for weight in weights.values()), "trained weights are float32"
    kept = task.model.state_dict()
    rule = {"lr": cfg.lr, "betas": cfg.betas, "fused": ranks.device.type in FUSED}
    groups = [
        {"params": [weight for _, weight in pairs], "weight_decay": decay}
        for pairs, decay in ((decayed, cfg.weight_decay), (others, 0.0))
        if pairs
    ]
    state = TrainState(
        weights=weights,
        buffers={name: buffer for name, buffer in task.model.named_buffers() if name in kept},
        average={} if cfg.ema is None else {name: w.detach().clone() for name, w in weights.items()},
        optimizer=torch.optim.AdamW(groups, **rule),
    )
    return Run(task, cfg, out, ranks, identity, model, state)


def _start(run: Run, saved: Saved | None) -> tuple[int, Position]:
    """Load the checkpoint and cut the log back to it; returns finished steps and the data's position."""
    if saved:
        load(saved, run.state, run.ranks)
    if run.ranks.main:
        run.out.mkdir(parents=True, exist_ok=True)
        if saved:
            remove_after(run.out, saved.step)
        prune(run.out, run.cfg.keep_last)
        remove_parts(run.out)
        cut_log(run.out / LOG, saved.step if saved else -1)
    if saved:
        return saved.step, saved.position
    _validate(run, 0)
    return 0, {}


def _report(run: Run, step: int, numbers: Mapping[str, float], seconds: float, bar: tqdm) -> None:
    """Show and log one step."""
    speed = run.cfg.batch_size * run.cfg.accumulate * run.ranks.world / seconds
    bar.set_postfix({"loss": f"{numbers['loss']:.4f}", "img/s": f"{speed:.3g}"}, refresh=False)
    bar.update()
    if run.ranks.main and _due(run, step, run.cfg.log_every):
        line = {"step": step, **numbers, "img_per_s": round(speed, 3)}
        if run.ranks.device.type == "cuda":
            line["memory_gb"] = round(torch.cuda.max_memory_allocated(run.ranks.device) / 1e9, 3)
        write_log(run.out / LOG, line)


def _due(run: Run, step: int, every: int) -> bool:
    return step % every == 0 or step == run.cfg.steps


def _milestones(run: Run, step: int, position: Position) -> bool:
    """Validation, images and checkpoint when due; the checkpoint last, as it holds the generators' states.

    Returns: whether there is a checkpoint of this step now.
    """
    saving, validation = _due(run, step, run.cfg.save_every), None
    if saving or _due(run, step, run.cfg.validate_every):
        validation = _validate(run, step)
    if _due(run, step, run.cfg.sample_every):
        _draw(run, step)
    if saving:
        _save(run, step, position, validation)
    return saving


def _save(run: Run, step: int, position: Position, validation: float | None) -> None:
    about = {"step": step, "position": position, "identity": run.identity, "validation": validation}
    save(run.out, run.state, run.ranks, about, run.cfg.keep_last)
    _draw_curve(run)


@torch.no_grad()
def _validate(run: Run, step: int) -> float | None:
    """Mean loss of the task's fixed batches, also written to the log; None where there are none."""
    with _averaged(run.state):
        losses = [_losses_of(run, batch).double() for batch in run.task.validation()]  # each (B,)
    if not losses:
        return None
    loss = torch.cat(losses).mean().item()
    _check_finite(step, {"validation loss": loss})
    if run.ranks.main:
        write_log(run.out / LOG, {"step": step, "validation": loss})
    return loss


@torch.no_grad()
def _draw(run: Run, step: int) -> None:
    """The task's sample grid; every rank draws it, as under FSDP2 none can alone."""
    with _averaged(run.state), _computing(run):
        parts = gather_weights(run.task.model)
        image = run.task.sample_grid()
        for part in parts:
            part.reshard()
    if image is not None and run.ranks.main:
        (run.out / SAMPLES).mkdir(exist_ok=True)
        save_png(run.out / SAMPLES / f"step-{step:08}.png", image)


def _draw_curve(run: Run) -> None:
    if run.ranks.main:
        save_png(run.out / CURVE, loss_curve(read_log(run.out / LOG)))


def _finish(run: Run) -> None:
    """The loss curve and the export, which a run killed after its last step may lack."""
    _draw_curve(run)
    with _averaged(run.state):
        gather_weights(run.task.model)  # not resharded: the run ends here
        if run.ranks.main:
            run.task.export(run.out / EXPORT)


@contextmanager
def _averaged(state: TrainState) -> Iterator[None]:
    """Inside, the weights are their average, if one is kept."""
    _swap(state)
    try:
        yield
    finally:
        _swap(state)


@torch.no_grad()
def _swap(state: TrainState) -> None:
    """Exchange the weights with their average, bit for bit."""
    for name, average in state.average.items():
        weight, held = local(state.weights[name]), local(average).clone()
        local(average).copy_(weight)
        weight.copy_(held)
