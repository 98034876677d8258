"""The cache of stage 2: what is in it, that it goes on after a kill, and whose it is."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from convert_weights import convert
from models.clip_image import clip_image
from moma import DEFAULT, Runtime
from moma import load as load_pipe
from moma.data.shards import ShardWriter
from moma.data.triplets import ShardSource, load, open_source
from moma.inputs.preprocess import make_reference
from moma.methods.ip_adapter import IPAdapterConfig, IPAdapterTraining
from moma.methods.moma.config import MethodConfig
from moma.methods.moma.training import AdapterTraining, start_adapter
from moma.methods.prompts import sd_prompt
from moma.sampling.interface import DenoisingTraining, Export
from moma.training.cache import Cache, CacheConfig, Encoder, build_cache, identity
from moma.training.common import Prepare, unpack, write_export
from moma.weights.bundle import Bundle
from tests.helpers import embed
from tests.training_data import SIDE, write_bundle, write_data

COUNT, BROKEN = 8, 4
CFG = CacheConfig(part=3, batch=2, workers=1)
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "triplets", COUNT, BROKEN)


@pytest.fixture(scope="module")
def cache(bundle: Bundle, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make(tmp_path_factory.mktemp("cache") / "whole", bundle, data)


def make(
    folder: Path,
    bundle: Bundle,
    data: Path,
    method: MethodConfig | IPAdapterConfig = DEFAULT,
    kind: type[DenoisingTraining] = AdapterTraining,
    cfg: CacheConfig = CFG,
    encoder: Callable[[], Any] | None = None,
    **ranks: Any,
) -> Cache:
    source = open_source(data)
    expected = identity(kind, bundle, source.names(), method, FP32, cfg)
    prepare = Prepare(SIDE, bundle.config("vision").image_size, method)
    networks = encoder or (lambda: Encoder(kind, Runtime(bundle, CPU, FP32), method))
    build_cache(folder, expected, source, prepare, networks, cfg, **ranks)
    return Cache(folder, expected, cfg)


def files(cache_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache_folder.iterdir()}


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@torch.no_grad()
def test_holds_what_the_pipeline_computes(bundle: Bundle, data: Path, cache: Cache) -> None:
    """Embeddings, latents, masks and texts of every sample against the sampler's own way to them."""
    pipe, source = load_pipe(bundle.folder, device="cpu", dtype="fp32"), open_source(data)
    triplets = [load(source, raw) for i, raw in enumerate(source.read(0)) if i != BROKEN]
    assert cache.names == [(t.key, t.label, t.caption) for t in triplets]
    batch = cache.batch(torch.arange(len(cache)))
    for i, triplet in enumerate(triplets):
        image, mask = triplet.reference or (triplet.image, triplet.mask)
        subject = pipe.encode_subject(image, mask, triplet.label)
        same(batch["embedding"][i], embed(pipe, subject, triplet.caption)[0])
        for prefix, m, square in (
            ("", "m_gen", make_reference(triplet.image, triplet.mask, SIDE, DEFAULT)),
            ("ref_", "m_ref", subject.reference),
        ):
            mean, std = pipe.base.vae.encode(square.image)
            same(batch[f"{prefix}mean"][i], mean[0])
            same(batch[f"{prefix}std"][i], std[0])
            assert torch.equal(unpack(batch[m], SIDE, SIDE)[i], square.mask[0])
        for name, text in (("text", sd_prompt(triplet.label, triplet.caption)), ("label", triplet.label)):
            assert batch[f"{name}_ids"][i].tolist() == pipe.base.tokenizers[0].ids([text])[0].tolist()


def test_an_image_that_is_its_own_reference_is_kept_once(cache: Cache) -> None:
    own = torch.tensor([i % 3 != 2 for i in range(COUNT) if i != BROKEN])
    assert torch.equal(cache.target == cache.reference, own)


