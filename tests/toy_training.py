"""A toy task for the training loop, and comparisons of its runs.

python -m tests.toy_training FOLDER STEPS
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from models.weights.loading import read_checkpoint
from moma.data.stream import Position
from moma.sampling.interface import Batch
from moma.training.checkpoint import check_same, newest, read_state
from moma.training.config import TrainConfig
from moma.training.log import read_log
from moma.training.loop import fit
from moma.training.parallel import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
CFG = TrainConfig(
    steps=12, batch_size=2, accumulate=2, lr=0.02, warmup=3, dtype="fp32", ema=0.9,
    save_every=3, validate_every=2, sample_every=6,
)  # fmt: skip
IDENTITY = {"data": "toy", "weights": {"base": "1" * 64}}


class Regression(nn.Module):
    """Two layers with noise from outside, one frozen; `rare` acts in some samples only."""

    def __init__(self, width: int = 5, rare: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
            self.out = nn.Linear(width, 1)
            self.frozen = nn.Linear(width, width).requires_grad_(False).to(torch.bfloat16)
        self.rare = nn.Parameter(torch.zeros(1)) if rare else None
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        self.calls += torch.is_grad_enabled()
        x = batch["x"] + self.frozen(batch["x"].to(torch.bfloat16)).float()  # (B, width)
        for block in self.blocks:
            x = torch.tanh(block(x))
        y = self.out(x)[:, 0]  # (B,)
        if self.rare is not None and (chosen := batch["number"] % 7 == 3).any():
            y = torch.where(chosen, y + self.rare, y)
        return (y - batch["y"]).float().square()  # (B,)


class Toy:
    """A `Task`. Sample number n is drawn from a generator seeded by (seed, n)."""

    def __init__(self, sharded: bool = False, seed: int = 0, poison: int | None = None) -> None:
        self.model = Regression(rare=not sharded)
        self.shards = tuple(self.model.blocks) if sharded else ()
        self.seed, self.poison = seed, poison
        self.decayed = ("",)

    def samples(self, numbers: list[int]) -> Batch:
        x = []
        for number in numbers:
            generator = torch.Generator().manual_seed(1000 * self.seed + number)
            x.append(torch.randn(5, generator=generator))
            if number == self.poison:
                x[-1] *= math.nan
        x = torch.stack(x)
        return {
            "number": torch.tensor(numbers),
            "x": x,
            "y": x.sin().sum(1),
            "names": list(map(str, numbers)),
        }

    def batches(
        self, batch_size: int, rank: int, world: int, start: Position
    ) -> Iterator[tuple[Batch, Position]]:
        number = start.get("samples", 0)
        while True:
            mine = [number + rank + world * i for i in range(batch_size)]
            number += world * batch_size
            # A key of its own for each rank, as a data stream with lanes has.
            yield self.samples(mine), {"samples": number, f"lane {rank}": number}

    def validation(self) -> list[Batch]:
        return [self.samples([-1, -2, -3]), self.samples([-4])]

    def sample_grid(self) -> Image.Image:
        value = self.model.out.bias.detach().abs().mul(1000).int().item() % 256
        return Image.new("RGB", (4, 4), (value, 0, 0))

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        state = {name: p.numpy().tolist() for name, p in trained.items()}  # as writing them to files does
        (folder / "weights.json").write_text(json.dumps(state))


def run(out: Path, cfg: TrainConfig = CFG, task: Toy | None = None, ranks: Ranks = ALONE) -> Toy:
    """Train, going on from the newest checkpoint if there is one."""
    task = task or Toy()
    saved = ranks.share(newest(out))
    identity = IDENTITY | {"train": cfg.identity(ranks.world)}
    if saved:
        check_same(saved, identity, cfg.steps)
    fit(task, cfg, out, ranks, identity, saved)
    return task


def numbers(out: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides."""
    return [{k: v for k, v in line.items() if k != "img_per_s"} for line in read_log(out / "log.jsonl")]


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {f"{file.stem}/{name}": t.read() for name, t in read_checkpoint(file).items()}
    return found


def same_run(a: Path, b: Path) -> None:
    """Bit-equal logs, checkpoints and exports."""
    assert numbers(a) == numbers(b)
    names = [sorted(p.name for p in (out / "checkpoints").iterdir()) for out in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        x, y = (tensors(out / "checkpoints" / name) for out in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
        assert read_state(a / "checkpoints" / name).position == read_state(b / "checkpoints" / name).position
    assert (a / "export" / "weights.json").read_text() == (b / "export" / "weights.json").read_text()


if __name__ == "__main__":
    run(Path(sys.argv[1]), replace(CFG, steps=int(sys.argv[2])))
