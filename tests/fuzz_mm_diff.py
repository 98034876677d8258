"""The fuzzer's cases of MM-Diff: its configs, the three released files, a face's file, annotated images."""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from convert_weights import convert
from moma.data.annotated import read_sample
from moma.inputs.faces import read_face
from moma.methods.mm_diff.config import MMDiffConfig
from moma.methods.mm_diff.method import MMDiff
from moma.methods.mm_diff.training import MMDiffTrainingConfig
from moma.weights.bundle import Bundle
from tests.fuzz_images import Case
from tests.fuzz_weights import damaged, edited
from tests.mm_diff_release import base_bundle, released, small_adapter, write

VALUES = (None, True, 0, 1, -1, 3.7, 10**30, float("nan"), float("inf"), "", "x", [], {}, [[1]])
NAME = "000010000"


def cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    base = base_bundle(folder / "base")
    kinds = [settings, partial(files, base=base), faces, annotated]
    made = [kind(rng, folder / str(i)) for i, kind in enumerate(kinds)]
    while True:
        yield next(rng.choice(made))


def settings(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Fields of both configs and of the network's sizes in a bundle."""
    while True:
        kind = rng.choice([MMDiffConfig, MMDiffTrainingConfig])
        field, new = rng.choice([field.name for field in fields(kind)]), rng.choice(VALUES)
        old = getattr(kind(), field)
        wrong = isinstance(new, list | dict | float) if isinstance(old, str | bool) else isinstance(new, str)
        make = MMDiff.configure if kind is MMDiffConfig else kind
        yield f"{kind.__name__}.{field} = {new!r}", partial(make, **{field: new}), wrong


def files(rng: random.Random, folder: Path, base: Bundle) -> Iterator[Case]:
    """The three released files, and the sizes that a bundle made of them states."""
    content = released(base, small_adapter(base))
    source = write(folder, content)
    flat = {
        "unet_adapter": content["unet_adapter"],
        "text_encoder_adapter": content["text_encoder_adapter"],
        "custom": {f"{part}.{key}": x for part, own in content["custom"].items() for key, x in own.items()},
    }
    whole = {name: (source / f"{name}_weights.bin").read_bytes() for name in flat}
    with contextlib.redirect_stderr(io.StringIO()):
        convert([source], folder / "whole", base, say=lambda _: None)
    config = json.loads((folder / "whole" / "config.json").read_text())

    def run(name: str, put: Callable[[Path], object]) -> None:
        path = source / f"{name}_weights.bin"
        put(path)
        try:
            shutil.rmtree(folder / "out", ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):
                convert([source], folder / "out", base, say=lambda _: None)
        finally:
            path.write_bytes(whole[name])

    def resized(field: str, new: object) -> None:
        own = json.loads(json.dumps(config))
        own["networks"]["mm_diff"]["config"][field] = new
        (folder / "whole" / "config.json").write_text(json.dumps(own))
        bundle = Bundle.open(folder / "whole")
        bundle.build("mm_diff")

    while True:
        name = rng.choice(list(flat))
        if (chance := rng.random()) < 0.3:
            way, at, data = damaged(rng, whole[name])
            put = partial(lambda path, data: path.write_bytes(data), data=data)
            yield f"{name} {way} at {at}", partial(run, name, put), way in ("cut", "empty", "other")
        elif chance < 0.8:
            # The image encoder's are completed by the public one's, and a text encoder may have no LoRA.
            keys = [key for key in flat[name] if not key.startswith("image_encoder.")]
            tensors, key, way, wrong = edited(rng, flat[name], keys)
            nested: dict[str, dict] = {}
            for full, tensor in tensors.items():
                part, _, rest = full.partition(".")
                nested.setdefault(part, {})[rest] = tensor
            put = partial(torch.save, nested if name == "custom" else tensors)
            yield f"{name} {key} {way}", partial(run, name, put), wrong
        else:
            own = config["networks"]["mm_diff"]["config"]
            field, new = rng.choice(list(own)), rng.choice(VALUES)
            wrong = type(new) is not type(own[field]) and new is not True
            yield f"sizes {field} = {new!r}", partial(resized, field, new), wrong


def faces(rng: random.Random, folder: Path) -> Iterator[Case]:
    folder.mkdir()
    path = folder / "face.safetensors"
    spots = torch.tensor([[30.0, 30], [60, 30], [45, 50], [33, 65], [57, 65]])
    whole = {"embedding": torch.randn(512, generator=torch.Generator().manual_seed(0)), "landmarks": spots}

    def run(content: bytes | dict) -> None:
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        read_face(path, (120, 90))

    while True:
        if rng.random() < 0.5:
            save_file(whole, path)
            way, at, data = damaged(rng, path.read_bytes())
            yield f"face {way} at {at}", partial(run, data), way in ("cut", "empty", "other")
        else:
            tensors, key, way, _ = edited(rng, whole, list(whole))
            wrong = way not in ("int8", "bytes", "bool", "float8")
            yield f"face {key} {way}", partial(run, tensors), wrong


def annotated(rng: random.Random, folder: Path) -> Iterator[Case]:
    """An image, its numbers and its words."""
    path = folder / NAME[:5] / NAME
    path.parent.mkdir(parents=True)
    Image.new("RGB", (40, 32), "red").save(path.with_suffix(".jpg"))
    numbers = np.zeros((32, 40))
    numbers[4:28, 2:12] = 1
    np.save(path.with_suffix(".npy"), numbers)
    segment = {"id": 1, "word": "a man", "start": 0, "end": 5, "bbox": [0, 0, 9, 9]}
    path.with_suffix(".json").write_text(json.dumps({"caption": "a man", "segments": [segment]}))
    whole = {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".jpg", ".npy", ".json")}

    def run(suffix: str, data: bytes) -> None:
        path.with_suffix(suffix).write_bytes(data)
        try:
            read_sample(folder, NAME)
        finally:
            path.with_suffix(suffix).write_bytes(whole[suffix])

    while True:
        suffix = rng.choice(list(whole))
        if suffix == ".json" and rng.random() < 0.7:
            told = {"caption": "a man", "segments": [dict(segment)]}
            where = rng.choice([told, told["segments"][0]])
            field, new = rng.choice(list(where)), rng.choice(VALUES)
            where[field] = new
            wrong = field in ("caption", "segments", "word", "id") and new != segment.get(field)
            text = json.dumps(told).encode()
            yield f"annotated {field} = {new!r}", partial(run, suffix, text), wrong
            continue
        way, at, data = damaged(rng, whole[suffix])
        yield f"annotated {suffix} {way} at {at}", partial(run, suffix, data), way in ("empty", "other")
