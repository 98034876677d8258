"""What surrounds the steps: the decoder, the VAE, a whole drawing, and the memory of all of it.

Letters: B images, S side of the images.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
    BenchConfig,
    Found,
    Part,
    Ratio,
    in_turn,
    matmul_peak,
    median_of,
    memory_of,
    part_of,
    relative_error,
    watched,
)
from moma.bench.step import Networks, make_step, pseudo_random
from moma.methods.moma.adapter import AdapterConfig
from moma.methods.moma.feature_decoder import MLLMInput
from moma.sampling.device import dtype_name
from moma.sampling.memory import Toggle, max_batch
from moma.sampling.pipeline import load_decoder
from moma.weights.bundle import CLIP_TOKENIZER, LLAMA_TOKENIZER, BundleWriter, expected_shapes
from moma.weights.tiny import SOURCE, TinyConfig, build_tokenizers, draw

SCRIPT = Path(__file__).parents[2] / "sample.py"
PEAK_MEMORY = re.compile(r"peak memory ([\d.]+) GB")  # in the last line of sample.py
WORD, PROMPT = "cat", "a cat on the beach at sunset"


def full_size() -> dict[str, Any]:
    """Every network's sizes in the public set."""
    llama, vision = LlamaConfig(lm_head=False), CLIPVisionConfig()
    return {
        "unet": SD15,
        "vae": VAE_SD15,
        "text": CLIPTextConfig(),
        "vision": vision,
        "llava": LlavaConfig(llama=llama, vision=vision),
        "adapter": AdapterConfig(),
    }


@dataclass(frozen=True)
class FlowConfig:
    """Of what is measured here."""

    networks: Mapping[str, Any] = field(default_factory=full_size)
    # A pass of a 7B model takes half a minute on a CPU.
    repeats: int = 2
    # Steps of the drawing whose memory is measured: the second one has masks, all later ones are like it.
    steps: int = 2


def build_bundle(folder: Path, size: int, networks: Mapping[str, Any], seed: int = 0) -> None:
    """A bundle with pseudo-random weights in bf16, tensors of one shape alike; tokenizers know few words.

    size: S. ValueError if the disk has no room for it: 16 GB for the public sizes.
    """
    kind = torch.bfloat16

    @lru_cache(maxsize=4)  # weights of the next block have the same shapes; the largest of them takes 0.3 GB
    def values(ending: str, shape: tuple[int, ...]) -> torch.Tensor:
        return draw(ending, shape, torch.Generator().manual_seed(seed), TinyConfig()).to(kind)

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


