"""Time, operations and memory, and the lines of the report."""

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from models.unet import SD15, Grid, UNetConfig
from moma.sampling.device import dtype_name
from moma.sampling.interface import Runtime

GIB = 2**30
POLL = 0.005  # seconds between two samples of a process's memory; buffers of a UNet step live longer
STATUS = Path("/proc/self/status")
OWN, MAPPED = "RssAnon:", "RssFile:"  # its lines on anonymous pages, and on pages of mapped files


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    unet: UNetConfig = SD15
    size: int = 512  # pixels
    share: float = 0.35  # of reference and image that the subject takes
    repeats: int = 3  # timed calls of each side, in turn; the median counts
    factor: int = 8  # pixels per latent
    text_tokens: int = 77
    timestep: int = 500  # at which Eq. 3 acts
    peak: int = 4096  # side of the matrices whose product measures the machine's peak
    seed: int = 0
    # The second sample of the training baseline needs this multiple of one sample's saved tensors as free
    # memory: two samples, buffers of operators, another UNet.
    room: float = 3.0
    images: int = 4  # of a whole drawing
    steps: int = 50
    # Curves; each varies one quantity.
    sizes: tuple[int, ...] = (256, 384, 512, 768, 1024)
    batches: tuple[int, ...] = (1, 4, 16)
    lengths: tuple[int, ...] = (1, 2, 5)  # steps
    shares: tuple[float, ...] = (0.05, 0.35, 0.7, 1.0)
    # Least ratios; "half" is that of 16-bit types where it differs.
    wanted: Mapping[str, float] = field(
        default_factory=lambda: {
            "eq3": 4.0, "moma": 1 / 1.1, "plain": 1.0, "plain half": 1 / 0.9, "release": 2.8,
            "release half": 4.0, "flow": 4.0, "flow cuda": 5.0, "streamed": 1 / 1.3, "training": 2.0,
            "batch": 2.0, "graph": 1.0,
        }
    )  # fmt: skip
    # Memory limits in GiB: of the streamed decoder, and of the whole pipeline in 16 bits.
    most: Mapping[str, float] = field(
        default_factory=lambda: {"streamed": 1.2, "pipeline cpu": 6.0, "pipeline cuda": 4.0}
    )

    @property
    def grid(self) -> Grid:
        """Height and width of the latents."""
        return self.size // self.factor, self.size // self.factor


@dataclass(frozen=True)
class Ratio:
    """One line of the table of ratios."""

    what: str
    dtype: str
    wanted: float  # least ratio
    slow: float  # the other side
    fast: float  # ours
    error: float | None = None  # largest difference over the largest value, if both compute the same
    unit: str = "s"

    @property
    def times(self) -> float:
        """The ratio."""
        return self.slow / self.fast


@dataclass(frozen=True)
class Part:
    """One line of the table of parts."""

    what: str
    dtype: str
    seconds: float
    flops: int | None = None
    of_peak: float | None = None  # operations per second over those of a matrix product
    memory: int | None = None  # bytes that a warmed-up call allocates


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    axis: str
    x: float
    dtype: str
    plain: float  # seconds of one or more plain steps
    moma: float  # seconds of as many MoMA steps
    memory: int | None  # bytes that an eager MoMA step allocates


Found = Ratio | Part | Point


