"""Embeddings kept on the disk: found for the same inputs alone, whole or not at all."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moma import DEFAULT, Bundle, MethodConfig, Runtime
from moma.inputs.preprocess import make_reference
from moma.methods.moma.feature_cache import FeatureCache, cached_features
from moma.methods.moma.feature_decoder import MAX_MLLM_BATCH, FeatureDecoder, MLLMInput
from tests.tiny import build_tiny_bundle


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny bundles with other weights."""
    places = [tmp_path_factory.mktemp("weights") / str(seed) for seed in (0, 1)]
    for seed, place in enumerate(places):
        build_tiny_bundle(place, seed)
    return places


def white(seed: int = 0, radius: int = 30) -> Image.Image:
    photo = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    mask = Image.fromarray(np.uint8(255) * (np.hypot(*np.ogrid[-45:45, -45:45]) < radius))
    return make_reference(photo, mask, 128, DEFAULT).white


INPUTS = [MLLMInput(white(), "cat", prompt) for prompt in ("a cat", "two cats")]


def cache_of(
    place: Path, weights: Path, method: MethodConfig = DEFAULT, dtype: torch.dtype = torch.bfloat16
) -> FeatureCache:
    return FeatureCache.of(place, runtime(weights, dtype), method)


def runtime(weights: Path, dtype: torch.dtype = torch.bfloat16) -> Runtime:
    return Runtime(Bundle.open(weights), torch.device("cpu"), dtype, stream="on")


def decoder(weights: Path) -> FeatureDecoder:
    return FeatureDecoder.load(runtime(weights), DEFAULT, None, ("adapter",))


def no_decoder() -> FeatureDecoder:
    raise AssertionError("the decoder was loaded")


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_second_time_without_the_decoder(folders: list[Path], tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "kept", folders[0])
    plain, how = cached_features(INPUTS, None, lambda: decoder(folders[0]))
    assert how == "streamed: asked for" and not cache.folder.exists()
    first, how = cached_features(INPUTS, cache, lambda: decoder(folders[0]))
    assert how == "streamed: asked for" and first[0].dtype == torch.bfloat16
    again, how = cached_features(INPUTS, cache_of(cache.folder, folders[0]), no_decoder)
    assert how == f"kept in {cache.folder}" and same(plain, first) and same(plain, again)


def test_only_what_is_missing_is_computed(folders: list[Path], tmp_path: Path) -> None:
    cache, asked = cache_of(tmp_path, folders[0]), []
    expected, _ = cached_features(INPUTS[:1], cache, lambda: decoder(folders[0]))

    def watched() -> FeatureDecoder:
        real = decoder(folders[0])
        row = real.llava.last_hidden_each
        real.llava.last_hidden_each = lambda rows, layers: asked.append(len(rows)) or row(rows, layers)
        return real

    both, _ = cached_features(INPUTS, cache, watched)
    assert asked == [1] and torch.equal(both[0], expected[0]) and not torch.equal(both[0], both[1])


def test_a_run_that_is_stopped_keeps_what_it_has(folders: list[Path], tmp_path: Path) -> None:
    cache = cache_of(tmp_path, folders[0])
    many = [MLLMInput(INPUTS[0].white, "cat", f"a cat {i}") for i in range(MAX_MLLM_BATCH + 1)]

    class Stopped(FeatureDecoder):
        def encode_features(self, inputs: Sequence[MLLMInput]) -> list[Tensor]:
            if many[-1] in inputs:
                raise KeyboardInterrupt
            return super().encode_features(inputs)

    with pytest.raises(KeyboardInterrupt):
        cached_features(many, cache, lambda: Stopped(**vars(decoder(folders[0]))))
    assert [cache.get(one) is not None for one in many] == [True] * MAX_MLLM_BATCH + [False]


def test_any_change_misses(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image, mask, words, weights, template, layers, dtype, settings of a network, tokenizer, processor,
    library: each makes a file of its own."""
    one = INPUTS[0]
    cache = cache_of(tmp_path, folders[0])
    paths = [
        cache.path(one),
        *(cache.path(replace(one, **change)) for change in (
            {"white": white(seed=1)}, {"white": white(radius=29)}, {"word": "dog"}, {"prompt": "a cat."},
        )),
        cache_of(tmp_path, folders[1]).path(one),
        cache_of(tmp_path, folders[0], replace(DEFAULT, template="paper")).path(one),
        cache_of(tmp_path, folders[0], replace(DEFAULT, mllm_layers=1)).path(one),
        cache_of(tmp_path, folders[0], dtype=torch.float32).path(one),
    ]  # fmt: skip
    bundle = Bundle.open(folders[0])
    llava = dict(bundle.networks["llava"], config={"changed": True})
    other = replace(bundle, networks={**bundle.networks, "llava": llava})
    paths.append(FeatureCache.of(tmp_path, replace(runtime(folders[0]), weights=other), DEFAULT).path(one))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: b"another tokenizer")
        paths.append(cache_of(tmp_path, folders[0]).path(one))
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "another")
        paths.append(cache_of(tmp_path, folders[0]).path(one))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    paths.append(cache_of(tmp_path, folders[0]).path(one))
    assert len(set(paths)) == len(paths)
    monkeypatch.undo()
    unrelated = replace(DEFAULT, m_gen_threshold=0.3)  # the decoder does not know it
    assert cache_of(tmp_path, folders[0], unrelated).path(replace(one, white=white())) == paths[0]


def test_an_altered_bundle_with_the_hashes_of_another(folders: list[Path], tmp_path: Path) -> None:
    """What a bundle records of itself is not believed, nor the time that a file brings along."""
    copy = Path(shutil.copytree(folders[0], tmp_path / "copy"))
    path = copy / "adapter.safetensors"
    honest = cache_of(tmp_path, copy).path(INPUTS[0])
    assert honest == cache_of(tmp_path, folders[0]).path(INPUTS[0])
    old = path.stat().st_mtime_ns - 10**10
    os.utime(path, ns=(old, old))
    assert cache_of(tmp_path, copy).path(INPUTS[0]) == honest
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(old, old))
    assert cache_of(tmp_path, copy).path(INPUTS[0]) != honest


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other", "folder"])
def test_damaged_entries_are_made_again(folders: list[Path], tmp_path: Path, damage: str) -> None:
    cache, one = cache_of(tmp_path, folders[0]), INPUTS[0]
    (expected,), _ = cached_features([one], cache, lambda: decoder(folders[0]))
    path = cache.path(one)
    whole = path.read_bytes()
    if damage == "folder":  # cannot even be replaced
        path.unlink()
        path.mkdir()
    else:
        changed = {"empty": b"", "cut": whole[:-1], "other": b"x" * len(whole)}
        path.write_bytes(changed.get(damage, whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]))
    assert cache.get(one) is None
    (found,), how = cached_features([one], cache, lambda: decoder(folders[0]))
    assert how.startswith("streamed") and torch.equal(found, expected)
    assert damage == "folder" or path.read_bytes() == whole
    assert [place.name for place in tmp_path.iterdir()] == [path.name]  # no drafts left


def test_a_folder_that_cannot_be_written_is_no_error(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = cache_of(tmp_path / "file", folders[0])
    found, _ = cached_features(INPUTS, cache, lambda: decoder(folders[0]))
    assert len(found) == 2 and cache.get(INPUTS[0]) is None
