"""Checkpoints: everything that a run needs to continue as if it had never stopped.

    <out>/checkpoints/step-00001000/
        state.json             step, data position, identity of the run, validation loss, hashes of the files
        model.safetensors      the trained parameters (float32) and the model's buffers, whole tensors
        average.safetensors    their average, if one is kept
        optimizer.safetensors  AdamW's state as <parameter>.<exp_avg|exp_avg_sq|step>
        random.safetensors     state of each rank's generators

A folder of that name is complete: it is written and flushed under another name, then renamed. Hashes tell
damage from then on, and a run goes back to the newest checkpoint that is whole. The files do not depend on
the ranks that wrote them. The learning rate follows from the step and is not stored.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.weights.files import flush, read_object
from models.weights.loading import (
    LazyTensor,
    does_not_fit,
    read_checkpoint,
    save_tensors,
    state_dict_mismatch,
)
from moma.app.files import write_text
from moma.sampling.config import check_types
from moma.training.parallel import Ranks, whole

FORMAT, VERSION = "moma-training", 2
STATE = "state.json"
DIFFERENCES = 4  # spelled out in an error
HASH_LENGTH, HASH_SHOWN = 64, 12  # characters of a sha256, and of those in an error


@dataclass(frozen=True)
class TrainState:
    """What the training changes. Keys: names in `Task.model`; values: under FSDP2, this rank's shards."""

    weights: dict[str, nn.Parameter]  # the trained ones, float32
    buffers: dict[str, Tensor]
    average: dict[str, Tensor]  # of the weights, {} = none is kept
    optimizer: torch.optim.Optimizer  # over the weights in this order

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> tensors. A weight that never had a gradient has no optimizer state."""
        states = {name: self.optimizer.state.get(weight, {}) for name, weight in self.weights.items()}
        optimizer = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
        return {"model": {**self.weights, **self.buffers}, "average": self.average, "optimizer": optimizer}


@dataclass(frozen=True)
class Saved:
    """A checkpoint's `state.json`."""

    folder: Path
    step: int  # finished ones
    position: Mapping[str, int]  # in the data
    identity: Mapping[str, Any]  # what must not differ between a run and its continuation
    validation: float | None
    files: Mapping[str, str]  # name -> sha256

    def tensors(self, stem: str) -> dict[str, LazyTensor]:
        """The tensors of `TrainState.groups`, which lie in several files where they are large."""
        files = [self.folder / file for file in self.files if file.split("-")[0].split(".")[0] == stem]
        return {name: tensor for file in files for name, tensor in read_checkpoint(file).items()}

    def verify(self) -> None:
        """ValueError, naming the file, if the checkpoint is not as it was written; reads all of it."""
        for name, wanted in self.files.items():
            try:
                with open(self.folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ValueError(f"{self.folder / name}: cannot be read ({error.strerror})") from None
            if found != wanted:
                raise ValueError(
                    f"{self.folder / name}: damaged, its content has changed since it was written"
                )


# --- which there are ---------------------------------------------------------------------------------


def read_state(folder: Path) -> Saved:
    """Open a checkpoint; ValueError for an incomplete or damaged one. Its tensors are not read."""
    try:
        state = read_object(folder / STATE)
        if (state.pop("format"), state.pop("version")) != (FORMAT, VERSION):
            raise ValueError("of another version")
        if state.pop("sha256") != _digest(state):
            raise ValueError(f"{STATE} has changed since it was written")
        check_types(saved := Saved(folder, **state))
        if missing := [file for file in saved.files if not (folder / Path(file).name).is_file()]:
            raise ValueError(f"{missing[0]} is missing")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder}: not a whole checkpoint ({error})") from None
    return saved


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def checkpoints(out: Path, say: Callable[[str], Any] = lambda text: None) -> list[Saved]:
    """The checkpoints of a run that have all their files, oldest first.

    Args:
        out: the run's folder.
        say: is told of every other one.

    Raises:
        ValueError: if there are some and none has all its files.
    """
    found, damage = [], None
    for folder in sorted((out / "checkpoints").glob("step-*")):
        try:
            found.append(read_state(folder))
        except ValueError as error:
            damage = error
            say(f"passed over: {error}")
    if damage and not found:
        raise damage
    return found


