"""How much memory is free, and whether to save it: LLaVA is streamed (models/weights/stream.py), the base's
networks take turns (moma/sampling/turns.py)."""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

import torch

Toggle = Literal["auto", "on", "off"]  # of a way to compute; "auto": where it helps
# Room beside the weights, as a share of them, for what computing needs: hidden states, buffers of operators,
# rounding of the allocator. Both grow with the networks' widths. For the public set it is 4 GB.
MARGIN = 0.25
# Latents that a CPU takes at once. Larger batches do not keep it busier, and the C library returns their
# large intermediate results to the system after each use (docs/performance.md). Small images do gain from a
# batch.
CPU_LATENTS = 4096
# Where Linux keeps the memory limit of a process group: controller in /proc/self/cgroup -> folder, limit,
# usage, and the part of it (in memory.stat) that is file cache and reclaimed on demand. "" is version 2.
CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def check_toggle(name: str, choice: str) -> None:
    """ValueError for a choice that is no `Toggle`; name: the option's."""
    if choice not in get_args(Toggle):
        raise ValueError(f"{name} {choice!r}: expected {', '.join(get_args(Toggle))}")


def choose_saving(choice: Toggle, needed: int, free: int | None) -> tuple[bool, str]:
    """Whether to save memory, and why; "auto" does if the weights and MARGIN do not fit into it.

    Args:
        choice: "auto", "on" or "off".
        needed: bytes of the resident weights.
        free: bytes; None = not known.

    Raises:
        ValueError: for another choice.
    """
    check_toggle("saving memory", choice)
    if choice != "auto":
        return choice == "on", "asked for"
    if free is None:
        return False, "free memory is not known here"
    wanted = needed * (1 + MARGIN)
    return wanted > free, f"{wanted / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"


def max_batch(batch_size: int, latents: int, device: torch.device) -> int:
    """How many images go through the UNet together, at least 1.

    Args:
        batch_size: at most.
        latents: of one image, h * w.
        device: a CPU takes CPU_LATENTS at most.
    """
    return max(1, min(batch_size, CPU_LATENTS // latents)) if device.type == "cpu" else batch_size


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device now; None = not known. MPS shares the machine's memory.

    What torch's allocator keeps of a GPU's memory without using it counts as free: the next tensors get it.
    """
    if device.type != "cuda":
        return available_ram()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def return_freed() -> None:
    """Give the system back what was freed, where the C library (glibc) would keep it."""
    with suppress(OSError, AttributeError, TypeError):  # the last on Windows
        ctypes.CDLL(None).malloc_trim(0)


def available_ram(root: Path = Path("/")) -> int | None:
    """Bytes of RAM that this process can get without swapping, limits of its cgroups included.

    root: of the file system that holds /proc and /sys. None where the system does not tell (not Linux).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return max(0, min([free, *_cgroup_rooms(root)]))


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Bytes left in each memory group that the process is in, from its own up to the outermost to be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, place in (line.split(":", 2) for line in lines):
        for controller in set(controllers.split(",")) & set(CGROUPS):
            folder, *names = CGROUPS[controller]
            top = root / folder
            own = top / place.strip("/")
            for group in (own, *own.parents):
                if (room := _room(group, *names)) is not None:
                    yield room
                if group == top:
                    break


def _room(group: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        most, now = (group / limit).read_text(), int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if most.strip() == "max" else int(most) - now + int(stat.get(cache, 0))
    except (OSError, ValueError):  # no such group here, or not this version's files
        return None
