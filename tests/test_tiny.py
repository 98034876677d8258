"""The tiny bundle: complete, small, and the same every time."""

import subprocess
import sys

import pytest
import torch

from models.tokenizers import ClipTokenizer, LlamaTokenizer
from moma.methods.moma.feature_decoder import instruction
from moma.weights.bundle import Bundle
from moma.weights.tiny import SOURCE, PseudoRandomConfig, build_tokenizers
from tests.helpers import ROOT
from tests.tiny import build_tiny_bundle

TEXT = "Photo of a teddy bear's Ünïcode 猫 🐈, 2 cats!"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    build_tiny_bundle(folder)
    return Bundle.open(folder)


def test_bundle_is_complete_small_and_says_what_it_is(bundle):
    assert set(bundle.networks) == {"unet", "vae", "text", "vision", "llava", "adapter"}
    for name, entry in bundle.networks.items():
        assert entry["source"] == SOURCE and "pseudo-random" in SOURCE
        network = bundle.build(name)
        assert all(p.isfinite().all() for p in network.parameters())
    assert sum(file.stat().st_size for file in bundle.folder.rglob("*") if file.is_file()) < 20e6


def test_reference_has_an_effect(bundle):
    """λ is not 0, the projections are not 0."""
    adapter = bundle.build("adapter")
    for layer in adapter.subject:
        assert layer.scale.item() == PseudoRandomConfig.subject_scale != 0
        assert layer.to_v.weight.std() > 0


def test_seed_decides_the_weights(tmp_path, bundle):
    build_tiny_bundle(tmp_path / "same")
    build_tiny_bundle(tmp_path / "other", seed=1)
    assert Bundle.open(tmp_path / "same").hashes == bundle.hashes
    other = Bundle.open(tmp_path / "other").hashes
    assert all(other[file] != value for file, value in bundle.hashes.items())


def test_global_generator_is_left_alone(tmp_path):
    before = torch.get_rng_state()
    build_tiny_bundle(tmp_path / "x")
    assert torch.equal(torch.get_rng_state(), before)


def test_existing_folders_are_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        build_tiny_bundle(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_vocabularies_fit_the_networks(bundle):
    clip, llama = bundle.clip_tokenizer(), bundle.llama_tokenizer()
    assert max(clip.encode(TEXT).ids) < bundle.config("text").vocab
    ids = llama.encode_with_image(instruction("cat", TEXT))
    assert max(ids) < bundle.config("llava").llama.vocab


def test_tokenizers_know_every_text(bundle):
    clip, llama = bundle.clip_tokenizer(), bundle.llama_tokenizer()
    encoding = clip.encode(TEXT)
    used = encoding.ids[1 : 1 + sum(span is not None for span in encoding.spans)]
    assert clip.end_id not in used  # END stands for the unknown, too
    covered = {i for span in encoding.spans if span for i in range(*span)}
    assert covered == {i for i, c in enumerate(TEXT) if not c.isspace()}
    assert llama.decode(llama.encode(TEXT)) == TEXT
    assert 0 not in llama.encode(TEXT) and (llama.bos, llama.eos) == (1, 2)
    assert llama.decode(llama.encode(instruction("cat", "x"))[-1:]).strip() == "*"  # the token that is read


@pytest.mark.slow  # a process of its own
def test_tokenizer_files_do_not_depend_on_the_process(tmp_path):
    """Python and the libraries hash strings differently in every process; the files must not show it."""
    build_tokenizers(tmp_path / "here")
    code = f"from moma.weights.tiny import build_tokenizers; build_tokenizers({str(tmp_path / 'there')!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    ClipTokenizer(tmp_path / "here" / "vocab.json", tmp_path / "here" / "merges.txt")
    LlamaTokenizer(tmp_path / "here" / "tokenizer.model")
