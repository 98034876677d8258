"""The two texts made from subject and prompt, and where the subject stands in them.

`sd_prompt` is what Stable Diffusion's text encoder reads, `instruction` what the multimodal LLM reads.
"""

import re
from typing import Literal

from models.tokenizers import IMAGE_TEXT, ClipTokenizer, Encoding

SD_TEMPLATE = "photo of a {subject}. {prompt}"
# English plural endings (singular, plural) of the subject's last word; irregular plurals are not known.
PLURALS = (("", "s"), ("s", "ses"), ("x", "xes"), ("ch", "ches"), ("sh", "shes"), ("o", "oes"), ("y", "ies"))


def sd_prompt(subject: str, prompt: str) -> str:
    """The text for Stable Diffusion (template of the released code)."""
    return SD_TEMPLATE.format(subject=subject, prompt=prompt)


def check_prompt(
    subject: str,
    prompt: str,
    absent_label: Literal["error", "ignore"] = "error",
    tokenizer: ClipTokenizer | None = None,
) -> None:
    """ValueError for an empty subject or prompt and, under "error", for a prompt without the subject.

    The SD prompt always starts with the subject, so sampling would run; but where the prompt itself does not
    say what the subject does, its attention maps, and so M_gen, are weak. With a tokenizer the prompt must
    also name the subject before the text encoder's limit.
    """
    if not subject.strip():
        raise ValueError("the subject is empty: expected the word for what the image shows, e.g. cat")
    if not prompt.strip():
        raise ValueError(f"the prompt is empty: expected a scene, e.g. 'a {subject} on the beach'")
    if IMAGE_TEXT in subject + prompt:
        raise ValueError(f"{IMAGE_TEXT} stands in the prompt: it is reserved for the image, leave it out")
    if absent_label == "ignore":
        return
    places = _occurrences(subject, prompt)
    if not places:
        raise ValueError(
            f"the prompt {prompt!r} does not name the subject {subject!r}: try 'a {subject}, {prompt}'"
        )
    if tokenizer is not None:
        text = sd_prompt(subject, prompt)
        start = len(text) - len(prompt)
        _surviving(tokenizer.encode(text), [(start + a, start + b) for a, b in places], subject)


def label_positions(
    tokenizer: ClipTokenizer, text: str, subject: str, mode: Literal["phrase", "first_piece"] = "phrase"
) -> list[int]:
    """Positions (0 = BOS) of the subject's tokens in a text for Stable Diffusion, rising.

    "phrase": all tokens of every place where the subject's words stand together, as whole words, in any case,
    the last word in singular or plural; ValueError when there is none or when none lies before the text
    encoder's limit. "first_piece": the release's get_subject_idx: every token equal to the first BPE piece
    of one of the subject's words, wherever it stands; may be empty.
    """
    encoding = tokenizer.encode(text)
    if mode == "first_piece":
        pieces = {tokenizer.encode(word).ids[1] for word in subject.split()}  # 0 is BOS
        return [i for i, token in enumerate(encoding.ids) if token in pieces]
    places = _occurrences(subject, text)
    if not places:
        raise ValueError(f"the subject {subject!r} is not in the prompt {text!r}: name it there")
    places = _surviving(encoding, places, subject)
    return [
        i
        for i, span in enumerate(encoding.spans)
        if span is not None and any(span[0] < end and start < span[1] for start, end in places)
    ]


def _occurrences(subject: str, text: str) -> list[tuple[int, int]]:
    """Character ranges of the subject's words in the text."""
    *first, last = subject.split()
    forms = sorted(_forms(last.lower()), key=len, reverse=True)
    words = [re.escape(word) for word in first] + ["(?:" + "|".join(map(re.escape, forms)) + ")"]
    pattern = r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]


def _forms(word: str) -> set[str]:
    """The word, what could be its plural and what could be its singular."""
    plurals = {word.removesuffix(one) + many for one, many in PLURALS if word.endswith(one)}
    singulars = {word.removesuffix(many) + one for one, many in PLURALS if word.endswith(many)}
    return {word} | plurals | {form for form in singulars if form}


def _surviving(encoding: Encoding, places: list[tuple[int, int]], subject: str) -> list[tuple[int, int]]:
    """The places that lie wholly before the text encoder's limit; ValueError when there is none."""
    kept = [place for place in places if not encoding.dropped or place[1] <= encoding.dropped[0][0]]
    if not kept:
        raise ValueError(
            f"the subject {subject!r} stands beyond the text encoder's limit of {len(encoding.ids)} tokens:"
            " name it earlier or shorten the prompt"
        )
    return kept
