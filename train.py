"""Train a method on pairs of images and texts.

python train.py moma:stage2 --bundle weights/moma --data data/ --out out/stage2
torchrun --nproc_per_node=8 train.py moma:stage1 --bundle weights/moma --data "data/*.tar" --out out/stage1
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from moma.app.files import Parser, check_writable, exit_status, given_text
from moma.data.triplets import open_source
from moma.methods import METHODS, all_trainings
from moma.sampling.config import parse_field
from moma.sampling.device import DTYPES, choose_device, set_precision
from moma.sampling.interface import FeatureTraining, Runtime, Training
from moma.training import denoising, features
from moma.training.checkpoint import (
    Saved,
    by_validation,
    check_same,
    checkpoints,
    differences,
    first_whole,
    load_weights,
    newest,
)
from moma.training.common import write_export
from moma.training.config import Choices, DenoisingConfig, FeatureConfig, TrainConfig
from moma.training.loop import EXPORT, fit
from moma.training.parallel import Ranks, start_ranks
from moma.training.stopping import raised_signals
from moma.training.task import Task
from moma.weights.bundle import Bundle

# What the order of the samples depends on: after a change of one, the data is read from its beginning.
ORDER = ("data", "train.seed", "settings.lanes")
RENAMED = {"stage1": "moma:stage1", "stage2": "moma:stage2"}


def main(argv: Sequence[str] | None = None) -> None:
    set_precision()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    if args.command == "export":
        return export(args)
    bundle = Bundle.open(args.bundle)
    choices = choices_of(args, bundle)
    with start_ranks(args.device) as ranks:
        identity = ranks.once(lambda: _identity_of(args, bundle, choices, ranks))
        saved = ranks.once(lambda: _find_start(args, identity, choices.train))
        task = _build(args, bundle, choices, ranks)  # the first weights are read here
        fit(task, choices.train, args.out, ranks, identity, saved)
    if ranks.main:
        print(f"done: {args.out / EXPORT}; put it into a bundle with")
        print(f"python convert_weights.py {args.out / EXPORT} --base-bundle {args.bundle} --out NEW")


# --- options -----------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        description="Train a method.", epilog="train.py TRAINING --help lists the options of a training."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="TRAINING|export")
    for name, (_, training) in all_trainings().items():
        command = commands.add_parser(name, help=training.about, description=f"Train {training.about}.")
        _add_training(command, training, _folder(name))
    add = commands.add_parser("export", help="write the weights of a checkpoint for a bundle").add_argument
    add("run", type=Path, metavar="DIR", help="--out of the training")
    add("--bundle", type=Path, required=True, metavar="DIR", help="bundle that the training started from")
    add("--which", choices=("last", "best"), default="best", help="best = lowest validation loss (default)")
    add("--to", type=Path, metavar="DIR", help=f"folder for the files (default: DIR/{EXPORT}-WHICH)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    if argv and argv[0] in RENAMED:
        raise ValueError(f"{argv[0]} is called {RENAMED[argv[0]]}")
    return parser.parse_args(argv)


def _folder(training: str) -> str:
    """The name of a training's default folders: what the frozen networks compute differs as well."""
    return training.replace(":", "-")


