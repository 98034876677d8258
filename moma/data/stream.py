"""An endless shuffled stream of training samples that can resume after any sample.

The order is the same for any number of ranks and workers. The samples are spread over L lanes. A unit is a
shard, or a part of one if there are fewer shards than lanes. Each epoch shuffles the units and deals them out
to the lanes; a lane reads its units one by one and shuffles within windows of W samples. Sample n of the
stream is number n // L of lane n % L, and a lane's order depends on the seed only. Each rank, and each worker
within it, owns whole lanes; where their number does not divide L, several read the same lane and each
delivers its share.
"""

import hashlib
import json
import math
import pickle
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moma.data.shards import Raw
from moma.data.triplets import SkipLog, Source, Triplet, load
from moma.inputs.preprocess import INPUT, InputConfig

# Position in the data, as JSON. The position of several ranks is the maximum of each key.
Position = dict[str, int]
# Runs in the worker; a ValueError or OSError skips the sample.
Transform = Callable[[Triplet], Any]


class KeptBack(ValueError):
    """Raised by a transform for a sample that is usable, but not here."""


@dataclass(frozen=True)
class StreamConfig:
    """What the order depends on besides the data."""

    seed: int = 0
    # Best a multiple of ranks * workers: otherwise several decode the same samples. Each lane holds a window
    # and an open shard in memory.
    lanes: int = 16
    window: int = 256  # encoded samples, some 30 MB per lane; separates neighbours of a shard
    window_bytes: int = 2**27  # of a window in memory; the rest waits on the disk
    limits: InputConfig = INPUT

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.window < 1:
            raise ValueError(f"lanes {self.lanes}, window {self.window}: expected at least 1 of each")


@dataclass(frozen=True, eq=False)
class Item:
    """One delivered sample."""

    number: int  # in the stream, counting delivered samples; from `once`: in file order
    key: str
    sample: Any  # the `Triplet`, or what the transform made of it
    position: Position  # of its lane after this sample; a rank's is the union of its items'
    skipped: list[tuple[str, str]]  # (key, reason), by its lane since its last item


def stream(
    source: Source,
    cfg: StreamConfig,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    start: Position | None = None,
    transform: Transform | None = None,
    skips: SkipLog | None = None,
) -> Iterator[Item]:
    """The samples n of the endless stream with n % world == rank, in order.

    Args:
        source: the data.
        cfg: seed, lanes and windows.
        rank, world: of the process.
        workers: processes that decode; 0 decodes in this one.
        start: position to resume from.
        transform: applied to each triplet in the worker.
        skips: counts samples that cannot be used; None = warnings.
    Raises:
        ValueError: the position belongs to other data or settings, or lacks ranks; the source has no usable
            sample.
    """
    skips, start = skips or SkipLog(), start or {}
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank}: expected 0 to {world - 1}")
    readers = world * max(workers, 1)
    parts = math.lcm(cfg.lanes, readers)  # part p: every (parts / lanes)-th sample of lane p % lanes
    share = parts // cfg.lanes
    if share > 1 and rank == 0:
        warnings.warn(
            f"{cfg.lanes} lanes for {readers} readers ({world} ranks, {max(workers, 1)} workers): each sample"
            f" is decoded {share} times; use fewer workers, or in a new run a multiple of {readers} lanes",
            stacklevel=2,
        )
    order = _order_id(source, cfg)
    if start.get("stream", order) != order:
        raise ValueError(
            "the position belongs to other training data, or to another seed, window or number of lanes:"
            " restore those, or start from the beginning"
        )

    def first(part: int) -> int:
        """The number of the first sample of a part that is not delivered yet."""
        turn, lane = divmod(part, cfg.lanes)
        good = start.get(f"lane.{lane}.good", 0)
        return (good + (turn - good) % share) * cfg.lanes + lane

    upcoming = sorted((first(part), part) for part in range(rank, parts, world))
    if any(number - upcoming[0][0] != i * world for i, (number, _) in enumerate(upcoming)):
        raise ValueError("the position lacks lanes of this rank: merge the positions of all ranks")
    lanes = [partial(_part, source, cfg, part, share, start, order, transform) for _, part in upcoming]
    return _checked(_Lanes(lanes), workers, skips)


