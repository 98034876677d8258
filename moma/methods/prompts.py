"""The text for Stable Diffusion made from subject and prompt, and where the subject stands in it."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Literal

from models.tokenizers import IMAGE_TEXT, ClipTokenizer, Encoding

SD_TEMPLATE = "photo of a {subject}. {prompt}"  # of the released code
# English plural endings (singular, plural) of the subject's last word; irregular plurals are not known.
PLURALS = (("", "s"), ("s", "ses"), ("x", "xes"), ("ch", "ches"), ("sh", "shes"), ("o", "oes"), ("y", "ies"))

# Scripts that write words together: what they say may stand on both sides of a subject (Thai to Khmer, kana,
# Han, Hangul with its particles).
TOGETHER = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)
BETWEEN = "[\\s\u2010-\u2015\u2212\ufe63\uff0d-]+"  # white space and hyphens between a subject's words
INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))  # marks that pasting brings along
WIDE = {ord(c) + 0xFEE0: c for c in "0123456789" + ascii_letters}  # full-width letters and digits
# What means something in other tools and is plain text here: brackets and weights, tags, keywords, wildcards.
FOREIGN = re.compile(
    r"[(\[{][^()\[\]{}]*[)\]}]+|<[\w-]+:[^<>]*>|\b(?:BREAK|AND)\b|__[\w-]+__|\b\w+(?:\+\+|--)(?!\w)|--[a-z]{2,}\b"
    r"|\bembedding:\w+"
)
# What goes with a subject that is taken out of a prompt: an article with up to three words behind it, and
# what joins it to its neighbour behind or, if there is nothing, before it.
ARTICLE = re.compile(r"\b(?:an?|the)\s+(?:(?!(?:an?|the|and|or|with)\b)[\w-]+\s+){0,3}$", re.IGNORECASE)
AND = r"\s*(?:,\s*and|,|&|\b(?:and|with|beside))"
AND_AFTER, AND_BEFORE = re.compile(AND + r"\s+", re.IGNORECASE), re.compile(AND + r"\s*$", re.IGNORECASE)
SUBJECT = "{subject}"  # placeholder for the subject's word in a prompt
LONGEST = 10_000  # characters of a prompt; the text encoder reads some hundred

LabelTokens = Literal["phrase", "first_piece"]
AbsentLabel = Literal["error", "ignore"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A user's prompt as the text encoders read it."""

    text: str
    encodings: tuple[Encoding, ...]  # of the text, one per tokenizer
    labels: tuple[
        tuple[int, ...], ...
    ]  # per subject: positions of its tokens (0 = BOS) for the first tokenizer

    @property
    def truncated(self) -> bool:
        """Whether the text's end is lost."""
        return any(encoding.truncated for encoding in self.encodings)