def _add_training(parser: argparse.ArgumentParser, training: type[Training], folder: str) -> None:
    """Options that are fields of a config have the field's name and its default, here None."""
    add, number, out = parser.add_argument, {"type": int, "metavar": "N"}, Path("out", folder)
    add("--bundle", type=Path, required=True, metavar="DIR", help="bundle to start from")
    add(
        "--data",
        type=given_text,
        required=True,
        metavar="PLACE",
        help="folder with metadata.jsonl or *.tar, or a pattern",
    )
    add("--out", type=Path, default=out, metavar="DIR", help=f"folder for the results (default: {out})")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out, if any")
    add("--steps", **number, help=f"optimiser steps (default: {TrainConfig.steps})")
    add("--batch-size", **number, help=f"samples per process and call (default: {TrainConfig.batch_size})")
    add("--lr", type=float, metavar="X", help=f"learning rate (default: {_rates(training)})")
    hints = get_type_hints(training.Config)
    for field in fields(training.Config):
        if about := field.metadata.get("help"):  # the training's own everyday options
            add(
                f"--{field.name}",
                choices=get_args(hints[field.name]),
                help=f"{about} (default: {field.default})",
            )
    if issubclass(training, FeatureTraining):
        add("--workers", **number, help=f"processes that decode images (default: {FeatureConfig.workers})")
    else:
        add("--cache", metavar="DIR", help="folder for what the frozen networks compute once"
            f" (default: {DenoisingConfig.cache}/{folder})")  # fmt: skip
        add("--workers", **number, dest="cache_workers", help="threads that decode images for the cache"
            f" (default: {DenoisingConfig.cache_workers})")  # fmt: skip
    add = parser.add_argument_group("advanced").add_argument
    add("--change", action="append", metavar="FIELD", default=[],
        help="with --resume: a setting that may differ now, e.g. train.lr; may be repeated")  # fmt: skip
    add("--validation", metavar="PLACE", help="held-out data (default: the first samples of --data)")
    add("--accumulate", **number, help=f"calls per optimiser step (default: {TrainConfig.accumulate})")
    add("--ema", type=float, metavar="DECAY", help="export an average of the weights (default: off)")
    add("--seed", **number, help=f"seed of every random number (default: {TrainConfig.seed})")
    add("--preset", default="default", help="preset of the method's config (default: default)")
    add("--set", action="append", type=parse_field, metavar="FIELD=VALUE", default=[],
        help="set a field of any config, e.g. warmup=100; may be repeated")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("bf16", "fp32"), help="dtype to compute in; trained weights are fp32 (default:"
        f" {TrainConfig.dtype})")  # fmt: skip
    add("--compile", action="store_true", default=None, help="use torch.compile")
    add("--gradient-checkpointing", action="store_true", default=None,
        help="save memory: recompute activations in the backward pass")  # fmt: skip


def _rates(training: type[Training]) -> str:
    """The default learning rates, by what is trained."""
    if "train" not in (hints := get_type_hints(training.Config)):
        return f"{training.learning_rate(training.Config()):g}"
    configs = [training.Config(train=part) for part in get_args(hints["train"])]
    return ", ".join(f"{config.train} {training.learning_rate(config):g}" for config in configs)


def choices_of(args: argparse.Namespace, bundle: Bundle) -> Choices:
    """The four configs; ValueError for a field or a value that they do not have."""
    name, training = all_trainings()[args.command]
    kinds = {
        "train": TrainConfig,
        "data": FeatureConfig if issubclass(training, FeatureTraining) else DenoisingConfig,
        "stage": training.Config,
        "method": METHODS[name].method.Config,
    }
    known = {part: {field.name for field in fields(kind)} for part, kind in kinds.items()}
    known["method"] -= {*METHODS[name].overrides, *training.fixed, "geometry"}  # the data's, for training
    given: dict[str, dict[str, Any]] = {part: {} for part in kinds}
    every = sorted(set().union(*known.values()))
    options = [(name, value) for name, value in vars(args).items() if name in every and value is not None]
    for option, value in (*options, *args.set):
        part, _, field = option.rpartition(".")
        found = [one for one in kinds if field in known[one] and part in ("", one)]
        if len(found) != 1:
            expected = [f"{one}.{field}" for one in found] or every
            raise ValueError(f"--set {option}: expected one of {', '.join(expected)}")
        given[found[0]][field] = value
    stage = training.Config(**given["stage"])
    if kinds["data"] is DenoisingConfig:
        given["data"].setdefault("cache", f"{DenoisingConfig.cache}/{_folder(args.command)}")
    return Choices(
        training,
        TrainConfig(**{"lr": training.learning_rate(stage), **given["train"]}),
        kinds["data"](**given["data"]),
        stage,
        replace(bundle.method_config(name, args.preset), **given["method"], **training.fixed),
    )


