"""Our tokenizers against transformers' on the same files.

A tiny vocabulary is trained for every run; the public files are compared too when MOMA_TOKENIZERS names a
folder with clip/vocab.json, clip/merges.txt and llama/tokenizer.model.
"""

import io
import json
import os
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from models.tokenizers import BEGIN, END, IMAGE_TOKEN, ClipTokenizer, LlamaTokenizer

transformers = pytest.importorskip("transformers")

PUBLIC = os.environ.get("MOMA_TOKENIZERS")
needs_public = pytest.mark.skipif(PUBLIC is None, reason="MOMA_TOKENIZERS is not set")
CORPUS = [
    "a photo of a dog. A dog on the beach, in the snow, with a city behind it.",
    "A wooden sculpture of a car on the table; the car's wheels don't turn.",
    "We'll see: they've got 123 teddy bears, I'm sure they're 45% off!",
    "une école, ein Käfig, Привет мир, 犬です, ½ … “quoted”",
] * 3
PARTS = [
    *("a photo of", "Dog", "don't", "WE'LL", "they've", "123", "4", "A.B.C", "x" * 40, "Ünïcode", "school"),
    *(
        "é",
        "e\u0301",
        "école",
        "İ",
        "ß",
        "ﬁ",
        "½",
        "²",
        "犬です",
        "Привет",
        "مرحبا",
        "🐶",
        "👩\u200d👩\u200d👧",
    ),
    *(
        "  ",
        "\t",
        "\n",
        "\u00a0",
        "\u3000",
        "\u200b",
        ".",
        "...",
        "!?",
        "$#@",
        "'s",
        "’s",
        "_",
        "-",
        "'",
        '"',
        "|",
    ),
    *("<image", "</a>"),
]


def texts(count: int) -> list[str]:
    """Random texts, from one part to far more than 77 tokens."""
    draw = random.Random(0)
    return ["", " ", "\n"] + [
        "".join(draw.choice(PARTS) + draw.choice(["", " "]) for _ in range(draw.choice([1, 3, 8, 60])))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of a byte-level BPE with CLIP's end-of-word marks."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = Tokenizer(BPE(unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=[BEGIN, END],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.model, trained as LLaMA's: BPE, byte fallback, single digits, white space kept."""
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def compare_clip(folder: Path, count: int) -> None:
    ours = ClipTokenizer(folder / "vocab.json", folder / "merges.txt")
    theirs = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    samples = [*texts(count), f"a {END} dog {BEGIN}dog"]
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert ours.ids(samples).tolist() == theirs(samples, **options)["input_ids"]
    long = 0
    for text in samples:
        encoding = ours.encode(text)
        found = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [span for span in encoding.spans if span is not None]
        assert spans + list(encoding.dropped) == found["offset_mapping"]
        assert encoding.truncated == (len(found["input_ids"]) > 75)
        long += encoding.truncated
    assert 0 < long < len(samples)


def compare_llama(path: Path, count: int) -> None:
    """transformers' version does the merging itself, from the pieces and their scores.

    It adds no space in front of a text that starts with one, sentencepiece (the reference of LLaMA) does.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.vocab_size())}
    merges = generate_merges(vocab, scores, skip_tokens=["<unk>", "<s>", "</s>"])
    theirs = transformers.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    ours = LlamaTokenizer(path)
    assert (ours.bos, ours.eos) == (1, 2)
    for text in texts(count):
        ids = ours.encode(text)
        if not text.startswith(" "):
            assert ids == theirs(text)["input_ids"], repr(text)
        assert ours.encode(text, bos=False) == ids[1:]
        assert ours.decode(ids) == text


def test_clip_equals_transformers(clip_files: Path) -> None:
    compare_clip(clip_files, 300)


def test_llama_equals_transformers(llama_file: Path) -> None:
    compare_llama(llama_file, 300)


@needs_public
def test_public_clip_equals_transformers() -> None:
    compare_clip(Path(PUBLIC) / "clip", 1000)


@needs_public
def test_public_llama_equals_transformers() -> None:
    compare_llama(Path(PUBLIC) / "llama" / "tokenizer.model", 1000)


