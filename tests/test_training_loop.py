"""The training loop on a toy: resuming bit for bit, checkpoints whole or not there, log, curve."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from moma.app import files as cli
from moma.app.chart import ticks
from moma.data.stream import Position
from moma.sampling.interface import Batch
from moma.training import checkpoint
from moma.training.checkpoint import best, check_same, checkpoints, load_weights, newest, read_state
from moma.training.config import TrainConfig, average_decay, learning_rate
from moma.training.log import cut_log, loss_curve, read_log, smoothed, write_log
from moma.training.loop import fit
from tests.helpers import ROOT, exit_status, fork
from tests.toy_training import ALONE, CFG, IDENTITY, Regression, Toy, numbers, run, same_run, tensors


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """12 steps without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


# --- the run -----------------------------------------------------------------------------------------


def test_what_a_run_leaves(whole_run):
    losses = [line["loss"] for line in numbers(whole_run) if "loss" in line]
    assert len(losses) == 12 and sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert [line["step"] for line in numbers(whole_run) if "validation" in line] == [
        0,
        2,
        3,
        4,
        6,
        8,
        9,
        10,
        12,
    ]
    assert sorted(p.name for p in (whole_run / "samples").iterdir()) == [
        "step-00000006.png",
        "step-00000012.png",
    ]
    assert json.loads((whole_run / "export" / "weights.json").read_text()).keys() == {
        name for name, p in Regression().named_parameters() if p.requires_grad
    }
    assert Image.open(whole_run / "loss.png").size == (960, 540)
    assert not [path for path in whole_run.rglob(".*")]


def test_checkpoint_holds_what_is_trained_only(whole_run):
    state, held = read_state(checkpoints(whole_run)[-1].folder), tensors(checkpoints(whole_run)[-1].folder)
    trained = {name for name, p in Regression().named_parameters() if p.requires_grad}
    assert {key for key in held if key.startswith("model/")} == {f"model/{n}" for n in (*trained, "calls")}
    assert {key for key in held if key.startswith("average/")} == {f"average/{n}" for n in trained}
    kinds = {"exp_avg", "exp_avg_sq", "step"}
    assert {k for k in held if k.startswith("optimizer/")} == {
        f"optimizer/{n}.{k}" for n in trained for k in kinds
    }
    assert held["model/calls"] == 24 and state.step == 12 and state.position["samples"] == 48
    assert state.identity["data"] == "toy" and "random/cpu.0" in held


