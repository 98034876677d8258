"""Captions by a tiny BLIP-2 with pseudo-random weights: what is written, resumed and shared."""

import json
from pathlib import Path

import pytest
import torch

from models.weights.files import read_text
from moma.data.blip2 import Blip2, Blip2Config, describe, find_images, finish, read_parts, run
from moma.data.captions import read_captions
from tests.helpers import image

COUNT = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the public one's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Blip2Config as PublicConfig
    from transformers import (
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(60)), "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PublicConfig(
        vision_config=tower | {"image_size": 28, "patch_size": 14},
        qformer_config=tower | {"encoder_hidden_size": 16, "vocab_size": len(words)},
        text_config={
            "model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": len(words), "word_embed_proj_dim": 16, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 1, "max_position_embeddings": 128,
        },
        num_query_tokens=4, image_token_index=len(words) - 1, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("blip2")
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    Blip2Processor(BlipImageProcessor(size=size), fast, num_query_tokens=4).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (folder := tmp_path / "images" / "train").mkdir(parents=True)
    for i in range(COUNT):
        image(i).save(folder / f"{i}.jpg")
    return tmp_path / "images"


def load(model: Path) -> Blip2:
    return Blip2.load(str(model), "cpu", "fp32", Blip2Config(batch=2, max_new=6, beams=2))


def test_the_converter_reads_what_is_written(model: Path, images: Path, tmp_path: Path) -> None:
    options = ["--images", str(images), "--model", str(model), "--device", "cpu", "--dtype", "fp32"]
    assert run([*options, "--out", str(tmp_path / "out"), "--batch-size", "3"]) == 0
    found = read_captions(tmp_path / "out" / "captions.jsonl", {str(i) for i in range(COUNT)})
    assert len(found) == COUNT and all("word" in caption for caption in found.values())


def test_batches_and_ranks_change_no_caption(model: Path, images: Path, tmp_path: Path) -> None:
    captioner, files, results = load(model), find_images(images), []
    for ranks in (1, 3):
        (out := tmp_path / str(ranks)).mkdir()
        shares = [list(describe(captioner, files, out, rank, ranks)) for rank in range(ranks)]
        assert sorted(name for share in shares for name in share) == sorted(files)
        results.append(read_text(finish(files, out)))
    assert results[0] == results[1]


def test_a_killed_run_continues(model: Path, images: Path, tmp_path: Path) -> None:
    captioner, files = load(model), find_images(images)
    begun = describe(captioner, files, tmp_path)
    first = [next(begun) for _ in range(2)]
    begun.close()
    assert finish(files, tmp_path) is None and not (tmp_path / "captions.jsonl").exists()
    with (tmp_path / "part-000.jsonl").open("a") as part:
        part.write('{"image_id": "6", "capt')  # as `kill -9` leaves it
    rest = list(describe(captioner, files, tmp_path, 0, 2)) + list(describe(captioner, files, tmp_path, 1, 2))
    assert sorted(first + rest) == sorted(files)
    assert set(read_parts(tmp_path)) == set(files) and finish(files, tmp_path)


def test_a_damaged_image_costs_its_own_caption_alone(model: Path, images: Path, tmp_path: Path) -> None:
    (images / "train" / "2.jpg").write_bytes(b"no image")
    files = find_images(images)
    list(describe(load(model), files, tmp_path))
    lines = [json.loads(line) for line in read_text(finish(files, tmp_path)).split("\n") if line]
    assert [line["image_id"] for line in lines if not line["caption"]] == ["2"]


def test_wrong_folders_are_refused(images: Path, tmp_path: Path, capsys) -> None:
    (images / "7").mkdir()
    image(0).save(images / "7" / "1.png")
    (tmp_path / "none").mkdir()
    for given, model, named in (
        (images, "x", "1"),
        (tmp_path / "none", "x", "none"),
        (images / "7", str(tmp_path / "none"), "none"),
    ):
        options = ["--images", str(given), "--model", model, "--out", str(tmp_path / "out")]
        assert run(options) == 2
        assert named in (error := capsys.readouterr().err) and error.count("\n") == 1