def once(source: Source, transform: Transform | None = None, skips: SkipLog | None = None) -> Iterator[Item]:
    """Every sample once, in file order; a repeated key is skipped, so that keys can name files.

    Args:
        source: the data.
        transform: applied to each triplet.
        skips: counts samples that cannot be used; None = warnings.
    Raises:
        ValueError: the source has no usable sample.
    """
    skips, seen, skipped = skips or SkipLog(), set(), []
    everything = (raw for shard in range(len(source.shards)) for raw in source.read(shard))
    for number, raw in enumerate(everything):
        try:
            key, sample = _use(source, raw, INPUT, transform)
            if key in seen:
                raise ValueError(f"the key {key!r} came before: expected one for each sample")
        except (ValueError, OSError) as error:
            skipped.append((raw.key, _line(error)))
            skips.add(skipped[-1:])
            continue
        seen.add(key)
        skips.add([], delivered=1)
        yield Item(number, key, sample, {"once": number + 1}, skipped)
        skipped = []
    if not seen:
        _require_something(source, INPUT, transform)


def batches(items: Iterator[Item], size: int, start: Position) -> Iterator[tuple[list[Item], Position]]:
    """Group items into batches, each with the rank's position after it.

    Args:
        items: of one rank, from `stream`.
        size: items per batch.
        start: the position that `stream` was given.
    """
    position = dict(start)
    while batch := list(islice(items, size)):
        for item in batch:
            position |= item.position
        yield batch, dict(position)


class _Window:
    """Samples that wait for their turn; those beyond `limit` bytes in a file without a name."""

    def __init__(self, raws: Iterable[Raw], limit: int) -> None:
        self.held: list[Raw | int | None] = []  # int: where it begins in the file
        self.file = None
        for raw in raws:
            limit -= raw.nbytes
            if limit < 0:
                self.file = self.file or tempfile.TemporaryFile()  # noqa: SIM115 (stays open)
                self.held.append(self.file.tell())
                pickle.dump(raw, self.file)
            else:
                self.held.append(raw)

    def take(self, i: int) -> Raw:
        """A sample, once."""
        raw, self.held[i] = self.held[i], None
        if isinstance(raw, int):
            self.file.seek(raw)
            raw = pickle.load(self.file)
        return raw


def _part(
    source: Source,
    cfg: StreamConfig,
    part: int,
    share: int,
    start: Position,
    order: int,
    transform: Transform | None,
) -> Iterator[Item]:
    """Every `share`-th sample of a lane. The others are decoded, too, to know which of them count."""
    turn, lane = divmod(part, cfg.lanes)
    for item in _lane(source, cfg, lane, start, order, transform):
        if item.number // cfg.lanes % share == turn:
            yield item