def test_by_hand(tmp_path):
    """Three steps equal AdamW, clipping, schedule and average written out."""
    cfg = replace(CFG, steps=3, accumulate=1, clip=0.5, ema=0.8, ema_warmup=2, warmup=2)
    run(tmp_path / "run", cfg)
    task, lines = Toy(), [line for line in numbers(tmp_path / "run") if "loss" in line]
    weights = [p for p in task.model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights]
    counts = [0] * len(weights)
    for step, lr in enumerate([0.01, 0.02, 0.02]):
        batch = task.samples([2 * step, 2 * step + 1])
        loss = task.model(batch).mean()
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        norm = sum(g.square().sum() for g in grads if g is not None).sqrt()
        assert norm > 0.5  # so that clipping does something
        assert lines[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert lines[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert lines[step]["lr"] == lr
        with torch.no_grad():
            for i, (p, g, (m, v)) in enumerate(zip(weights, grads, moments, strict=True)):
                if g is None:
                    continue
                counts[i] += 1
                g = g * 0.5 / norm
                p.mul_(1 - lr * 0.01)
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).add_(g * g, alpha=0.001)
                p -= lr * (m / (1 - 0.9 ** counts[i])) / ((v / (1 - 0.999 ** counts[i])).sqrt() + 1e-8)
            for a, p in zip(average, weights, strict=True):
                decay = min(0.8, (1 + step) / (2 + step))  # 1/2, 2/3, 3/4
                a.copy_(decay * a + (1 - decay) * p)
    held = tensors(checkpoints(tmp_path / "run")[-1].folder)
    names = [name for name, p in task.model.named_parameters() if p.requires_grad]
    for name, p, a in zip(names, weights, average, strict=True):
        torch.testing.assert_close(held[f"model/{name}"], p.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(held[f"average/{name}"], a, rtol=1e-5, atol=1e-6)
    exported = json.loads((tmp_path / "run" / "export" / "weights.json").read_text())
    assert exported["out.bias"] == held["average/out.bias"].tolist()  # the average is the result
    lowest = [line["validation"] for line in numbers(tmp_path / "run") if "validation" in line][-1]
    load_weights(checkpoints(tmp_path / "run")[-1], task.model)
    with torch.no_grad():
        judged = torch.cat([task.model(batch) for batch in task.validation()]).double().mean()
    assert lowest == pytest.approx(judged.item(), rel=1e-6)


def test_accumulation_equals_the_larger_batch(tmp_path):
    for name, batch_size, accumulate in (("one", 4, 1), ("many", 1, 4)):
        run(tmp_path / name, replace(CFG, batch_size=batch_size, accumulate=accumulate))
    one, many = ([line["loss"] for line in numbers(tmp_path / n) if "loss" in line] for n in ("one", "many"))
    np.testing.assert_allclose(one, many, rtol=1e-5)


def test_learning_rate():
    cfg = TrainConfig(steps=110, lr=1.0, warmup=10)
    assert [learning_rate(cfg, step) for step in (0, 4, 9, 10, 109)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    cosine = replace(cfg, schedule="cosine")
    rates = [learning_rate(cosine, step) for step in (0, 9, 10, 35, 60, 109)]
    expected = [0.1, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 * (1 - math.cos(math.pi / 100))]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert learning_rate(TrainConfig(steps=1, warmup=0, schedule="cosine"), 0) == 1e-4


def test_autocast_computes_in_bf16_and_trains_in_float32(tmp_path):
    seen = []

    class Watched(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.model.out.register_forward_hook(
                lambda module, args, y: seen.append((y.dtype, module.weight.dtype))
            )

    run(tmp_path / "run", replace(CFG, steps=1, dtype="bf16"), Watched())
    assert set(seen) == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"lr": "fast"}, "lr .*'fast'"),
        ({"clip": -1.0}, "clip -1.0"),
        ({"schedule": "linear"}, "linear"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"betas": [0.9]}, "betas"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"keep_last": 0}, "keep_last 0"),
        ({"save_every": 0}, "save_every 0"),
        ({"warmup": -1}, "warmup -1"),
    ],
)
def test_bad_choices(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(**fields)
    assert "\n" not in str(error.value)


# --- going on ----------------------------------------------------------------------------------------


def test_resume_is_bit_equal(tmp_path, whole_run):
    run(tmp_path / "run", replace(CFG, steps=6))
    run(tmp_path / "run")  # more steps
    assert numbers(tmp_path / "run") == numbers(whole_run)
    same_run(tmp_path / "run", whole_run)


def test_draws_of_the_global_generator_go_on(tmp_path):
    """A task should not draw from it; if a part of its model does all the same (a dropout), it is kept."""

    class Noisy(Regression):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) * (1 + torch.rand(()))

    def noisy() -> Toy:
        task = Toy()
        task.model = Noisy()
        return task

    run(tmp_path / "whole", task=noisy())
    run(tmp_path / "run", replace(CFG, steps=6), noisy())
    torch.manual_seed(99)
    run(tmp_path / "run", task=noisy())
    same_run(tmp_path / "run", tmp_path / "whole")