@torch.no_grad()
def test_clip_embeddings(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    """The IP-Adapter baseline's: CLIP's own embedding of the reference on white; without the MLLM."""
    lean = replace(bundle, configs={n: c for n, c in bundle.configs.items() if n not in ("llava", "adapter")})
    method = IPAdapterConfig(image="white", encoder="vision")
    found = make(tmp_path / "clip", lean, data, method, IPAdapterTraining).batch(torch.tensor([1]))[
        "embedding"
    ]
    source, vision = open_source(data), bundle.build("vision")
    triplet = load(source, list(source.read(0))[1])
    white = make_reference(triplet.image, triplet.mask, SIDE, DEFAULT).white
    same(found, vision.pool(vision.hidden(clip_image(white, vision.cfg.image_size)[None])))


def test_white_background(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    """The paper's reference is another image than the target, of the same mask."""
    white = make(tmp_path / "white", bundle, data, replace(DEFAULT, reference_background="white"))
    batch = white.batch(torch.tensor([0]))
    assert not torch.equal(batch["mean"], batch["ref_mean"]) and torch.equal(batch["m_gen"], batch["m_ref"])


def test_what_cannot_be_used_is_named(cache: Cache) -> None:
    assert list(cache.skipped) == [f"metadata.jsonl:{BROKEN + 1}"]
    assert "covers the whole image" in next(iter(cache.skipped.values()))
    assert len(cache) == COUNT - 1


def test_mapped_reading_equals_reading_whole(
    bundle: Bundle, data: Path, cache: Cache, tmp_path: Path
) -> None:
    mapped = make(tmp_path / "mapped", bundle, data, cfg=replace(CFG, memory=0))
    index = torch.tensor([6, 0, 3, 6, 2])
    for name, value in cache.batch(index).items():
        assert torch.equal(mapped.batch(index)[name], value), name


def moma_encoder(bundle: Bundle) -> Encoder:
    return Encoder(AdapterTraining, Runtime(bundle, CPU, FP32), DEFAULT)


class Killed(Exception):
    pass


class Dying:
    """The networks, until they have been called `calls` times."""

    def __init__(self, encoder: Encoder, calls: int) -> None:
        self.encoder, self.calls = encoder, calls

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls -= 1
            if self.calls < 0:
                raise Killed
            return getattr(self.encoder, name)(*args)

        return call


@pytest.mark.parametrize("calls", [0, 5, 9])
def test_goes_on_after_a_kill(bundle: Bundle, data: Path, cache: Cache, tmp_path: Path, calls: int) -> None:
    """Killed at the first part, at the second: in the end the same files, byte for byte."""
    make(tmp_path / "whole", bundle, data)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        make(folder, bundle, data, encoder=lambda: Dying(moma_encoder(bundle), calls))
    expected = identity(AdapterTraining, bundle, open_source(data).names(), DEFAULT, FP32, CFG)
    with pytest.raises(ValueError, match="incomplete"):
        Cache(folder, expected, CFG)
    make(folder, bundle, data)
    assert files(folder) == files(tmp_path / "whole")


def test_complete_cache_needs_no_network(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it write anything or decode an image."""
    make(tmp_path / "a", bundle, data)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    monkeypatch.setattr("moma.training.cache.load", lambda *args: pytest.fail("read again"))
    make(tmp_path / "a", bundle, data, encoder=lambda: pytest.fail("built again"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before


DAMAGES = {
    "cut": lambda data: data[:-3],
    "header": lambda data: data[:8] + b"x" * 16 + data[24:],
    "values": lambda data: data.replace(data[len(data) // 2 :][:16], bytes(16), 1),  # of latents
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_made_again(
    bundle: Bundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    """That file alone, with a line."""
    make(tmp_path / "a", bundle, data)
    before, path = files(tmp_path / "a"), tmp_path / "a" / "samples-00000-00001.safetensors"
    if DAMAGES[damage] is None:
        path.unlink()
    else:
        for damaged in (path, tmp_path / "a" / "cache.json"):
            damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    capsys.readouterr()
    calls = []
    make(tmp_path / "a", bundle, data, encoder=lambda: calls.append(1) or Dying(moma_encoder(bundle), 8))
    assert files(tmp_path / "a") == before and calls == [1]
    assert (path.name in capsys.readouterr().out) == (damage != "gone")


def test_changed_data_is_read_again(
    bundle: Bundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Images exchanged in place: their file is made again, the others stay."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    before = make(tmp_path / "a", bundle, copy)
    kept = files(tmp_path / "a")
    for a, b in (("0.png", "1.png"), ("1.png", "0.png")):
        (copy / a).write_bytes((data / b).read_bytes())
    after = make(tmp_path / "a", bundle, copy)
    index = torch.tensor([1, 0])
    assert torch.equal(after.batch(index)["mean"], before.batch(index.flip(0))["mean"])
    now = files(tmp_path / "a")
    assert [name for name in now if now[name] != kept[name]] == ["samples-00000-00000.safetensors"]
    assert "samples-00000-00000" in capsys.readouterr().out


def test_missing_files_come_back(
    bundle: Bundle, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """They are counted, told at each start, more than a share of them ends it, and they are tried again."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for i in (0, 1, 5):
        (copy / f"{i}.png").unlink()
    strict = replace(CFG, max_skipped=0.3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"5 of 8 .*max_skipped 0\.3") as error:
            make(tmp_path / "a", bundle, copy, cfg=strict)
        assert "\n" not in str(error.value)
    capsys.readouterr()
    for _ in range(2):
        assert len(make(tmp_path / "a", bundle, copy, cfg=replace(CFG, max_skipped=0.7))) == 3
        assert "5 of 8 samples (62.5%)" in capsys.readouterr().out
    shutil.copyfile(data / "5.png", copy / "5.png")
    assert len(make(tmp_path / "a", bundle, copy)) == 4
    for i in (0, 1):
        shutil.copyfile(data / f"{i}.png", copy / f"{i}.png")
    assert len(make(tmp_path / "a", bundle, copy, cfg=strict)) == 7
    make(tmp_path / "b", bundle, data)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_faults_that_pass_are_tried_again(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk fails for longer than it is waited for; at the next start it does not."""
    with monkeypatch.context() as patch:

        def fail(path: Path) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        patch.setattr("moma.data.shards.time.sleep", lambda seconds: None)
        real = Path.read_bytes
        patch.setattr(Path, "read_bytes", lambda path: fail(path) if path.name == "6.png" else real(path))
        assert len(make(tmp_path / "a", bundle, data)) == 6
    assert len(make(tmp_path / "a", bundle, data)) == 7


def shards_of(data: Path, folder: Path, per_shard: int = 3) -> Path:
    """The data as tar shards."""
    with ShardWriter(folder, per_shard) as shards:
        for i, line in enumerate((data / "metadata.jsonl").read_text().splitlines()):
            sample = json.loads(line)
            image, mask = ((data / sample[name]).read_bytes() for name in ("image", "mask"))
            shards.add(f"{i:03}", image, "png", mask, sample["label"], sample["caption"])
    return folder


def test_what_damaged_shards_lose_is_counted(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    """Cut off in a first sample, and overwritten in a second: 3 + 1, and the one whose mask is full."""
    folder = shards_of(data, tmp_path / "data")
    cut, hurt = folder / "00000.tar", folder / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:700])
    content = hurt.read_bytes()
    second = content.index(b"004.png")
    hurt.write_bytes(content[:second] + b"x" * 512 + content[second + 512 :])
    with pytest.raises(ValueError, match="4 of 8"):  # 004 is the one whose mask is full
        make(tmp_path / "a", bundle, folder, cfg=replace(CFG, max_skipped=0.4))
    assert len(make(tmp_path / "a", bundle, folder)) == 4


def test_shards_are_read_by_one_rank_and_not_again(
    bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = shards_of(data, tmp_path / "data"), []
    real = ShardSource.read
    monkeypatch.setattr(ShardSource, "read", lambda self, shard: read.append(shard) or real(self, shard))
    make(tmp_path / "one", bundle, folder)
    assert read == [0, 1, 2]
    barrier = threading.Barrier(2, timeout=60)

    def rank(number: int) -> None:
        networks = moma_encoder(bundle)
        ranks = {"rank": number, "world": 2, "wait": barrier.wait}
        make(tmp_path / "two", bundle, folder, encoder=lambda: networks, **ranks)

    for expected in ([0, 1, 2], [], [2]):
        read.clear()
        if expected == [2]:
            (tmp_path / "two" / "samples-00002-00000.safetensors").unlink()
        threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(read) == expected
        assert files(tmp_path / "two") == files(tmp_path / "one")


def test_decodes_ahead_within_bounds(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    """Samples are read and decoded while the networks compute, but not many, and not many bytes."""
    folder = shards_of(data, tmp_path / "data", 8)
    source, begun, seen = open_source(folder), [], []

    class Watching(Encoder):
        def latents(self, images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(len(begun))
            return super().latents(images)

    real = source.read
    source.read = lambda shard: (begun.append(raw.key) or raw for raw in real(shard))
    networks = Watching(AdapterTraining, Runtime(bundle, CPU, FP32), DEFAULT)
    prepare = Prepare(SIDE, bundle.config("vision").image_size, DEFAULT)
    for name, cfg, first in (
        ("many", replace(CFG, part=8, ahead=2), 6),  # a batch, and twice as much ahead
        ("few", replace(CFG, part=8, ahead_bytes=0), 2),
    ):
        expected = identity(AdapterTraining, bundle, source.names(), DEFAULT, FP32, cfg)
        begun.clear(), seen.clear()
        build_cache(tmp_path / name, expected, source, prepare, lambda: networks, cfg)
        assert seen[0] == first, name


def test_bytes_of_a_sample(tmp_path: Path, data: Path) -> None:
    """At 512 pixels, in bf16, with CLIP's 77 tokens: at most 110 kB."""

    class Full:
        def embed(self, samples: Sequence[Any]) -> torch.Tensor:
            return torch.zeros(len(samples), 1024, dtype=torch.bfloat16)

        def latents(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
            return 2 * (torch.zeros(len(images), 4, 64, 64, dtype=torch.bfloat16),)

        def text(self, sample: Any) -> str:
            return sample.caption

        def ids(self, texts: Sequence[str]) -> torch.Tensor:
            return torch.zeros(len(texts), 77, dtype=torch.int32)

    source = open_source(shards_of(data, tmp_path / "data"))
    build_cache(tmp_path / "a", {}, source, Prepare(512, 336, DEFAULT), Full, CacheConfig())
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert size / (COUNT - 1) < 110_000


def test_mirrored_images(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    """Behind each sample what its mirror image gives, with the same texts."""
    source = open_source(data)
    expected = identity(AdapterTraining, bundle, source.names(), DEFAULT, FP32, CFG, flip=True)
    assert expected != identity(AdapterTraining, bundle, source.names(), DEFAULT, FP32, CFG)
    prepare = Prepare(SIDE, bundle.config("vision").image_size, DEFAULT, flip=True)
    build_cache(tmp_path / "a", expected, source, prepare, lambda: moma_encoder(bundle), CFG)
    both = Cache(tmp_path / "a", expected, CFG)
    assert len(both) == 2 * (COUNT - 1)
    plain, other = both.batch(torch.arange(0, len(both), 2)), both.batch(torch.arange(1, len(both), 2))
    for name in ("m_gen", "m_ref"):
        assert torch.equal(unpack(plain[name], SIDE, SIDE).flip(-1), unpack(other[name], SIDE, SIDE))
    assert torch.equal(plain["text_ids"], other["text_ids"])
    image = make_reference(*[ImageOps.mirror(Image.open(data / f"0{x}.png")) for x in ("", "_mask")], SIDE)
    same(other["mean"][0], moma_encoder(bundle).vae.encode(image.image)[0][0])


def test_ranks_share_the_work(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    """Two ranks, each with its parts, give the files of one."""
    make(tmp_path / "one", bundle, data)
    barrier, calls = threading.Barrier(2, timeout=60), []

    class Counting(Encoder):
        def embed_of(self, rank: int) -> "Counting":
            own = self.embed
            self.embed = lambda samples: calls.append(rank) or own(samples)
            return self

    def run(rank: int) -> None:
        encoder = Counting(AdapterTraining, Runtime(bundle, CPU, FP32), DEFAULT).embed_of(rank)
        make(tmp_path / "two", bundle, data, encoder=lambda: encoder, rank=rank, world=2, wait=barrier.wait)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert set(calls) == {0, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", "vae"),
        ("data", "data"),
        ("tokenizer", "tokenizer"),
        ({"template": "paper"}, "template"),
        ({"geometry": "crop"}, "geometry"),
        ({"mask_binarise_above": 0.2}, "mask_binarise_above"),
    ],
    ids=str,
)
def test_refuses_another_cache(
    bundle: Bundle, data: Path, cache: Cache, tmp_path: Path, change: Any, message: str
) -> None:
    folder = tmp_path / "cache"
    make(folder, bundle, data)
    method = replace(DEFAULT, **change) if isinstance(change, dict) else DEFAULT
    if change in ("weights", "tokenizer"):
        bundle = Bundle.open(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    if change == "weights":
        with (bundle.folder / "vae.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
    if change == "tokenizer":
        (bundle.folder / "tokenizers" / "merges.txt").open("a").write("\n")
    if change == "data":
        data = write_data(tmp_path / "data", COUNT - 1)
    with pytest.raises(ValueError, match=f" {message} ") as error:
        make(folder, bundle, data, method)
    assert "\n" not in str(error.value)


def test_stage_2_does_not_outdate_it(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    """The decoder beside another projector, context, subject part: the same cache; another mapping: not."""
    adapter = start_adapter(bundle, ("mapping.", "token"), token=False, seed=5)
    for name, expected in (("stage2", True), ("stage1", False)):
        if name == "stage1":
            adapter.mapping.up_proj.weight.data.mul_(2)
        write_export(tmp_path / name, Export({"adapter": (adapter.cfg, adapter.state_dict())}))
        convert([tmp_path / name], tmp_path / f"{name}-bundle", bundle, say=lambda text: None)
        other = Bundle.open(tmp_path / f"{name}-bundle")
        identities = [identity(AdapterTraining, b, "", DEFAULT, FP32, CFG) for b in (bundle, other)]
        assert (identities[0] == identities[1]) == expected


def test_nothing_usable(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample of the data can be used"):
        make(tmp_path / "cache", bundle, write_data(tmp_path / "data", 1, broken=0))
