"""What the frozen networks make of a data set, computed once: a training then never holds an MLLM.

    cache.json                           what it was made of (`identity`) and, when complete, what it holds
    samples-<shard>-<part>.safetensors   embeddings, latents, masks and names of some samples
    texts-<part>.safetensors             text states of the distinct texts, sorted

Every file appears when it is complete, so that an interrupted build continues, and several ranks share one.

Letters: B samples, P images, Z latent channels, h w latents, S side of an image, s side of the image tower's,
T text tokens, E embedding.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models.weights.files import parse_json, read_object
from models.weights.loading import read_checkpoint, save_tensors
from moma.app.files import write_text
from moma.data.triplets import Source, load
from moma.inputs.preprocess import ReferenceConfig
from moma.methods.prompts import sd_prompt
from moma.sampling.interface import DenoisingTraining, Runtime
from moma.training.common import Prepare, Sample, to_pixels
from moma.weights.bundle import Bundle

MANIFEST, VERSION = "cache.json", 1
NETWORKS = ("vae", "text")  # that every cache depends on


@dataclass(frozen=True)
class CacheConfig:
    """How a cache is made and read."""

    part: int = 1024  # samples per file: what a crash costs at most, and a rank's unit of work
    batch: int = 16  # samples per call of a network
    workers: int = 4  # threads that decode images; PIL releases Python's lock
    memory: int = 8_000_000_000  # bytes per rank; a larger cache stays mapped on the disk


class Encoder:
    """The frozen networks of a bundle, as functions of prepared samples."""

    def __init__(self, kind: type[DenoisingTraining], runtime: Runtime, method: Any) -> None:
        """Load them.

        Args:
            kind: of training, which says what embeddings it needs.
            runtime: weights and machine.
            method: the method's config.
        """
        self.device, self.dtype = runtime.device, runtime.dtype
        self.vae, self.text = (
            runtime.weights.build(name, self.device, self.dtype).eval().requires_grad_(False)
            for name in NETWORKS
        )
        self.tokenizer = runtime.weights.clip_tokenizer()
        self.embedder = kind.load_embedder(runtime, method) if kind.embedding else None

    def embed(self, samples: Sequence[Sample]) -> Tensor:
        """Image embeddings (B, E); E = 0 where the training needs none."""
        if self.embedder is None:
            return torch.empty(len(samples), 0)
        white = torch.stack([sample.white for sample in samples])  # (B, 3, s, s)
        words, prompts = ([getattr(s, name) for s in samples] for name in ("label", "caption"))
        return self.embedder(white.to(self.device, self.dtype), words, prompts)  # (B, E)

    def latents(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """uint8 (3, S, S) each -> the VAE posterior's mean and standard deviation, each (B, Z, h, w)."""
        return self.vae.encode(to_pixels(torch.stack(list(images)).to(self.device), self.dtype))

    def states(self, texts: Sequence[str]) -> Tensor:
        """Text states (B, T, context_dim)."""
        return self.text(self.tokenizer.ids(texts).to(self.device))[0]


# --- what a cache belongs to --------------------------------------------------------------------------


def identity(
    kind: type[DenoisingTraining],
    bundle: Bundle,
    fingerprint: str,
    method: ReferenceConfig,
    dtype: torch.dtype,
    cfg: CacheConfig,
) -> dict[str, Any]:
    """All that the tensors of a cache depend on; JSON.

    Args:
        kind: of training.
        bundle: with the frozen networks.
        fingerprint: of the data.
        method: the method's config.
        dtype: of the networks.
        cfg: how the cache is made.

    Raises:
        ValueError: for a bundle that lacks a network.
    """
    return {
        "version": VERSION,
        "data": fingerprint,
        **{name: _weights(bundle, name) for name in (*NETWORKS, *kind.embedding_networks)},
        **kind.embedding_identity(bundle, method),
        **{field.name: getattr(method, field.name) for field in fields(ReferenceConfig)},
        "image size": bundle.image_size,
        "embedding": kind.embedding,
        "dtype": str(dtype).removeprefix("torch."),
        "samples per part": cfg.part,
    }


def _weights(bundle: Bundle, name: str) -> str:
    bundle.config(name)
    return sha256(json.dumps(bundle.networks[name]["sha256"], sort_keys=True).encode()).hexdigest()


