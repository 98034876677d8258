"""Weights of 8 and 4 bits: models/weights/quant.py, bundles that hold them, and what they refuse."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from convert_weights import convert, main
from models.llama import LlamaBlock, LlamaConfig
from models.weights.loading import save_tensors
from models.weights.quant import (
    PRESETS,
    SCALE_DTYPE,
    UNSAFE,
    QuantConfig,
    QuantLinear,
    dequantise,
    group_size,
    pack,
    quantise,
    unpack,
    use_quantised_layers,
)
from moma import MoMASubject, Pipeline, load
from moma.bench import rounding
from moma.methods.moma.config import DEFAULT
from moma.methods.moma.training import AdapterTraining, DecoderTraining
from moma.mini import pretrain
from moma.sampling.config import SampleConfig
from moma.sampling.interface import Runtime
from moma.training import denoising
from moma.training.config import Choices, DenoisingConfig, TrainConfig
from moma.weights.bundle import Bundle, config_from_json
from tests import real
from tests.helpers import MINI, ROOT
from tests.make_checkpoints import TINY, make_clip, make_llava
from tests.tiny import TinyConfig, build_tiny_bundle
from tests.training_data import write_data

BITS = sorted(PRESETS)
OLDER = QuantConfig(4, group=128)  # of bundles whose 4 bits have larger groups


def weights(outputs: int = 12, inputs: int = 256) -> Tensor:
    """Gaussian, with a rare large value, a row of zeros, and rows of all sizes that float32 has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[0, 5] = -20
    weight[1] = 0
    weight[2] *= 1e-30
    weight[3] *= 1e30
    return weight


# --- the numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "most"), [(PRESETS[8], 0.98), (OLDER, 0.98), (PRESETS[4], 0.96)])
def test_every_code_is_the_nearest(cfg: QuantConfig, most: float) -> None:
    """Half a step off at most, but for what lies beyond the grid, which gets its end."""
    bits, weight = cfg.bits, weights()
    codes, scale = quantise(weight, cfg)
    step = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * step[..., None]  # (O, I, 2^bits)
    nearest = (levels - weight[..., None].double()).abs().amin(dim=-1)
    error = (dequantise(codes, scale, cfg, torch.float32).double() - weight.double()).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=0)
    inside = (levels.amin(dim=-1) <= weight) & (weight <= levels.amax(dim=-1))
    assert inside.float().mean() > most
    assert (error <= step.abs() * 0.50001)[inside].all()
    assert bits == 4 or (error <= step.abs()).all()  # nothing is cut off by more than a step


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.11)])
def test_error_of_gaussian_weights(bits: int, most: float) -> None:
    """16 levels and the best of all uniform grids have 0.107 of the standard deviation (Max, 1960)."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    rounded = dequantise(*quantise(weight, PRESETS[bits]), PRESETS[bits], torch.float32)
    assert (rounded - weight).square().mean().sqrt() < most


def test_clipping_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    def errors() -> Tensor:
        rounded = dequantise(*quantise(weight, OLDER), OLDER, torch.float32)
        return (rounded - weight).unflatten(1, (-1, OLDER.group)).square().sum(dim=-1)  # of each group

    clipped = errors()
    monkeypatch.setattr("models.weights.quant.CLIPS", {4: (1.0,)})
    assert (clipped <= errors()).all() and clipped.sum() < 0.95 * errors().sum()


@pytest.mark.parametrize("bits", BITS)
def test_parts_and_dtypes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix worked on in parts is the same; other dtypes are float32's value, rounded once."""
    cfg, weight = PRESETS[bits], weights()[[0, 1, 4, 5, 6]]
    codes, scale = quantise(weight, cfg)
    full = dequantise(codes, scale, cfg, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantise(codes, scale, cfg, dtype), full.to(dtype))
    monkeypatch.setattr("models.weights.quant.CHUNK", 2 * weight.shape[1])  # two rows
    for a, b in zip(quantise(weight, cfg), (codes, scale), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(dequantise(codes, scale, cfg, torch.float32), full)


def test_packing() -> None:
    every = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)  # (256, 2)
    packed = pack(every)
    assert packed.shape == (256, 1) and packed.dtype == torch.uint8 and len(packed.unique()) == 256
    assert torch.equal(unpack(packed), every)
    four = torch.tensor([[1, -1, 2, -8]], dtype=torch.int8)
    assert pack(four).tolist() == [[0x21, 0x8F]]


