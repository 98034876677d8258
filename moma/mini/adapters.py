"""The adapters of MoMA-mini: their data as shards, and their trainings by `train.py`, as for any other data.

Letters: N images, S W sides of an image.
"""

import runpy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moma.data.shards import Other, ShardWriter
from moma.inputs.preprocess import encoded
from moma.mini.config import AdapterRun
from moma.mini.workspace import Workspace
from moma.sampling.device import dtype_name
from moma.training.loop import EXPORT
from moma.world.pairs import named_specs, pair, pair_words
from moma.world.world import CLASSES, Spec, WorldConfig, draw, spec, trained_elsewhere

ROOT = Path(__file__).parents[2]  # of the repository's scripts
PAIRS = "pairs"  # the data of two subjects

# --- the data ------------------------------------------------------------------------------------------


def write_singles(work: Workspace, name: str) -> None:
    """Write the first training images as shards. Every image is its own reference, or another render is.

    Args:
        work: has the renders.
        name: of the folder, and of the share of other renders in `MiniConfig.twins`.
    """
    found, world, share = work.arrays("train"), work.cfg.world, work.cfg.twins[name]
    with ShardWriter(work.folder / name) as shards:
        done = shards.done_keys()
        for i in range(work.cfg.singles):
            if (key := f"{i:06}") not in done:
                image, mask = (_png(found[kind][i]) for kind in ("image", "mask"))
                words = CLASSES[found["label"][i]], str(found["caption"][i])
                twin = _twin(spec(i, "train", world), i, share, world)
                shards.add(key, image, "png", mask, *words, reference=twin)


def write_pairs(work: Workspace) -> None:
    """Write the first training images of two subjects as shards, without those that no words tell apart."""
    found, world, share = work.arrays("train_pairs"), work.cfg.world, work.cfg.twins[PAIRS]
    with ShardWriter(work.folder / PAIRS) as shards:
        done = shards.done_keys()
        for i in range(work.cfg.twos):
            what, key = pair(i, "train", world), f"{i:06}"
            words = pair_words(what, world)
            alike = words.labels[0] == words.labels[1]
            told = words.patterned if alike else words.caption
            if key in done or (alike and not told.apart):
                continue
            twins = [_twin(one, i, share, world) for one in named_specs([what], world)]
            image, first, second = map(_png, (found["image"][i], *found["masks"][i]))
            others = [Other(second, words.labels[1], reference=twins[1])]
            texts = words.labels[0], told.text
            shards.add(key, image, "png", first, *texts, reference=twins[0], others=others)


def _twin(what: Spec, i: int, share: float, world: WorldConfig) -> tuple[bytes, bytes] | None:
    """Another render of a subject and its mask, for a share of the samples i."""
    if int((i + 1) * share) == int(i * share):
        return None
    return tuple(map(_png, draw(trained_elsewhere(what, i, world), world)[:2]))


def _png(array: np.ndarray) -> bytes:
    """An image or mask as a PNG file."""
    return encoded(Image.fromarray(array), "PNG")


# --- the trainings -------------------------------------------------------------------------------------


def decoder(work: Workspace) -> None:
    """The feature decoder (Eq. 4)."""
    options = ("--steps", work.cfg.decoder_steps, *work.cfg.decoder_options)
    _train(work, "decoder", AdapterRun("moma:stage1", start="base"), map(str, options), work.folder / "base")


def adapters(work: Workspace) -> None:
    """The adapters, each on top of the ones before, so that the last bundle holds all."""
    train_runs(work, work.cfg.adapters)


def ablations(work: Workspace) -> None:
    """Adapters trained otherwise, for a part of the steps."""
    for name in sorted(work.cfg.twins.keys() - {"mixed", PAIRS}):
        work.ranks.once(partial(write_singles, work, name))
    train_runs(work, work.cfg.ablations)


def train_runs(work: Workspace, runs: Mapping[str, AdapterRun]) -> None:
    """Run trainings by Eq. 1 and put each result into the bundle that it started from."""
    world = work.cfg.world
    for name, run in runs.items():
        shape = ("--set", f"height={world.size}", "--set", f"width={world.pair_pixels}")
        cache = f"{work.folder}/caches/{run.cache or run.training.replace(':', '-')}-{run.data}"
        steps = max(1, round(run.share * work.cfg.adapter_steps))
        options = ("--steps", str(steps), "--cache", cache, *work.cfg.adapter_options, *run.options)
        options += shape if run.data == PAIRS else ()
        _train(work, f"adapters/{name}", run, options, bundle_of(work, run.start))


def bundle_of(work: Workspace, name: str) -> Path:
    """The bundle that a run has made or, by "decoder", stage 1."""
    return work.folder / "bundles" / name


def _train(work: Workspace, name: str, run: AdapterRun, options: Iterable[str], start: Path) -> None:
    """`train.py` on all ranks, and a bundle with its result; SystemExit if it fails.

    Args:
        work: of the recipe.
        name: of the folder in it; its last part names the new bundle.
        run: the training.
        options: of `train.py`.
        start: the bundle that it starts from.
    """
    out, share = work.folder / name, work.share_of(work.cfg.adapter_batch)
    given = {"--bundle": start, "--data": work.folder / run.data, "--out": out}
    given |= {"--batch-size": share, "--device": work.ranks.device.type}
    texts = [str(part) for option in given.items() for part in option]
    _run_script("train.py", [run.training, "--resume", *texts, *options])
    dtype = dtype_name(work.cfg.dtype)
    work.ranks.once(lambda: put_in(out / EXPORT, start, bundle_of(work, out.name), dtype))


def put_in(export: Path, bundle: Path, target: Path, dtype: str) -> None:
    """Write a bundle with the result of a training.

    Args:
        export: folder of the training's export.
        bundle: that the training started from.
        target: folder of the new bundle.
        dtype: of what was trained, a name.
    """
    options = ("--base-bundle", str(bundle), "--out", str(target), "--overwrite", "--dtype", dtype)
    _run_script("convert_weights.py", [str(export), *options])


def _run_script(name: str, options: Sequence[Any]) -> None:
    """Run a script of the repository in this process, as one of its ranks; SystemExit if it fails."""
    script = runpy.run_path(str(ROOT / name))
    if script.get("run", script["main"])(options):
        raise SystemExit(2)
