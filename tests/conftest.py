"""One thread for all tests: their tensors are small, and a second thread costs more in waiting than it gains,
many times more where the cores are shared with other work. Subprocesses inherit it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