def test_groups() -> None:
    four = PRESETS[4]
    assert [group_size(four, n) for n in (4096, 11008, 192, 48, 100)] == [32, 32, 32, 24, 25]
    assert group_size(PRESETS[8], 11008) == 11008
    for width in (131, 2 * 131, 8, 225):  # no divisor of a fit size, too small, odd
        with pytest.raises(ValueError, match=str(width)):
            group_size(four, width)
    with pytest.raises(ValueError, match="524"):
        use_quantised_layers(LlamaBlock(LlamaConfig(width=64, heads=4, mlp=524)), four)
    with pytest.raises(ValueError, match="3 bits"):
        QuantConfig(3)
    with pytest.raises(ValueError, match="groups of 4"):
        QuantConfig(4, group=4)


# --- in the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_layer_is_a_linear_layer(bits: int, dtype: torch.dtype) -> None:
    cfg, weight = PRESETS[bits], weights()
    layer = QuantLinear(256, 12, cfg)
    codes, scale = quantise(weight, cfg)
    layer.load_state_dict({"codes": codes, "scale": scale}, strict=True)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = F.linear(x, dequantise(codes, scale, cfg, dtype))
    assert layer(x).dtype == dtype and torch.equal(layer(x), wanted)


@pytest.mark.parametrize("bits", BITS)
def test_block_of_quantised_layers(bits: int) -> None:
    """Whoever holds one block at a time fills it by the names of its state dict."""
    with torch.device("meta"):
        block = LlamaBlock(LlamaConfig(width=64, heads=4, mlp=128))
        use_quantised_layers(block, PRESETS[bits])
    kinds = {name: value.dtype for name, value in block.state_dict().items()}
    layers = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    parts = {"codes": torch.int8 if bits == 8 else torch.uint8, "scale": SCALE_DTYPE}
    norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), torch.float32)
    assert kinds == norms | {f"{layer}.{part}": kind for layer in layers for part, kind in parts.items()}
    assert [name for name, _ in block.named_parameters()] == list(norms)


# --- bundles -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle, its language model large enough for the size of its matrices to show."""
    cfg = TinyConfig(image_size=64)
    llava = cfg.networks["llava"]
    wider = replace(llava, llama=replace(llava.llama, width=192, heads=6, mlp=512, lm_head=True))
    adapter = replace(cfg.networks["adapter"], mllm_dim=192)
    folder = tmp_path_factory.mktemp("quant") / "plain"
    build_tiny_bundle(folder, cfg=replace(cfg, networks={**cfg.networks, "llava": wider, "adapter": adapter}))
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def few(plain: Bundle) -> dict[int, Bundle]:
    """Made of it by the command."""
    found = {}
    for bits in BITS:
        out = plain.folder.with_name(f"bits{bits}")
        line = f"--base-bundle {plain.folder} --llm-bits {bits} --dtype bf16 --out {out}"
        assert main(line.split()) == 0
        found[bits] = Bundle.open(out)
    return found


def subject_of(pipe: Pipeline) -> MoMASubject:
    image = Image.radial_gradient("L").resize((64, 64))
    mask = image.point(lambda value: 255 * (value < 100))
    return pipe.encode_subject(image.convert("RGB"), mask, "cat")


@pytest.mark.parametrize(("bits", "least"), [(8, 0.9999), (4, 0.999)])
def test_embeddings_of_mini_are_near_the_plain_ones(tmp_path: Path, bits: int, least: float) -> None:
    """With and without what all have in common; random weights scatter too much to tell."""
    out, said = tmp_path / "few", []
    convert([], out, Bundle.open(MINI), llm_bits=bits, say=said.append)
    assert (bits in UNSAFE) == any(f"note: {bits} bits" in line for line in said)
    cfg = rounding.RoundingConfig(pairs=3)
    wanted, found = (rounding.embeddings(folder, "fp32", cfg) for folder in (MINI, out))
    near = rounding.agreement(wanted, found)
    assert least < near.removed < 0.9999999 and least < near.cosine and near.found == near.count == 3


@pytest.mark.parametrize("bits", BITS)
def test_what_a_bundle_holds(plain: Bundle, few: dict[int, Bundle], bits: int) -> None:
    """Codes and bfloat16 scales of the blocks' matrices; all else as --dtype says."""
    before, after, cfg = plain.tensors("llava"), few[bits].tensors("llava"), PRESETS[bits]
    matrices = [n.removesuffix(".weight") for n in before if "_proj." in n]
    assert len(matrices) == 7 * plain.config("llava").llama.layers
    for name in matrices:
        codes, scale = quantise(before.pop(f"{name}.weight").read(), cfg)
        assert torch.equal(after.pop(f"{name}.codes").read(), codes)
        stored = after.pop(f"{name}.scale").read()
        assert stored.dtype == SCALE_DTYPE and torch.equal(stored, scale)
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name].read(), t.read().bfloat16()) for name, t in before.items())


