"""The order of training samples, the same for any number of ranks and workers, resumable anywhere.

The samples are spread over L lanes. A unit is a shard, or a part of one where there are fewer shards than
lanes. In each epoch the units are shuffled and dealt out to the lanes; a lane reads its units one by one,
shuffles inside windows of W samples and goes on with its next epoch. Sample n of the stream is number n // L
of lane n % L. Ranks, and workers within a rank, own whole lanes: what a lane gives depends on the seed only.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
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

# Where the data stands; JSON. Ranks' positions are united key by key, the larger value of a key winning.
Position = dict[str, int]


# Run in the worker; its ValueError or OSError makes the sample a skipped one.
Transform = Callable[[Triplet], Any]


@dataclass(frozen=True)
class StreamConfig:
    """What the order depends on, besides the data."""

    seed: int = 0
    # ranks * workers must divide it; each lane holds a window and an open shard, so more cost memory.
    lanes: int = 16
    window: int = 256  # encoded samples, some 30 MB in each lane; neighbours in a shard should get apart
    limits: InputConfig = INPUT

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.window < 1:
            raise ValueError(f"lanes {self.lanes}, window {self.window}: expected at least 1 of each")


@dataclass(frozen=True, eq=False)
class Item:
    """One delivered sample."""

    number: int  # in the stream: counts the delivered ones; from `once`: place in file order
    key: str
    sample: Any  # the `Triplet`, or what the transform made of it
    position: Position  # of its lane after it; a rank's position is the union of its items'
    skipped: list[tuple[str, str]]  # (key, reason) of what its lane passed over since its last item


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
    """The endless stream's samples n with n % world == rank, in order, from a position on.

    workers: processes that decode; 0 decodes here. What cannot be used is skipped and told to `skips` (by
    default as warnings). ValueError: lanes do not divide, a position of other data, settings or of some
    ranks only, a source without a single usable sample.
    """
    skips, start = skips or SkipLog(), start or {}
    groups = world * max(workers, 1)
    if not 0 <= rank < world or cfg.lanes % groups:
        raise ValueError(
            f"{cfg.lanes} lanes cannot be dealt out to {world} ranks with {max(workers, 1)} workers each:"
            f" expected a multiple of {groups} lanes, or other workers"
        )
    order = _order_id(source, cfg)
    if start.get("stream", order) != order:
        raise ValueError(
            "the position belongs to other training data, or to another seed, window or number of lanes:"
            " restore those, or start from the beginning"
        )
    own = range(rank, cfg.lanes, world)
    upcoming = sorted((start.get(f"lane.{lane}.good", 0) * cfg.lanes + lane, lane) for lane in own)
    if any(number - upcoming[0][0] != i * world for i, (number, _) in enumerate(upcoming)):
        raise ValueError("the position lacks lanes of this rank: unite the positions of all ranks")
    lanes = [partial(_lane, source, cfg, lane, start, order, transform) for _, lane in upcoming]
    return _told(_Lanes(lanes), workers, skips)


def once(
    source: Source,
    part: int = 0,
    parts: int = 1,
    start: int = 0,
    transform: Transform | None = None,
    skips: SkipLog | None = None,
    limits: InputConfig = INPUT,
) -> Iterator[Item]:
    """Every sample once, in file order: those with number % parts == part, from number `start` on.

    A key that came before in this pass is skipped, so that keys can name files. ValueError: nothing usable.
    """
    skips, seen, skipped = skips or SkipLog(), set(), []
    everything = (raw for shard in range(len(source.shards)) for raw in source.read(shard))
    for number, raw in enumerate(everything):
        if number < start or number % parts != part:
            continue
        try:
            key, sample = _use(source, raw, limits, transform)
            if key in seen:
                raise ValueError(f"the key {key!r} came before: expected one for each sample")
        except (ValueError, OSError) as error:
            skipped.append((raw.key, _line(error)))
            skips.add(skipped[-1:])
            continue
        seen.add(key)
        yield Item(number, key, sample, {"once": number + 1}, skipped)
        skipped = []
    if not seen:
        _require_something(source, limits, transform)


def batches(items: Iterator[Item], size: int, start: Position) -> Iterator[tuple[list[Item], Position]]:
    """`size` items each, and the rank's position after them; `start`: what `stream` was given."""
    position = dict(start)
    while batch := list(islice(items, size)):
        for item in batch:
            position |= item.position
        yield batch, dict(position)


