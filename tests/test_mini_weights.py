"""The bundle that is shipped: MoMA-mini, as `python sample.py --ref examples/cat.png` meets it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from moma.bundle import SAMPLING, Bundle
from moma.mini import SOURCE

ROOT = Path(__file__).parents[1]
MINI = ROOT / "weights" / "mini"
LIMIT = 32 * 2**20  # bytes: what a clone should have to carry at most


def test_whole_and_small() -> None:
    bundle = Bundle.open(MINI)
    assert set(SAMPLING) <= set(bundle.networks) and bundle.networks["unet"]["source"] == SOURCE
    assert sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file()) <= LIMIT


def test_is_used_by_default_and_draws_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Snow is bright and little coloured, a sunset is warm: noise would be neither."""
    monkeypatch.setattr(sample, "WEIGHTS", sample.WEIGHTS[1:])  # whatever else lies there
    assert (
        sample.run(["--ref", str(ROOT / "examples" / "cat.png"), "--steps", "8", "--out", str(tmp_path)]) == 0
    )
    assert "MoMA-mini" in capsys.readouterr().out
    top = {
        scene: np.asarray(Image.open(tmp_path / f"a-cat-{scene}-seed0.png").convert("RGB"))[:16].mean((0, 1))
        for scene in ("in-the-snow", "at-sunset")
    }
    warm = {scene: rgb[0] - rgb[2] for scene, rgb in top.items()}
    assert warm["at-sunset"] > 0 > warm["in-the-snow"]
