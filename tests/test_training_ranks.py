"""Two Gloo processes train what one does, by DDP and by FSDP2, and share its checkpoints."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moma.training.checkpoint import checkpoints, read_state
from moma.training.config import TrainConfig
from moma.training.parallel import start_ranks
from moma.training.stopping import Stopped
from tests.helpers import exit_status, fork
from tests.toy_training import CFG, Toy, numbers, run, tensors

KINDS = ("ddp", "fsdp")
STEPS, HALF = 6, 3
PAIR = replace(CFG, steps=STEPS, save_every=HALF, sample_every=HALF, keep_last=5)  # of two ranks
ONE = replace(PAIR, batch_size=2 * PAIR.batch_size)
POISON = 3 * 8 + 5  # a sample of rank 1 in the fourth step


def toy(kind: str, poison: int | None = None) -> Toy:
    return Toy(sharded=kind == "fsdp", poison=poison)


class Asked(Toy):
    """Rank 1 gets a SIGTERM in the second step."""

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__(sharded=kind == "fsdp")
        self.rank = rank

    def batches(self, *args: Any) -> Iterator:
        for batch, position in super().batches(*args):
            if self.rank and position["samples"] == 2 * 8:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch, position


def work(out: Path) -> None:
    """What each of the two ranks does."""
    with start_ranks("cpu") as ranks:
        for kind in KINDS:
            run(out / kind / "pair", PAIR, toy(kind), ranks)
            run(out / kind / "one-to-pair", PAIR, toy(kind), ranks)
            try:
                run(out / kind / "poisoned", PAIR, toy(kind, POISON), ranks)
            except ValueError as error:
                (out / kind / f"error-{ranks.rank}").write_text(str(error))
            try:
                run(out / kind / "stopped", PAIR, Asked(kind, ranks.rank), ranks)
            except Stopped as stop:
                (out / kind / f"status-{ranks.rank}").write_text(str(stop.status))
            run(out / kind / "stopped", PAIR, toy(kind), ranks)


def half(source: Path, target: Path) -> None:
    """A run that was stopped in the middle."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / f"step-{STEPS:08}")
    shutil.rmtree(target / "export")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    for kind in KINDS:
        run(out / kind / "one", ONE, toy(kind))
        half(out / kind / "one", out / kind / "one-to-pair")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def rank(number: int) -> None:
        """As torchrun starts it."""
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= where | {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        work(out)

    assert [exit_status(pid) for pid in [fork(partial(rank, number)) for number in (0, 1)]] == [0, 0]
    for kind in KINDS:
        half(out / kind / "pair", out / kind / "pair-to-one")
        run(out / kind / "pair-to-one", ONE, toy(kind))
    return out


def losses(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in numbers(out) if name in line]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pair", "one-to-pair", "pair-to-one"])
def test_equals_one_process(runs, kind, name):
    """Losses, gradient norms, validation, weights, averages and moments, exported file and image."""
    one, other = runs / kind / "one", runs / kind / name
    for number in ("loss", "grad_norm", "validation"):
        assert len(losses(one, number)) == (5 if number == "validation" else STEPS)
        np.testing.assert_allclose(losses(one, number), losses(other, number), rtol=1e-5)
    for step in (HALF, STEPS):
        x, y = (tensors(out / "checkpoints" / f"step-{step:08}") for out in (one, other))
        of_all = [key for key in x if not key.startswith("random/")]
        assert set(of_all) == {key for key in y if not key.startswith("random/")}
        for key in of_all:
            torch.testing.assert_close(x[key], y[key], rtol=1e-4, atol=1e-6)
    exported = [json.loads((out / "export" / "weights.json").read_text()) for out in (one, other)]
    assert exported[0].keys() == exported[1].keys()
    for key in exported[0]:
        np.testing.assert_allclose(exported[0][key], exported[1][key], rtol=1e-4, atol=1e-6)
    images = [out / "samples" / f"step-{STEPS:08}.png" for out in (one, other)]
    assert images[0].read_bytes() == images[1].read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_two_ranks(runs, kind):
    saved = read_state(runs / kind / "pair" / "checkpoints" / f"step-{HALF:08}")
    samples = HALF * 2 * PAIR.batch_size * PAIR.accumulate
    assert saved.position == {"samples": samples, "lane 0": samples, "lane 1": samples}  # united
    assert {"random/cpu.0", "random/cpu.1"} <= set(tensors(saved.folder))


@pytest.mark.parametrize("kind", KINDS)
def test_not_finite_on_one_rank_stops_both(runs, kind):
    for rank in (0, 1):
        assert "loss is nan after 3 steps" in (runs / kind / f"error-{rank}").read_text()
    assert [saved.step for saved in checkpoints(runs / kind / "poisoned")] == [HALF]


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_rank_saves_and_stops_both(runs, kind):
    assert [(runs / kind / f"status-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    stopped, pair = (runs / kind / name for name in ("stopped", "pair"))
    assert read_state(stopped / "checkpoints" / "step-00000002").validation is None
    assert losses(stopped) == losses(pair) and losses(stopped, "validation") == losses(pair, "validation")


def test_one_process_needs_no_torchrun():
    with start_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.main, ranks.device) == (0, 1, True, torch.device("cpu"))
    with pytest.raises(ValueError, match="device 'gpu'"), start_ranks("gpu"):
        pass


def test_identity_counts_samples_of_all_ranks():
    cfg = TrainConfig(batch_size=2, accumulate=3)
    assert cfg.identity(4) == replace(cfg, batch_size=24, accumulate=1).identity(1)
    assert cfg.identity(4) != cfg.identity(2)
