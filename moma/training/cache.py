"""What the frozen networks make of a data set, computed once: a training then never holds an MLLM.

    cache.json                           what it was made of (`identity`) and, when complete, what it holds
    samples-<shard>-<part>.safetensors   embeddings, latents, masks, token ids and names of some samples

Every file appears when it is complete, so that an interrupted build continues. Each knows its own hash and
that of the data it was made of: what is damaged, or whose data has changed or come back, is made again.

A training that takes several subjects of a sample has tables of subjects (O of them) and their counts; so has
one whose targets have another shape than the references, with one subject each.

Letters: B samples, P images, O subjects, Z latent channels, h w latents, S side of a reference, H W sides of
a target, s side of the image tower's, T text tokens, K tokenizers, E embedding.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from models.weights.files import parse_json, read_object, read_text
from models.weights.loading import read_checkpoint, save_tensors
from moma.app.files import check_writable, write_text
from moma.data.shards import Raw
from moma.data.triplets import SkipLog, Source, load, too_many
from moma.inputs.preprocess import ReferenceConfig
from moma.methods.prompts import joined, sd_prompt
from moma.sampling.interface import DenoisingTraining, Runtime, text_networks
from moma.training.common import Prepare, Sample, to_pixels
from moma.weights.bundle import CLIP_TOKENIZER, Bundle

MANIFEST, VERSION = "cache.json", 2
TARGET = "target's width and height"  # in the identity, where they are not the references'
NETWORKS = ("vae",)  # that every cache depends on
TABLES = ("embedding", "mean", "std", "mask", "text", "label")
SAMPLES = ("mean", "std", "text")  # tables of samples where the others are of subjects
SUBJECTS = ("embedding", "ref_mean", "ref_std", "m_gen", "m_ref", "label")


@dataclass(frozen=True)
class CacheConfig:
    """How a cache is made and read."""

    part: int = 1024  # samples per file at most: what a crash costs, and a unit of work within a shard
    batch: int = 16  # samples per call of a network
    workers: int = 4  # threads that decode images; PIL releases Python's lock
    ahead: int = 4  # batches that are decoded while the networks compute
    ahead_bytes: int = 2**28  # of encoded samples that wait for it
    memory: int = 8_000_000_000  # bytes per rank; a larger cache stays mapped on the disk
    max_skipped: float = 1.0  # largest share of samples that cannot be used
    early: int = 1000  # of them before a build ends early; smaller sets are read whole, to count all
    listed: int = 1000  # of them that `cache.json` names


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
        self.vae = runtime.weights.build("vae", self.device, self.dtype).eval().requires_grad_(False)
        self.tokenizers = runtime.weights.clip_tokenizers()
        self.embedder = kind.load_embedder(runtime, method) if kind.embedding else None
        self.captions_alone, self.kind = kind.captions_alone, kind

    def embed(self, samples: Sequence[Sample]) -> Tensor:
        """Image embeddings (B, E); E = 0 where the training needs none."""
        if self.embedder is None:
            return torch.empty(len(samples), 0)
        white = torch.stack([sample.white for sample in samples])  # (B, 3, s, s)
        words, prompts = ([getattr(s, name) for s in samples] for name in ("label", "caption"))
        faces = {}
        if samples[0].face is not None:
            own, crops = (torch.stack(parts) for parts in zip(*(s.face for s in samples), strict=True))
            faces = {"faces": (own.to(self.device), crops.to(self.device, self.dtype))}
        return self.embedder(white.to(self.device, self.dtype), words, prompts, **faces)  # (B, E)

    def latents(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """uint8 (3, H, W) each -> the VAE posterior's mean and standard deviation, each (B, Z, h, w)."""
        return self.vae.encode(to_pixels(torch.stack(list(images)).to(self.device)).to(self.dtype))

    def text(self, sample: Sample) -> str:
        """What the text encoders read of a sample."""
        words = [one.label for one in (sample, *sample.others)]
        return sample.caption if self.captions_alone else sd_prompt(joined(words), sample.caption)

    def words(self, sample: Sample) -> Tensor:
        """The token of each subject's word by each tokenizer, int32 (n, K)."""
        every = (sample, *sample.others)
        labels, ends = [one.label for one in every], [one.end for one in every]
        return torch.tensor(self.kind.places(self.tokenizers, sample.caption, labels, ends)).int()

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids of each of K tokenizers, side by side, int32 (B, K*T)."""
        return torch.cat([tokenizer.ids(texts) for tokenizer in self.tokenizers], dim=1).int()


# --- what a cache belongs to --------------------------------------------------------------------------


def identity(
    kind: type[DenoisingTraining],
    bundle: Bundle,
    names: str,
    method: ReferenceConfig,
    dtype: torch.dtype,
    cfg: CacheConfig,
    flip: bool = False,
    background: str = "white",
    faces: bool = False,
    target: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """All that the tensors of a cache depend on besides the content of the data; JSON.

    Args:
        kind: of training.
        bundle: with the frozen networks.
        names: of the samples (`Source.names`); their content is compared file by file.
        method: the method's config.
        dtype: of the networks.
        cfg: how the cache is made.
        flip: whether it holds mirrored images, too.
        background: of what image encoders see.
        faces: whether it holds those of people.
        target: width and height of the targets, None = the references'.

    Raises:
        ValueError: for a bundle that lacks a network.
    """
    pads = [bundle.config(name).pad for name in text_networks(bundle.config("unet"))]
    return {
        "version": VERSION,
        "data": names,
        **({"padding": pads} if len(pads) > 1 else {}),
        "tokenizer": [sha256(bundle.tokenizer(file).read_bytes()).hexdigest() for file in CLIP_TOKENIZER],
        **{name: _weights(bundle, name) for name in (*NETWORKS, *kind.embedding_networks)},
        **kind.embedding_identity(bundle, method),
        **{field.name: getattr(method, field.name) for field in fields(ReferenceConfig)},
        "image size": bundle.image_size,
        "embedding": kind.embedding,
        **({"text": "captions"} if kind.captions_alone else {}),
        **({"subjects": "all"} if kind.several else {}),
        **({"background": background} if background != "white" else {}),
        **({"faces": "aligned"} if faces else {}),
        **({TARGET: list(target)} if target else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "samples per part": cfg.part,
        "mirrored": flip,
    }


def _weights(bundle: Bundle, name: str) -> str:
    bundle.config(name)
    return _sha256(bundle.hashes_of(name))


def _check_identity(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the cache in `folder`, None without a whole one; ValueError for something else's."""
    try:
        manifest = read_object(folder / MANIFEST)
        found = dict(manifest["identity"])
    except (ValueError, KeyError, TypeError):  # it can be written again: the files tell what they belong to
        return None
    if other := [name for name in expected | found if found.get(name) != expected.get(name)]:
        changes = ", ".join(f"{name} ({_short(found, name)}, now {_short(expected, name)})" for name in other)
        raise ValueError(f"cache {folder}: made with another {changes}; delete it, or give another folder")
    return manifest