def test_finished_run_only_exports_again(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    run(tmp_path / "run")
    same_run(tmp_path / "run", whole_run)


def killing(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, count: int) -> None:
    """SIGKILL this process in the middle of its call number `count` of a function, before it acts."""
    function, calls = getattr(module, name), []

    def deadly(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    monkeypatch.setattr(module, name, deadly)


MOMENTS = [
    *[(os, "fsync", n) for n in (1, 4, 6, 7, 9, 13)],  # files, folders of the first and second checkpoint
    *[(os, "rename", n) for n in (1, 2, 4)],  # a checkpoint appears, is removed
    *[(os, "replace", n) for n in (1, 3, 7)],  # log, images
    *[(checkpoint, "save_tensors", n) for n in (1, 4, 6)],  # the files of a checkpoint
    *[(shutil, "rmtree", n) for n in (1, 3, 6, 12)],
    (Regression, "forward", 19),
]
FAST = ((os, "fsync", 9), (os, "rename", 2), (checkpoint, "save_tensors", 4), (shutil, "rmtree", 3))


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [pytest.param(*moment, marks=[] if moment in FAST else [pytest.mark.slow]) for moment in MOMENTS],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_killed_at_any_moment(tmp_path, whole_run, module, name, count):
    def doomed() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            killing(monkeypatch, module, name, count)
            run(tmp_path / "run")

    assert exit_status(fork(doomed)) == -signal.SIGKILL
    for saved in checkpoints(tmp_path / "run"):  # what is there can be read
        assert len(tensors(saved.folder)) > 20
    run(tmp_path / "run")
    same_run(tmp_path / "run", whole_run)
    assert not [path for path in (tmp_path / "run").rglob(".*")]


@pytest.mark.slow  # a process of its own
def test_killed_process(tmp_path):
    """The same with a process of its own, at whatever it is doing."""
    cfg, out = replace(CFG, steps=60), tmp_path / "run"
    run(tmp_path / "whole", cfg)
    process = subprocess.Popen([sys.executable, "-m", "tests.toy_training", str(out), "60"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while len(read_log(out / "log.jsonl")) < 25:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (out / "export").exists()
    run(out, cfg)
    same_run(out, tmp_path / "whole")


DAMAGES = {  # of a file's bytes
    "cut": lambda data: data[:-3],
    "header": lambda data: data[:8] + b"x" * 16 + data[24:],
    "values": lambda data: data[:-32] + bytes(x ^ 85 for x in data[-32:-16]) + data[-16:],
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors", "state.json"])
def test_damaged_checkpoint_is_not_taken(tmp_path, whole_run, capsys, name, damage):
    """The run goes on from the one before, says so, and ends as ever."""
    shutil.copytree(whole_run, tmp_path / "run")
    file = checkpoints(tmp_path / "run")[-1].folder / name
    if DAMAGES[damage] is None:
        file.unlink()
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert newest(tmp_path / "run").step < 12
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "step-00000012" in said and name in said
    run(tmp_path / "run")
    same_run(tmp_path / "run", whole_run)


def test_a_damaged_checkpoint_does_not_outlive_the_one_before(tmp_path, whole_run):
    """Killed after the fallback, before the next checkpoint: there still is one to go on from."""
    shutil.copytree(whole_run, tmp_path / "run")
    file = checkpoints(tmp_path / "run")[-1].folder / "model.safetensors"
    file.write_bytes(DAMAGES["values"](file.read_bytes()))
    with pytest.raises(ValueError, match="nan"):
        run(tmp_path / "run", replace(CFG, keep_last=1), Toy(poison=4 * newest(tmp_path / "run").step))
    run(tmp_path / "run")
    same_run(tmp_path / "run", whole_run)


def test_all_damaged(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/*/model.safetensors"):
        file.write_bytes(DAMAGES["values"](file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors"):  # rather than to begin again
        newest(tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "log.jsonl", "loss.png"])
def test_disk_full(tmp_path, monkeypatch, name):
    """One line with the file's name; what was there before is whole."""
    run(tmp_path / "run", replace(CFG, steps=3))
    replace_file = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=re.escape(name)) as error:
        run(tmp_path / "run", replace(CFG, steps=6))
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert newest(tmp_path / "run").step in (3, 6)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "moma-training", "version": 2}'])
def test_damaged_state(tmp_path, text):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(text)
    with pytest.raises(ValueError, match="step-00000001") as error:
        read_state(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="step-00000001"):  # rather than to begin again silently
        checkpoints(tmp_path)


@pytest.mark.parametrize(
    "change", [{"step": "x"}, {"identity": []}, {"files": {"../a": 3}}, {"position": [1]}]
)
def test_state_of_another_type(tmp_path, whole_run, change):
    """Though its hash is right: a stranger's."""
    folder = shutil.copytree(checkpoints(whole_run)[-1].folder, tmp_path / "step-00000012")
    state = json.loads((folder / "state.json").read_text()) | change
    rest = {name: value for name, value in state.items() if name not in ("format", "version", "sha256")}
    state["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=next(iter(change))) as error:
        read_state(folder)
    assert "\n" not in str(error.value)


def test_keeps_the_last_and_the_best(tmp_path):
    losses = iter([9.0, 5.0, 1.0, 3.0, 4.0, 2.0])

    class Model(Regression):
        def forward(self, batch: Batch) -> Tensor:
            return batch["wanted"] if "wanted" in batch else super().forward(batch)

    class Judged(Toy):
        def validation(self) -> list[Batch]:
            return [{"wanted": torch.tensor([next(losses)])}]

    task = Judged()
    task.model = Model()
    cfg = replace(CFG, steps=5, save_every=1, validate_every=1, keep_last=1)
    run(tmp_path / "run", cfg, task)
    kept = checkpoints(tmp_path / "run")
    assert [(one.step, one.validation) for one in kept] == [(2, 1.0), (5, 2.0)]
    assert best(kept).step == 2 and best([]) is None
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000002", "step-00000005"]


def test_not_finite(tmp_path):
    with pytest.raises(ValueError, match="nan after 7 steps") as error:
        run(tmp_path / "run", task=Toy(poison=30))  # four samples a step
    assert "\n" not in str(error.value)
    kept = checkpoints(tmp_path / "run")
    assert kept[-1].step == 6
    assert all(t.isfinite().all() for t in tensors(kept[-1].folder).values() if t.is_floating_point())
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.03}, r"train.lr 0.02 then, 0.03 now"),
        ({"seed": 1}, r"train.seed 0 then, 1 now"),
        ({"batch_size": 4}, r"train.samples per step 4.* 8"),
        (
            {"schedule": "cosine"},
            r"train.schedule 'constant'.*'cosine'.*train.steps None.*12",
        ),
        ({"betas": (0.9, 0.99)}, r"train.betas"),
        ({"steps": 11}, "12 steps.*11"),
    ],
)
def test_another_run_is_refused(whole_run, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        run(whole_run, replace(CFG, **fields))
    assert "\n" not in str(error.value)


def test_named_fields_may_change(whole_run):
    saved = checkpoints(whole_run)[-1]
    cfg = replace(CFG, lr=0.001, betas=(0.9, 0.99))
    identity = IDENTITY | {"train": cfg.identity(1)}
    check_same(saved, identity, 12, ["train.lr", "train.betas"])
    with pytest.raises(ValueError, match=r"train\.betas.*--change train\.betas"):
        check_same(saved, identity, 12, ["train.lr"])
    with pytest.raises(ValueError, match=r"--change train\.rate: .*train\.lr"):
        check_same(saved, identity, 12, ["train.rate"])


def test_what_may_change(whole_run):
    saved, cfg = checkpoints(whole_run)[-1], replace(CFG, batch_size=1, accumulate=4, save_every=5, steps=99)
    check_same(saved, IDENTITY | {"train": cfg.identity(1)}, cfg.steps)
    check_same(saved, IDENTITY | {"train": replace(cfg, accumulate=1).identity(4)}, cfg.steps)
    other = {"data": "toy", "weights": {"base": "2" * 64}, "train": CFG.identity(1)}
    with pytest.raises(ValueError, match=r"weights\.base '1+'.*'2+'"):
        check_same(saved, other, CFG.steps)
    with pytest.raises(ValueError, match=r"data 'toy'.*None"):
        check_same(saved, {"weights": IDENTITY["weights"], "train": CFG.identity(1)}, CFG.steps)


def test_checkpoint_of_another_model(whole_run):
    task = Toy(sharded=True)  # has no `rare`
    with pytest.raises(ValueError, match="rare") as error:
        fit(task, CFG, whole_run, ALONE, {}, checkpoints(whole_run)[-1])
    assert "\n" not in str(error.value)


# --- signals -----------------------------------------------------------------------------------------


class Asked(Toy):
    """Gets a signal while it makes the batch of a step."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__()
        self.number, self.step = number, step

    def batches(self, batch_size: int, rank: int, world: int, start: Position) -> Iterator:
        for batch, position in super().batches(batch_size, rank, world, start):
            if position["samples"] == 4 * self.step:
                os.kill(os.getpid(), self.number)
            yield batch, position


@pytest.mark.parametrize("step", [5, 6, 12])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_under_way(tmp_path, whole_run, capsys, number, status, step):
    """Between two checkpoints, where one is due, and in the last step, which ends the run as ever."""
    before = signal.getsignal(number)
    ended = cli.exit_status("toy", lambda: run(tmp_path / "run", task=Asked(number, step)))
    assert ended == (0 if step == 12 else status) and signal.getsignal(number) == before
    assert checkpoints(tmp_path / "run")[-1].step == step
    assert step == 12 or f"step {step}" in capsys.readouterr().err
    run(tmp_path / "run")
    same_run(tmp_path / "run", whole_run)


def test_a_second_interrupt_ends_at_once(tmp_path):
    class Impatient(Toy):
        def batches(self, *args: Any) -> Iterator:
            for batch, position in super().batches(*args):
                if position["samples"] > 16:  # both batches of the fifth step
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch, position

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", task=Impatient())
    assert checkpoints(tmp_path / "run")[-1].step == 3


def test_a_dead_worker_ends_in_one_line(tmp_path):
    class Deadly(Toy):
        def batches(self, *args: Any) -> Iterator:
            def die(items: list) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            yield from DataLoader([0, 1], num_workers=1, collate_fn=die)

    with pytest.raises(ChildProcessError, match=re.escape(str(tmp_path / "run"))) as error:
        run(tmp_path / "run", task=Deadly())
    assert "\n" not in str(error.value)


# --- decay and average -------------------------------------------------------------------------------


def test_only_named_weights_decay(tmp_path):
    """Without gradients the others stay what they are; after a continuation, too."""

    class Still(Regression):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) * 0

    def task() -> Toy:
        made = Toy()
        made.model, made.decayed = Still(), ("out.weight", "blocks.1.weight")
        return made

    cfg = replace(CFG, steps=3, warmup=0, weight_decay=0.5)
    run(tmp_path / "run", cfg, task())
    ended = run(tmp_path / "run", replace(cfg, steps=6), task())
    for name, weight in dict(Regression().named_parameters()).items():
        now = ended.model.get_parameter(name)
        factor = (1 - 0.5 * cfg.lr) ** 6 if name in ended.decayed else 1
        torch.testing.assert_close(now, weight * factor, msg=name)


def test_the_average_forgets_the_start():
    cfg = TrainConfig(ema=0.9999)
    kept = math.prod(average_decay(cfg, step) for step in range(1000))
    assert kept < 1e-6
    assert average_decay(cfg, 10**6) == 0.9999 and average_decay(replace(cfg, ema=None), 5) == 0


# --- log and curve -----------------------------------------------------------------------------------


def test_log_is_cut_back(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in (1, 2, 3):
        write_log(path, {"step": step, "loss": step / 2})
    with open(path, "ab") as stream:
        stream.write(b'{"step": 3, \xff\x00\n[1]\n{"loss": 1}\n')  # damaged
        stream.write(b'{"step": 4, "lo')  # killed here
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    cut_log(path, 2)
    write_log(path, {"step": 3, "loss": 0.25})
    assert read_log(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.25}]
    cut_log(path, -1)
    assert path.read_text() == ""


def test_ticks_are_round_and_enclose():
    assert ticks(0, 12, 6) == [0, 2, 4, 6, 8, 10, 12]
    assert ticks(0.13, 0.41, 6) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45])
    for low, high in ((0, 1), (3, 3), (0, 0), (-2, 5), (1e-7, 2e-7), (0, 100_000)):
        found = ticks(low, high, 6)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9


def test_smoothed():
    assert smoothed([(1, 4.0), (2, 4.0), (3, 4.0)], 10) == pytest.approx([(1, 4.0), (2, 4.0), (3, 4.0)])
    (_, first), (_, second) = smoothed([(1, 0.0), (2, 1.0)], 2)  # weights 1/2 and 1
    assert (first, second) == pytest.approx((0, 2 / 3))


def test_curve_shows_the_losses():
    """Falling losses are drawn falling, in the colours of the legend; an outlier does not flatten them."""
    log = [{"step": n, "loss": 1 - n / 1000} for n in range(1, 1001)] + [{"step": 0, "validation": 0.5}]
    log += [{"step": 1000, "validation": 0.5}]
    pixels = np.asarray(loss_curve(log))[60:470].astype(int)

    def heights(colour: tuple[int, int, int]) -> tuple[float, float]:
        rows, columns = np.nonzero((pixels == colour).all(-1))
        return rows[columns < 200].mean(), rows[columns > 800].mean()

    left, right = heights((30, 90, 170))
    assert right - left > 250
    left, right = heights((200, 80, 30))
    assert abs(right - left) < 1
    spiked = loss_curve([*log, {"step": 500, "loss": 1e6}])
    assert abs(np.asarray(spiked).astype(int) - np.asarray(loss_curve(log))).mean() < 5


@pytest.mark.parametrize("log", [[], [{"step": 3, "loss": 2.0}], [{"step": 0, "validation": 0.0}]])
def test_curve_of_little(log):
    assert loss_curve(log).size == (960, 540)