def first_whole(candidates: Iterable[Saved], say: Callable[[str], Any] = print) -> Saved | None:
    """The first checkpoint that is as it was written; None if there are none.

    Args:
        candidates: in order of preference.
        say: is told of those that are passed over.

    Raises:
        ValueError: if there are some and all are damaged.
    """
    damage = None
    for saved in candidates:
        try:
            saved.verify()
            return saved
        except ValueError as error:
            damage = error
            say(f"passed over: {error}")
    if damage:
        raise damage
    return None


def newest(out: Path, say: Callable[[str], Any] = print) -> Saved | None:
    """The newest checkpoint of a run that is whole; as `first_whole`."""
    return first_whole(reversed(checkpoints(out, say)), say)


def best(saved: Sequence[Saved]) -> Saved | None:
    """The checkpoint with the lowest validation loss, None without any."""
    return next((one for one in by_validation(saved) if one.validation is not None), None)


def by_validation(saved: Sequence[Saved]) -> list[Saved]:
    """The best first; then those without a validation loss, newest first."""
    validated = [one for one in saved if one.validation is not None]
    rest = [one for one in reversed(saved) if one.validation is None]
    return sorted(validated, key=lambda one: one.validation) + rest


def check_same(saved: Saved, identity: Mapping[str, Any], steps: int, change: Collection[str] = ()) -> None:
    """ValueError, naming the differences, if a run cannot continue from a checkpoint.

    Args:
        saved: the checkpoint.
        identity: of the run.
        steps: of the run in all.
        change: names of what may differ, such as "train.lr".
    """
    then, now = _flat(saved.identity), _flat(json.loads(json.dumps(identity)))
    if unknown := sorted(set(change) - {*then, *now}):
        raise ValueError(f"--change {unknown[0]}: expected one of {', '.join(sorted({*then, *now}))}")
    refused = {name for name in {**then, **now} if then.get(name) != now.get(name)}.difference(change)
    if listed := differences(*({n: tree.get(n) for n in sorted(refused)} for tree in (then, now))):
        raise ValueError(
            f"{saved.folder}: of another run: {listed}; undo that, go on with it by --change"
            f" {min(refused)}, or change --out"
        )
    if saved.step > steps:
        raise ValueError(f"{saved.folder}: has already {saved.step} steps, asked for {steps}")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name some differences between settings from JSON (then) and others (now); "" if they are the same."""
    then, now = _flat(then), _flat(json.loads(json.dumps(now)))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    listed = [f"{n} {_short(then.get(n))} then, {_short(now.get(n))} now" for n in names[:DIFFERENCES]]
    more = [f"and {len(names) - DIFFERENCES} more"] if len(names) > DIFFERENCES else []
    return "; ".join(listed + more)


def _short(value: Any) -> str:
    """A value for people; of a hash, its beginning."""
    return repr(value[:HASH_SHOWN] if isinstance(value, str) and len(value) == HASH_LENGTH else value)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# --- writing -----------------------------------------------------------------------------------------


def save(out: Path, state: TrainState, ranks: Ranks, about: Mapping[str, Any], keep_last: int) -> None:
    """Write a checkpoint, then `prune`; on all ranks.

    Args:
        out: the run's folder.
        state: what is saved.
        ranks: this process and the others.
        about: step, identity and validation of `Saved`, and this rank's position.
        keep_last: number of checkpoints kept beside the best.
    """
    positions = ranks.gather(about["position"])
    position = {key: max(p[key] for p in positions if key in p) for p in positions for key in p}
    generators = [pair for pairs in ranks.gather(_generators(ranks)) for pair in pairs.items()]
    folder, files = out / "checkpoints" / f"step-{about['step']:08}", {}
    with _appears_whole(folder, ranks) as part:
        for stem, tensors in {**state.groups(), "random": dict(generators)}.items():
            held = {}
            for name, tensor in tensors.items():
                values = whole(tensor)  # gathers the other ranks' shards
                if ranks.main:
                    held[name] = values.cpu()
            if held:
                files |= save_tensors(part, stem, held)
        if ranks.main:
            state = json.loads(json.dumps({**about, "position": position, "files": files}))
            record = {"format": FORMAT, "version": VERSION, "sha256": _digest(state), **state}
            write_text(part / STATE, json.dumps(record, indent=1) + "\n")
    if ranks.main:
        prune(out, keep_last)


def _generators(ranks: Ranks) -> dict[str, Tensor]:
    """States of torch's generators in this process, named by its rank."""
    states = {f"cpu.{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"cuda.{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return states


@contextmanager
def _appears_whole(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield a hidden folder for rank 0 to fill; flush it to the disk and rename it to `folder`."""
    part = folder.with_name(f".{folder.name}.part")
    if not ranks.main:
        yield part
        return
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        flush(part)
        if folder.exists():  # a damaged checkpoint: others are never written twice
            _remove(folder)
        os.rename(part, folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder so that its name never shows half of it."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    shutil.rmtree(old)


def remove_after(out: Path, step: int) -> None:
    """Remove the checkpoints after `step`, which were damaged: the run goes on before them."""
    for folder in (out / "checkpoints").glob("step-*"):
        if folder.name > f"step-{step:08}":
            _remove(folder)


def prune(out: Path, keep_last: int) -> None:
    """Remove checkpoints that are neither among the last nor the best, and what a killed run left."""
    found = checkpoints(out)
    keep = [*found[-keep_last:], best(found)]
    for one in found:
        if one not in keep:
            _remove(one.folder)
    for folder in (out / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


# --- reading -----------------------------------------------------------------------------------------


@torch.no_grad()
def load(saved: Saved, state: TrainState, ranks: Ranks) -> None:
    """Restore a checkpoint, on all ranks; rank 0 reads.

    Args:
        saved: the checkpoint.
        state: to restore it to.
        ranks: this process and the others.

    Raises:
        ValueError: for tensors of another model.
    """
    stored = {stem: saved.tensors(stem) if ranks.main else {} for stem in (*state.groups(), "random")}

    def read(stem: str, name: str, like: Tensor) -> Tensor:
        values = torch.empty(like.shape, dtype=like.dtype)
        if ranks.main:
            values = stored[stem][name].read().clone()
        return ranks.distribute(values, like)

    for stem in ("model", "average"):
        if ranks.main:
            _check_fit(saved, stem, state.groups()[stem], stored[stem])
        for name, tensor in state.groups()[stem].items():
            tensor.copy_(read(stem, name, tensor))

    known, states = ranks.share(set(stored["optimizer"])), {}
    for number, (name, weight) in enumerate(state.weights.items()):
        # AdamW's count of the steps of each weight is a single number and never sharded.
        likes = {"step": torch.zeros((), device=weight.device), "exp_avg": weight, "exp_avg_sq": weight}
        keys = [key for key in likes if f"{name}.{key}" in known]
        states[number] = {key: read("optimizer", f"{name}.{key}", likes[key]) for key in keys}
    groups = state.optimizer.state_dict()["param_groups"]
    states = {number: one for number, one in states.items() if one}
    state.optimizer.load_state_dict({"state": states, "param_groups": groups})

    random = ranks.share({name: tensor.read().clone() for name, tensor in stored["random"].items()})
    if (generator := random.get(f"cpu.{ranks.rank}")) is not None:
        torch.set_rng_state(generator)
    if (generator := random.get(f"cuda.{ranks.rank}")) is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(generator, ranks.device)


@torch.no_grad()
def load_weights(saved: Saved, model: nn.Module) -> None:
    """Load the trained parameters, averaged ones if there are, into a model on one process, for an export."""
    stem = "average" if saved.tensors("average") else "model"
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    stored = {
        name: tensor
        for name, tensor in saved.tensors(stem).items()
        if name not in dict(model.named_buffers())
    }
    _check_fit(saved, stem, trained, stored)
    for name, weight in trained.items():
        weight.copy_(stored[name].read())


def _check_fit(
    saved: Saved, stem: str, wanted: Mapping[str, Tensor], stored: Mapping[str, LazyTensor]
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if problems := state_dict_mismatch(shapes, stored):
        raise ValueError(does_not_fit(f"{saved.folder}, {stem}", "the model", problems))
