"""What the frozen networks make of a data set, computed once: stage 2 then never holds the MLLM.

    cache.json                           what it was made of (`identity`) and, when complete, what it holds
    samples-<shard>-<part>.safetensors   embeddings, latents, masks and names of some samples
    texts-<part>.safetensors             text states of the distinct texts, sorted

Every file appears when it is complete, so that an interrupted build goes on, and several ranks share one.

Letters: B samples, P images, Z latent channels, h w latents, S side of an image, T text tokens,
E embedding.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from models.clip import CLIPVision
from models.weights.loading import read_checkpoint, save_tensors
from moma.app.files import write_text
from moma.data.triplets import Source, load
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.feature_decoder import FeatureDecoder, instruction
from moma.methods.prompts import sd_prompt
from moma.training.common import Prepare, Sample, to_pixels
from moma.weights.bundle import Bundle

MANIFEST, VERSION = "cache.json", 1
Embedding = Literal["decoder", "clip"]
# Fields of MethodConfig that the cached tensors depend on.
METHOD = ("reference_background", "mask_binarise_above", "empty_mask", "geometry")
DECODER_METHOD = ("template", "mllm_layers")  # the same, where the decoder makes the embeddings


@dataclass(frozen=True)
class CacheConfig:
    """How a cache is made and read."""

    part: int = 1024  # samples per file: what a crash costs at most, and a rank's unit of work
    batch: int = 16  # samples per call of a network
    workers: int = 4  # threads that decode images; PIL lets go of Python's lock
    memory: int = 8_000_000_000  # bytes per rank; a larger cache stays mapped on the disk


def clip_embedding(vision: CLIPVision, pixels: Tensor) -> Tensor:
    """The CLIP image embedding of Eq. 4's space: pixels (B, 3, s, s) of `clip_image` -> (B, E)."""
    return vision.pool(vision.hidden(pixels))  # (B, E)


