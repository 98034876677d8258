"""Everything around the steps: feature decoder, VAE, whole drawings, and their memory.

Letters: B images, S side of the images.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from models.clip import CLIPTextConfig, CLIPVisionConfig
from models.llama import LlamaConfig
from models.llava import LlavaConfig
from models.unet import SD15
from models.vae import SD15 as VAE_SD15
from models.vae import VAE
from models.weights.loading import LazyTensor
from moma.bench.measure import (
    GIB,
    OWN,
    Bench,
    Found,
    Part,
    Ratio,
    in_turn,
    matmul_peak,
    median_of,
    memory_of,
    relative_error,
    watched,
)
from moma.bench.step import Networks, make_step, pseudo_random
from moma.methods.moma.adapter import AdapterConfig
from moma.methods.moma.feature_decoder import FeatureDecoder, MLLMInput
from moma.sampling.memory import Toggle, max_batch
from moma.weights.bundle import CLIP_TOKENIZER, LLAMA_TOKENIZER, BundleWriter, expected_shapes
from moma.weights.tiny import SOURCE, build_tokenizers, draw

SCRIPT = Path(__file__).parents[2] / "sample.py"
PEAK_MEMORY = re.compile(r"peak memory ([\d.]+) GB")  # last line of sample.py
WORD, PROMPT = "cat", "a cat on the beach at sunset"


def _full_size() -> dict[str, Any]:
    """Sizes of all networks of the public weights."""
    vision = CLIPVisionConfig()
    llava = LlavaConfig(llama=LlamaConfig(lm_head=False), vision=vision)
    text, adapter = CLIPTextConfig(), AdapterConfig()
    return {
        "unet": SD15, "vae": VAE_SD15, "text": text, "vision": vision, "llava": llava, "adapter": adapter
    }  # fmt: skip


@dataclass(frozen=True)
class FlowConfig:
    """Settings of this module."""

    networks: Mapping[str, Any] = field(default_factory=_full_size)
    repeats: int = 2  # few, since a pass of a 7B model is slow on a CPU
    steps: int = 2  # of the drawing whose memory is measured: the second one has masks, as all later ones do


def build_bundle(folder: Path, size: int, networks: Mapping[str, Any]) -> None:
    """Write a bundle of pseudo-random bf16 weights (tensors of one shape are equal) and tiny tokenizers.

    Args:
        folder: of the bundle.
        size: image side S in pixels.
        networks: name -> sizes.

    Raises:
        ValueError: if the disk lacks the space.
    """
    kind = torch.bfloat16

    @lru_cache(maxsize=4)  # the next block has weights of the same shapes
    def values(ending: str, shape: tuple[int, ...]) -> torch.Tensor:
        return draw(ending, shape, torch.Generator().manual_seed(0)).to(kind)

    def lazy(key: str, shape: tuple[int, ...], file: Path) -> LazyTensor:
        return LazyTensor(shape, kind, file, lambda: values(f".{key.rpartition('.')[2]}", shape))

    with BundleWriter(folder, size) as writer, tempfile.TemporaryDirectory() as drafts:
        shapes = {name: expected_shapes(name, cfg, networks["unet"]) for name, cfg in networks.items()}
        writer.check_space(sum(prod(s) for group in shapes.values() for s in group.values()) * kind.itemsize)
        build_tokenizers(drafts)
        for name in (*CLIP_TOKENIZER, *LLAMA_TOKENIZER):
            writer.add_tokenizer(name, Path(drafts, name))
        for name, config in networks.items():
            tensors = {key: lazy(key, shape, writer.part) for key, shape in shapes[name].items()}
            writer.add(name, config, tensors, SOURCE)


def _image(size: int) -> Image.Image:
    """A disc on white, RGB (S, S)."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse([size // 4, size // 4, 3 * size // 4, 3 * size // 4], (150, 90, 40))
    return image


# --- the feature decoder -----------------------------------------------------------------------------


def decoder(bench: Bench) -> Iterator[Found]:
    """One MLLM query with weights in memory or streamed from the file block by block."""
    query, repeats = [MLLMInput(_image(bench.cfg.size), WORD, PROMPT)], FlowConfig().repeats
    config = bench.runtime.weights.method_config("moma")

    def load(stream: Toggle) -> FeatureDecoder:
        return FeatureDecoder.load(replace(bench.runtime, stream=stream), config, None, ("adapter",))

    streamed, resident = (partial(load(how).encode_features, query) for how in ("on", "off"))
    error = relative_error(streamed()[0], resident()[0])
    slow, fast = in_turn(resident, streamed, min(bench.cfg.repeats, repeats))
    yield bench.ratio("decoder, resident / streamed, file in the page cache", "streamed", slow, fast, error)
    memory = memory_of(streamed, bench.device, mapped=True)
    del resident, streamed  # frees 14 GB
    seconds = in_turn(
        lambda: load("off").encode_features(query), lambda: load("on").encode_features(query), 1
    )
    yield bench.ratio("decoder, loaded for one question, resident / streamed", "streamed", *seconds)
    yield Part("decoder, resident", bench.kind, slow)
    yield Part("decoder, streamed", bench.kind, fast, memory=memory)
    if memory is not None:
        yield _limit(bench, "streamed decoder's memory, limit / with its mapped weights", "streamed", memory)


