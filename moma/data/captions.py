"""Captions for training: LLaVA writes them, colour, shape and texture words go, and they name the subject.

The paper leaves these words out so that the model learns them from the image. `training_caption` uses word
lists and the neighbouring words, not a parser: it leaves no dangling article or conjunction, but it can err
where a word may be an attribute or a thing.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from PIL import Image

from models.clip_image import clip_image
from models.llava import Llava
from models.tokenizers import IMAGE_TEXT, LlamaTokenizer
from models.weights.files import parse_json
from moma.data import words
from moma.methods.prompts import check_prompt, occurrences
from moma.sampling.device import choose_device, choose_dtype
from moma.weights.bundle import Bundle

TOKEN = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
# Phrases whose noun is the attribute: "in the shape of a heart", "shaped like a heart".
PHRASES = re.compile(r"\s*\b(?:in the (?:shape|colou?r) of|shaped like)(?: an?| the)? \w+", re.IGNORECASE)
# Marks that would separate an attribute from its noun.
MARKS = re.compile(r"[\"“”„«»()\[\]{}<>*_#]+")
CLOSING = set(".,;:!?%")  # take no space before them
NO_START = words.JOINERS | CLOSING


@dataclass(frozen=True)
class CaptionConfig:
    """How captions are written and cut."""

    # LLaVA-1.5's conversation format (vicuna_v1); one sentence, like BLIP-2's captions.
    prompt: str = (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives"
        " helpful, detailed, and polite answers to the human's questions."
        f" USER: {IMAGE_TEXT}\nDescribe this image in one short sentence. ASSISTANT:"
    )
    max_new: int = 40  # tokens; enough for one sentence of about 25 words, after which LLaVA stops
    batch: int = 8  # images; with 600 tokens each, 7B in bf16 fits a 24 GB card
    max_words: int = 45  # of a caption: the text encoder has 77 tokens, SD's template included


CAPTIONS = CaptionConfig()


class Captioner:
    """Describes images with LLaVA and its language head."""

    def __init__(self, llava: Llava, tokenizer: LlamaTokenizer, cfg: CaptionConfig = CAPTIONS) -> None:
        self.llava, self.cfg = llava, cfg
        self.ids = torch.tensor(tokenizer.encode_with_image(cfg.prompt))  # (T,)
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "auto", dtype: str = "auto", cfg: CaptionConfig = CAPTIONS
    ) -> "Captioner":
        """Build LLaVA from a bundle.

        Args:
            folder: the bundle.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps".
            dtype: "auto", "bf16", "fp16" or "fp32".
            cfg: prompt and lengths.

        Raises:
            ValueError: the bundle has no LLaVA with a language head.
        """
        bundle, resolved = Bundle.open(folder), choose_device(device)
        llava = bundle.build("llava", resolved, choose_dtype(dtype, resolved)[0], lm_head=True)
        return cls(llava.eval().requires_grad_(False), bundle.llama_tokenizer(), cfg)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption per image, decoded greedily, on one line; images may have any size."""
        weight = self.llava.projector[0].weight
        side = self.llava.cfg.vision.image_size
        pixels = torch.stack([clip_image(image, side, pad=True) for image in images])  # (B, 3, S, S)
        ids = [self.ids.to(weight.device)] * len(images)
        answers = self.llava.generate(
            pixels.to(weight.device, weight.dtype), ids, max_new=self.cfg.max_new
        )  # B lists
        return [" ".join(self.tokenizer.decode(answer).split()) for answer in answers]


def read_captions(path: Path, wanted: Collection[str]) -> dict[str, str]:
    """image_id -> caption of the wanted images, without empty ones; ValueError if the file is malformed."""
    captions = {}
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                data = parse_json(line, "line") if line.strip() else {"image_id": "", "caption": ""}
                image_id, caption = data["image_id"], " ".join(data["caption"].split())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{path}:{number}: expected {{'image_id': ..., 'caption': ...}}") from None
            if image_id in wanted and caption:
                captions[image_id] = caption
    return captions


# --- attributes out, label in ------------------------------------------------------------------------


