"""LLaVA streamed from its files: the resident one's numbers, two blocks in memory, chosen by free memory."""

import threading
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.tokenizers import IMAGE_TOKEN
from models.weights.loading import LazyTensor
from models.weights.stream import StreamedLlava, one_after_another
from moma import Job, MethodConfig, SampleConfig, load
from moma.methods.moma.feature_decoder import MAX_MLLM_BATCH, MLLMInput
from moma.sampling.memory import CPU_LATENTS, MARGIN, available_ram, choose_saving, max_batch
from moma.weights.bundle import Bundle
from tests.helpers import feature_decoder
from tests.tiny import TinyConfig, build_tiny_bundle

CPU = torch.device("cpu")
BLOCKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with more blocks than are ever in memory."""
    path = tmp_path_factory.mktemp("weights") / "tiny"
    networks = TinyConfig().networks
    llava = networks["llava"]
    networks["llava"] = replace(llava, llama=replace(llava.llama, layers=BLOCKS, kv_heads=2))
    build_tiny_bundle(path, cfg=TinyConfig(networks=networks))
    return path


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 90, 3), dtype=np.uint8))


def questions() -> list[MLLMInput]:
    """Two subjects, prompts of different length."""
    cat, dog = image(0), image(1)
    return [
        MLLMInput(cat, "cat", "a cat in the snow"),
        MLLMInput(dog, "dog", "a dog reading a book in a library, studio light"),
        MLLMInput(cat, "cat", "two cats"),
    ]


# --- the resident numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("template", "layers"), [("release", None), ("paper", None), ("release", 2)])
def test_equals_resident(folder: Path, dtype: str, template: str, layers: int | None) -> None:
    """Bit for bit, together and alone; the stored float32 is used as it lies there, or cast."""
    method = MethodConfig(template=template, mllm_layers=layers)
    resident, streamed = (feature_decoder(folder, dtype, method, stream) for stream in ("off", "on"))
    assert type(resident.llava) is not StreamedLlava and type(streamed.llava) is StreamedLlava
    assert (resident.how, streamed.how) == ("resident: asked for", "streamed: asked for")
    expected, found = resident.encode_features(questions()), streamed.encode_features(questions())
    for question, a, b in zip(questions(), expected, found, strict=True):
        assert torch.equal(a, b) and torch.equal(a, streamed.encode_features([question])[0])
        assert torch.equal(a, resident.encode_features([question])[0])
    assert not torch.equal(expected[0], expected[2]) and expected[0].shape == (1, 32)


@torch.no_grad()
def test_has_the_interface_of_llava(folder: Path) -> None:
    """Batches of padded rows, too."""
    bundle = Bundle.open(folder)
    resident, streamed = bundle.build("llava", "cpu", torch.float32), bundle.stream(CPU, torch.float32)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = [torch.tensor([1, IMAGE_TOKEN, 5, 6]), torch.tensor([1, 4, IMAGE_TOKEN, 3, 300, 301])]
    for layers in (None, 1, BLOCKS):
        assert torch.equal(streamed(pixels, ids, layers=layers), resident(pixels, ids, layers=layers))
    for layers in (0, BLOCKS + 1):
        with pytest.raises(ValueError, match=f"layers {layers}"):
            streamed(pixels, ids, layers=layers)
    long = torch.zeros(1, 5000, 64)
    with pytest.raises(ValueError, match="5000"):
        streamed.llama(long)


def test_pipeline(folder: Path) -> None:
    """A pipeline with either; without an MLLM, subjects bring what it gave before."""
    size, drawn = SampleConfig(steps=2, height=64, width=64), []
    mask = Image.fromarray(np.uint8(255) * (np.hypot(*np.ogrid[-45:45, -45:45]) < 30))
    prompts, features = ("a cat", "two cats"), None
    for stream, encoders in (("off", True), ("on", True), ("on", False)):
        pipe = load(folder, device="cpu", dtype="fp32", stream=stream, encoders=encoders)
        subject = pipe.encode_subject(
            image(0), mask, "cat", prompts=prompts if encoders else (), features=features
        )
        features = subject.features
        jobs = [Job(subject, prompt, 0) for prompt in prompts]
        drawn.append(torch.cat([result.latents for result in pipe.run(jobs, size)]))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


# --- memory, reading ----------------------------------------------------------------------------------


class Watched:
    """Groups of tensors that note when they are read and who is still alive then."""

    def __init__(self, groups: int, tensors: int = 3) -> None:
        self.alive: list[tuple[int, weakref.ref]] = []
        self.most = 0
        self.read = [threading.Event() for _ in range(groups)]
        self.groups = [{f"w{n}": self._lazy(i) for n in range(tensors)} for i in range(groups)]

    def _lazy(self, i: int) -> LazyTensor:
        return LazyTensor((2, 5), torch.float32, Path("x"), lambda: self._read(i))

    def _read(self, i: int) -> Tensor:
        values = torch.full((2, 5), float(i))
        self.alive.append((i, weakref.ref(values)))
        self.most = max(self.most, len(self.groups_alive()))
        self.read[i].set()
        return values

    def groups_alive(self) -> set[int]:
        return {i for i, tensor in self.alive if tensor() is not None}


def test_two_groups_in_memory_and_the_next_one_is_read_ahead() -> None:
    watched, order = Watched(6), []

    def use(i: int, weights: dict[str, Tensor]) -> None:
        order.append(i)
        assert all((values == i).all() for values in weights.values())
        if i + 1 < len(watched.groups):  # read while this one is in use
            assert watched.read[i + 1].wait(timeout=30)
        assert i + 2 >= len(watched.groups) or not watched.read[i + 2].wait(timeout=0.05)

    one_after_another(watched.groups, use, CPU, torch.float32)
    assert order == list(range(6)) and watched.most == 2 and not watched.groups_alive()


def test_an_error_while_reading_arrives() -> None:
    def broken() -> Tensor:
        raise ValueError("x.safetensors: damaged")

    bad = {"w": LazyTensor((1,), torch.float32, Path("x"), broken)}
    used = []
    with pytest.raises(ValueError, match="damaged"):
        one_after_another([*Watched(1).groups, bad], lambda i, w: used.append(i), CPU, torch.float32)
    assert used == [0]


def watched_decoder(folder: Path, reads: Counter, **method: int) -> object:
    """A streamed decoder that counts how often each tensor is read."""
    decoder = feature_decoder(folder, method=MethodConfig(**method))

    def count(name: str, tensor: LazyTensor) -> LazyTensor:
        return replace(tensor, read=lambda: reads.update([name]) or tensor.read())

    llava = decoder.llava
    llava.front = {name: count("front", tensor) for name, tensor in llava.front.items()}
    blocks = llava.llama.blocks
    llava.llama.blocks = [
        {name: count(f"block {i}", tensor) for name, tensor in block.items()}
        for i, block in enumerate(blocks)
    ]
    return decoder


def test_every_block_is_read_once_for_all(folder: Path) -> None:
    reads: Counter = Counter()
    watched_decoder(folder, reads).encode_features(questions())
    parts = len(feature_decoder(folder).llava.llama.blocks[0])
    assert {reads[f"block {i}"] for i in range(BLOCKS)} == {parts}
    tower = reads["front"]

    reads.clear()
    cat = image(0)
    many = [MLLMInput(cat, "cat", f"a cat {i}") for i in range(MAX_MLLM_BATCH + 1)]
    watched_decoder(folder, reads, mllm_layers=2).encode_features(many)
    assert reads == {"front": tower, "block 0": 2 * parts, "block 1": 2 * parts}

    reads.clear()
    assert watched_decoder(folder, reads).encode_features([]) == [] and not reads


def test_wrong_names_are_found_before_anything_is_read(folder: Path) -> None:
    bundle = Bundle.open(folder)
    config, tensors = bundle.config("llava"), bundle._without_head()

    def unread(tensor: LazyTensor) -> LazyTensor:
        return replace(tensor, read=lambda: pytest.fail("was read"))

    tensors = {name: unread(tensor) for name, tensor in tensors.items()}
    lost = tensors.pop("llama.layers.1.mlp.up_proj.weight")
    for change, message in (
        ({}, "missing: llama.layers.1.mlp.up_proj.weight"),
        ({"llama.more": lost}, "unexpected: llama.more"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            StreamedLlava(config, tensors | change, CPU, torch.float32)
        assert "\n" not in str(error.value)


# --- the choice ---------------------------------------------------------------------------------------


def test_choice() -> None:
    fits = int(1000 * (1 + MARGIN))
    assert choose_saving("auto", 1000, fits) == (False, "0.00 GB needed, 0.00 GB free")
    assert choose_saving("auto", 1000, fits - 1)[0]
    assert choose_saving("auto", 14_000_000_000, 8_000_000_000)[1] == ("17.50 GB needed, 8.00 GB free")
    assert choose_saving("auto", 1000, None) == (False, "free memory is not known here")
    assert choose_saving("on", 1000, None) == (True, "asked for")
    assert choose_saving("off", 1000, 0) == (False, "asked for")
    with pytest.raises(ValueError, match="'yes'"):
        choose_saving("yes", 1000, None)


def test_choice_follows_free_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes are those of the networks that will be in memory together."""
    decoder, everything = ("llava", "adapter"), ("llava", "unet", "vae", "text", "adapter")
    bundle = Bundle.open(folder)
    with_margin = {
        names: int(bundle.nbytes(names, torch.float32) * (1 + MARGIN)) for names in (decoder, everything)
    }
    llava = sum(p.nbytes for p in bundle.build("llava").parameters())
    assert bundle.nbytes(("llava",), torch.float32) == llava
    assert bundle.nbytes(("llava",), torch.bfloat16) == llava // 2
    monkeypatch.setattr(
        "moma.methods.moma.feature_decoder.free_memory", lambda device: with_margin[decoder] + 1
    )
    assert feature_decoder(folder, stream="auto").how.startswith("resident: 0.00 GB needed")
    assert type(load(folder, device="cpu", dtype="fp32").method.decoder.llava) is StreamedLlava
    monkeypatch.setattr(
        "moma.methods.moma.feature_decoder.free_memory", lambda device: with_margin[everything] + 1
    )
    assert type(load(folder, device="cpu", dtype="fp32").method.decoder.llava) is not StreamedLlava
    with pytest.raises(ValueError, match="stream 'maybe'"):
        load(folder, device="cpu", dtype="fp32", stream="maybe")


