"""Train MoMA on pairs of images and texts: stage 1 the decoder (Eq. 4), stage 2 the adapter (Eq. 1).

python train.py stage2 --bundle weights/moma --data data/ --out out/stage2
torchrun --nproc_per_node=8 train.py stage1 --bundle weights/moma --data "data/*.tar" --out out/stage1
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from moma.data.triplets import open_source
from moma.methods.moma.config import PRESETS, MethodConfig, method_config
from moma.sampling.config import parse_field
from moma.sampling.device import DTYPES, set_precision
from moma.training import stage1, stage2
from moma.training.checkpoint import Saved, best, check_same, checkpoints, load_weights
from moma.training.config import TrainConfig
from moma.training.loop import EXPORT, fit
from moma.training.parallel import Ranks, start_ranks
from moma.training.task import Task
from moma.weights.bundle import Bundle

STAGES = {"stage1": (stage1.Stage1Config, stage1.build), "stage2": (stage2.Stage2Config, stage2.build)}
COMMAND = "command.json"  # in the run's folder: how it was started, for an export
# Learning rates of stage 1 by what it trains: LLaVA-1.5's for its MLLM, LoRA on it, a new projector.
RATES = {"mllm": 2e-5, "lora": 2e-4, "new": 1e-3}
# Fields of a stage by which two runs may differ and still be the same run: where and how fast, not what.
FREE = {
    "cache",
    "cache_batch",
    "cache_workers",
    "workers",
    "gradient_checkpointing",
    "grid_samples",
    "grid_steps",
}


def main(argv: Sequence[str] | None = None) -> None:
    set_precision()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    if args.command == "export":
        return export(args)
    bundle = Bundle.open(args.bundle)
    choices = choices_of(args, bundle)
    with start_ranks(args.device) as ranks:
        identity = identity_of(args, bundle, choices, ranks)
        saved = ranks.share(find_start(args, identity, choices.train) if ranks.main else None)
        task = build(args, bundle, choices, ranks)  # the first weights are read here
        if ranks.main:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / COMMAND).write_text(json.dumps(argv) + "\n", encoding="utf-8")
        fit(task, choices.train, args.out, ranks, identity, saved)
    if ranks.main:
        print(f"done: {args.out / EXPORT}; put it into a bundle with")
        print(f"python convert_weights.py {args.out / EXPORT} --base-bundle {args.bundle} --out NEW")


# --- what is asked for -------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


class Choices(NamedTuple):
    train: TrainConfig
    stage: Any  # Stage1Config or Stage2Config
    method: MethodConfig


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description="Train MoMA.", epilog="train.py STAGE --help lists the options of a stage.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="stage1|stage2|export")
    add_stage(commands.add_parser("stage1", help="train the MLLM and its mapping (Eq. 4)"), "stage1")
    add_stage(commands.add_parser("stage2", help="train the adapter (Eq. 1)"), "stage2")
    add = commands.add_parser("export", help="weights of a checkpoint, as for a bundle").add_argument
    add("run", type=Path, metavar="DIR", help="--out of the training, started from the same place")
    add("--which", choices=("last", "best"), default="best", help="best = lowest validation loss (default)")
    add("--to", type=Path, metavar="DIR", help=f"folder for the files (default: DIR/{EXPORT}-WHICH)")
    return parser.parse_args(argv)


def add_stage(parser: argparse.ArgumentParser, name: str) -> None:
    """Options that are fields of a config have the field's name and its default, here None."""
    add, number = parser.add_argument, {"type": int, "metavar": "N"}
    rates = "1e-4" if name == "stage2" else ", ".join(f"{k} {v:g}" for k, v in RATES.items())
    add(
        "--bundle", type=Path, required=True, metavar="DIR", help="weights to start from (convert_weights.py)"
    )
    add("--data", required=True, metavar="PLACE", help="folder with metadata.jsonl or *.tar, or a pattern")
    add("--validation", metavar="PLACE", help="data held out (default: the first samples of --data)")
    add("--out", type=Path, default=Path("out", name), metavar="DIR", help=f"results (default: out/{name})")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add("--steps", **number, help=f"in all (default: {TrainConfig.steps})")
    add("--batch-size", **number, help=f"per process and call (default: {TrainConfig.batch_size})")
    add("--accumulate", **number, help=f"calls per step (default: {TrainConfig.accumulate})")
    add("--lr", type=float, metavar="X", help=f"learning rate (default: {rates})")
    add("--ema", type=float, metavar="DECAY", help="keep and export an average of the weights (default: off)")
    add("--seed", **number, help=f"of all that is drawn (default: {TrainConfig.seed})")
    if name == "stage1":
        add("--train", choices=tuple(RATES), help="all of the MLLM, LoRA on it, or only what is new")
        add("--workers", **number, help="processes that decode images")
    else:
        add("--context", choices=("base", "ip_adapter"), dest="context_init", help="start of context K, V")
        add("--cache", metavar="DIR", help="for what the frozen networks compute once")
        add("--workers", **number, dest="cache_workers", help="threads that decode images")
    add(
        "--preset",
        choices=tuple(PRESETS),
        default="default",
        help="of the method (moma/methods/moma/config.py)",
    )
    add("--set", action="append", type=parse_field, metavar="FIELD=VALUE", default=[],
        help="any field of TrainConfig, the stage's config or MethodConfig; may be repeated")  # fmt: skip
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--dtype", choices=("bf16", "fp32"), help="of computing; trained weights are fp32 (default: bf16)")
    add("--compile", action="store_true", default=None, help="torch.compile")
    add("--gradient-checkpointing", action="store_true", default=None, help="slower, in less memory")