@pytest.mark.parametrize("bits", BITS)
def test_size_on_disk(few: dict[int, Bundle], bits: int) -> None:
    """bits/8 bytes per weight, two per scale, two for every other parameter, and the file's header."""
    llama = few[bits].config("llava").llama
    width, mlp = llama.width, llama.mlp
    shapes = [(width, width)] * 4 + [(mlp, width)] * 2 + [(width, mlp)]  # (outputs, inputs)
    weights = sum(rows * columns for rows, columns in shapes) * llama.layers
    scales = (
        sum(rows * columns // group_size(llama.quant, columns) for rows, columns in shapes) * llama.layers
    )
    rest = llama.vocab * width * 2 + width * (2 * llama.layers + 1) + (32 + 1 + width + 1) * width
    (file,) = few[bits].files("llava")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + weights * bits // 8 + 2 * scales + 2 * rest


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_scales_keep_their_dtype(few: dict[int, Bundle], bits: int) -> None:
    llava = few[bits].build("llava", dtype=torch.float16, lm_head=True)
    assert {p.dtype for p in llava.parameters()} == {torch.float16}
    kinds = {name.rpartition(".")[2]: buffer.dtype for name, buffer in llava.named_buffers()}
    assert kinds == {"codes": torch.int8 if bits == 8 else torch.uint8, "scale": SCALE_DTYPE}


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_streamed_equals_resident(few: dict[int, Bundle], bits: int) -> None:
    """Scales are not cast on the way either: in float16 some would change."""
    cpu, width = torch.device("cpu"), few[bits].config("llava").llama.width
    x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0)).half()
    resident, streamed = few[bits].build("llava", cpu, torch.float16), few[bits].stream(cpu, torch.float16)
    assert torch.equal(streamed.llama(x), resident.llama(x))


@torch.no_grad()
def test_bundles_with_larger_groups_still_load(plain: Bundle, tmp_path: Path) -> None:
    """Their config says so; what it does not fit is refused."""
    older = tmp_path / "older"
    llava = plain.build("llava", torch.device("cpu"), torch.float32, lm_head=True)
    few = {f"llama.{name}": x for name, x in rounding.rounded(llava.llama.state_dict(), OLDER).items()}
    small = few | {name: x for name, x in llava.state_dict().items() if not name.startswith("llama.")}
    shutil.copytree(plain.folder, older)
    save_tensors(older, "llava", small)
    manifest = json.loads((older / "config.json").read_text())
    network = manifest["networks"]["llava"]
    network["config"]["llama"]["quant"] = {"bits": 4, "group": 128}
    (older / "config.json").write_text(json.dumps(manifest))
    cpu, x = torch.device("cpu"), torch.randn(1, 5, 192, generator=torch.Generator().manual_seed(0))
    bundle = Bundle.open(older)
    resident, streamed = bundle.build("llava", cpu, torch.float32), bundle.stream(cpu, torch.float32)
    assert torch.equal(streamed.llama(x), resident.llama(x))
    network["config"]["llama"]["quant"]["group"] = 32
    (older / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="scale"):
        Bundle.open(older).build("llava", cpu, torch.float32)


def test_an_image(few: dict[int, Bundle]) -> None:
    pipe = load(few[4].folder, device="cpu")
    (image,) = pipe.sample(subject_of(pipe), "a cat on the beach", config=SampleConfig(steps=2))
    assert image.size == (64, 64)


def test_stage_2_reads_its_embeddings(few: dict[int, Bundle], tmp_path: Path) -> None:
    data, cpu = write_data(tmp_path / "data", 4), torch.device("cpu")
    options = DenoisingConfig(
        cache=str(tmp_path / "cache"), cache_batch=4, cache_workers=1, validation_samples=1, grid_samples=1
    )
    runtime = Runtime(few[4], cpu, torch.float32, pack=False)
    choices = Choices(AdapterTraining, TrainConfig(), options, AdapterTraining.Config(), DEFAULT)
    task = denoising.build(choices, runtime, data)
    batch, _ = next(task.batches(2, 0, 1, {}))
    assert task.model(batch).isfinite().all()