def training_caption(caption: str, label: str, cfg: CaptionConfig = CAPTIONS) -> str:
    """The caption without colour, shape and texture words, naming the label as `check_prompt` requires.

    If the caption does not name the label, the label replaces a synonym or comes first ("a cat, ...").

    Args:
        caption: any text.
        label: the subject's class.
        cfg: maximum length.

    Raises:
        ValueError: for an empty label or caption, or for `<image>` in the caption.
    """
    label = " ".join(label.split())
    if not (label and caption.strip()) or IMAGE_TEXT in caption:
        raise ValueError(f"label {label!r}, caption {caption!r}: expected texts without {IMAGE_TEXT}")
    spaced = " ".join(MARKS.sub(" ", caption).split())  # PHRASES would search long gaps again and again
    tokens = _tokens(PHRASES.sub("", spaced), label, 2 * cfg.max_words)
    if len(tokens) > cfg.max_words:
        del tokens[cfg.max_words :]
        _pop_hanging(tokens)
    tokens = _without_attributes(tokens, label)
    if not _find(label, tokens):
        tokens = _renamed(tokens, label)
    text = _text(tokens)
    text = text[:1].upper() + text[1:] if caption.strip()[:1].isupper() else text
    if not _find(label, tokens):
        text = text[:1].lower() + text[1:] if tokens and tokens[0].low in words.ARTICLES else text
        text = ", ".join(part for part in (_with_article(label), text) if part)
    check_prompt([label], text)
    return text


def _with_article(label: str) -> str:
    """'a cat', 'an orange', 'scissors'."""
    plural = label.endswith("s") and not label.endswith(words.SINGULAR_S)
    return label if plural else f"{_article(label)} {label}"


@dataclass(slots=True)
class _Token:
    """A word or a punctuation mark of a caption."""

    text: str
    glued: bool = False  # no space before it
    fixed: bool = False  # part of a name
    repair: bool = False  # "a" or "an" whose next word has changed

    @property
    def low(self) -> str:
        return self.text.lower()

    @property
    def attribute(self) -> bool:
        parts = self.low.split("-") if "-" in self.text else [self.low]
        return not self.fixed and any(part in words.ATTRIBUTES for part in parts)

    @property
    def noun(self) -> bool:
        """Whether an adjective before it would describe it, by the word lists."""
        return self.fixed or (self.text[0].isalnum() and self.low not in words.AFTER_NOUN)


def _tokens(caption: str, label: str, most: int) -> list[_Token]:
    """The caption's first tokens; those of the label and of fixed names are marked as fixed."""
    tokens, end = [], 0
    for match in islice(TOKEN.finditer(caption), most):
        tokens.append(_Token(match[0], glued=bool(tokens) and match.start() == end))
        end = match.end()
    names = [name for name in words.FIXED_NAMES if name in caption.lower()]
    if label.lower() not in words.ATTRIBUTES:  # "orange" is the label only as a noun: `_without_attributes`
        names.append(label)
    for name in names:
        for start, stop in _find(name, tokens):
            for token in tokens[start:stop]:
                token.fixed = True
    return tokens


def _find(name: str, tokens: Sequence[_Token]) -> list[tuple[int, int]]:
    """Ranges of tokens that are the name, in singular or plural."""
    size = len(TOKEN.findall(name))
    windows = [(i, i + size) for i in range(len(tokens) - size + 1)]
    return [(a, b) for a, b in windows if occurrences(name, _text(tokens[a:b]))]


def _without_attributes(tokens: list[_Token], label: str) -> list[_Token]:
    out: list[_Token] = []
    i = 0
    while i < len(tokens):
        end = _run_end(tokens, i)
        if end == i:
            out.append(tokens[i])
            i += 1
            continue
        after = tokens[end:]
        last = tokens[end - 1]
        if not (after and after[0].noun):  # the attribute may itself be the thing
            predicative = bool(out) and out[-1].low in words.PREDICATIVE
            if last.low == label.lower() or (last.low in words.NOUNS and not predicative):
                after, end = tokens[end - 1 :], end - 1
                last.fixed = True
            elif out and out[-1].low in words.DETERMINERS and _list_goes_on(after, words.AFTER_NOUN):
                # "a red, old car"
                after, end = after[1:], end + 1
        if after and after[0].noun:
            if len(out) > 1 and out[-1].low in words.JOINERS and out[-2].low in words.ADJECTIVES:
                out.pop()  # "a big, red car"
        else:
            copula = _pop_hanging(out)
            if copula and _list_goes_on(after, words.DETERMINERS):  # "the cat is black and sits"
                end += 1
        if out and out[-1].low in ("a", "an"):
            out[-1].repair = True
        if end < len(tokens):
            tokens[end].glued = False
        i = end
    out = _tidy(out)
    _repair_articles(out)
    return out


