"""The two templates, and where the subject's tokens are."""

import json
import os
from pathlib import Path

import pytest

from models.tokenizers import ClipTokenizer
from moma.methods.moma.feature_decoder import instruction
from moma.methods.prompts import foreign_syntax, label_positions, plain_text, read_prompt, sd_prompt
from moma.weights.tiny import build_tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ClipTokenizer:
    folder = tmp_path_factory.mktemp("tokenizers")
    build_tokenizers(folder)
    return ClipTokenizer(folder / "vocab.json", folder / "merges.txt")


def positions(tokenizer: ClipTokenizer, text: str, subject: str, *mode: str) -> list[int]:
    return label_positions(tokenizer, tokenizer.encode(text), text, subject, *mode)


def labelled(tokenizer: ClipTokenizer, text: str, subject: str) -> list[str]:
    """The stretches of the text whose tokens are chosen; neighbouring tokens joined."""
    encoding = tokenizer.encode(text)
    chosen = set()
    for position in positions(tokenizer, text, subject):
        chosen.update(range(*encoding.spans[position]))
    marked = "".join(c if i in chosen else "|" for i, c in enumerate(text))
    return [part for part in marked.split("|") if part]


def test_templates():
    assert sd_prompt("car", "A car in autumn.") == "photo of a car. A car in autumn."
    assert instruction("car", "A car.") == (
        "USER: <image>\n A photo of a car. Describe a new image of the same car in: A car.. ASSISTANT: *"
    )
    paper = instruction("car", "A car in autumn.", "paper")
    assert paper.count("<image>") == 1 and "An image of car. Describe A car in autumn." in paper
    assert instruction("{x}", "{prompt} {y}").count("{x}") == 2  # braces are the user's own


@pytest.mark.parametrize(
    ("subject", "prompt", "expected"),
    [
        ("cat", "a cat on a mat", ["cat", "cat"]),
        ("Cat", "CATS and a cat", ["Cat", "CATS", "cat"]),
        ("cats", "one cat", ["cats", "cat"]),
        ("dress", "two dresses, an address", ["dress", "dresses"]),
        ("dresses", "a dress", ["dresses", "dress"]),
        ("puppy", "puppies play; puppyhood", ["puppy", "puppies"]),
        ("puppies", "a puppy", ["puppies", "puppy"]),
        ("box", "boxes in a boxing ring", ["box", "boxes"]),
        ("cat", "a category, a bobcat, the cat's tail, (cat)!", ["cat", "cat", "cat"]),
        ("cat", "a cat, a cat-like thing", ["cat", "cat", "cat"]),
        ("axolotl", "an axolotl reading", ["axolotl", "axolotl"]),  # many pieces: all of them
        ("c++", "a c++ book", ["c++", "c++"]),
        ("猫", "a 猫 in the snow", ["猫", "猫"]),
        ("猫", "雪の中の猫です", ["猫", "猫"]),
        ("고양이", "눈 속의 고양이가", ["고양이", "고양이"]),
        ("cat", "catが雪", ["cat", "cat"]),
        ("बिल", "बिल, बिल्ली", ["बिल", "बिल"]),  # the second word goes on with a mark
        ("teddy-bear", "two teddy bears", ["teddy-bear", "teddy", "bears"]),
        ("t-shirt", "a t‑shirt", ["t-shirt", "t‑shirt"]),  # with a hyphen that does not break
    ],
)
def test_phrase_takes_whole_words_in_any_form(tokenizer, subject, prompt, expected):
    assert labelled(tokenizer, sd_prompt(subject, prompt), subject) == expected


def test_phrase_of_two_words_needs_both(tokenizer):
    text = sd_prompt("teddy bear", "A Teddy  bear, teddy bears and a bear rug, teddy")
    # Spaces between words belong to no token.
    assert labelled(tokenizer, text, "teddy bear") == ["teddy", "bear", "Teddy", "bear", "teddy", "bears"]


def test_first_piece_takes_stray_words_as_the_release_does(tokenizer):
    text = sd_prompt("teddy bear", "A teddy bear and a bear rug")
    encoding = tokenizer.encode(text)
    words = [text[slice(*encoding.spans[i])] for i in positions(tokenizer, text, "teddy bear", "first_piece")]
    assert words.count("bear") == 3 and len(words) > len(positions(tokenizer, text, "teddy bear"))
    assert positions(tokenizer, "nothing of it", "dog", "first_piece") == []


def test_positions_count_from_the_begin_token(tokenizer):
    encoding = tokenizer.encode("cat")
    assert positions(tokenizer, "cat", "cat") == [i for i, span in enumerate(encoding.spans) if span]
    assert positions(tokenizer, "cat", "cat")[0] == 1