class Encoder:
    """The frozen networks of a bundle, as functions of prepared samples."""

    def __init__(
        self,
        bundle: Bundle,
        method: MethodConfig,
        embedding: Embedding,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        def build(name: str) -> Any:
            return bundle.build(name, device, dtype).eval().requires_grad_(False)

        self.method, self.device, self.dtype = method, device, dtype
        self.vae, self.text, self.clip_tokenizer = build("vae"), build("text"), bundle.clip_tokenizer()
        if embedding == "clip":
            self.vision = build("vision")
        else:
            self.decoder = FeatureDecoder(build("llava"), build("adapter"), bundle.llama_tokenizer(), method)
        self.embed = self._clip if embedding == "clip" else self._decode

    def _clip(self, samples: Sequence[Sample]) -> Tensor:
        return clip_embedding(self.vision, self._stack([sample.white for sample in samples]))  # (B, E)

    def _decode(self, samples: Sequence[Sample]) -> Tensor:
        """The decoder's embeddings (Sec. 3.2), (B, E)."""
        pixels = self._stack([sample.white for sample in samples])  # (B, 3, s, s)
        texts = [instruction(s.label, s.caption, self.method.template) for s in samples]
        return self.decoder.embed(self.decoder.llava.encode_images(pixels), texts)  # (B, E)

    def latents(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """uint8 (3, S, S) each -> the VAE posterior's mean and standard deviation, each (B, Z, h, w)."""
        return self.vae.encode(to_pixels(torch.stack(list(images)).to(self.device), self.dtype))

    def states(self, texts: Sequence[str]) -> Tensor:
        """Text states (B, T, context_dim)."""
        return self.text(self.clip_tokenizer.ids(texts).to(self.device))[0]

    def _stack(self, pixels: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(pixels)).to(self.device, self.dtype)  # (B, 3, s, s)


# --- what a cache belongs to --------------------------------------------------------------------------


def identity(
    bundle: Bundle,
    fingerprint: str,
    method: MethodConfig,
    embedding: Embedding,
    dtype: torch.dtype,
    cfg: CacheConfig,
) -> dict[str, Any]:
    """All that the tensors of a cache depend on; JSON."""
    networks, fields, decoder = ("vae", "text", "vision"), METHOD, {}
    if embedding == "decoder":
        networks, fields = (*networks, "llava"), (*METHOD, *DECODER_METHOD)
        decoder = {"adapter's mapping and token": _decoder_hash(bundle)}
    return {
        "version": VERSION,
        "data": fingerprint,
        **{name: _weights(bundle, name) for name in networks},
        **decoder,
        **{name: getattr(method, name) for name in fields},
        "image size": bundle.image_size,
        "embedding": embedding,
        "dtype": str(dtype).removeprefix("torch."),
        "samples per part": cfg.part,
    }


def _weights(bundle: Bundle, name: str) -> str:
    bundle.config(name)
    return sha256(json.dumps(bundle.networks[name]["sha256"], sort_keys=True).encode()).hexdigest()


def _decoder_hash(bundle: Bundle) -> str:
    """Of the adapter's tensors that the decoder uses: stage 2 changes the others."""
    digest = sha256()
    for name, tensor in sorted(bundle.tensors("adapter").items()):
        if name.startswith(("mapping.", "token")):
            digest.update(name.encode())
            digest.update(tensor.read().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_identity(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the cache in `folder`, None if there is none. ValueError if it is of something else."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    found = manifest["identity"]
    if other := [name for name in expected | found if found.get(name) != expected.get(name)]:
        changes = ", ".join(f"{name} ({_short(found, name)}, now {_short(expected, name)})" for name in other)
        raise ValueError(
            f"cache {folder}: made with another {changes}; delete it to build it anew, or give another folder"
        )
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
    """Complete the cache in `folder`; does nothing if it is.

    expected: its `identity`; encoder: makes the networks, called if there is something to compute; rank,
    world: this process among those that build together; wait: returns when all of them have called it.
    """
    manifest = check_identity(folder, expected)
    if manifest is not None and "samples" in manifest:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        _write_json(folder / MANIFEST, {"identity": dict(expected)})
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
    for i, part in enumerate(chunks(texts, cfg.part)):
        if i % world == rank and not (folder / f"texts-{i:05}.safetensors").is_file():
            states = torch.cat([networks.states(some) for some in chunks(part, cfg.batch)])  # (n, T, C)
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
        _write_json(folder / MANIFEST, {"identity": dict(expected), "samples": counts, "skipped": skipped})
    wait()


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """`size` items at a time, the last time what is left."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _parts(source: Source, size: int) -> Iterator[tuple[str, Sequence[Any]]]:
    """The data in pieces of up to `size` undecoded samples, each with the name of its file."""
    for shard in range(len(source.shards)):
        for i, raws in enumerate(chunks(source.read(shard), size)):
            yield f"samples-{shard:05}-{i:05}", raws


def _try(source: Source, prepare: Prepare, raw: Any) -> Sample | tuple[str, str]:
    """The sample, or its key and why it cannot be used."""
    try:
        return prepare(load(source, raw))
    except (ValueError, OSError) as error:
        return raw.key, str(error)


@torch.no_grad()
def _write_part(folder: Path, stem: str, networks: Encoder, found: Sequence[Any], cfg: CacheConfig) -> None:
    """One file. Images are kept once: a sample's target and reference are rows of the same table."""
    samples = [sample for sample in found if isinstance(sample, Sample)]
    skipped = [pair for pair in found if not isinstance(pair, Sample)]
    rows: dict[str, list[Any]] = {name: [] for name in ("embedding", "mean", "std", "mask")}
    target, reference, count = [], [], 0
    for some in chunks(samples, cfg.batch):
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


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False))


def _names(path: Path) -> dict[str, Any]:
    return json.loads(read_checkpoint(path)["names"].read().numpy().tobytes())


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
        place = torch.bucketize(index, self.ends, right=True)  # (B,)
        out = torch.empty(len(index), *self.parts[0].shape[1:], dtype=self.parts[0].dtype)
        for i in place.unique().tolist():
            here = place == i
            start = int(self.ends[i]) - len(self.parts[i])
            out[here] = self.parts[i].index_select(0, index[here] - start)
        return out


class Cache:
    """A complete cache, random access by sample number."""

    def __init__(self, folder: Path, expected: Mapping[str, Any], cfg: CacheConfig) -> None:
        """ValueError if it is incomplete or was made of something else than `expected`."""
        manifest = check_identity(folder, expected)
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
        """Samples `index` (B,) int64, in the order of the data.

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