def _check_identity(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the cache in `folder`, None if there is none; ValueError if it is of something else."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_object(path)
    found = manifest["identity"]
    if other := [name for name in expected | found if found.get(name) != expected.get(name)]:
        changes = ", ".join(f"{name} ({_short(found, name)}, now {_short(expected, name)})" for name in other)
        raise ValueError(f"cache {folder}: made with another {changes}; delete it, or give another folder")
    return manifest


def _short(values: Mapping[str, Any], name: str) -> str:
    return str(values.get(name))[:12]


# --- building -----------------------------------------------------------------------------------------


def build_cache(
    folder: Path,
    expected: Mapping[str, Any],
    source: Source,
    prepare: Prepare,
    encoder: Callable[[], Encoder],
    cfg: CacheConfig,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], Any] = lambda: None,
) -> None:
    """Complete the cache in `folder`; does nothing if it is complete.

    Args:
        folder: of the cache.
        expected: its `identity`.
        source: the data.
        prepare: makes samples of it.
        encoder: loads the networks, called if there is something to compute.
        cfg: how the cache is made.
        rank: of this process among those that build together.
        world: their number.
        wait: returns when all of them have called it.

    Raises:
        ValueError: for a cache of something else, or data without a usable sample.
    """
    manifest = _check_identity(folder, expected)
    if manifest is not None and "samples" in manifest:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        _write_manifest(folder, {"identity": dict(expected)})
    networks = encoder()
    with ThreadPoolExecutor(max(1, cfg.workers)) as pool, tqdm(unit=" samples", disable=rank > 0) as bar:
        todo = partial(_try, source, prepare)
        for i, (stem, raws) in enumerate(_parts(source, cfg.part)):
            if i % world == rank and not (folder / f"{stem}.safetensors").is_file():
                _write_part(folder, stem, networks, list(pool.map(todo, raws)), cfg)
            bar.update(len(raws))
    wait()
    names = {path.name: _names(path) for path in sorted(folder.glob("samples-*.safetensors"))}
    texts = sorted({text for name in names.values() for sample in name["samples"] for text in _texts(sample)})
    for i, part in enumerate(_chunks(texts, cfg.part)):
        if i % world == rank and not (folder / f"texts-{i:05}.safetensors").is_file():
            states = torch.cat([networks.states(some) for some in _chunks(part, cfg.batch)])  # (n, T, C)
            save_tensors(folder, f"texts-{i:05}", {"states": states})
    wait()
    counts = {name: len(content["samples"]) for name, content in names.items()}
    skipped = dict(pair for content in names.values() for pair in content["skipped"])
    example = next(iter(skipped.items()), "it is empty")
    if not sum(counts.values()):
        raise ValueError(f"cache {folder}: no sample of the data can be used, e.g. {example}")
    if rank == 0:
        if skipped:
            tqdm.write(f"{folder}: {len(skipped)} samples left out, e.g. {example}")
        _write_manifest(folder, {"identity": dict(expected), "samples": counts, "skipped": skipped})
    wait()


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """`size` items at a time, the last time fewer."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _parts(source: Source, size: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """The data in pieces of up to `size` undecoded samples, each with the name of its file."""
    for shard in range(len(source.shards)):
        for i, raws in enumerate(_chunks(source.read(shard), size)):
            yield f"samples-{shard:05}-{i:05}", raws


def _try(source: Source, prepare: Prepare, raw: Any) -> Sample | tuple[str, str]:
    """The sample, or its key and why it cannot be used."""
    try:
        return prepare(load(source, raw))
    except (ValueError, OSError) as error:
        return raw.key, str(error)


@torch.no_grad()
def _write_part(folder: Path, stem: str, networks: Encoder, found: Sequence[Any], cfg: CacheConfig) -> None:
    """One file. Images are stored once: a sample's target and reference are rows of the same table."""
    samples = [sample for sample in found if isinstance(sample, Sample)]
    skipped = [pair for pair in found if not isinstance(pair, Sample)]
    rows: dict[str, list[Any]] = {name: [] for name in ("embedding", "mean", "std", "mask")}
    target, reference, count = [], [], 0
    for some in _chunks(samples, cfg.batch):
        rows["embedding"].append(networks.embed(some))  # (B, E)
        images = []
        for sample in some:
            own = torch.equal(sample.image, sample.reference) and torch.equal(sample.m_gen, sample.m_ref)
            images += [(sample.image, sample.m_gen)] + [(sample.reference, sample.m_ref)] * (not own)
            target.append(count)
            reference.append(count + (not own))
            count += 2 - own
        mean, std = networks.latents([image for image, _ in images])  # 2 x (P, Z, h, w)
        rows["mean"].append(mean)
        rows["std"].append(std)
        rows["mask"].append(torch.stack([mask for _, mask in images]))  # (P, S * S / 8)
    names = {"samples": [(s.key, s.label, s.caption) for s in samples], "skipped": skipped}
    text = json.dumps(names, ensure_ascii=False).encode()
    tensors = {name: torch.cat(parts) for name, parts in rows.items() if parts}
    tensors |= {"target": torch.tensor(target), "reference": torch.tensor(reference)} if samples else {}
    save_tensors(folder, stem, tensors | {"names": torch.frombuffer(bytearray(text), dtype=torch.uint8)})