def _limit(bench: Bench, what: str, limit: str, memory: float) -> Ratio:
    """A limit of `BenchConfig.most` over the memory found, in bytes."""
    return Ratio(what, bench.kind, 1.0, bench.cfg.most[limit], memory / GIB, unit="GiB")


# --- the VAE -----------------------------------------------------------------------------------------


@torch.no_grad()
def autoencoder(bench: Bench) -> Iterator[Found]:
    """Encoding and decoding of one image."""
    cfg, peak = bench.cfg, matmul_peak(bench)
    vae, generator = pseudo_random(lambda: VAE(VAE_SD15), bench), torch.Generator()
    generator.manual_seed(cfg.seed)
    for what, call, shape in (
        ("VAE, encode", vae.encode, (VAE_SD15.in_channels, cfg.size, cfg.size)),
        ("VAE, decode", vae.decode, (VAE_SD15.latent_channels, *cfg.grid)),
    ):
        x = torch.randn(1, *shape, generator=generator).to(bench.device, bench.dtype)
        yield bench.part(what, median_of(partial(call, x), cfg.repeats), partial(call, x), peak)


# --- a whole drawing ---------------------------------------------------------------------------------


@torch.no_grad()
def drawing(bench: Bench, networks: Networks) -> Iterator[Found]:
    """One batch of the pipeline: a single step, or all steps where capturing CUDA graphs takes time."""
    cfg, batch = bench.cfg, _batch(bench)
    if networks.make_recorder is not None:
        step = make_step(networks, cfg, batch)
        seconds = median_of(lambda: step.drawing(cfg.steps), FlowConfig().repeats)
        yield Part(_drawing_name(cfg.steps, batch), bench.kind, seconds)
    elif batch > 1:  # `moma.bench.step.steps` yields a batch of one
        yield Part(
            _step_name(batch), bench.kind, median_of(make_step(networks, cfg, batch).moma, cfg.repeats)
        )


def _batch(bench: Bench) -> int:
    """Images that the pipeline draws at once."""
    return max_batch(bench.cfg.images, prod(bench.cfg.grid), bench.device)


def _step_name(batch: int) -> str:
    return "MoMA step" if batch == 1 else f"MoMA step, {batch} at once"


def _drawing_name(steps: int, batch: int) -> str:
    return f"{steps} MoMA steps and their recording, {batch} at once"


def flow(bench: Bench, found: Sequence[Found]) -> Iterator[Found]:
    """Several images of one subject and prompt, summed from the parts found.

    Ours runs decoder and reference pass once, and images in batches. The release repeats everything for each
    image, with its own step; its other parts are assumed to be as fast as ours. Loading and text encoding
    count for neither.
    """
    n, steps, batch = bench.cfg.images, bench.cfg.steps, _batch(bench)
    part = {p.what: p.seconds for p in found if isinstance(p, Part)}
    release = [r.slow for r in found if isinstance(r, Ratio) and r.what.startswith("MoMA step, release")]
    drawn = part.get(_drawing_name(steps, batch)) or steps * part.get(_step_name(batch), 0.0)  # of a batch
    if not release or not drawn or not {"reference pass", "VAE, encode", "VAE, decode"} <= set(part):
        return
    read = part.get("decoder, resident", 0.0)
    once = read + part["VAE, encode"] + part["reference pass"]
    fast = once + -(-n // batch) * drawn + n * part["VAE, decode"]
    slow = n * (once + steps * release[-1] + part["VAE, decode"])
    decoded = f"{'with' if read else 'without'} the decoder, summed from parts"
    what = f"{n} images of one prompt, {steps} steps, {decoded}, release / ours"
    yield bench.ratio(what, "flow cuda" if bench.device.type == "cuda" else "flow", slow, fast)


def pipeline(bench: Bench) -> Iterator[Found]:
    """Peak memory of a run of `sample.py`; on CPUs without mapped files."""
    cfg, device, folder = bench.cfg, bench.device, bench.runtime.weights.folder
    with tempfile.TemporaryDirectory() as out:
        _image(cfg.size).save(Path(out, "ref.png"))
        options = {
            "--ref": Path(out, "ref.png"), "--subject": WORD, "--prompt": PROMPT, "--weights": folder,
            "--out": out, "--cache": "off", "--stream": "on", "--steps": FlowConfig().steps, "--num": 1,
            "--dtype": bench.kind, "--device": device, "--size": cfg.size,
        }  # fmt: skip
        command = [sys.executable, str(SCRIPT), *(str(x) for pair in options.items() for x in pair)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with watched(Path(f"/proc/{process.pid}/status"), (OWN,)) as seen:
            text, _ = process.communicate()
    if process.returncode:
        last = text.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise ValueError(f"{SCRIPT.name} failed with {folder}: {last}")
    match = PEAK_MEMORY.search(text)
    memory = float(match[1]) * 1e9 if device.type == "cuda" and match else max(seen)
    if memory and (limit := f"pipeline {device.type}") in cfg.most:
        yield _limit(bench, "memory of the whole pipeline, limit / ours", limit, memory)
