"""One thread for all tests: their tensors are small, and a second thread costs more in waiting than it gains,
many times more where the cores are shared with other work. Subprocesses inherit it.

Each test has a folder for caches of its own, so that none finds what another one, or the user, has kept.
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