@pytest.mark.parametrize(
    ("word", "prompt", "same"),
    [
        ("cafe\u0301", "a caf\u00e9", "a caf\u00e9"),
        ("caf\u00e9", "a cafe\u0301", "a caf\u00e9"),
        ("cat", "a ｃａｔ\u3000Ｎ７", "a cat N7"),
        ("cat", "\ufeffa c\u00adat\u200b", "a cat"),
        ("cat", "a cat\u2028on\u00a0the\tbeach", "a cat on the beach"),
    ],
)
def test_texts_are_read_as_meant(tokenizer, word, prompt, same):
    found, expected = (read_prompt([tokenizer], [plain_text(word)], text) for text in (prompt, same))
    assert (found.text, found.encodings[0].ids) == (expected.text, expected.encodings[0].ids)
    assert read_prompt([tokenizer], [word], prompt).labels == expected.labels


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (cat:1.2) on ((the)) [beach]", ["(cat:1.2)", "(the))", "[beach]"]),
        ("a cat <lora:snow:0.8> BREAK snow AND sun", ["<lora:snow:0.8>", "BREAK", "AND"]),
        ("a {red|blue} cat, __place__, --ar 16:9", ["{red|blue}", "__place__", "--ar"]),
        ("fluffy++ cat, embedding:bad", ["fluffy++", "embedding:bad"]),
        ("a cat at 5:30 - the cat's <3 -- and so on, x--y", []),
    ],
)
def test_syntax_of_other_tools_is_seen(prompt, parts):
    assert foreign_syntax(prompt) == parts


def test_absent_subject_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="'dog'"):
        positions(tokenizer, "photo of a hotdog", "dog")


def test_subject_beyond_the_limit_is_an_error(tokenizer):
    text = "7 " * 74 + "cat cat"
    assert positions(tokenizer, text, "cat") == [75]  # the last place before END; the second one is cut
    with pytest.raises(ValueError, match="77"):
        positions(tokenizer, "7 " * 75 + "cat", "cat")


def test_phrase_cut_in_the_middle_does_not_count(tokenizer):
    pieces = len(positions(tokenizer, "axolotl", "axolotl"))
    assert pieces > 1
    for room, fits in ((pieces, True), (pieces - 1, False)):
        text = "7 " * (75 - room) + "axolotl"
        if fits:
            assert len(positions(tokenizer, text, "axolotl")) == pieces
        else:
            with pytest.raises(ValueError, match="beyond"):
                positions(tokenizer, text, "axolotl")


@pytest.mark.parametrize(
    ("subject", "prompt", "message"),
    [
        ("", "a cat", "subject"),
        (" ", "a cat", "subject"),
        ("cat", "", "prompt"),
        ("cat", " \n", "prompt"),
        ("cat", "a dog in the snow", "'cat': .*'a cat, a dog in the snow'"),
        ("cat", "a cat <image>", "reserved"),
        ("cat", "7 " * 90 + "cat", "beyond"),
        ("cat", "a cat " * 2000, "12,000"),
        ("cat", "a cat \udce9", "dce9"),
    ],
)
def test_what_cannot_be_drawn(tokenizer, subject, prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        read_prompt([tokenizer], [subject], prompt)
    assert "\n" not in str(error.value)


def test_what_can_be_drawn(tokenizer):
    assert read_prompt([tokenizer], ["cat"], "two CATS").labels[0]
    assert read_prompt([tokenizer], ["cat"], "a cat" + " 7" * 90).truncated  # only the end is cut
    assert not read_prompt([tokenizer], ["cat"], "a cat").truncated
    read_prompt([tokenizer], ["cat"], "a dog", absent_label="ignore")
    with pytest.raises(ValueError, match="empty"):
        read_prompt([tokenizer], ["cat"], "", absent_label="ignore")


def test_any_number_of_subjects_and_tokenizers(tokenizer):
    """Without a subject the prompt is the text; each subject has its own label."""
    plain = read_prompt([tokenizer, tokenizer], [], "on the beach")
    assert plain.text == "on the beach" and plain.labels == () and len(plain.encodings) == 2
    both = read_prompt([tokenizer], ["cat", "dog"], "a cat beside a dog")
    assert both.text == "photo of a cat and a dog. a cat beside a dog"
    assert not set(both.labels[0]) & set(both.labels[1]) and all(len(label) == 2 for label in both.labels)
    with pytest.raises(ValueError, match="'dog'"):
        read_prompt([tokenizer], ["cat", "dog"], "a cat")


@pytest.mark.skipif("MOMA_TOKENIZERS" not in os.environ, reason="needs the public tokenizer files")
def test_release_positions_with_the_public_tokenizer():
    """Positions of the released code's get_subject_idx (excerpt of its output on these prompts)."""
    clip = Path(os.environ["MOMA_TOKENIZERS"]) / "clip"
    tokenizer = ClipTokenizer(clip / "vocab.json", clip / "merges.txt")
    rows = json.loads(
        (Path(__file__).parent / "golden" / "subject_positions.json").read_text(encoding="utf-8")
    )
    for row in rows:
        text = sd_prompt(row["subject"], row["prompt"])
        assert positions(tokenizer, text, row["subject"], "first_piece") == row["positions"], text
    bears = sd_prompt("teddy bear", "A teddy bear and a bear rug in the snow.")
    assert positions(tokenizer, bears, "teddy bear") == [4, 5, 8, 9]