def plain_text(text: str) -> str:
    """A text as it is meant: letters composed and of ordinary width, no invisible marks, all white space
    spaces. ValueError for bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r:.100}: not a text in UTF-8 (character {error.start})") from None
    text = unicodedata.normalize("NFC", text.translate(INVISIBLE | WIDE))
    return re.sub(r"[^\S ]", " ", text)


def foreign_syntax(prompt: str) -> list[str]:
    """The parts of a prompt that mean something in other tools, and are read as plain text here."""
    return FOREIGN.findall(prompt)


def read_prompt(
    tokenizers: Sequence[ClipTokenizer],
    words: Sequence[str],
    prompt: str,
    label_tokens: LabelTokens = "phrase",
    absent_label: AbsentLabel = "error",
) -> Prompt:
    """Check a prompt and tokenise its text once.

    The text always starts with the subject (`SD_TEMPLATE`), so sampling would run without it in the prompt;
    but where the prompt itself does not say what the subject does, its attention maps, and so M_gen, are
    weak.

    Args:
        tokenizers: one per text encoder.
        words: of the subjects; without any the prompt is the text.
        prompt: the user's text.
        label_tokens: see `label_positions`.
        absent_label: "error" refuses a prompt that does not name every subject before the text encoder's
        limit.

    Raises:
        ValueError: for an empty subject or prompt, and under "error".
    """
    words, prompt = [plain_text(word) for word in words], plain_text(prompt)
    check_prompt(words, prompt, absent_label)
    text = sd_prompt(joined(words), prompt) if words else prompt
    encodings = tuple(tokenizer.encode(text) for tokenizer in tokenizers)
    start = len(text) - len(prompt)
    own = [[(start + a, start + b) for a, b in each] for each in places_of(words, prompt)]
    for word, places in zip(words, own, strict=True) if absent_label == "error" else ():
        if not places:
            raise ValueError(f"the prompt {prompt!r} names {word!r} only within another subject: name each")
        _surviving(encodings[0], places, word)
    every = zip(places_of(words, text[:start]), own, strict=True)
    labels = tuple(
        tuple(label_positions(tokenizers[0], encodings[0], text, word, label_tokens, before + places))
        for word, (before, places) in zip(words, every, strict=True)
    )
    if absent_label == "error" and not all(labels):
        raise ValueError(f"no token of the subject {words[0]!r} is in {text!r}: name it in the prompt")
    return Prompt(text, encodings, labels)


def check_prompt(words: Sequence[str], prompt: str, absent_label: AbsentLabel = "error") -> None:
    """What `read_prompt` checks without a tokenizer.

    Args:
        words: of the subjects.
        prompt: the user's text.
        absent_label: "error" refuses a prompt that does not name every subject.

    Raises:
        ValueError: for an empty subject or prompt, and under "error".
    """
    if not all(word.strip() for word in words):
        raise ValueError("the subject is empty: expected the word for what the image shows, e.g. cat")
    if not prompt.strip():
        example = f"a {words[0]}" if words else "a cat"
        raise ValueError(f"the prompt is empty: expected a scene, e.g. '{example} on the beach'")
    if len(prompt) > LONGEST:
        raise ValueError(f"the prompt has {len(prompt):,} characters: expected at most {LONGEST:,}")
    if IMAGE_TEXT in "".join(words) + prompt:
        raise ValueError(f"{IMAGE_TEXT} stands in the prompt: it is reserved for the image, leave it out")
    for word in words if absent_label == "error" else ():
        if not occurrences(word, prompt):
            raise ValueError(
                f"the prompt {prompt!r} does not name the subject {word!r}: try 'a {word}, {prompt}'"
            )


def sd_prompt(subject: str, prompt: str) -> str:
    """The text for Stable Diffusion (template of the released code)."""
    return SD_TEMPLATE.format(subject=subject, prompt=prompt)


def joined(words: Sequence[str]) -> str:
    """Several subjects in the template's place for one: "cat and a teapot"."""
    return " and a ".join(words)


def label_positions(
    tokenizer: ClipTokenizer,
    encoding: Encoding,
    text: str,
    subject: str,
    label_tokens: LabelTokens = "phrase",
    places: Sequence[tuple[int, int]] | None = None,
) -> list[int]:
    """Positions (0 = BOS) of the subject's tokens in a text for Stable Diffusion, rising.

    Args:
        tokenizer: of the text encoder.
        encoding: of the text.
        text: the whole text.
        subject: the subject's words.
        label_tokens: "phrase" = all tokens of every place where the subject's words stand together, as whole
            words, in any case, the last word in singular or plural; "first_piece" = the release's
            get_subject_idx: every token equal to the first BPE piece of one of the words, wherever it stands.
        places: for "phrase", where the subject's words are those of this subject; None = wherever they stand.

    Returns:
        The positions; "first_piece" may find none.

    Raises:
        ValueError: under "phrase", where the subject is not in the text or beyond the text encoder's limit.
    """
    if label_tokens == "first_piece":
        pieces = {tokenizer.encode(word).ids[1] for word in subject.split()}  # 0 is BOS
        return [i for i, token in enumerate(encoding.ids) if token in pieces]
    places = occurrences(subject, text) if places is None else list(places)
    if not places:
        raise ValueError(f"the subject {subject!r} is not in the prompt {text!r}: name it there")
    places = _surviving(encoding, places, subject)
    return [
        i
        for i, span in enumerate(encoding.spans)
        if span is not None and any(span[0] < end and start < span[1] for start, end in places)
    ]