@needs_public
@pytest.mark.skipif("MOMA_GOLDEN" not in os.environ, reason="MOMA_GOLDEN is not set")
def test_golden_ids() -> None:
    """Ids of the release's prompts."""
    clip = ClipTokenizer(Path(PUBLIC) / "clip" / "vocab.json", Path(PUBLIC) / "clip" / "merges.txt")
    llama = LlamaTokenizer(Path(PUBLIC) / "llama" / "tokenizer.model")
    rows = json.loads((Path(os.environ["MOMA_GOLDEN"]) / "tokenization.json").read_text())["rows"]
    assert rows
    for row in rows:
        assert list(clip.encode(row["sd_prompt"]).ids) == row["sd_ids"]
        assert list(clip.encode(row["subject"]).ids) == row["label_ids"]
        assert llama.encode_with_image(row["llava_prompt"]) == row["llava_ids"]


@needs_public
def test_public_llava_prompt() -> None:
    """Ids around `<image>` as LLaVA's tokenizer_image_token makes them."""
    llama = LlamaTokenizer(Path(PUBLIC) / "llama" / "tokenizer.model")
    ids = llama.encode_with_image("USER: <image>\nASSISTANT: *")
    assert ids == [1, 3148, 1001, 29901, 29871, -200, 29871, 13, 22933, 9047, 13566, 29901, 334]


def test_clip_layout(clip_files: Path) -> None:
    """BEGIN, the tokens, END to the end; ids follow the vocabulary's, the length is free."""
    files = clip_files / "vocab.json", clip_files / "merges.txt"
    vocab = json.loads(files[0].read_text())
    tokenizer = ClipTokenizer(*files, length=12)
    assert (tokenizer.begin_id, tokenizer.end_id) == (vocab[BEGIN], vocab[END])
    encoding = tokenizer.encode("a dog")
    words = len([span for span in encoding.spans if span is not None])
    assert encoding.ids[0] == vocab[BEGIN]
    assert encoding.ids[1 + words :] == (vocab[END],) * (11 - words)
    assert len(encoding.ids) == len(encoding.spans) == 12
    assert not encoding.truncated
    cut = tokenizer.encode("a dog " * 12)
    assert cut.truncated
    assert cut.ids[-1] == vocab[END]
    assert cut.spans[-1] is None
    assert tokenizer.ids(["a dog", "a dog " * 12]).tolist() == [list(encoding.ids), list(cut.ids)]


def test_clip_spans_are_in_the_original_text(clip_files: Path) -> None:
    """White space is squeezed and letters are lowered inside, yet spans point into the text as it came."""
    tokenizer = ClipTokenizer(clip_files / "vocab.json", clip_files / "merges.txt")
    text = "  A \t\n Teddy   BEAR's  🐶 café"
    encoding = tokenizer.encode(text)
    for word in ("Teddy", "BEAR", "🐶", "café"):
        start, end = text.index(word), text.index(word) + len(word)
        inside = [s for s in encoding.spans if s is not None and s[0] < end and start < s[1]]
        assert (inside[0][0], inside[-1][1]) == (start, end), word


def test_image_in_the_prompt(llama_file: Path) -> None:
    tokenizer = LlamaTokenizer(llama_file)
    before, after = tokenizer.encode("USER: "), tokenizer.encode("\n a dog", bos=False)
    assert tokenizer.encode_with_image("USER: <image>\n a dog") == [*before, IMAGE_TOKEN, *after]
    assert tokenizer.encode_with_image("<image>") == [tokenizer.bos, IMAGE_TOKEN]
    assert tokenizer.decode([*before, tokenizer.eos]) == "USER: "
    for text in ("no image", "<image><image>"):
        with pytest.raises(ValueError, match="expected exactly one"):
            tokenizer.encode_with_image(text)


def test_files_that_cannot_be_read(tmp_path: Path, clip_files: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json"):
        ClipTokenizer(tmp_path / "absent.json", clip_files / "merges.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"vocab\.json.*<\|startoftext\|>"):
        ClipTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "broken.model").write_bytes(b"not a model")
    for name in ("absent.model", "broken.model"):
        with pytest.raises(ValueError, match=name):
            LlamaTokenizer(tmp_path / name)
