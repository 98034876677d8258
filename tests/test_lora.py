"""LoRAs that are merged when a base is converted, in every layout, against diffusers' own merge."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import convert_weights
from models.weights import keymaps
from models.weights.loading import LazyTensor
from moma import Bundle
from moma.weights.lora import merge_loras, parse_lora
from tests.make_checkpoints import clip_json, converted, unet_json
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl

RANK, ALPHA, WEIGHT = 3, 1.5, 0.7
TEXTS = {"text": "text_encoder", "text_2": "text_encoder_2"}
KOHYA = {"unet": "lora_unet", "text": "lora_te1", "text_2": "lora_te2"}
# Of every kind of layer one or more.
UNET = (
    r"down_blocks\.1\.attentions\.0\.(proj_in|proj_out|transformer_blocks\.0\..*)",
    r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn[12]\..*",
    r"up_blocks\.1\.attentions\.2\.transformer_blocks\.0\.attn2\.to_(k|v)",
    r"down_blocks\.[01]\.(resnets\.1\.conv[12]|resnets\.0\.(conv_shortcut|time_emb_proj)|downsamplers\.0\.conv)",
    r"up_blocks\.0\.upsamplers\.0\.conv", r"conv_in", r"conv_out", r"time_embedding\.linear_\d",
    r"add_embedding\.linear_\d",
)  # fmt: skip
# All that diffusers' first layout has.
ATTENTION, SELF_ATTENTION = (UNET[1], UNET[2]), (r"encoder\.layers\.1\.self_attn\.\w+",)
TEXT = (r"encoder\.layers\.1\.(self_attn\.\w+|mlp\.fc\d)",)

Factors = dict[tuple[str, str], tuple[Tensor, Tensor]]  # (network, layer) -> down, up
Layout = Callable[[Bundle, Factors, float | None], dict[str, Tensor]]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    build_tiny_bundle(folder, cfg=TinyConfig(networks=tiny_sdxl()) if request.param == "sdxl" else None)
    return Bundle.open(folder)


def factors(bundle: Bundle, unet: tuple[str, ...] = UNET, text: tuple[str, ...] = TEXT) -> Factors:
    """Random ones for some layers of every network."""
    generator, found = torch.Generator().manual_seed(5), {}
    for network, wanted in {"unet": unet, "text": text, "text_2": text}.items():
        if network not in bundle.networks:
            continue
        for name, tensor in bundle.tensors(network).items():
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and any(re.fullmatch(one, layer) for one in wanted):
                if "norm" in layer:
                    continue
                out, into, *kernel = tensor.shape
                down = torch.randn(RANK, into, *kernel, generator=generator)
                up = torch.randn(out, RANK, *[1] * len(kernel), generator=generator)
                found[network, layer] = 0.1 * down, 0.1 * up
    return found


# --- the layouts ---------------------------------------------------------------------------------------


def inside(network: str, layer: str) -> str:
    return layer if network == "unet" else f"text_model.{layer}"


def kohya(bundle: Bundle, given: Factors, alpha: float | None, original: bool = False) -> dict[str, Tensor]:
    cfg, found = bundle.config("unet"), {}
    table = keymaps.ldm_unet([d > 0 for d in cfg.depth], cfg.resnets, bool(cfg.added_cond_dim))
    weights = [f"{layer}.weight" for network, layer in given if network == "unet"]
    names = keymaps.convert(table, weights, "out").names if original else {}
    known = {ours.removesuffix(".weight"): name.removesuffix(".weight") for name, (ours, _) in names.items()}
    for (network, layer), (down, up) in given.items():
        name = known[layer] if network == "unet" and original else inside(network, layer)
        start = "lora_te" if network == "text" and "text_2" not in bundle.networks else KOHYA[network]
        name = f"{start}_{name.replace('.', '_')}"
        found |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def kohya_original(bundle: Bundle, given: Factors, alpha: float | None) -> dict[str, Tensor]:
    return kohya(bundle, given, alpha, original=True)


def diffusers_first(bundle: Bundle, given: Factors, alpha: float | None) -> dict[str, Tensor]:
    """Of the attention processors."""
    found = {}
    for (network, layer), (down, up) in given.items():
        name = re.sub(r"\.(attn\d)\.(to_[a-z]+)(\.0)?$", r".\1.processor.\2_lora", inside(network, layer))
        name = re.sub(r"\.self_attn\.(\w+)_proj$", r".self_attn.to_\1_lora", name)
        start = "unet" if network == "unet" else TEXTS[network]
        found |= {f"{start}.{name}.down.weight": down, f"{start}.{name}.up.weight": up}
    return found


def dotted(down: str, up: str, start: Mapping[str, str]) -> Layout:
    def write(bundle: Bundle, given: Factors, alpha: float | None) -> dict[str, Tensor]:
        found = {}
        for (network, layer), (a, b) in given.items():
            name = f"{start[network]}{inside(network, layer)}"
            found |= {f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}
            if alpha is not None:
                found[f"{name}.alpha"] = torch.tensor(alpha)
        return found

    return write


DOTS = {"unet": "unet.", "text": "text_encoder.", "text_2": "text_encoder_2."}
LAYOUTS: dict[str, Layout] = {
    "kohya": kohya,
    "kohya, original UNet": kohya_original,
    "diffusers": dotted("lora.down", "lora.up", DOTS),
    "peft in diffusers": dotted("lora_A", "lora_B", DOTS),
    "peft": dotted("lora_A.default", "lora_B.default", {name: "base_model.model." for name in DOTS}),
}


def write(folder: Path, tensors: Mapping[str, Tensor], **metadata: str) -> Path:
    path = folder / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def merge(bundle: Bundle, *loras: tuple[Path, float]) -> dict[str, dict[str, LazyTensor]]:
    """The networks with LoRAs in them."""
    networks = {name: bundle.tensors(name) for name in ("unet", "text", "text_2") if name in bundle.networks}
    return merge_loras(loras, networks, bundle.config("unet"), {})[0]


def assert_merged(bundle: Bundle, loras: Sequence[tuple[Path, float]], given: Factors, scale: float) -> None:
    """W + scale·B A, in float64."""
    found, networks = merge(bundle, *loras), {name: bundle.tensors(name) for name, _ in given}
    for (network, layer), (down, up) in given.items():
        old = networks[network][f"{layer}.weight"].read().double()
        delta = up.double().flatten(1) @ down.double().flatten(1)
        wanted = (old + scale * delta.view_as(old)).float()
        ours = found[network][f"{layer}.weight"].read()
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6, msg=f"{network} {layer}")


@pytest.mark.parametrize("alpha", [ALPHA, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(bundle: Bundle, tmp_path: Path, layout: str, alpha: float | None) -> None:
    given = factors(bundle, text=() if layout == "peft" else TEXT)
    path = write(tmp_path, LAYOUTS[layout](bundle, given, alpha))
    scale = WEIGHT * (1 if alpha is None else alpha / RANK)
    assert_merged(bundle, [(path, WEIGHT)], given, scale)


def test_the_first_layout_of_diffusers(bundle: Bundle, tmp_path: Path) -> None:
    given = factors(bundle, ATTENTION, SELF_ATTENTION)
    path = write(tmp_path, diffusers_first(bundle, given, None))
    assert_merged(bundle, [(path, WEIGHT)], given, WEIGHT)


def public_pipeline(bundle: Bundle) -> Any:
    """diffusers' pipeline with the UNet and the text encoders of the bundle."""
    unet = diffusers.UNet2DConditionModel(
        **unet_json(bundle.config("unet"), "text_2" in bundle.networks and bundle.config("text_2").projection)
    )
    unet.load_state_dict(bundle.state("unet"))
    texts = {}
    for name, attribute in TEXTS.items():
        if name in bundle.networks:
            cfg = bundle.config(name)
            kind = transformers.CLIPTextModelWithProjection if cfg.projection else transformers.CLIPTextModel
            theirs = kind(transformers.CLIPTextConfig(**clip_json(cfg)))
            names = {key.replace("text_model.", ""): key for key in theirs.state_dict()}
            theirs.load_state_dict({names[key]: value for key, value in bundle.state(name).items()})
            texts[attribute] = theirs
    parts = {"vae": None, "tokenizer": None, "scheduler": None, "unet": unet, **texts}
    if len(texts) == 2:
        return diffusers.StableDiffusionXLPipeline(**parts, tokenizer_2=None)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def peft_metadata(given: Factors) -> str:
    """As diffusers writes it, with another alpha for some layers."""
    settings = {}
    for network in {network for network, _ in given}:
        layers = [layer for name, layer in given if name == network]
        pattern = {layer: 2.0 for layer in layers if layer.endswith("1.attn2.to_q") or "fc1" in layer}
        own = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": pattern, "target_modules": layers}
        settings |= {f"{TEXTS.get(network, network)}.{key}": value for key, value in own.items()}
    return json.dumps(settings)


