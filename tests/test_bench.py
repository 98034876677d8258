"""The benchmark on a small UNet: both sides of every ratio compute the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.unet import UNetConfig
from moma import bench

SMALL = bench.BenchConfig(
    unet=UNetConfig(
        channels=(32, 64), depth=(1, 1), heads=(4, 4), context_dim=(16, 16), resnets=1, norm_groups=8
    ),
    size=128, repeats=1, text_tokens=9, peak=64,
)  # fmt: skip
CPU = torch.device("cpu")


def test_equation_3_is_the_same() -> None:
    ratio = bench.equation_3(SMALL, CPU, torch.float32)
    assert ratio.error < 1e-5


@torch.no_grad()
def test_the_baseline_is_the_same() -> None:
    """diffusers with the release's processors draws what our step draws; so it is the same work."""
    baseline = pytest.importorskip("tests.baseline")
    found = list(bench.steps(SMALL, CPU, torch.float32, baseline))
    assert len(found) == 3 and all(r.error < 1e-4 for r in found[1:])
    step = bench.make_step(SMALL, CPU, torch.float32)
    assert bench.relative_error(step.moma(), step.plain()) > 1e-2  # Eq. 3 does something here


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(bench, "BenchConfig", lambda: SMALL)
    monkeypatch.setattr(bench, "steps", lambda *args: iter(()))
    out = tmp_path / "new" / "bench.json"
    assert bench.run(["--dtype", "fp32", "--size", "128", "--repeats", "1", "--out", str(out)]) == 0
    assert "Eq. 3" in capsys.readouterr().out
    assert json.loads(out.read_text())["ratios"][0]["dtype"] == "fp32"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--size", "500"], "--size 500"), (["--share", "2"], "--share 2"), (["--repeats", "0"], "--repeats 0")],
)
def test_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert bench.run(options) != 0
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_table_says_what_is_missed() -> None:
    found = bench.table([bench.Ratio("a", "fp32", 2.0, 3.0, 1.0), bench.Ratio("b", "fp32", 2.0, 3.0, 2.0)])
    assert "| 3.00 | at least 2.00: met |" in found and "| 1.50 | at least 2.00: **missed** |" in found


def test_in_turn_counts_each_side() -> None:
    calls: list[str] = []
    bench.in_turn(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert "".join(calls) == "abababab"


def test_the_square_has_its_share() -> None:
    assert bench.square(replace(SMALL, size=512)).mean().item() == pytest.approx(SMALL.share, abs=0.02)