def image(size: int) -> Image.Image:
    """A disc on white: RGB (S, S)."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse([size // 4, size // 4, 3 * size // 4, 3 * size // 4], (150, 90, 40))
    return image


# --- the decoder -------------------------------------------------------------------------------------


def decoder(folder: Path, cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Found]:
    """One question to the MLLM, its weights in memory or read from the file block by block."""
    kind, repeats = dtype_name(dtype), min(cfg.repeats, FlowConfig().repeats)
    question = [MLLMInput(image(cfg.size), WORD, PROMPT)]
    streamed, resident = (load_decoder(folder, str(device), kind, stream=how) for how in ("on", "off"))
    error = relative_error(streamed(question)[0], resident(question)[0])
    slow, fast = in_turn(partial(resident, question), partial(streamed, question), repeats)
    yield Ratio(
        "decoder, resident / streamed, file in the page cache",
        kind,
        cfg.wanted["streamed"],
        slow,
        fast,
        error,
    )
    memory = memory_of(partial(streamed, question), device, mapped=True)
    del resident, streamed  # 14 GB

    def loaded(how: Toggle) -> None:
        load_decoder(folder, str(device), kind, stream=how)(question)

    seconds = in_turn(partial(loaded, "off"), partial(loaded, "on"), 1)
    what = "decoder, loaded for one question, resident / streamed"
    yield Ratio(what, kind, cfg.wanted["streamed"], *seconds)
    yield Part("decoder, resident", kind, slow)
    yield Part("decoder, streamed", kind, fast, memory=memory)
    if memory is not None:
        most = cfg.most["streamed"]
        yield Ratio(
            "streamed decoder's memory, limit / with its mapped weights",
            kind,
            1.0,
            most,
            memory / GIB,
            unit="GiB",
        )


# --- the VAE -----------------------------------------------------------------------------------------


@torch.no_grad()
def autoencoder(cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Found]:
    """One image to latents and one back."""
    vae = pseudo_random(lambda: VAE(VAE_SD15), cfg.seed, device, dtype)
    generator, peak = torch.Generator().manual_seed(cfg.seed), matmul_peak(cfg, device, dtype)
    x = torch.randn(1, VAE_SD15.in_channels, cfg.size, cfg.size, generator=generator).to(device, dtype)
    z = torch.randn(1, VAE_SD15.latent_channels, *cfg.grid, generator=generator).to(device, dtype)
    calls = {"VAE, encode": lambda: vae.encode(x), "VAE, decode": lambda: vae.decode(z)}
    for what, call in calls.items():
        yield part_of(what, dtype, call, median_of(call, cfg.repeats), peak, device)


# --- a whole drawing -----------------------------------------------------------------------------------


@torch.no_grad()
def drawing(cfg: BenchConfig, networks: Networks) -> Iterator[Found]:
    """The steps of as many images of the flow as the pipeline draws at once: one, or where steps are
    recorded, which takes its time, all of them."""
    together, kind = at_once(cfg, networks.device), dtype_name(networks.dtype)
    if networks.make_recorder is not None:
        step = make_step(networks, cfg, together)
        seconds = median_of(lambda: step.drawing(cfg.steps), FlowConfig().repeats)
        yield Part(drawing_name(cfg.steps, together), kind, seconds)
    elif together > 1:  # `moma.bench.step.steps` has the other one
        yield Part(step_name(together), kind, median_of(make_step(networks, cfg, together).moma, cfg.repeats))


def at_once(cfg: BenchConfig, device: torch.device) -> int:
    return max_batch(cfg.images, prod(cfg.grid), device)


def step_name(together: int) -> str:
    return "MoMA step" if together == 1 else f"MoMA step, {together} at once"


def drawing_name(steps: int, together: int) -> str:
    return f"{steps} MoMA steps and their recording, {together} at once"


def flow(found: list[Found], cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Found]:
    """Several images of one subject for one prompt, the sum of the parts that were measured.

    Ours: the decoder and the reference pass once, images in the pipeline's batches. The release's: all of
    it anew for each image, with its own step; what else it does is taken to be as fast as ours. Loading
    and text encoding are in neither.
    """
    kind, n, steps = dtype_name(dtype), cfg.images, cfg.steps
    part = {p.what: p.seconds for p in found if isinstance(p, Part) and p.dtype == kind}
    release = [r.slow for r in found if isinstance(r, Ratio) and r.what.startswith("MoMA step, release")]
    together = at_once(cfg, device)
    drawn = part.get(drawing_name(steps, together)) or steps * part.get(step_name(together), 0.0)  # a batch
    if not release or not drawn or not {"reference pass", "VAE, encode", "VAE, decode"} <= set(part):
        return
    read = part.get("decoder, resident", 0.0)
    once = read + part["VAE, encode"] + part["reference pass"]
    fast = once + -(-n // together) * drawn + n * part["VAE, decode"]
    slow = n * (once + steps * release[-1] + part["VAE, decode"])
    least = cfg.wanted["flow cuda" if device.type == "cuda" else "flow"]
    decoded = "with" if read else "without"
    what = (
        f"{n} images of one prompt, {steps} steps, {decoded} the decoder, summed from parts, release / ours"
    )
    yield Ratio(what, kind, least, slow, fast)


def pipeline(folder: Path, cfg: BenchConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Found]:
    """Most memory of `sample.py` from its start to its end; on CPUs without the files that are mapped."""
    kind, least = dtype_name(dtype), f"pipeline {device.type}"
    with tempfile.TemporaryDirectory() as out:
        image(cfg.size).save(Path(out, "ref.png"))
        options = {
            "--ref": Path(out, "ref.png"), "--subject": WORD, "--prompt": PROMPT, "--weights": folder,
            "--out": out, "--cache": "off", "--stream": "on", "--steps": FlowConfig().steps, "--num": 1,
            "--dtype": kind, "--device": device, "--size": cfg.size,
        }  # fmt: skip
        command = [sys.executable, str(SCRIPT), *(str(x) for pair in options.items() for x in pair)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with watched(Path(f"/proc/{process.pid}/status"), (OWN,)) as seen:
            text, _ = process.communicate()
    if process.returncode:
        last = text.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise ValueError(f"{SCRIPT.name} failed with {folder}: {last}")
    told = PEAK_MEMORY.search(text)
    memory = float(told[1]) * 1e9 if device.type == "cuda" and told else max(seen)
    if memory and least in cfg.most:
        what = "memory of the whole pipeline, limit / ours"
        yield Ratio(what, kind, 1.0, cfg.most[least], memory / GIB, unit="GiB")
