"""Prompts with a mark behind the word of each subject, which people may leave out."""

from collections.abc import Sequence
from dataclasses import dataclass
from unicodedata import category

from models.tokenizers import ClipTokenizer, Encoding
from moma.methods.prompts import (
    AbsentLabel,
    Prompt,
    check_prompt,
    inside_word,
    plain_text,
    word_ends,
)

TRIGGER = "<|subj|>"  # of the released code; it is cut out of the text before it is read


@dataclass(frozen=True, eq=False)
class MarkedPrompt(Prompt):
    """A prompt, and the token of each subject that its image is merged into."""

    places: tuple[tuple[int | None, ...], ...]  # per tokenizer and subject; None = the prompt lacks its word


def read_marked(
    tokenizers: Sequence[ClipTokenizer],
    words: Sequence[str],
    prompt: str,
    absent_label: AbsentLabel = "error",
) -> MarkedPrompt:
    """Find each subject's token: the last one before its mark, or of its word where nothing is marked.

    Args:
        tokenizers: one per text encoder.
        words: of the subjects.
        prompt: the user's text, with a mark for each subject in their order, or without any.
        absent_label: "error" refuses a prompt without marks that does not name every subject.

    Raises:
        ValueError: for another number of marks, one that stands where no word ends, two in one place, one
            beyond the text encoder's limit; an empty subject or prompt; and under "error".
    """
    words, parts = [plain_text(word) for word in words], plain_text(prompt).split(TRIGGER)
    text = "".join(parts)
    check_prompt(words, text, "ignore" if len(parts) > 1 else absent_label)
    if len(parts) > 1:
        if len(parts) - 1 != len(words):
            raise ValueError(f"{len(parts) - 1} {TRIGGER} for {len(words)} subjects: expected one for each")
        ends = [sum(map(len, parts[: i + 1])) for i in range(len(words))]
    else:
        ends = word_ends(words, text)
        if absent_label == "error" and None in ends:
            raise ValueError(
                f"the prompt {text!r} names {words[ends.index(None)]!r} for fewer subjects than there are:"
                f" name each, or put {TRIGGER} behind the word of each"
            )
    encodings = tuple(tokenizer.encode(text) for tokenizer in tokenizers)
    places = tuple(
        tuple(None if end is None else _token(encoding, text, end) for end in ends) for encoding in encodings
    )
    found = [place for place in places[0] if place is not None]
    if len(set(found)) < len(found):
        raise ValueError(f"{prompt!r}: two subjects stand at one word, expected a word for each")
    labels = tuple(() if place is None else (place,) for place in places[0])
    return MarkedPrompt(text, encodings, labels, places)


def _token(encoding: Encoding, text: str, end: int) -> int:
    """The token that ends where a subject's word does, or before the white space there."""
    shown = f"{text[:end]}{TRIGGER}{text[end:]}"
    if inside_word(text, end):
        raise ValueError(f"{shown!r}: {TRIGGER} stands within a word, expected it behind one")
    spans = [(i, span) for i, span in enumerate(encoding.spans) if span is not None]
    before = [(i, span) for i, span in spans if span[1] <= end]
    if any(start < end < stop for _, (start, stop) in spans):
        raise ValueError(f"{shown!r}: {TRIGGER} stands within a token, expected it behind a word")
    if any(stop <= end for _, stop in encoding.dropped):
        limit = len(encoding.ids)
        raise ValueError(f"{shown!r}: a subject stands beyond the text encoder's limit of {limit} tokens")
    if not before or category(text[before[-1][1][1] - 1])[0] not in "LMN":
        raise ValueError(f"{shown!r}: {TRIGGER} stands behind no word, expected it behind the subject's")
    return before[-1][0]
