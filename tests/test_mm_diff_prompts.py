"""Where MM-Diff finds the words of its subjects in a prompt."""

import json
import os
from pathlib import Path

import pytest

from models.tokenizers import ClipTokenizer
from moma.methods.mm_diff.prompts import TRIGGER, read_marked
from moma.weights.tiny import build_tokenizers
from tests.golden_files import CARRIED


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipTokenizer:
    folder = tmp_path_factory.mktemp("tokenizers")
    build_tokenizers(folder)
    return ClipTokenizer(folder / "vocab.json", folder / "merges.txt")


def marked(tokenizer: ClipTokenizer, words: list[str], prompt: str) -> list[str]:
    """The text up to the end of each subject's token."""
    read = read_marked([tokenizer], words, prompt)
    return [read.text[: read.encodings[0].spans[place][1]] for place in read.places[0]]


@pytest.mark.parametrize(
    ("words", "prompt", "ends"),
    [
        (["man"], "a man in the snow", ["a man"]),
        (["man", "woman"], "a woman and a man", ["a woman and a man", "a woman"]),
        (["man", "old man"], "an old man and a man", ["an old man and a man", "an old man"]),
        (["cat", "cat"], "a cat beside a cat", ["a cat", "a cat beside a cat"]),
        (["cat"], "two Cats", ["two Cats"]),
        (["x"], f"a man{TRIGGER}'s portrait", ["a man"]),
        (["x"], f"a man {TRIGGER} in the snow", ["a man"]),
        (["x", "y"], f"a man{TRIGGER}, a dog{TRIGGER}", ["a man", "a man, a dog"]),
    ],
)
def test_marks_are_put_in(tokenizer: ClipTokenizer, words: list[str], prompt: str, ends: list[str]) -> None:
    assert marked(tokenizer, words, prompt) == ends


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (["x"], f"{TRIGGER} a man"),
        (["x", "y"], f"a man{TRIGGER}{TRIGGER} on the beach"),
        (["x", "y"], f"a man{TRIGGER} on the beach"),
        (["x"], f"a snow{TRIGGER}man"),
        (["x"], f"a man{TRIGGER}in the park"),
        (["x"], f"a man !{TRIGGER}! there"),
        (["x"], "very " * 80 + f"happy man{TRIGGER}"),
        (["man"], "very " * 80 + "happy man"),
        (["cat", "cat"], "a cat beside a dog"),
        (["cat", "dog"], "a cat in the snow"),
        (["cat"], f" {TRIGGER}"),
        ([""], f"a cat{TRIGGER}"),
    ],
)  # fmt: skip
def test_wrong_marks_are_refused(tokenizer: ClipTokenizer, words: list[str], prompt: str) -> None:
    with pytest.raises(ValueError) as error:
        read_marked([tokenizer], words, prompt)
    assert "\n" not in str(error.value)


@pytest.mark.skipif("MOMA_TOKENIZERS" not in os.environ, reason="needs the public tokenizer files")
def test_positions_are_the_recorded_ones() -> None:
    folder = Path(os.environ["MOMA_TOKENIZERS"]) / "clip"
    public = ClipTokenizer(folder / "vocab.json", folder / "merges.txt")
    for row in json.loads((CARRIED / "mmdiff_positions.json").read_text(encoding="utf-8")):
        words, prompt = ["x"] * row["prompt"].count(TRIGGER), row["prompt"]
        if row["refused"]:
            with pytest.raises(ValueError):
                read_marked([public], words, prompt)
        else:
            assert read_marked([public], words, prompt).places == (tuple(row["positions"]),), prompt