def _short(values: Mapping[str, Any], name: str) -> str:
    return str(values.get(name))[:12]


# --- building -----------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What a file says of itself."""

    samples: list[tuple[str, str, str]]  # key, label, caption
    skipped: list[tuple[str, str]]  # key, reason
    read: int  # samples of the data, used and skipped
    cache: str  # hash of the cache's identity
    data: str  # hash of the data (`Source.digests`)
    last: bool  # of its shard
    rest: bool  # the shard has more samples, which cannot be read
    again: bool  # a fault may pass: it is to be made again


class _End(NamedTuple):
    """All samples of a file have been read."""

    stem: str
    data: str
    last: bool


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
    """Complete the cache in `folder`; what is there and whole stays. Says how many samples cannot be used.

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
        ValueError: for a cache of something else, or data of which too little can be used.
    """
    manifest = _check_identity(folder, expected)
    check_writable("--cache", folder)
    if rank == 0 and manifest is None:
        _write_manifest(folder, {"identity": dict(expected)})
    building = _Building(folder, source, prepare, cfg, rank, world, _sha256(expected))
    missing = list(building.missing())
    wait()  # no rank replaces what another one looks at
    if missing:
        building.make(missing, encoder())
    wait()
    _finish(folder, expected, len(source.shards), cfg, rank)
    wait()