def _tidy(tokens: Sequence[_Token]) -> list[_Token]:
    """Remove conjunctions and articles that have lost their words."""
    kept: list[_Token] = []  # from the end
    for token in reversed(tokens):
        after = kept[-1].low if kept else "."
        pair = token.text == "," and after in ("and", "or")
        joiner = token.low in words.JOINERS and after in NO_START and not pair
        article = token.low in words.ARTICLES and after in NO_START
        if token.fixed or not (joiner or article):
            kept.append(token)
    while kept and kept[-1].low in NO_START:
        kept.pop()
    return kept[::-1]


def _run_end(tokens: Sequence[_Token], start: int) -> int:
    """End of the run of attributes, modifiers and joiners at `start`; `start` if there is none."""
    end = i = start
    while i < len(tokens):
        if tokens[i].low in words.MODIFIERS and not tokens[i].fixed and not tokens[i].attribute:
            i += 1
        elif tokens[i].attribute:
            i = end = i + 1
        elif _suffixed(tokens, i):
            i = end = i + 2
        elif end > start and tokens[i].low in words.JOINERS:
            i += 1
        else:
            break
    return end


def _suffixed(tokens: Sequence[_Token], i: int) -> bool:
    """Whether a phrase such as "cream colored" and its noun start here."""
    if i + 2 >= len(tokens):
        return False
    word, suffix, thing = tokens[i : i + 3]
    return (
        word.noun and not word.fixed and suffix.low in words.SUFFIXES and thing.noun and not thing.attribute
    )


def _list_goes_on(after: Sequence[_Token], stops: frozenset[str]) -> bool:
    """Whether a joiner follows, and then a word that is not a stop."""
    if len(after) < 2 or after[0].low not in words.JOINERS:
        return False
    return after[1].fixed or (after[1].text[0].isalnum() and after[1].low not in stops)


def _pop_hanging(out: list[_Token]) -> bool:
    """Remove words that cannot end a phrase from the end; returns whether a copula was among them."""
    copula = False
    while out and out[-1].low in words.HANGING and not out[-1].fixed:
        copula |= out.pop().low in words.COPULAS
    return copula


def _repair_articles(tokens: Sequence[_Token]) -> None:
    for token, after in pairwise(tokens):
        if token.repair:
            article = _article(after.text)
            token.text = article.capitalize() if token.text[0].isupper() else article


def _article(word: str) -> str:
    word = word.lower()
    vowel = word.startswith(tuple("aeiou")) and not word.startswith(words.VOWEL_EXCEPTIONS)
    return "an" if vowel or word.startswith(words.SILENT_H) else "a"


def _renamed(tokens: list[_Token], label: str) -> list[_Token]:
    """The tokens with the label in place of its last word or of a synonym, if there is one."""
    *first, last = label.split()
    options = [(name, label) for name in words.SYNONYMS.get(label.lower(), ())]
    if first and label.lower() not in words.WHOLE_LABELS:
        options.insert(0, (last, label))
    for name, new in options:
        for start, stop in _find(name, tokens)[:1]:
            many = _text(tokens[start:stop]).lower() != name.lower()
            text = _plural(new) if many else new
            found = [_Token(word) for word in TOKEN.findall(text)]
            if _find(label, found):
                found[0].glued = tokens[start].glued
                if start and tokens[start - 1].low in ("a", "an"):
                    tokens[start - 1].repair = True
                tokens = [*tokens[:start], *found, *tokens[stop:]]
                _repair_articles(tokens)
                return tokens
    return tokens


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2:-1] not in "aeiou" else word + "s"


def _text(tokens: Sequence[_Token]) -> str:
    """The tokens as text."""
    text = ""
    for i, token in enumerate(tokens):
        tight = token.text in CLOSING or token.glued
        text += token.text if i == 0 or tight else f" {token.text}"
    return text
