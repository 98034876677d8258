"""Seconds, operations and memory, and the lines that they become.

Letters: h w latents.
"""

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

from models.unet import SD15, UNetConfig
from moma.methods.moma.masks import Grid
from moma.sampling.device import dtype_name

GIB = 2**30
POLL = 0.005  # seconds between two looks at a process's memory: a buffer of a UNet step lives longer
STATUS = Path("/proc/self/status")
OWN, MAPPED = "RssAnon:", "RssFile:"  # pages of no file, and of files, in it


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    unet: UNetConfig = SD15
    size: int = 512  # pixels
    share: float = 0.35  # of the subject in the reference and in the image
    repeats: int = 3  # of each side, in turn; the median counts
    factor: int = 8  # pixels per latent
    text_tokens: int = 77
    timestep: int = 500  # where Eq. 3 acts
    peak: int = 4096  # side of the matrices whose product is taken for this machine's peak
    seed: int = 0
    # Free memory, as a multiple of what a sample of the training's baseline keeps, without which its second
    # sample is left out: two of them, buffers of operators, another UNet.
    room: float = 3.0
    images: int = 4  # of the whole flow
    steps: int = 50
    # Of the curves. Each point varies one thing and leaves the others.
    sizes: tuple[int, ...] = (256, 384, 512, 768, 1024)
    batches: tuple[int, ...] = (1, 4, 16)
    lengths: tuple[int, ...] = (1, 2, 5)  # steps
    shares: tuple[float, ...] = (0.05, 0.35, 0.7, 1.0)
    # Least ratios; "half": where 16-bit types have another one.
    wanted: Mapping[str, float] = field(
        default_factory=lambda: {
            "eq3": 4.0, "moma": 1 / 1.1, "plain": 1.0, "plain half": 1 / 0.9, "release": 2.8,
            "release half": 4.0, "flow": 4.0, "flow cuda": 5.0, "streamed": 1 / 1.3, "training": 2.0,
            "batch": 2.0, "graph": 1.0,
        }
    )  # fmt: skip
    # Most memory in GiB: of the streamed decoder, and of the whole pipeline in 16 bits.
    most: Mapping[str, float] = field(
        default_factory=lambda: {"streamed": 1.2, "pipeline cpu": 6.0, "pipeline cuda": 4.0}
    )

    @property
    def grid(self) -> Grid:
        """Latents."""
        return self.size // self.factor, self.size // self.factor


@dataclass(frozen=True)
class Ratio:
    """One line of the table of ratios."""

    what: str
    dtype: str
    wanted: float  # least ratio
    slow: float  # what is compared with
    fast: float  # ours
    error: float | None = None  # largest difference over the largest value, where both give the same
    unit: str = "s"

    @property
    def times(self) -> float:
        return self.slow / self.fast


@dataclass(frozen=True)
class Part:
    """One line of the table of parts."""

    what: str
    dtype: str
    seconds: float
    flops: int | None = None
    of_peak: float | None = None  # operations per second over those of a matrix product
    memory: int | None = None  # bytes beyond what was there before, on a call that is not the first


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    axis: str
    x: float
    dtype: str
    plain: float  # seconds of a plain step, or of several
    moma: float  # seconds of as many MoMA steps
    memory: int | None  # bytes beyond weights and inputs, of an eager MoMA step


Found = Ratio | Part | Point


def half(key: str, dtype: torch.dtype) -> str:
    """The key of `BenchConfig.wanted` for a dtype."""
    return key if dtype == torch.float32 else f"{key} half"


# --- seconds -----------------------------------------------------------------------------------------


def in_turn(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of both, called in turn after one call each that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repeats + 1):
        for call, kept in zip((first, second), seconds, strict=True):
            taken = seconds_of(call)
            if round_:
                kept.append(taken)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def median_of(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, after one that does not count."""
    return in_turn(call, lambda: None, repeats)[0]


def seconds_of(call: Callable[[], Any]) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


# --- operations --------------------------------------------------------------------------------------


def operations(run: Callable[[], Any]) -> int:
    """Floating point operations of matrix products, convolutions and attention."""

    def sdpa(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def linear(x: torch.Size, weight: torch.Size, *args: Any, **options: Any) -> int:
        return 2 * prod(x) * weight[0]

    def conv(x: torch.Size, weight: torch.Size, *args: Any, out_shape: torch.Size, **options: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    ops = torch.ops
    known = {ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa}  # these are not in torch's own list
    if torch.backends.mkldnn.is_available():
        known |= {ops.mkldnn._linear_pointwise: linear, ops.mkldnn._convolution_pointwise: conv}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


def matmul_peak(cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product."""
    generator = torch.Generator(device).manual_seed(cfg.seed)
    a = torch.randn(cfg.peak, cfg.peak, generator=generator, device=device).to(dtype)
    return 2 * cfg.peak**3 / median_of(lambda: a @ a, cfg.repeats)


def part_of(
    what: str, dtype: torch.dtype, call: Callable[[], Any], seconds: float, peak: float, device: torch.device
) -> Part:
    """A call's line; peak: of `matmul_peak`."""
    flops = operations(call)
    return Part(what, dtype_name(dtype), seconds, flops, flops / seconds / peak, memory_of(call, device))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


# --- memory ------------------------------------------------------------------------------------------


def memory_of(call: Callable[[], Any], device: torch.device, mapped: bool = False) -> int | None:
    """Most bytes that a call takes beyond what was there before; None = the system does not tell.

    On CUDA what torch has allocated; on CPUs this process's own pages and, with `mapped`, those of files that
    are mapped into it and were touched.
    """
    if device.type == "cuda":
        wait()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    give_back()
    kinds = (OWN, MAPPED) if mapped else (OWN,)
    if (before := pages(STATUS, kinds)) is None:
        call()
        return None
    with watched(STATUS, kinds) as seen:
        call()
    return max(seen) - before


def give_back() -> None:
    """Memory that was freed but kept by the C library for later goes back to the system: it would hide what
    a call takes."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def pages(status: Path, kinds: tuple[str, ...]) -> int | None:
    """Bytes of a process's pages of these kinds; status: its file of that name in /proc."""
    try:
        lines = [line.split() for line in status.read_text().splitlines()]
    except OSError:
        return None
    found = [int(words[1]) * 1024 for words in lines if words and words[0] in kinds]
    return sum(found) if found else None


@contextmanager
def watched(status: Path, kinds: tuple[str, ...]) -> Iterator[list[int]]:
    """`pages` again and again while the context is open, in a list."""
    seen, over = [pages(status, kinds) or 0], threading.Event()

    def look() -> None:
        while not over.wait(POLL):
            seen.append(pages(status, kinds) or 0)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
