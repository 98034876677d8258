"""Embeddings kept on the disk: found for the same inputs alone, whole or not at all, and not too many."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moma import DEFAULT, MethodConfig
from moma.app.feature_cache import EmbeddingCache, embeddings
from moma.inputs.preprocess import make_reference
from moma.methods.moma.feature_decoder import FeatureDecoder, MLLMInput
from moma.sampling.pipeline import load_decoder
from moma.weights.bundle import Bundle
from moma.weights.tiny import build_tiny_bundle

CPU = torch.device("cpu")


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


QUESTIONS = [MLLMInput(white(), "cat", prompt) for prompt in ("a cat", "two cats")]


def cache_of(
    place: Path, weights: Path, method: MethodConfig = DEFAULT, dtype: torch.dtype = torch.bfloat16
) -> EmbeddingCache:
    return EmbeddingCache.of(place, Bundle.open(weights), method, CPU, dtype)


def decoder(weights: Path) -> FeatureDecoder:
    return load_decoder(weights, "cpu", "bf16", stream="on")


def no_decoder() -> FeatureDecoder:
    raise AssertionError("the decoder was loaded")


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_second_time_without_the_decoder(folders: list[Path], tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "kept", folders[0])
    plain, how = embeddings(QUESTIONS, None, lambda: decoder(folders[0]))
    assert how == "streamed: asked for" and not cache.folder.exists()
    first, how = embeddings(QUESTIONS, cache, lambda: decoder(folders[0]))
    assert how == "streamed: asked for" and first[0].dtype == torch.bfloat16
    again, how = embeddings(QUESTIONS, cache_of(cache.folder, folders[0]), no_decoder)
    assert how == f"kept in {cache.folder}" and same(plain, first) and same(plain, again)


def test_only_what_is_missing_is_computed(folders: list[Path], tmp_path: Path) -> None:
    cache, asked = cache_of(tmp_path, folders[0]), []
    expected, _ = embeddings(QUESTIONS[:1], cache, lambda: decoder(folders[0]))

    def watched() -> FeatureDecoder:
        real = decoder(folders[0])
        row = real.llava.last_hidden_each
        real.llava.last_hidden_each = lambda rows, layers: asked.append(len(rows)) or row(rows, layers)
        return real

    both, _ = embeddings(QUESTIONS, cache, watched)
    assert asked == [1] and torch.equal(both[0], expected[0]) and not torch.equal(both[0], both[1])


def test_any_change_misses(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image, mask, words, weights, template, layers, dtype, settings of a network, tokenizer, processor,
    library: each makes a file of its own."""
    question = QUESTIONS[0]
    cache = cache_of(tmp_path, folders[0])
    paths = [
        cache.path(question),
        *(cache.path(replace(question, **change)) for change in (
            {"white": white(seed=1)}, {"white": white(radius=29)}, {"word": "dog"}, {"prompt": "a cat."},
        )),
        cache_of(tmp_path, folders[1]).path(question),
        cache_of(tmp_path, folders[0], replace(DEFAULT, template="paper")).path(question),
        cache_of(tmp_path, folders[0], replace(DEFAULT, mllm_layers=1)).path(question),
        cache_of(tmp_path, folders[0], dtype=torch.float32).path(question),
    ]  # fmt: skip
    bundle = Bundle.open(folders[0])
    llava = dict(bundle.networks["llava"], config={"changed": True})
    other = replace(bundle, networks={**bundle.networks, "llava": llava})
    paths.append(EmbeddingCache.of(tmp_path, other, DEFAULT, CPU, torch.bfloat16).path(question))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: b"another tokenizer")
        paths.append(cache_of(tmp_path, folders[0]).path(question))
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "another")
        paths.append(cache_of(tmp_path, folders[0]).path(question))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    paths.append(cache_of(tmp_path, folders[0]).path(question))
    assert len(set(paths)) == len(paths)
    monkeypatch.undo()
    unrelated = replace(DEFAULT, m_gen_threshold=0.3)  # the decoder does not know it
    assert cache_of(tmp_path, folders[0], unrelated).path(replace(question, white=white())) == paths[0]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other", "folder"])
def test_damaged_entries_are_made_again(folders: list[Path], tmp_path: Path, damage: str) -> None:
    cache, question = cache_of(tmp_path, folders[0]), QUESTIONS[0]
    (expected,), _ = embeddings([question], cache, lambda: decoder(folders[0]))
    path = cache.path(question)
    whole = path.read_bytes()
    if damage == "folder":  # cannot even be replaced
        path.unlink()
        path.mkdir()
    else:
        changed = {"empty": b"", "cut": whole[:-1], "other": b"x" * len(whole)}
        path.write_bytes(changed.get(damage, whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]))
    assert cache.get(question) is None
    (found,), how = embeddings([question], cache, lambda: decoder(folders[0]))
    assert how.startswith("streamed") and torch.equal(found, expected)
    assert damage == "folder" or path.read_bytes() == whole
    assert [place.name for place in tmp_path.iterdir()] == [path.name]  # no drafts left


def test_a_folder_that_cannot_be_written_is_no_error(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = cache_of(tmp_path / "file", folders[0])
    found, _ = embeddings(QUESTIONS, cache, lambda: decoder(folders[0]))
    assert len(found) == 2 and cache.get(QUESTIONS[0]) is None


def test_the_oldest_go(folders: list[Path], tmp_path: Path) -> None:
    cache = replace(cache_of(tmp_path, folders[0]), entries=2)
    for i in range(4):
        question = replace(QUESTIONS[0], prompt=f"a cat {i}")
        cache.put(question, torch.full((1, 32), i, dtype=torch.bfloat16))
        os.utime(cache.path(question), (i, i))  # the clock of a file system may stand still in between
    kept = [cache.get(replace(QUESTIONS[0], prompt=f"a cat {i}")) for i in range(4)]
    assert [None if e is None else e[0, 0].item() for e in kept] == [None, None, 2, 3]