def _lane(
    source: Source, cfg: StreamConfig, lane: int, start: Position, order: int, transform: Transform | None
) -> Iterator[Item]:
    """One lane's endless samples from a position on."""
    # Counters that only grow, so that positions can be merged by their maximum: finished units, samples read
    # (raw), samples read before the current unit (base), samples delivered (good), kept back (held).
    counters = ("unit", "raw", "base", "good", "held")
    unit, raw, base, good, held = (start.get(f"lane.{lane}.{name}", 0) for name in counters)
    parts = -(-cfg.lanes // len(source.shards))  # per shard; 1 if there are enough shards
    units = parts * len(source.shards)
    in_epoch = len(range(lane, units, cfg.lanes))
    skipped: list[tuple[str, str]] = []
    good_before = good  # this epoch
    while True:
        epoch, turn = divmod(unit, in_epoch)
        dealt = _generator(cfg.seed, "units", epoch).permutation(units)
        shard, part = divmod(int(dealt[lane + turn * cfg.lanes]), parts)
        window, done = divmod(raw - base, cfg.window)
        items = islice(source.read(shard), part + window * cfg.window * parts, None, parts)
        while (waiting := _Window(islice(items, cfg.window), cfg.window_bytes)).held:
            shuffled = _generator(cfg.seed, "window", lane, unit, window).permutation(len(waiting.held))
            for i in shuffled[done:].tolist():
                item, raw = waiting.take(i), raw + 1
                try:
                    key, sample = _use(source, item, cfg.limits, transform)
                except KeptBack:
                    held += 1
                    continue
                except (ValueError, OSError) as error:
                    skipped.append((item.key, _line(error)))
                    continue
                good += 1
                after = dict(zip(counters, (unit, raw, base, good, held), strict=True))
                position = {f"lane.{lane}.{name}": value for name, value in after.items()} | {"stream": order}
                yield Item((good - 1) * cfg.lanes + lane, key, sample, position, skipped)
                skipped = []
            window, done = window + 1, 0
        unit, base = unit + 1, raw
        if unit % in_epoch == 0:
            if good == good_before:  # perhaps only this lane's units are empty
                _require_something(source, cfg.limits, transform)
            good_before = good


class _Lanes(IterableDataset):
    """Takes turns over the lanes, or over those that this worker owns."""

    def __init__(self, lanes: list[Callable[[], Iterator[Item]]]) -> None:
        self.lanes = lanes

    def __iter__(self) -> Iterator[Item | ValueError]:
        worker = get_worker_info()
        lanes = self.lanes if worker is None else self.lanes[worker.id :: worker.num_workers]
        iterators = [lane() for lane in lanes]
        try:
            while True:
                for iterator in iterators:
                    yield next(iterator)
        except ValueError as error:  # yielded, since a raised one gets the worker's traceback
            yield error


def _checked(lanes: _Lanes, workers: int, skips: SkipLog) -> Iterator[Item]:
    # The loader takes one item per worker in turn, which is the order of the lanes. With its own generator it
    # does not draw from the global one.
    options = {"num_workers": workers, "generator": torch.Generator(), "worker_init_fn": _leave_signals}
    loader = DataLoader(lanes, batch_size=None, **options)
    for item in loader if workers else lanes:
        if isinstance(item, ValueError):
            raise item
        skips.add(item.skipped, delivered=1)
        yield item


def _leave_signals(worker: int) -> None:
    """A worker leaves it to its process to end after signals that the whole group gets."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def skipped_so_far(position: Position) -> tuple[int, int]:
    """How many samples could not be used up to a position, and how many have been read."""
    raw, good, held = (
        sum(count for key, count in position.items() if key.endswith(name))
        for name in (".raw", ".good", ".held")
    )
    return raw - good - held, raw


def _use(source: Source, raw: Raw, limits: InputConfig, transform: Transform | None) -> tuple[str, Any]:
    """A sample's key and its (transformed) content; ValueError or OSError if it cannot be used."""
    triplet = load(source, raw, limits)
    return triplet.key, triplet if transform is None else transform(triplet)


def _require_something(source: Source, limits: InputConfig, transform: Transform | None) -> None:
    """ValueError if no sample at all can be used."""
    reason = "it holds no samples"
    for shard in range(len(source.shards)):
        for raw in source.read(shard):
            try:
                _use(source, raw, limits, transform)
                return
            except (ValueError, OSError) as error:
                reason = f"the last one, {raw.key!r}: {_line(error)}"
    raise ValueError(f"the training data has no usable sample ({reason})")


def _order_id(source: Source, cfg: StreamConfig) -> int:
    """Identifies the order; 48 bits."""
    settings = json.dumps([source.names(), cfg.seed, cfg.lanes, cfg.window])
    return int.from_bytes(hashlib.sha256(settings.encode()).digest()[:6])


def _generator(*name: int | str) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
