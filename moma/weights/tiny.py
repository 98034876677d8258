"""Pseudo-random weights, and small tokenizers that are learned in a second."""

import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

from models.clip import CLIPConfig
from models.tokenizers import BEGIN, CLIP_WORDS, END
from models.weights.files import read_object
from moma.methods.moma.feature_decoder import instruction
from moma.methods.prompts import sd_prompt
from moma.weights.bundle import CLIP_TOKENIZER, LLAMA_TOKENIZER

SOURCE = "pseudo-random weights, for tests and demonstrations: images are noise"
SUBJECTS = (
    "cat", "dog", "car", "teddy bear", "robot", "backpack", "vase", "toy", "boot", "clock", "candle",
    "puppy", "dress", "duck", "monster", "bird",
)  # fmt: skip
SCENES = (
    "on the beach at sunset", "in the snow", "in autumn with falling leaves", "on top of a wooden floor",
    "in the jungle", "wearing a red hat", "reading a book in a library", "with a city in the background",
    "as a watercolor painting", "made of glass, studio light", "riding a bicycle through the forest",
    "sitting on a purple rug in front of a blue house",
)  # fmt: skip


@dataclass(frozen=True)
class PseudoRandomConfig:
    """Numbers of the tokenizers and of the weights."""

    clip_merges: int = 300  # merges of the CLIP tokenizer
    llama_pieces: int = 500  # of the sentencepiece model, 259 of them bytes and control tokens
    subject_scale: float = 0.5  # λ of every layer; 0 would hide the reference


def with_vocabularies(networks: dict[str, Any], tokenizers: Path) -> dict[str, Any]:
    """Set the vocabularies of the networks to those of the tokenizers' files."""
    clip = len(read_object(tokenizers / CLIP_TOKENIZER[0]))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizers / LLAMA_TOKENIZER[0]))
    llava = networks["llava"]
    clips = {name: config for name, config in networks.items() if isinstance(config, CLIPConfig)}
    scorers = {name: replace(config, text=replace(config.text, vocab=clip)) for name, config in clips.items()}
    texts = {name: replace(networks[name], vocab=clip) for name in ("text", "text_2") if name in networks}
    llama = replace(llava.llama, vocab=pieces.vocab_size())
    return networks | scorers | texts | {"llava": replace(llava, llama=llama)}


def draw(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a parameter, float32, with variance 1 / fan-in so that activations keep their scale.

    Args:
        key: its name, which tells scales, biases and norms.
        shape: of the parameter.
        generator: on the CPU.
    """
    if key.endswith(".scale"):
        return torch.full(shape, PseudoRandomConfig.subject_scale)
    if key.endswith("bias"):
        return torch.zeros(shape)
    if key.endswith("weight") and len(shape) == 1:  # of a normalisation
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))


def build_tokenizers(folder: str | Path) -> None:
    """Learn both tokenizers from SUBJECTS and SCENES, reproducibly. Both fall back to bytes."""
    cfg = PseudoRandomConfig()
    pairs = [(subject, f"a {subject} {scene}") for subject in SUBJECTS for scene in SCENES]
    texts = [sd_prompt(*pair) for pair in pairs]
    instructions = [instruction(*pair).replace("<image>", "") for pair in pairs]
    learn_tokenizers(folder, texts, cfg.clip_merges, instructions, cfg.llama_pieces)


def learn_tokenizers(
    folder: str | Path, clip_texts: list[str], clip_merges: int, llama_texts: list[str], llama_pieces: int
) -> None:
    """Write vocab.json, merges.txt (CLIP) and tokenizer.model (LLaMA), learned from texts.

    Args:
        folder: where to write.
        clip_texts: texts for the CLIP tokenizer.
        clip_merges: largest number of merges to learn.
        llama_texts: texts for the LLaMA tokenizer.
        llama_pieces: largest vocabulary of the sentencepiece model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = _learn_clip(clip_texts, clip_merges)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(_learn_llama(llama_texts, llama_pieces))


def _learn_clip(texts: list[str], count: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's layout: 256 bytes, the same 256 ending a word, the merges in order, BEGIN, END."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{byte}</w>" for byte in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + count,
        special_tokens=endings,  # a fixed order of ids, which break ties between pairs
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:count]
    pieces = dict.fromkeys([*alphabet, *endings, *("".join(pair) for pair in merges), BEGIN, END])
    return {piece: i for i, piece in enumerate(pieces)}, merges


def _learn_llama(texts: list[str], pieces: int) -> bytes:
    """A sentencepiece model like LLaMA's: BPE with byte fallback, ids 0 unknown, 1 begin, 2 end."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@torch.no_grad()
def fill(network: nn.Module, generator: torch.Generator) -> None:
    """Fill parameters so that activations keep their scale: matrices and kernels Gaussian with variance
    1 / fan-in, norms and λ 1, biases 0. The values depend on the generator's device."""
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0 if name.endswith("bias") else 1)
        else:
            values = torch.randn(parameter.shape, generator=generator, device=generator.device)
            parameter.copy_(values.div_(values[0].numel() ** 0.5))