def _write_manifest(folder: Path, data: Mapping[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(data, indent=1, ensure_ascii=False))


def _names(path: Path) -> dict[str, Any]:
    return parse_json(read_checkpoint(path)["names"].read().numpy().tobytes(), str(path))


def _texts(sample: Sequence[str]) -> tuple[str, str]:
    """What the text encoder reads of a sample (key, label, caption): the prompt, and the label alone."""
    _, label, caption = sample
    return sd_prompt(label, caption), label


# --- reading ------------------------------------------------------------------------------------------


class _Table:
    """Rows that lie in several files, or in memory."""

    def __init__(self, parts: Sequence[Tensor], whole: bool) -> None:
        self.parts = [torch.cat(list(parts))] if whole else parts
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)  # (files,)

    def rows(self, index: Tensor) -> Tensor:
        """index (B,) int64 -> (B, ...)."""
        if len(self.parts) == 1:
            return self.parts[0].index_select(0, index)
        file = torch.bucketize(index, self.ends, right=True)  # (B,)
        out = torch.empty(len(index), *self.parts[0].shape[1:], dtype=self.parts[0].dtype)
        for i in file.unique().tolist():
            here = file == i
            start = int(self.ends[i]) - len(self.parts[i])
            out[here] = self.parts[i].index_select(0, index[here] - start)
        return out


class Cache:
    """A complete cache, random access by sample number."""

    def __init__(self, folder: Path, expected: Mapping[str, Any], cfg: CacheConfig) -> None:
        """ValueError if it is incomplete or its identity is not `expected`."""
        manifest = _check_identity(folder, expected)
        if manifest is None or "samples" not in manifest:
            raise ValueError(f"cache {folder}: incomplete, build it first")
        files = [folder / name for name, count in manifest["samples"].items() if count]
        contents = [read_checkpoint(path) for path in files]
        texts = [read_checkpoint(path) for path in sorted(folder.glob("texts-*.safetensors"))]
        size = sum(tensor.nbytes for content in (*contents, *texts) for tensor in content.values())
        whole = size <= cfg.memory

        def table(name: str, among: Sequence[Mapping[str, Any]] = contents) -> _Table:
            return _Table([content[name].read() for content in among], whole)

        self.skipped: dict[str, str] = manifest["skipped"]
        self.names = [tuple(sample) for path in files for sample in _names(path)["samples"]]
        self.tables = {name: table(name) for name in ("embedding", "mean", "std", "mask")}
        self.tables["states"] = table("states", texts)
        starts = torch.tensor([0, *(content["mean"].shape[0] for content in contents)]).cumsum(0)
        self.target, self.reference = (
            torch.cat([c[name].read() + start for c, start in zip(contents, starts, strict=False)])
            for name in ("target", "reference")
        )  # 2 x (len(self),), rows of the images' tables
        order = sorted({text for sample in self.names for text in _texts(sample)})
        number = {text: i for i, text in enumerate(order)}
        self.text, self.label = (
            torch.tensor([number[_texts(sample)[i]] for sample in self.names]) for i in range(2)
        )  # 2 x (len(self),), rows of the states' table

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Some samples.

        Args:
            index: (B,) int64, in the order of the data.

        Returns:
            embedding (B, E); mean, std (B, Z, h, w) of the target and ref_mean, ref_std of the reference;
            m_gen, m_ref (B, S * S / 8), packed; text, label (B, T, context_dim).
        """
        target, reference, tables = self.target[index], self.reference[index], self.tables
        return {
            "embedding": tables["embedding"].rows(index),
            "mean": tables["mean"].rows(target),
            "std": tables["std"].rows(target),
            "m_gen": tables["mask"].rows(target),
            "ref_mean": tables["mean"].rows(reference),
            "ref_std": tables["std"].rows(reference),
            "m_ref": tables["mask"].rows(reference),
            "text": tables["states"].rows(self.text[index]),
            "label": tables["states"].rows(self.label[index]),
        }