@dataclass(frozen=True)
class _Building:
    """One rank's share of a cache: whole shards, or parts of one where there are fewer shards than ranks."""

    folder: Path
    source: Source
    prepare: Prepare
    cfg: CacheConfig
    rank: int
    world: int
    mark: str  # of the cache

    def missing(self) -> Iterator[tuple[int, list[str], set[int]]]:
        """Shards to read, with the hashes of their data and their parts that need not be made."""
        shards = len(self.source.shards)
        for shard in range(self.rank % shards, shards, self.world):
            digests, whole, last = self.source.digests(shard, self.cfg.part), set(), False
            there = _files_of(self.folder, shard)
            for part, path in enumerate(there):
                found = _read_part(path, whole=self._own(shard, part))
                same = found and (found.cache, found.data) == (self.mark, _of(digests, part))
                if same and not found.again:
                    whole.add(part)
                    last = found.last
                elif not same and path.exists():
                    tqdm.write(f"{path}: is made again, as it is damaged or its data has changed")
            if not (last and len(whole) == len(there)):
                others = {part for part in range(len(there)) if not self._own(shard, part)}
                yield shard, digests, whole | others

    def _own(self, shard: int, part: int) -> bool:
        """Whether a part of this rank's shards is its own."""
        sharing = range(shard, self.world, len(self.source.shards)) or (self.rank,)
        return sharing[part % len(sharing)] == self.rank

    def make(self, missing: Sequence[tuple[int, list[str], set[int]]], networks: Encoder) -> None:
        """Read shards and write what is missing."""
        rows = _Rows(networks, self.cfg.batch, self.prepare)
        skips = SkipLog(lambda text: None, self.cfg.max_skipped, slack=self.cfg.early)
        bar = tqdm(unit=" samples", disable=self.rank > 0)
        with ThreadPoolExecutor(self.cfg.workers) as pool, bar:
            for found in self._ahead(self._read(missing), pool):
                if isinstance(found, _End):
                    rows.save(self.folder, found, self.mark)
                    rows = _Rows(networks, self.cfg.batch, self.prepare)
                    continue
                bar.update()
                skips.add(found.skipped, delivered=len(found.samples))
                rows.add(found)

    def _read(self, missing: Iterable[tuple[int, list[str], set[int]]]) -> Iterator[Raw | _End]:
        """The samples of this rank's missing files, each time with an end."""
        for shard, digests, whole in missing:
            raws, part = self.source.read(shard), 0
            raw = next(raws, None)
            while raw is not None or part == 0:
                wanted = part not in whole and self._own(shard, part)
                for _ in range(self.cfg.part):
                    if raw is not None:
                        if wanted:
                            yield raw
                        raw = next(raws, None)
                if wanted:
                    yield _End(_stem(shard, part), _of(digests, part), last=raw is None)
                part += 1
            for path in _files_of(self.folder, shard)[part:]:
                path.unlink(missing_ok=True)

    def _ahead(self, events: Iterable[Raw | _End], pool: ThreadPoolExecutor) -> Iterator["_Tried | _End"]:
        """The same, decoded, some samples ahead of what is taken."""
        waiting: deque[tuple[int, Any]] = deque()
        size = 0
        for event in events:
            raw = isinstance(event, Raw)
            waiting.append((event.nbytes, pool.submit(self._try, event)) if raw else (0, event))
            size += waiting[-1][0]
            while len(waiting) > self.cfg.ahead * self.cfg.batch or size > self.cfg.ahead_bytes:
                nbytes, item = waiting.popleft()
                size -= nbytes
                yield item.result() if isinstance(item, Future) else item
        yield from (item.result() if isinstance(item, Future) else item for _, item in waiting)

    def _try(self, raw: Raw) -> "_Tried":
        """The samples that are made of one, or its key and why it cannot be used."""
        try:
            return _Tried(self.prepare(load(self.source, raw)), [], False, False)
        except (ValueError, OSError) as error:
            lasting = isinstance(error, FileNotFoundError)  # its return is seen in the hash of the data
            again = raw.again or (isinstance(error, OSError) and not lasting)
            return _Tried([], [(raw.key, str(error))], raw.rest, again)


class _Tried(NamedTuple):
    samples: list[Sample]
    skipped: list[tuple[str, str]]
    rest: bool
    again: bool