def test_from_a_public_source(tmp_path: Path, plain: Bundle) -> None:
    clip = make_clip(tmp_path / "clip", TINY)
    llava = make_llava(tmp_path / "llava", TINY, plain.folder / "tokenizers")
    said: list[str] = []
    for name, bits in (("plain", None), ("few", 4)):
        convert([llava, clip], tmp_path / name, llm_bits=bits, say=said.append)
    before, after = (Bundle.open(tmp_path / name) for name in ("plain", "few"))
    assert after.config("llava").llama == replace(before.config("llava").llama, quant=PRESETS[4])
    name = "llama.layers.1.mlp.down_proj"
    codes, scale = quantise(before.tensors("llava")[f"{name}.weight"].read(), PRESETS[4])
    tensors = after.tensors("llava")
    assert torch.equal(tensors[f"{name}.codes"].read(), codes)
    assert torch.equal(tensors[f"{name}.scale"].read(), scale)
    one, two = (line.split()[1] for line in said if line.startswith("llava "))
    assert one == two  # parameters, not stored numbers


def test_bundles_from_before_it_open() -> None:
    """Their configs have no such field."""
    data = json.loads((ROOT / "weights/mini/config.json").read_text(encoding="utf-8"))
    llama = {k: v for k, v in data["networks"]["llava"]["config"]["llama"].items() if k != "quant"}
    assert config_from_json(LlamaConfig, llama, "here").quant is None
    found = config_from_json(LlamaConfig, llama | {"quant": {"bits": 4, "group": 96}}, "here")
    assert found.quant == QuantConfig(4, 96)
    with pytest.raises(ValueError, match=r"here\.quant: .*'zero'"):
        config_from_json(LlamaConfig, llama | {"quant": {"bits": 4, "zero": 1}}, "here")


# --- refusals ----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture, *line: object) -> str:
    assert main([str(part) for part in line]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    return error


def test_conversion_refuses(
    few: dict[int, Bundle], plain: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ("--out", tmp_path / "out", "--llm-bits", 4)
    assert "8 bits" in refused(capsys, *out, "--base-bundle", few[8].folder)
    assert "--no-llm" in refused(capsys, *out, "--base-bundle", plain.folder, "--no-llm")
    assert "no LLaVA" in refused(capsys, *out)
    clip = make_clip(tmp_path / "clip", TINY)
    assert "no LLaVA" in refused(capsys, *out, clip)
    odd = replace(TINY, llama=replace(TINY.llama, mlp=2 * 131))
    llava = make_llava(tmp_path / "odd", odd, plain.folder / "tokenizers")
    assert "4 bits for a width of 262" in refused(capsys, *out, llava, clip)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("train", ["mllm", "lora", "new"])
def test_stage_1_refuses(few: dict[int, Bundle], train: str, no_weights: None) -> None:
    with pytest.raises(ValueError, match="8 bits"):
        DecoderTraining.check(few[8], DecoderTraining.Config(train=train), DEFAULT)


def test_the_recipe_refuses_such_a_start(few: dict[int, Bundle], tmp_path: Path, no_weights: None) -> None:
    with pytest.raises(ValueError, match="4 bits"):
        pretrain.main(
            ["--start", str(few[4].folder), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o")]
        )
    assert not list(tmp_path.iterdir())


# --- the comparison ----------------------------------------------------------------------------------


def test_rounding_of_a_small_decoder_on_random_states() -> None:
    """A line per block; 8 bits are nearer than 4, and both are near."""
    sizes = LlamaConfig(width=64, heads=4, mlp=128, lm_head=False)
    lines = list(rounding.full_size(2, rounding.RoundingConfig(tokens=8, llama=sizes)))
    assert len(lines) == 2
    for line in lines:
        eight, four = (float(value) for value in re.findall(r"bits (0\.\d+)", line))
        assert 0.9 < four < eight < 1


def test_rounding_of_bundles() -> None:
    """Another pair is far from a bundle's embeddings, fp32 near, the bundle itself the same."""
    lines = list(rounding.compare([MINI, MINI], rounding.RoundingConfig(pairs=3)))
    other, fp32, same = (float(re.search(r"least (-?\d\.\d+)", line)[1]) for line in lines[1:])
    assert other < 0.9 < 0.999 < fp32 and same == 1


def test_agreement_removes_what_all_share() -> None:
    """A large common part hides that two of four vectors are exchanged; without it both are seen."""
    wanted = torch.eye(4) + 100
    found = rounding.agreement(wanted, wanted[[1, 0, 2, 3]] + 5)
    assert found.cosine > 0.9999 and (found.found, found.count) == (2, 4)
    assert found.removed == pytest.approx(1 / 3, abs=1e-4) and found.least == pytest.approx(-1 / 3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(bool(real.missing()), reason="packages of tests/real.py are not installed")
def test_real_weights() -> None:
    """8 bits keep a real language model's states; both networks equal the references."""
    assert [what for what, _, fine in real.rows() if not fine] == []