def choices_of(args: argparse.Namespace, bundle: Bundle) -> Choices:
    """The three configs; ValueError for a field or a value that they do not have."""
    kinds = {"train": TrainConfig, "stage": STAGES[args.command][0], "method": MethodConfig}
    known = {part: {field.name for field in fields(kind)} for part, kind in kinds.items()}
    given: dict[str, dict[str, Any]] = {part: {} for part in kinds}
    every = sorted(set().union(*known.values()))
    options = [(name, value) for name, value in vars(args).items() if name in every and value is not None]
    for name, value in (*options, *args.set):
        part, _, field = name.rpartition(".")
        places = [place for place in kinds if field in known[place] and part in ("", place)]
        if len(places) != 1:
            expected = [f"{place}.{field}" for place in places] or every
            raise ValueError(f"--set {name}: expected one of {', '.join(expected)}")
        given[places[0]][field] = value
    stage = kinds["stage"](**given["stage"])
    rate = {"lr": RATES[stage.train]} if args.command == "stage1" else {}
    method = method_config(args.preset, **{**bundle.method, **given["method"]})
    return Choices(TrainConfig(**{**rate, **given["train"]}), stage, method)


def identity_of(args: argparse.Namespace, bundle: Bundle, choices: Choices, ranks: Ranks) -> dict[str, Any]:
    """What must be the same for a run to go on. ValueError where there is no data."""
    return {
        "stage": args.command,
        "data": open_source(args.data).fingerprint(),
        "weights": dict(bundle.hashes),
        "train": choices.train.identity(ranks.world),
        "settings": {name: value for name, value in asdict(choices.stage).items() if name not in FREE},
        "method": asdict(choices.method),
    }


# --- the parts of a run ------------------------------------------------------------------------------


def find_start(args: argparse.Namespace, identity: dict[str, Any], train: TrainConfig) -> Saved | None:
    """The checkpoint to go on from. ValueError for one of another run, or where results are in the way."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise ValueError(f"--out {args.out}: cannot write there ({error.strerror})") from None
    found = checkpoints(args.out)
    if found and not args.resume:
        raise ValueError(f"--out {args.out}: has a run of {found[-1].step} steps: add --resume or change it")
    if not found:
        print(f"from the beginning{': no checkpoint yet' if args.resume else ''}")
        return None
    check_same(found[-1], identity, train.steps)
    print(f"going on from {found[-1].folder}")
    return found[-1]


def build(args: argparse.Namespace, bundle: Bundle, choices: Choices, ranks: Ranks) -> Task:
    """The stage with its weights."""
    torch.manual_seed(choices.train.seed)  # the same start on every rank
    dtype = DTYPES[choices.train.dtype]
    make = STAGES[args.command][1]
    return make(bundle, args.data, choices.stage, choices.train, choices.method, ranks.device, dtype)


def export(args: argparse.Namespace) -> None:
    """The weights of one checkpoint of a run, by the command that the run was started with."""
    found = checkpoints(args.run)
    if not found or not (args.run / COMMAND).is_file():
        raise ValueError(f"{args.run}: no checkpoints of a training there")
    saved = (best(found) if args.which == "best" else None) or found[-1]
    run = parse_args(json.loads((args.run / COMMAND).read_text(encoding="utf-8")))
    bundle = Bundle.open(run.bundle)
    choices = choices_of(run, bundle)
    with start_ranks(run.device) as ranks:
        identity = identity_of(run, bundle, choices, ranks)
        check_same(saved, {**identity, "train": saved.identity["train"]}, saved.step)
        task = build(run, bundle, choices, ranks)
    load_weights(saved, task.model)
    folder = args.to or args.run / f"{EXPORT}-{args.which}"
    task.export(folder)
    print(f"{folder}: step {saved.step}, validation loss {saved.validation}")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status: 2 and one line for a user's mistake, never a traceback for it."""
    try:
        main(argv)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"train.py{rank}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped; --resume goes on from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