@dataclass(frozen=True)
class Bench:
    """What is measured, and on which machine, in one dtype."""

    cfg: BenchConfig
    runtime: Runtime  # its weights: a bundle of full size, or None
    baseline: Any = None  # the module tests.baseline

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def dtype(self) -> torch.dtype:
        return self.runtime.dtype

    @property
    def kind(self) -> str:
        """The name of the dtype."""
        return dtype_name(self.dtype)

    def ratio(
        self, what: str, wanted: str, slow: float, fast: float, error: float | None = None, unit: str = "s"
    ) -> Ratio:
        """A line of the table of ratios.

        Args:
            what: name of the line.
            wanted: key of `BenchConfig.wanted`.
            slow: the other side.
            fast: ours.
            error: relative difference of the results.
            unit: of both sides.
        """
        least, key = self.cfg.wanted, f"{wanted} half"
        if self.dtype == torch.float32 or key not in least:
            key = wanted
        return Ratio(what, self.kind, least[key], slow, fast, error, unit)

    def part(self, what: str, seconds: float, call: Callable[[], Any], peak: float) -> Part:
        """A line of the table of parts.

        Args:
            what: name of the line.
            seconds: the call's time.
            call: what was timed.
            peak: operations per second, of `matmul_peak`.
        """
        flops = operations(call)
        return Part(what, self.kind, seconds, flops, flops / seconds / peak, memory_of(call, self.device))


# --- seconds -----------------------------------------------------------------------------------------


def in_turn(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Time two calls in turn, after one warm-up call of each.

    Args:
        first: one side.
        second: the other side.
        repeats: timed calls of each.

    Returns:
        Median seconds of both.
    """
    rounds = [(seconds_of(first), seconds_of(second)) for _ in range(repeats + 1)]
    slow, fast = (statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True))
    return slow, fast


def median_of(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after a warm-up call."""
    return in_turn(call, lambda: None, repeats)[0]


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call, including work on the device."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Wait for the device to finish its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# --- operations --------------------------------------------------------------------------------------


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations of a call's matrix products, convolutions and attention."""

    def sdpa(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def linear(x: torch.Size, weight: torch.Size, *args: Any, **options: Any) -> int:
        return 2 * prod(x) * weight[0]

    def conv(x: torch.Size, weight: torch.Size, *args: Any, out_shape: torch.Size, **options: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    ops = torch.ops
    known = {ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa}  # missing in torch's own list
    if torch.backends.mkldnn.is_available():
        known |= {ops.mkldnn._linear_pointwise: linear, ops.mkldnn._convolution_pointwise: conv}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


def matmul_peak(bench: Bench) -> float:
    """Operations per second of a large matrix product."""
    cfg, generator = bench.cfg, torch.Generator(bench.device).manual_seed(bench.cfg.seed)
    a = torch.randn(cfg.peak, cfg.peak, generator=generator, device=bench.device).to(bench.dtype)
    return 2 * cfg.peak**3 / median_of(lambda: a @ a, cfg.repeats)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


# --- memory ------------------------------------------------------------------------------------------


def memory_of(call: Callable[[], Any], device: torch.device, mapped: bool = False) -> int | None:
    """Peak memory of a call beyond what was allocated before.

    Args:
        call: what to measure.
        device: on CUDA, memory is what torch has allocated; on CPUs, the anonymous pages of this process.
        mapped: on CPUs, whether touched pages of mapped files count, too.

    Returns:
        Bytes, or None where the system does not tell.
    """
    if device.type == "cuda":
        _wait()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    kinds = (OWN, MAPPED) if mapped else (OWN,)
    if (before := _pages(STATUS, kinds)) is None:
        call()
        return None
    with watched(STATUS, kinds) as seen:
        call()
    return max(seen) - before


def _trim() -> None:
    """Return memory that the C library keeps after it was freed; it would hide what a call allocates."""
    with suppress(OSError, AttributeError):  # of another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _pages(status: Path, kinds: tuple[str, ...]) -> int | None:
    """Bytes of a process's pages of these kinds; status: its file "status" in /proc."""
    try:
        lines = [line.split() for line in status.read_text().splitlines()]
    except OSError:
        return None
    found = [int(words[1]) * 1024 for words in lines if words and words[0] in kinds]
    return sum(found) if found else None


@contextmanager
def watched(status: Path, kinds: tuple[str, ...]) -> Iterator[list[int]]:
    """Sample the memory of a process while the context is open; yields the list of samples in bytes."""
    seen, stop = [_pages(status, kinds) or 0], threading.Event()

    def sample() -> None:
        while not stop.wait(POLL):
            seen.append(_pages(status, kinds) or 0)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