class _Rows:
    """The content of a file while it is made. Images are stored once: where a sample's target and reference
    can be the same, they are rows of the same tables."""

    def __init__(self, networks: Encoder, batch: int, prepare: Prepare) -> None:
        self.networks, self.batch, self.prepare = networks, batch, prepare
        self.waiting: list[Sample] = []
        self.tried: list[_Tried] = []
        self.tables: dict[str, list[Tensor]] = {}
        self.places: list[tuple[int, int]] = []  # of target and reference

    def add(self, found: _Tried) -> None:
        self.tried.append(found._replace(samples=[(s.key, s.label, s.caption) for s in found.samples]))
        self.waiting += found.samples
        while len(self.waiting) >= self.batch:
            self._encode(self.waiting[: self.batch])
            del self.waiting[: self.batch]

    @torch.no_grad()
    def _encode(self, samples: Sequence[Sample]) -> None:
        rows = self._subject_rows(samples) if self.prepare.apart else self._rows(samples)
        for name, values in rows.items():
            self.tables.setdefault(name, []).append(values.cpu())

    def _subject_rows(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Tables of samples and of all their subjects."""
        every = [one for sample in samples for one in (sample, *sample.others)]
        targets, references = [sample.image for sample in samples], [one.reference for one in every]
        if self.prepare.target:
            target, reference = map(self.networks.latents, (targets, references))  # 2 x (B | O, Z, h, w)
        else:
            both = self.networks.latents([*targets, *references])  # 2 x (B + O, Z, h, w)
            target, reference = zip(*(x.split([len(samples), len(every)]) for x in both), strict=True)
        words = [self.networks.words(sample) for sample in samples] if self.prepare.several else []
        return {
            "embedding": self.networks.embed(every),  # (O, E)
            **dict(zip(("mean", "std"), target, strict=True)),
            **dict(zip(("ref_mean", "ref_std"), reference, strict=True)),
            "m_gen": torch.stack([one.m_gen for one in every]),  # (O, H * W / 8)
            "m_ref": torch.stack([one.m_ref for one in every]),  # (O, S * S / 8)
            "text": self.networks.ids([self.networks.text(s) for s in samples]),  # (B, K*T)
            "label": self.networks.ids([one.label for one in every]),  # (O, K*T)
            **({"word": torch.cat(words)} if words else {}),  # (O, K)
            "count": torch.tensor([1 + len(sample.others) for sample in samples]),  # (B,)
        }

    def _rows(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Tables of samples and images."""
        images = []
        count = sum(map(len, self.tables.get("mask", [])))
        for sample in samples:
            own = torch.equal(sample.image, sample.reference) and torch.equal(sample.m_gen, sample.m_ref)
            self.places.append((count + len(images), count + len(images) + (not own)))
            images += [(sample.image, sample.m_gen)] + [(sample.reference, sample.m_ref)] * (not own)
        mean, std = self.networks.latents([image for image, _ in images])  # 2 x (P, Z, h, w)
        return {
            "embedding": self.networks.embed(samples),  # (B, E)
            "mean": mean,
            "std": std,
            "mask": torch.stack([mask for _, mask in images]),  # (P, S * S / 8)
            "text": self.networks.ids([self.networks.text(s) for s in samples]),  # (B, K*T)
            "label": self.networks.ids([s.label for s in samples]),  # (B, K*T)
        }

    def save(self, folder: Path, end: _End, mark: str) -> None:
        """Write the file. mark: of the cache."""
        if self.waiting:
            self._encode(self.waiting)
        samples, skipped = ([one for tried in self.tried for one in tried[i]] for i in range(2))
        rest, again = (any(tried[i] for tried in self.tried) for i in (2, 3))
        about = Part(samples, skipped, len(self.tried), mark, end.data, end.last, rest, again)
        text = json.dumps(about._asdict(), ensure_ascii=False).encode("utf-8", "surrogateescape")
        tensors = {name: torch.cat(parts) for name, parts in self.tables.items()}
        tensors |= {"places": torch.tensor(self.places).reshape(-1, 2)}
        tensors |= {"names": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        save_tensors(folder, end.stem, tensors | {"digest": _digest(tensors)})


def _finish(folder: Path, expected: Mapping[str, Any], shards: int, cfg: CacheConfig, rank: int) -> None:
    """Write what the cache holds, and say what it lacks; ValueError if it is too much."""
    counts, skipped, read, cut = {}, [], [0] * shards, set()
    for shard in range(shards):
        for path in _files_of(folder, shard):
            part = _read_part(path)
            counts[path.name] = len(part.samples)
            skipped += part.skipped
            read[shard] += part.read
            cut |= {shard} if part.rest else set()
    # Nobody knows how many samples a shard has lost at its end: about as many as it has fewer than others.
    gone = len(skipped) + sum(max(read) - read[shard] for shard in cut)
    total = sum(read) - len(skipped) + gone
    example = next(iter(skipped), ("", "it is empty"))
    if not sum(counts.values()):
        raise ValueError(f"cache {folder}: no sample of the data can be used, e.g. {tuple(example)}")
    if gone > cfg.max_skipped * total:
        raise too_many(gone, total, example, cfg.max_skipped)
    if rank == 0:
        if gone:
            share = f"{gone:,} of {total:,} samples ({gone / total:.1%}) cannot be used"
            tqdm.write(f"{folder}: {share}, e.g. {example[0]!r}: {example[1]}")
        held = {"samples": counts, "skipped": skipped[: cfg.listed]}
        _write_manifest(folder, {"identity": dict(expected), **held})


def _stem(shard: int, part: int) -> str:
    return f"samples-{shard:05}-{part:05}"


def _files_of(folder: Path, shard: int) -> list[Path]:
    """The files that a shard may have, present or not, up to the last that is present."""
    found = folder.glob(f"{_stem(shard, 0)[:-5]}*.safetensors")
    count = max((int(path.stem.split("-")[2]) + 1 for path in found), default=0)
    return [folder / f"{_stem(shard, part)}.safetensors" for part in range(count)]


def _of(digests: Sequence[str], part: int) -> str:
    """The hash of a part's data; a shard may have one for all parts."""
    return digests[min(part, len(digests) - 1)] if digests else ""


def _sha256(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """sha256 of names, shapes and values, uint8 (32,)."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _read_part(path: Path, whole: bool = False) -> Part | None:
    """What a file says of itself; None for none, and for a damaged one (whole: in any of its values)."""
    try:
        stored = read_checkpoint(path)
        tensors = {name: tensor.read() for name, tensor in stored.items() if whole or name == "names"}
        if whole and not torch.equal(tensors.pop("digest"), _digest(tensors)):
            return None
        return Part(**parse_json(tensors["names"].numpy().tobytes(), str(path)))
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _write_manifest(folder: Path, data: Mapping[str, Any]) -> None:
    """Write the list, if it is new: a complete cache may lie where nothing can be written."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    path = folder / MANIFEST
    if not path.is_file() or read_text(path) != text:
        write_text(path, text)


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
        size = sum(tensor.nbytes for content in contents for tensor in content.values())
        self.skipped: dict[str, str] = dict(manifest["skipped"])  # key -> reason
        self.names = [tuple(sample) for path in files for sample in _read_part(path).samples]
        self.several = "subjects" in expected
        apart = self.several or TARGET in expected
        names = (*SAMPLES, *SUBJECTS, *(["word"] if self.several else [])) if apart else TABLES
        self.tables = {
            name: _Table([content[name].read() for content in contents], size <= cfg.memory) for name in names
        }
        self.counts = torch.cat([content["count"].read() for content in contents]) if apart else None
        if apart:
            self.first = self.counts.cumsum(0) - self.counts  # (len(self),), each sample's row of subjects
            return
        starts = torch.tensor([0, *(content["mean"].shape[0] for content in contents)]).cumsum(0)
        places = [c["places"].read() + start for c, start in zip(contents, starts, strict=False)]
        self.target, self.reference = torch.cat(places).unbind(1)  # 2 x (len(self),), rows of images' tables

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Some samples.

        Args:
            index: (B,) int64, in the order of the data.

        Returns:
            embedding (B, E); mean, std (B, Z, h, w) of the target and ref_mean, ref_std of the reference;
            m_gen (B, H * W / 8), m_ref (B, S * S / 8), packed; text_ids, label_ids int64 (B, K*T), of the
            prompt and of the label alone. Of several subjects: `DenoisingTraining`.
        """
        if self.counts is not None:
            return self._subjects(index)
        target, reference, tables = self.target[index], self.reference[index], self.tables
        return {
            "embedding": tables["embedding"].rows(index),
            "mean": tables["mean"].rows(target),
            "std": tables["std"].rows(target),
            "m_gen": tables["mask"].rows(target),
            "ref_mean": tables["mean"].rows(reference),
            "ref_std": tables["std"].rows(reference),
            "m_ref": tables["mask"].rows(reference),
            "text_ids": tables["text"].rows(index).long(),
            "label_ids": tables["label"].rows(index).long(),
        }

    def _subjects(self, index: Tensor) -> dict[str, Tensor]:
        """Samples with all their subjects, n at most; those with fewer repeat their last one."""
        counts = self.counts[index]  # (B,)
        number = torch.arange(int(counts.max()))  # (n,)
        rows = self.first[index][:, None] + torch.minimum(number, counts[:, None] - 1)  # (B, n)
        tables = {name: self.tables[name].rows(index) for name in SAMPLES}
        for name in (name for name in self.tables if name not in SAMPLES):
            own = self.tables[name].rows(rows.flatten()).unflatten(0, rows.shape)  # (B, n, ...)
            tables[name] = own if self.several else own[:, 0]
        ids = {f"{name}_ids": tables.pop(name).long() for name in ("text", "label")}
        if not self.several:
            return tables | ids
        return tables | ids | {"places": tables.pop("word").long(), "present": number < counts[:, None]}