def _identity_of(args: argparse.Namespace, bundle: Bundle, choices: Choices, ranks: Ranks) -> dict[str, Any]:
    """What must not differ for a run to continue; ValueError if there is no data."""
    return {
        "stage": args.command,
        "data": open_source(args.data).fingerprint(),
        "weights": dict(bundle.hashes),
        "train": choices.train.identity(ranks.world),
        "settings": {**choices.data.identity(), **asdict(choices.stage)},
        "method": asdict(choices.method),
    }


# --- the parts of a run ------------------------------------------------------------------------------


def _find_start(args: argparse.Namespace, identity: dict[str, Any], train: TrainConfig) -> Saved | None:
    """The checkpoint to continue from; ValueError for another run's, or where results are in the way."""
    check_writable("--out", args.out)
    if args.change and not args.resume:
        raise ValueError("--change: only with --resume")
    found = newest(args.out)
    if found and not args.resume:
        raise ValueError(f"--out {args.out}: has a run of {found.step} steps: add --resume or change it")
    if not found:
        print(f"from the beginning{': no checkpoint yet' if args.resume else ''}")
        return None
    check_same(found, identity, train.steps, args.change)
    print(f"continuing from {found.folder}")
    if set(args.change) & set(ORDER):
        print("the data is read from its beginning")
        return replace(found, position={})
    return found


def _build(args: argparse.Namespace, bundle: Bundle, choices: Choices, ranks: Ranks) -> Task:
    """The training with its weights."""
    train = choices.train
    torch.manual_seed(train.seed)  # the same start on every rank
    runtime = Runtime(bundle, ranks.device, DTYPES[train.dtype], pack=False)
    return _kind_of(choices.training).build(choices, runtime, args.data)


def _kind_of(training: type[Training]) -> Any:
    """The module that makes tasks and models of a training."""
    return features if issubclass(training, FeatureTraining) else denoising


def export(args: argparse.Namespace) -> None:
    """The weights of one checkpoint of a run. Its files say how it trained; what is read, the user names."""
    found = checkpoints(args.run, print)
    saved = first_whole(by_validation(found) if args.which == "best" else reversed(found))
    if saved is None:
        raise ValueError(f"{args.run}: no checkpoints of a training there")
    bundle = Bundle.open(args.bundle)
    if listed := differences({"weights": saved.identity.get("weights")}, {"weights": bundle.hashes}):
        raise ValueError(f"--bundle {args.bundle}: not what {args.run} started from: {listed}")
    choices = _choices_then(saved)
    choices.training.check(bundle, choices.stage, choices.method)
    folder = args.to or args.run / f"{EXPORT}-{args.which}"
    check_writable("--to", folder)
    runtime = Runtime(bundle, choose_device(args.device), DTYPES[choices.train.dtype], pack=False)
    model = _kind_of(choices.training).model_of(choices, runtime)
    load_weights(saved, model)
    write_export(folder, model.export())
    print(f"{folder}: step {saved.step}, validation loss {saved.validation}")


def _choices_then(saved: Saved) -> Choices:
    """The configs of a checkpoint's run, as far as its model depends on them."""
    stage = saved.identity.get("stage")
    if stage not in all_trainings():
        raise ValueError(f"{saved.folder}: of a training {stage!r}, expected {', '.join(all_trainings())}")
    name, training = all_trainings()[stage]
    try:
        train, settings, method = (dict(saved.identity[part]) for part in ("train", "settings", "method"))
        own = {field.name: settings[field.name] for field in fields(training.Config)}
        kept = {field.name: train[field.name] for field in fields(TrainConfig) if field.name in train}
        return Choices(
            training, TrainConfig(**kept), None, training.Config(**own), METHODS[name].method.Config(**method)
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{saved.folder}: settings of another version of this code ({error})") from None


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    stopped = "stopped; --resume continues from the newest checkpoint"
    with raised_signals():
        return exit_status("train.py", lambda: main(argv), stopped)


if __name__ == "__main__":
    sys.exit(run())
