"""The cache of stage 2: what is in it, that it goes on after a kill, and whose it is."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convert_weights import convert
from models.clip_image import clip_image
from moma import DEFAULT, Runtime
from moma import load as load_pipe
from moma.data.triplets import load, open_source
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
    expected = identity(kind, bundle, source.fingerprint(), method, FP32, cfg)
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
            assert torch.equal(unpack(batch[m], SIDE)[i], square.mask[0])
        for name, text in (("text", sd_prompt(triplet.label, triplet.caption)), ("label", triplet.label)):
            same(batch[name][i], pipe.base.text_encoders[0](pipe.base.tokenizers[0].ids([text]))[0][0])


def test_an_image_that_is_its_own_reference_is_kept_once(cache: Cache) -> None:
    own = torch.tensor([i % 3 != 2 for i in range(COUNT) if i != BROKEN])
    assert torch.equal(cache.target == cache.reference, own)
    assert (len(cache.text.unique()), len(cache.label.unique())) == (4, 2)
    assert [len(part) for part in cache.tables["states"].parts] == [6]


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
    """Killed at the first part, at the second, among the texts: in the end the same files, byte for byte."""
    make(tmp_path / "whole", bundle, data)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        make(folder, bundle, data, encoder=lambda: Dying(moma_encoder(bundle), calls))
    expected = identity(AdapterTraining, bundle, open_source(data).fingerprint(), DEFAULT, FP32, CFG)
    with pytest.raises(ValueError, match="incomplete"):
        Cache(folder, expected, CFG)
    make(folder, bundle, data)
    assert files(folder) == files(tmp_path / "whole")


def test_complete_cache_needs_no_network(bundle: Bundle, data: Path, tmp_path: Path) -> None:
    make(tmp_path / "a", bundle, data)
    make(tmp_path / "a", bundle, data, encoder=lambda: pytest.fail("built again"))


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
    if change == "weights":
        vae = {**bundle.networks["vae"], "sha256": {"vae.safetensors": "0" * 64}}
        bundle = replace(bundle, networks={**bundle.networks, "vae": vae})
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
