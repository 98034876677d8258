"""Our LLaMA against transformers' on the same pseudo-random weights."""

from dataclasses import replace

import pytest
import torch

from models.llama import Llama, LlamaConfig, rope_at
from models.weights.public_configs import llama_config
from tests.compare import assert_close_to_std
from tests.recipe import fill, ints, normal

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
LENGTHS = (9, 4, 7)


def pair(json: dict) -> tuple[Llama, torch.nn.Module]:
    """Ours and transformers', holding the same weights."""
    ours = Llama(llama_config(json)).eval()
    fill(ours)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**json)).eval()
    state = {key if key.startswith("lm_head") else f"model.{key}": w for key, w in ours.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    return ours, theirs


def prompts() -> list[torch.Tensor]:
    return [torch.from_numpy(ints(f"llama/ids/{n}", (n,), 3, 50)) for n in LENGTHS]


def padded(model: Llama, garbage: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the prompts (B, T, C), padded with `garbage`, and their lengths."""
    rows = [model.embed_tokens(ids) for ids in prompts()]
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=garbage)
    return embeds, torch.tensor(LENGTHS)


@torch.no_grad()
@pytest.mark.parametrize("json", [SMALL, GROUPED])
def test_parity(json: dict) -> None:
    ours, theirs = pair(json)
    embeds = torch.from_numpy(normal("llama/embeds", (2, 11, 32)))
    assert_close_to_std(ours(embeds), theirs.model(inputs_embeds=embeds).last_hidden_state)


@torch.no_grad()
def test_fewer_layers() -> None:
    """The first k blocks, then the final norm."""
    ours, theirs = pair(SMALL)
    embeds = torch.from_numpy(normal("llama/embeds", (2, 11, 32)))
    states = theirs.model(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    assert_close_to_std(ours(embeds, layers=2), theirs.model.norm(states[2]))


@torch.no_grad()
def test_blocks_one_at_a_time() -> None:
    """What a runner that holds one block does."""
    ours, _ = pair(SMALL)
    x = embeds = torch.from_numpy(normal("llama/embeds", (2, 11, 32)))
    rope = ours.rope(embeds)
    for block in ours.layers:
        x = block(x, rope)
    assert torch.equal(ours.norm(x), ours(embeds))


@torch.no_grad()
def test_explicit_mask_equals_causal() -> None:
    ours, _ = pair(SMALL)
    x = torch.from_numpy(normal("llama/embeds", (2, 11, 32)))
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    causal, masked = (ours.layers[0](x, ours.rope(x), m) for m in (None, mask))
    torch.testing.assert_close(masked, causal, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_is_never_seen() -> None:
    """Valid positions of a right-padded batch equal the single runs, whatever the padding holds."""
    ours, _ = pair(SMALL)
    embeds, lengths = padded(ours, garbage=7.0)
    hidden = ours(embeds)
    for i, length in enumerate(lengths):
        single = ours(embeds[i : i + 1, :length])[0]
        torch.testing.assert_close(hidden[i, :length], single, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("json", [SMALL, GROUPED])
def test_greedy_generation_parity(json: dict) -> None:
    """A batch of prompts of different length against transformers' generate, prompt by prompt."""
    ours, theirs = pair(json)
    embeds, lengths = padded(ours, garbage=7.0)
    texts = ours.generate(embeds, lengths, max_new=12)
    for ids, text in zip(prompts(), texts, strict=True):
        reference = theirs.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        found = reference[0, len(ids) :].tolist()
        assert text == (found[: found.index(2)] if 2 in found else found)
    assert any(len(set(text)) > 3 for text in texts), "the weights repeat one token: the test shows nothing"


@torch.no_grad()
def test_generation_stops_at_eos_per_row() -> None:
    """A row that has met the end token stays ended while the others go on."""
    ours, _ = pair(SMALL)
    embeds, lengths = padded(ours)
    free = ours.generate(embeds, lengths, max_new=12)
    stop = next(t for t in free[0][1:] if t != free[0][0])
    ending = Llama(replace(ours.cfg, eos=stop)).eval()
    ending.load_state_dict(ours.state_dict())
    stopped = ending.generate(embeds, lengths, max_new=12)
    for text, whole in zip(stopped, free, strict=True):
        assert text == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[0]) < 12


def gradients(model: Llama) -> list[torch.Tensor]:
    embeds = torch.from_numpy(normal("llama/embeds", (2, 11, 32))).requires_grad_()
    model.zero_grad()
    logits = model.lm_head(model(embeds))
    logits.square().mean().backward()
    parameters = [p for name, p in model.named_parameters() if name != "embed_tokens.weight"]
    return [embeds.grad, *(p.grad for p in parameters)]


def test_checkpointing_changes_nothing() -> None:
    """Gradients reach the input and every parameter, and are equal with and without checkpointing."""
    plain, _ = pair(SMALL)
    saving = Llama(replace(plain.cfg, gradient_checkpointing=True))
    saving.load_state_dict(plain.state_dict())
    calls = []
    saving.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for a, b in zip(gradients(plain), gradients(saving), strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(calls) == 2, "the block was not recomputed in the backward"


@torch.no_grad()
def test_bfloat16() -> None:
    ours, _ = pair(SMALL)
    embeds = torch.from_numpy(normal("llama/embeds", (2, 11, 32)))
    full = ours(embeds)
    half = ours.bfloat16()(embeds.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close_to_std(half, full, tolerance=0.2)
    assert len(ours.generate(embeds.bfloat16(), torch.tensor([11, 5]), max_new=3)) == 2


def test_rope_turns_by_the_distance_alone() -> None:
    """Scores depend on the difference of two positions: angles add."""
    cfg = llama_config(SMALL)
    cos, sin = rope_at(torch.tensor([[0, 3, 5, 8]]), cfg)
    torch.testing.assert_close(cos[0, 0, 1] * cos[0, 0, 2] - sin[0, 0, 1] * sin[0, 0, 2], cos[0, 0, 3])
    assert (cos[0, 0, 0] == 1).all()


def test_public_config() -> None:
    vicuna = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    assert llama_config(vicuna) == LlamaConfig()
    assert llama_config({}).eps == 1e-6  # transformers' default
    assert llama_config(GROUPED).rope_theta == 500.0
    assert llama_config(GROUPED).groups == 2
    refused = (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 5},
        {"num_attention_heads": 30},
        {"num_key_value_heads": 5},
    )
    for json in refused:
        with pytest.raises(ValueError, match="expected"):
            llama_config(json)


def test_wrong_inputs() -> None:
    ours, _ = pair(SMALL)
    headless = Llama(replace(ours.cfg, lm_head=False))
    assert "lm_head.weight" not in headless.state_dict()
    embeds, lengths = padded(ours)
    with pytest.raises(ValueError, match="lm_head"):
        headless.generate(embeds, lengths, max_new=1)
    with pytest.raises(ValueError, match="65"):
        ours.generate(embeds, lengths, max_new=56)
    for layers in (0, 4):
        with pytest.raises(ValueError, match=f"layers {layers}"):
            ours(embeds, layers=layers)