V1 = "4:memory:/outer/inner\n0::/\n"
V2 = "0::/outer/inner\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (None, {}, 8_000_000),  # no groups at all
        (V2, {}, 8_000_000),
        (V2, {"outer/inner": ("max", 5, 0)}, 8_000_000),
        (V2, {"outer/inner": (5_000_000, 3_000_000, 1_000_000)}, 3_000_000),  # the file cache is given back
        (V2, {"outer/inner": (5_000_000, 0, 0), "outer": (4_000_000, 1_500_000, 0)}, 2_500_000),
        (V2, {"": (1_000_000, 0, 0)}, 1_000_000),  # of a container that shows its own group as the root
        (V2, {"outer/inner": (1_000_000, 2_000_000, 0)}, 0),
        (V1, {"memory/outer/inner": (3_000_000, 1_000_000, 500_000)}, 2_500_000),
        (V1, {"memory": (2_000_000, 0, 0)}, 2_000_000),
    ],
)
def test_available_ram(tmp_path: Path, cgroup: str | None, files: dict, expected: int) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  99999 kB\nMemAvailable:    7812 kB\nMemFree: 1 kB\n")
    if cgroup is not None:
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
    old = cgroup == V1
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    for place, (limit, used, cache) in files.items():
        group = tmp_path / "sys/fs/cgroup" / place
        group.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, used), strict=True):
            (group / name).write_text(f"{value}\n")
        (group / "memory.stat").write_text(f"anon 7\n{'total_' if old else ''}inactive_file {cache}\n")
    free = available_ram(tmp_path)
    assert free == (7812 * 1024 if expected == 8_000_000 else expected)


def test_unknown_system(tmp_path: Path) -> None:
    assert available_ram(tmp_path) is None


def test_images_at_once() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [max_batch(4, n, cpu) for n in (16, CPU_LATENTS // 2, CPU_LATENTS, 9 * CPU_LATENTS)] == [
        4,
        2,
        1,
        1,
    ]
    assert max_batch(4, 9 * CPU_LATENTS, gpu) == 4