@pytest.mark.parametrize("layout", ["kohya", "kohya, original UNet", "diffusers' first", "peft in diffusers"])
def test_diffusers_merges_the_same(bundle: Bundle, tmp_path: Path, layout: str) -> None:
    """load_lora_weights and fuse_lora, every tensor of every network."""
    # Of kohya's names, theirs knows the original UNet's for SDXL alone, and add_embedding in these alone.
    if layout == "kohya, original UNet" and "text_2" not in bundle.networks:
        pytest.skip("not read by diffusers")
    first = layout == "diffusers' first"
    unet = ATTENTION if first else UNET[:-1] if layout == "kohya" else UNET
    given = factors(bundle, unet, SELF_ATTENTION if first else TEXT)
    metadata = {"lora_adapter_metadata": peft_metadata(given)} if layout == "peft in diffusers" else {}
    tensors = (LAYOUTS | {"diffusers' first": diffusers_first})[layout](
        bundle, given, ALPHA if layout.startswith("kohya") else None
    )
    path = write(tmp_path, tensors, **metadata)
    theirs = public_pipeline(bundle)
    theirs.load_lora_weights(path)
    theirs.fuse_lora(lora_scale=WEIGHT)
    theirs.unload_lora_weights()
    for network, own in merge(bundle, (path, WEIGHT)).items():
        fused = getattr(theirs, TEXTS.get(network, network)).state_dict()
        names = {key.replace("text_model.", ""): key for key in fused}
        differing = {
            name: float((tensor.read() - fused[names[name]]).abs().max())
            for name, tensor in own.items()
            if not torch.allclose(tensor.read(), fused[names[name]], rtol=0, atol=1e-6)
        }
        assert not differing, network