def _lane(
    source: Source, cfg: StreamConfig, lane: int, start: Position, order: int, transform: Transform | None
) -> Iterator[Item]:
    """One lane's endless samples, from where `start` says."""
    # Numbers that only grow, so that positions can be united by their larger values: units that are done,
    # samples read in all (raw), those read before the present unit (base), and those delivered (good).
    unit, raw, base, good = (start.get(f"lane.{lane}.{name}", 0) for name in ("unit", "raw", "base", "good"))
    parts = -(-cfg.lanes // len(source.shards))  # of each shard; 1 where there are enough shards
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
        while held := list(islice(items, cfg.window)):
            shuffled = _generator(cfg.seed, "window", lane, unit, window).permutation(len(held))
            waiting = deque(held[i] for i in shuffled[done:].tolist())
            held.clear()  # so that never more than one window is in memory
            while waiting:
                item, raw = waiting.popleft(), raw + 1
                try:
                    key, sample = _use(source, item, cfg.limits, transform)
                except (ValueError, OSError) as error:
                    skipped.append((item.key, _line(error)))
                    continue
                good += 1
                after = {"unit": unit, "raw": raw, "base": base, "good": good}
                position = {f"lane.{lane}.{name}": value for name, value in after.items()} | {"stream": order}
                yield Item((good - 1) * cfg.lanes + lane, key, sample, position, skipped)
                skipped = []
            window, done = window + 1, 0
        unit, base = unit + 1, raw
        if unit % in_epoch == 0:
            if good == good_before:  # perhaps by chance: this lane's units may be empty
                _require_something(source, cfg.limits, transform)
            good_before = good


class _Lanes(IterableDataset):
    """Lanes in turn, or those of them that this worker owns."""

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
        except ValueError as error:  # raised here it would reach the user with the worker's traceback
            yield error


def _told(lanes: _Lanes, workers: int, skips: SkipLog) -> Iterator[Item]:
    # One item of each worker in turn is the order of the lanes. The generator of its own keeps the loader
    # from drawing from the program's.
    loader = DataLoader(lanes, batch_size=None, num_workers=workers, generator=torch.Generator())
    for item in loader if workers else lanes:
        if isinstance(item, ValueError):
            raise item
        skips.add(item.skipped)
        yield item


def _use(source: Source, raw: Raw, limits: InputConfig, transform: Transform | None) -> tuple[str, Any]:
    """A sample's key and what is delivered of it. ValueError, OSError: it cannot be used."""
    triplet = load(source, raw, limits)
    return triplet.key, triplet if transform is None else transform(triplet)


def _require_something(source: Source, limits: InputConfig, transform: Transform | None) -> None:
    """ValueError where no sample at all can be used."""
    reason = "it holds no samples"
    for shard in range(len(source.shards)):
        for raw in source.read(shard):
            try:
                _use(source, raw, limits, transform)
                return
            except (ValueError, OSError) as error:
                reason = f"the last one, {raw.key!r}: {_line(error)}"
    raise ValueError(f"the training data has not one usable sample ({reason}): mend it or give other data")


def _order_id(source: Source, cfg: StreamConfig) -> int:
    """Tells streams of another order apart; 48 bits."""
    settings = json.dumps([source.fingerprint(), cfg.seed, cfg.lanes, cfg.window])
    return int.from_bytes(hashlib.sha256(settings.encode()).digest()[:6])


def _generator(*name: int | str) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps(name).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
