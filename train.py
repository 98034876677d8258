"""Train a method on pairs of images and texts.

python train.py moma:stage2 --bundle weights/moma --data data/ --out out/stage2
torchrun --nproc_per_node=8 train.py moma:stage1 --bundle weights/moma --data "data/*.tar" --out out/stage1
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from models.weights.files import read_json
from moma.app.files import Parser, check_writable, exit_status, write_text
from moma.data.triplets import open_source
from moma.methods import METHODS, all_trainings
from moma.sampling.config import parse_field
from moma.sampling.device import DTYPES, set_precision
from moma.sampling.interface import FeatureTraining, Runtime, Training
from moma.training import denoising, features
from moma.training.checkpoint import Saved, best, check_same, checkpoints, load_weights
from moma.training.config import Choices, DenoisingConfig, FeatureConfig, TrainConfig
from moma.training.loop import EXPORT, fit
from moma.training.parallel import Ranks, start_ranks
from moma.training.task import Task
from moma.weights.bundle import Bundle

COMMAND = "command.json"  # in the run's folder: how it was started, for an export
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
        identity = _identity_of(args, bundle, choices, ranks)
        saved = ranks.share(_find_start(args, identity, choices.train) if ranks.main else None)
        task = _build(args, bundle, choices, ranks)  # the first weights are read here
        if ranks.main:
            args.out.mkdir(parents=True, exist_ok=True)
            write_text(args.out / COMMAND, json.dumps(argv) + "\n")
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
        _add_training(command, training, Path("out", name.replace(":", "-")))
    add = commands.add_parser("export", help="write the weights of a checkpoint for a bundle").add_argument
    add("run", type=Path, metavar="DIR", help="--out of the training, from the same working directory")
    add("--which", choices=("last", "best"), default="best", help="best = lowest validation loss (default)")
    add("--to", type=Path, metavar="DIR", help=f"folder for the files (default: DIR/{EXPORT}-WHICH)")
    if argv and argv[0] in RENAMED:
        raise ValueError(f"{argv[0]} is called {RENAMED[argv[0]]}")
    return parser.parse_args(argv)


def _add_training(parser: argparse.ArgumentParser, training: type[Training], out: Path) -> None:
    """Options that are fields of a config have the field's name and its default, here None."""
    add, number = parser.add_argument, {"type": int, "metavar": "N"}
    add("--bundle", type=Path, required=True, metavar="DIR", help="bundle to start from")
    add("--data", required=True, metavar="PLACE", help="folder with metadata.jsonl or *.tar, or a pattern")
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
            f" (default: {DenoisingConfig.cache})")  # fmt: skip
        add("--workers", **number, dest="cache_workers", help="threads that decode images for the cache"
            f" (default: {DenoisingConfig.cache_workers})")  # fmt: skip
    add = parser.add_argument_group("advanced").add_argument
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
    known["method"] -= set(training.fixed)
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
    return Choices(
        training,
        TrainConfig(**{"lr": training.learning_rate(stage), **given["train"]}),
        kinds["data"](**given["data"]),
        stage,
        bundle.method_config(name, args.preset, **given["method"], **training.fixed),
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
    found = checkpoints(args.out)
    if found and not args.resume:
        raise ValueError(f"--out {args.out}: has a run of {found[-1].step} steps: add --resume or change it")
    if not found:
        print(f"from the beginning{': no checkpoint yet' if args.resume else ''}")
        return None
    check_same(found[-1], identity, train.steps)
    print(f"continuing from {found[-1].folder}")
    return found[-1]


def _build(args: argparse.Namespace, bundle: Bundle, choices: Choices, ranks: Ranks) -> Task:
    """The training with its weights."""
    train = choices.train
    torch.manual_seed(train.seed)  # the same start on every rank
    runtime = Runtime(bundle, ranks.device, DTYPES[train.dtype], pack=False)
    make = features.build if issubclass(choices.training, FeatureTraining) else denoising.build
    return make(choices, runtime, args.data)


def export(args: argparse.Namespace) -> None:
    """The weights of one checkpoint of a run, by the command that the run was started with."""
    found = checkpoints(args.run)
    if not found or not (args.run / COMMAND).is_file():
        raise ValueError(f"{args.run}: no checkpoints of a training there")
    saved = (best(found) if args.which == "best" else None) or found[-1]
    run = parse_args(read_json(args.run / COMMAND))
    bundle = Bundle.open(run.bundle)
    choices = choices_of(run, bundle)
    with start_ranks(run.device) as ranks:
        identity = _identity_of(run, bundle, choices, ranks)
        check_same(saved, {**identity, "train": saved.identity["train"]}, saved.step)
        task = _build(run, bundle, choices, ranks)
    load_weights(saved, task.model)
    folder = args.to or args.run / f"{EXPORT}-{args.which}"
    task.export(folder)
    print(f"{folder}: step {saved.step}, validation loss {saved.validation}")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    stopped = "stopped; --resume continues from the newest checkpoint"
    return exit_status("train.py", lambda: main(argv), stopped)


if __name__ == "__main__":
    sys.exit(run())