def occurrences(subject: str, text: str) -> list[tuple[int, int]]:
    """Character ranges of a subject's words in a text, in any case, the last one in singular or plural.

    The words may be joined by spaces or hyphens, and stand alone but for letters of scripts without spaces.
    """
    *first, last = list(filter(None, re.split(BETWEEN, subject))) or [subject]
    forms = sorted(_forms(last.lower()), key=len, reverse=True)
    words = [re.escape(word) for word in first] + ["(?:" + "|".join(map(re.escape, forms)) + ")"]
    spans = [match.span() for match in re.finditer(BETWEEN.join(words), text, re.IGNORECASE)]
    return [span for span in spans if not any(inside_word(text, place) for place in span)]


def places_of(words: Sequence[str], text: str) -> list[list[tuple[int, int]]]:
    """Where a text names each of several subjects, as character ranges.

    Words within those of a longer subject are not the shorter one's ("cat" in "striped cat"). Subjects of the
    same words take turns if there are enough places, and else share them ("two cats").
    """
    every = [occurrences(word, text) for word in words]
    found = []
    for i, word in enumerate(words):
        longer = [
            place
            for other, each in zip(words, every, strict=True)
            if len(other) > len(word)
            for place in each
        ]
        free = [(a, b) for a, b in every[i] if not any(start <= a and b <= end for start, end in longer)]
        alike = [j for j, other in enumerate(words) if other.lower() == word.lower()]
        found.append(free[alike.index(i) :: len(alike)] if len(free) >= len(alike) else free)
    return found


def own_prompt(words: Sequence[str], prompt: str, subject: int) -> str:
    """A prompt without its other subjects and what joins them to it, in English.

    Args:
        words: of the subjects.
        prompt: the user's text.
        subject: the number of the one that stays.
    """
    text = plain_text(prompt)
    places = places_of([plain_text(word) for word in words], text)
    own = places[subject]
    for start, end in sorted({place for each in places for place in each} - set(own), reverse=True):
        first = start
        if (described := ARTICLE.search(text[:start])) and not any(
            described.start() < b <= start for _, b in own
        ):
            first = described.start()
        if after := AND_AFTER.match(text[end:]):
            end += after.end()
        elif before := AND_BEFORE.search(text[:first]):
            first = before.start()
        text = text[:first] + text[end:]
    return " ".join(text.split())


def inside_word(text: str, place: int) -> bool:
    """Whether a place in a text lies within a word of a script with spaces."""
    around = text[max(place - 1, 0) : place + 1]
    letters = [c == "_" or unicodedata.category(c)[0] in "LMN" for c in around]
    return len(letters) == 2 and all(letters) and not TOGETHER.search(around)


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


def word_ends(words: Sequence[str], text: str) -> list[int | None]:
    """Where each subject's word ends in a text: its first place that no longer word, and no subject before,
    has; None = there is none."""
    taken: list[tuple[int, int]] = []
    ends: list[int | None] = [None] * len(words)
    for i in sorted(range(len(words)), key=lambda i: -len(words[i])):
        free = [
            place
            for place in occurrences(words[i], text)
            if all(place[1] <= start or end <= place[0] for start, end in taken)
        ]
        if free:
            taken.append(free[0])
            ends[i] = free[0][1]
    return ends


def fill(prompt: str, word: str) -> str:
    """Put a subject's word into a prompt; "a {subject}" becomes "an ..." where it must."""
    article = "an" if word[:1].lower() in "aeiou" else "a"
    return re.sub(rf"\ba {re.escape(SUBJECT)}", f"{article} {SUBJECT}", prompt).replace(SUBJECT, word)