def test_peft_folders(bundle: Bundle, tmp_path: Path) -> None:
    """With the alphas of adapter_config.json; α/√r where that says so."""
    given = factors(bundle, text=())
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder, LAYOUTS["peft"](bundle, given, None)).rename(folder / "adapter_model.safetensors")
    for rslora, scale in ((False, ALPHA / RANK), (True, ALPHA / RANK**0.5)):
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": rslora}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert_merged(bundle, [(folder, WEIGHT)], given, WEIGHT * scale)


# --- refusals and records --------------------------------------------------------------------------------


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def more(**values: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """`__` stands for a dot; X for a layer."""
    names = {key.replace("__", ".").replace("X", "lora_unet_conv_in"): value for key, value in values.items()}
    return lambda tensors: tensors | names


ONE = torch.ones(1)
REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "dora": (more(X__dora_scale=ONE), "DoRA"),
    "dora of peft": (more(X__lora_magnitude_vector=ONE), "DoRA"),
    "loha": (more(X__hada_w1_a=ONE), "LoHa"),
    "lokr": (more(X__lokr_w1=ONE), "LoKr"),
    "oft": (more(X__oft_blocks=ONE), "OFT"),
    "ia3": (more(X__on_input=ONE), "IA3"),
    "glora": (more(X__a1__weight=ONE), "GLoRA"),
    "tucker": (more(X__lora_mid__weight=ONE), "Tucker"),
    "full": (more(X__diff=ONE), "differences"),
    "norms": (more(X__w_norm=ONE), "differences"),
    "bias": (more(X__lora_B__bias=ONE), r"lora_B\.bias"),
    "another base": (renamed("attentions", "others"), "others"),
    "an embedding": (more(emb_params=torch.ones(2, 32)), "emb_params"),
    "half a pair": (lambda x: {k: v for k, v in x.items() if "conv_in.lora_up" not in k}, "conv_in"),
    "two names": (more(unet__conv_in__lora_A__weight=torch.ones(3, 4, 3, 3)), "conv_in"),
    "shapes": (more(X__lora_up__weight=torch.ones(5, RANK, 1, 1)), r"\[5, 3, 1, 1\]"),
    "rank": (more(X__lora_up__weight=torch.ones(32, 0, 1, 1), X__lora_down__weight=torch.ones(0, 4, 3, 3)),
        r"\[0, 4, 3, 3\]"),
    "alpha": (more(X__alpha=torch.tensor(torch.nan)), "nan"),
    "alphas": (more(X__alpha=torch.ones(2)), r"\[2\]"),
    "integers": (more(X__lora_up__weight=torch.ones(32, RANK, 1, 1, dtype=torch.int8)), "int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(bundle: Bundle, tmp_path: Path, name: str) -> None:
    if "text_2" in bundle.networks:
        pytest.skip("the same for both")
    change, message = REFUSED[name]
    path = write(tmp_path, change(kohya(bundle, factors(bundle), ALPHA)))
    with pytest.raises(ValueError, match=message) as error:
        merge(bundle, (path, 1.0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"), ({"peft_type": "LOHA"}, "LOHA"), ({"lora_alpha": "x"}, "'x'"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"), ({"lora_alpha": 1e999}, "inf"),
    ],
)  # fmt: skip
def test_settings_are_checked(bundle: Bundle, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    tensors = LAYOUTS["peft"](bundle, factors(bundle, text=()), None)
    path = write(tmp_path, tensors).rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        merge(bundle, (path, 1.0))


def test_values_are_checked_when_they_are_written(bundle: Bundle, tmp_path: Path) -> None:
    tensors = kohya(bundle, factors(bundle), ALPHA)
    tensors["lora_unet_conv_in.lora_up.weight"][0] = torch.nan
    with pytest.raises(ValueError, match=r"conv_in\.lora_up"):
        converted([], tmp_path / "out", bundle, loras=[(write(tmp_path, tensors), 1.0)])
    assert not (tmp_path / "out").exists()


def test_a_bundle_says_what_is_merged(bundle: Bundle, tmp_path: Path) -> None:
    """One LoRA with the command, another on its result; networks without changes stay as they are."""
    given = factors(bundle, text=())
    path = write(tmp_path, kohya(bundle, given, ALPHA))
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--lora", f"{path}:{WEIGHT}", "--out", str(first)]
    assert convert_weights.main(["--base-bundle", str(bundle.folder), *options]) == 0
    converted([], second, Bundle.open(first), loras=[(path, -WEIGHT)])
    again = Bundle.open(second)
    found = again.networks["unet"]["loras"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found == [{"file": path.name, "sha256": digest, "weight": w} for w in (WEIGHT, -WEIGHT)]
    assert "loras" not in again.networks["text"]
    assert again.hashes_of("text", "vae") == bundle.hashes_of("text", "vae")
    for name, values in again.state("unet").items():
        torch.testing.assert_close(values, bundle.state("unet")[name], rtol=0, atol=1e-5)
    changed = merge(bundle, (path, WEIGHT))["unet"]["conv_in.weight"].read()
    assert torch.equal(Bundle.open(first).state("unet")["conv_in.weight"], changed)


@pytest.mark.parametrize("text", ["none.safetensors", "{}:nan", "{}:inf", "{}x:1"])
def test_the_option(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, {"a": ONE})
    assert parse_lora(f"{path}:0.5") == (path, 0.5) and parse_lora(str(path)) == (path, 1.0)
    with pytest.raises(ValueError):
        parse_lora(text.format(path))
