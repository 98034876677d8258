"""One thread for all tests: their tensors are small, and a second thread costs more in waiting than it gains,
many times more where the cores are shared with other work. Subprocesses inherit it.

No CUDA device, unless MOMA_GPU is set: what is expected is a CPU's, to its digits, and some tests fork, which
CUDA forbids. `MOMA_GPU=1 python -m pytest tests/test_gpu.py` runs those of a CUDA device.

Ctrl-C works as in a terminal: a shell's jobs in the background ignore it, and so would the tests of it.

Each test has a folder for caches of its own, so that none finds what another one, or the user, has kept.
"""

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moma import Pipeline

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
if not os.environ.get("MOMA_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes by their length: some hold the time of their making, and all workers must see the same names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tiny bundle."""
    from tests.tiny import build_tiny_bundle  # torch reads the number of threads when it is imported

    path = tmp_path_factory.mktemp("weights") / "tiny"
    build_tiny_bundle(path)
    yield str(path)


@pytest.fixture(scope="module")
def pipe(folder: str) -> "Pipeline":
    from moma import load

    return load(folder, device="cpu", dtype="fp32")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights from a bundle fails the test."""

    def load(*args: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("moma.weights.bundle.load_into", load)
