"""Text -> token ids, for CLIP (byte-level BPE) and LLaMA (sentencepiece), from their public files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

IMAGE_TOKEN = -200  # LLaVA's placeholder in the ids; never embedded
IMAGE_TEXT = "<image>"  # its placeholder in the text

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: English clitics, runs of letters, single digits, runs of anything else
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoding:
    """A text as CLIP reads it."""

    ids: tuple[int, ...]  # BEGIN, the text, END, then the padding up to the fixed length
    spans: tuple[Span | None, ...]  # per id: its characters text[start:end]; None for BEGIN, END and padding
    dropped: tuple[Span, ...]  # spans of the tokens that did not fit

    @property
    def truncated(self) -> bool:
        return bool(self.dropped)


class ClipTokenizer:
    """CLIP's tokenizer, equal to transformers' CLIPTokenizer: NFC, lower case, white space only separates.

    END pads short texts, as in OpenAI's CLIP and Stable Diffusion 1, or another token, as in SDXL's second
    tokenizer; wherever that one stands in a text, it is a token of its own.
    """

    def __init__(self, vocab: str | Path, merges: str | Path, length: int = 77, pad: str = END) -> None:
        """Read the files; ValueError if one cannot be read or lacks BEGIN or END.

        Args:
            vocab: path of vocab.json.
            merges: path of merges.txt.
            length: ids per text, BEGIN and END included (the text encoder's `positions`).
            pad: the token that fills short texts.
        """
        try:
            model = BPE.from_file(str(vocab), str(merges), unk_token=END, end_of_word_suffix="</w>")
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"CLIP tokenizer {vocab}, {merges}: cannot be read ({error})") from error
        self.length = length
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        special = dict.fromkeys((BEGIN, END, pad))
        for token in special:
            if self._tokenizer.token_to_id(token) is None:
                raise ValueError(f"CLIP tokenizer {vocab}: no {token}; expected CLIP's vocab.json")
        self._tokenizer.add_special_tokens([AddedToken(token, normalized=True) for token in special])
        self.begin_id: int = self._tokenizer.token_to_id(BEGIN)
        self.end_id: int = self._tokenizer.token_to_id(END)
        self.pad_id: int = self._tokenizer.token_to_id(pad)

    def encode(self, text: str) -> Encoding:
        """`length` ids of a text of any length, and the place of each token in the text."""
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:  # half of a surrogate pair
            raise ValueError(f"{text!r:.100}: not a text in UTF-8") from None
        room = self.length - 2  # between BEGIN and END
        ids, spans = found.ids[:room], found.offsets[:room]
        padding = room - len(ids)
        return Encoding(
            ids=(self.begin_id, *ids, self.end_id, *[self.pad_id] * padding),
            spans=(None, *spans, None, *[None] * padding),
            dropped=tuple(found.offsets[room:]),
        )

    def ids(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, length) int64."""
        return torch.tensor([self.encode(text).ids for text in texts])


class LlamaTokenizer:
    """LLaMA's sentencepiece tokenizer; `</s>` in a text is plain text, unlike in transformers."""

    def __init__(self, model: str | Path) -> None:
        """model: tokenizer.model; ValueError if it cannot be read."""
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"LLaMA tokenizer {model}: not a readable sentencepiece model") from error
        self.bos: int = self._pieces.bos_id()
        self.eos: int = self._pieces.eos_id()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, with the begin token first if `bos`."""
        return [self.bos] * bos + self._pieces.encode(text)

    def encode_with_image(self, text: str) -> list[int]:
        """Ids of a prompt that holds `<image>` exactly once, which becomes IMAGE_TOKEN.

        The parts before and after it are tokenised separately, as in LLaVA's `tokenizer_image_token`.
        """
        parts = text.split(IMAGE_TEXT)
        if len(parts) != 2:
            raise ValueError(f"prompt with {len(parts) - 1} {IMAGE_TEXT}: expected exactly one: {text!r}")
        return [*self.encode(parts[0]), IMAGE_TOKEN, *self.encode(parts[1], bos=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without the begin and end tokens."""
        return self._pieces.decode([i for i in ids if i not in (self.bos, self.eos)])
