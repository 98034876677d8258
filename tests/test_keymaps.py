"""models/weights/keymaps.py against the public implementations' own names and converters, and both ways
round.

Everything runs on meta tensors, so that the real models' sizes cost nothing.
"""

from math import prod

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration, SamConfig, SamModel, ViTModel
from transformers import LlavaConfig as PublicLlavaConfig

from models.clip import PRESETS as CLIPS
from models.clip import VISION_PRESETS, CLIPTextConfig
from models.dino import PRESETS as DINOS
from models.llava import LlavaConfig
from models.sam_config import PRESETS as SAM_PRESETS
from models.unet import UNetConfig, attention_layers
from models.vae import VAEConfig
from models.weights import keymaps
from models.weights.keymaps import CONV, COPY, Row, Table, convert
from moma.methods.moma.adapter import AdapterConfig
from moma.weights.bundle import expected_shapes
from tests.make_checkpoints import FULL, TINY, clip_json, llava_hf_json, sam_json, unet_json, vae_json
from tests.parity_scorers import public_clip, public_dino

Shapes = dict[str, tuple[int, ...]]
SD15_LAYERS = (6, 9, 1)  # down, up, mid


def meta(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def run(table: Table, tensors: dict[str, Tensor], direction: str = "in") -> dict[str, Tensor]:
    result = convert(table, tensors, direction)
    assert not result.unknown
    return {name: change(tensors[old]) for name, (old, change) in result.names.items()}


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


UNET = expected_shapes("unet", UNetConfig())
VAE = expected_shapes("vae", VAEConfig())
TEXT = expected_shapes("text", CLIPTextConfig(projection=768))
TOWER = expected_shapes("vision", VISION_PRESETS["l14_336"])
CLIP_B32 = expected_shapes("clip_b32", CLIPS["b32"])
DINO_S16 = {  # with attn.qkv in three, as transformers has it
    name.replace(".qkv.", f".{letter}."): (shape[0] // (3 if ".qkv." in name else 1), *shape[1:])
    for name, shape in expected_shapes("dino_s16", DINOS["s16"]).items()
    for letter in ("qkv" if ".qkv." in name else "-")
}
LLAVA = expected_shapes("llava", LlavaConfig()) | {
    f"tower.{name}": shape for name, shape in expected_shapes("vision", FULL.llava.vision).items()
}
ADAPTER = expected_shapes("adapter", AdapterConfig(), UNetConfig())
IP_ADAPTER = expected_shapes("ip_adapter", AdapterConfig(), UNetConfig())
SAM_H = expected_shapes("sam", SAM_PRESETS["h"])
LDM_UNET = keymaps.ldm_unet((True, True, True, False), 2)
LDM_VAE = keymaps.ldm_vae(4)

ROUND_TRIPS = {
    "ldm unet": (LDM_UNET, UNET),
    "ldm vae": (LDM_VAE, VAE),
    "diffusers vae": (keymaps.DIFFUSERS_VAE, VAE),
    "old diffusers vae": (keymaps.DIFFUSERS_VAE_OLD, VAE),
    "clip text": (keymaps.CLIP_TEXT, TEXT),
    "clip vision": (keymaps.CLIP_VISION, TOWER),
    "clip bare": (keymaps.CLIP_BARE, TOWER),
    "clip whole": (keymaps.CLIP_WHOLE, CLIP_B32),
    "dino": (keymaps.DINO_HF, DINO_S16),
    "dino, new names": (keymaps.DINO_HF_NEW, DINO_S16),
    "ldm text": (keymaps.LDM_TEXT, expected_shapes("text", CLIPTextConfig())),
    "llava": (keymaps.LLAVA_ORIGINAL, LLAVA),
    "llava-hf": (keymaps.llava_hf(False, 32000, 32064), LLAVA),
    "llava-hf, new names": (keymaps.llava_hf(True, 32000, 32064), LLAVA),
    "moma": (keymaps.moma_th(*SD15_LAYERS), ADAPTER),
    "ip-adapter": (keymaps.ip_adapter(*SD15_LAYERS), IP_ADAPTER),
    "sam": (keymaps.SAM_OFFICIAL, SAM_H),
    "sam of transformers": (keymaps.SAM_TRANSFORMERS, SAM_H),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trip(case: str) -> None:
    table, ours = ROUND_TRIPS[case]
    public = run(table, meta(ours), "out")
    assert len(public) == len(ours)
    assert shapes_of(run(table, public)) == ours


def test_values_survive_the_transforms() -> None:
    x = torch.randn(3, 3)
    for shape in ((3, 3), (3, 3, 1), (3, 3, 1, 1)):
        assert torch.equal(CONV.into(x.reshape(shape)), x)
    assert CONV.back(x).shape == (3, 3, 1, 1)
    assert CONV.into(torch.ones(3, 3, 3, 3)).shape == (3, 3, 3, 3), (
        "a real convolution stays, and is reported"
    )
    words = next(row.transform for row in keymaps.llava_hf(False, 3, 5) if row.transform is not COPY)
    assert torch.equal(words.into(words.back(x)), x)
    assert torch.equal(words.back(x)[3:], torch.zeros(2, 3))


# --- against diffusers ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [FULL, TINY], ids=["sd15", "tiny"])
def test_ldm_unet_as_diffusers_converts_it(scale) -> None:
    """Our LDM names, converted by diffusers, are the names and shapes of its own UNet."""
    config = unet_json(scale.unet)
    with torch.device("meta"):
        reference = shapes_of(UNet2DConditionModel.from_config(config).state_dict())
    assert expected_shapes("unet", scale.unet) == reference
    table = keymaps.ldm_unet([depth > 0 for depth in scale.unet.depth], scale.unet.resnets)
    ours = {name: torch.full((1,), i) for i, name in enumerate(reference)}
    public = {f"model.diffusion_model.{name}": tensor for name, tensor in run(table, ours, "out").items()}
    config |= {"class_embed_type": None, "addition_embed_type": None}
    theirs = convert_ldm_unet_checkpoint(public, config)
    assert {name: int(tensor) for name, tensor in theirs.items()} == {n: int(t) for n, t in ours.items()}


@pytest.mark.parametrize("scale", [FULL, TINY], ids=["sd15", "tiny"])
def test_ldm_vae_as_diffusers_converts_it(scale) -> None:
    config = vae_json(scale.vae)
    with torch.device("meta"):
        reference = shapes_of(AutoencoderKL.from_config(config).state_dict())
    assert expected_shapes("vae", scale.vae) == reference
    # A stamp in place of values; the mid attention's must be matrices, to become convolutions
    ours = {
        name: torch.full((1, 1) if ".attentions." in name and len(reference[name]) == 2 else (1,), i)
        for i, name in enumerate(reference)
    }
    table = keymaps.ldm_vae(len(scale.vae.channels))
    public = {f"first_stage_model.{name}": t for name, t in run(table, ours, "out").items()}
    assert public["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (1, 1, 1, 1)
    theirs = convert_ldm_vae_checkpoint(public, config)
    assert {name: t.item() for name, t in theirs.items()} == {name: t.item() for name, t in ours.items()}


def test_old_vae_attention_names() -> None:
    public = run(keymaps.DIFFUSERS_VAE_OLD, meta(VAE), "out")
    there = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for half in ("encoder", "decoder"):
        for name, ours in there.items():
            key = f"{half}.mid_block.attentions.0.{name}.weight"
            (found,) = keymaps.convert(keymaps.DIFFUSERS_VAE_OLD, [key]).names
            assert found == f"{half}.mid_block.attentions.0.{ours}.weight"
            assert public[key].shape == (512, 512)
    for ones in ((), (1,), (1, 1)):  # all three are met in files
        shaped = {
            name: torch.empty(*tensor.shape, *ones, device="meta")
            if ".attentions.0." in name and tensor.dim() == 2
            else tensor
            for name, tensor in public.items()
        }
        assert shapes_of(run(keymaps.DIFFUSERS_VAE_OLD, shaped)) == VAE


def test_adapter_numbers_follow_diffusers_attention_processors() -> None:
    """The .th and IP-Adapter number the layers of `unet.attn_processors`; ours are in execution order."""
    with torch.device("meta"):
        processors = list(UNet2DConditionModel.from_config(unet_json(UNetConfig())).attn_processors)
    assert len(processors) == 32
    # what runs first to last, by name
    order = sorted({name.rsplit(".attn", 1)[0] for name in processors}, key=lambda n: ("dmu".index(n[0]), n))
    table = keymaps.moma_th(*SD15_LAYERS)
    for n, processor in enumerate(processors):
        layer, kind = processor.removesuffix(".processor").rsplit(".", 1)
        names = convert(table, [f"self_cross_attentions.{n}.to_k_ip.weight"]).names
        group = {"attn1": "subject", "attn2": "context"}[kind]
        assert list(names) == [f"{group}.{order.index(layer)}.to_k.weight"]
        if kind == "attn2":
            ip = convert(keymaps.ip_adapter(*SD15_LAYERS), [f"ip_adapter.{n}.to_k_ip.weight"]).names
            assert list(ip) == list(names)


def test_moma_th_has_the_released_sizes() -> None:
    """Parameter counts of the released file's parts (self 24.8 M, cross 19.2 M, projector, mapping)."""
    public = run(keymaps.moma_th(*SD15_LAYERS), meta(ADAPTER), "out")
    assert len(public) == 4 + 80 + 3

    def count(prefix: str, keep=lambda name: True) -> int:
        return sum(prod(t.shape) for name, t in public.items() if name.startswith(prefix) and keep(name))

    def even(name: str) -> bool:
        return int(name.split(".")[1]) % 2 == 0

    assert count("projectors.") == 3_150_336
    assert count("llm_mapping.mapping.") == 9_437_184
    assert count("self_cross_attentions.", even) == 24_780_816
    assert count("self_cross_attentions.", lambda name: not even(name)) == 19_169_280
    for n, width in ((0, 320), (4, 640), (8, 1280), (12, 1280), (18, 640), (24, 320), (30, 1280)):
        assert public[f"self_cross_attentions.{n}.to_v_ip.weight"].shape == (width, width)
        assert public[f"self_cross_attentions.{n}.scale_learnable"].shape == (1,)
        assert public[f"self_cross_attentions.{n + 1}.to_k_ip.weight"].shape == (width, 768)


def test_ip_adapter_has_the_released_size_and_its_trainers_names() -> None:
    table = keymaps.ip_adapter(*SD15_LAYERS)
    public = run(table, meta(IP_ADAPTER), "out")
    assert sum(prod(tensor.shape) for tensor in public.values()) == 22_319_616
    assert all(name.startswith(("image_proj.", "ip_adapter.")) for name in public)
    training = {
        name.replace("image_proj.", "image_proj_model.").replace("ip_adapter.", "adapter_modules."): tensor
        for name, tensor in public.items()
    }
    assert shapes_of(run(table, training)) == IP_ADAPTER


def test_attention_layers_are_counted_as_the_unet_counts_them() -> None:
    down, up, mid = SD15_LAYERS
    assert len(attention_layers(UNetConfig())) == down + up + mid


# --- against transformers -----------------------------------------------------------------------------


def test_clip_names() -> None:
    config = {"text_config": clip_json(CLIPTextConfig()), "vision_config": clip_json(FULL.tower)}
    with torch.device("meta"):
        state = CLIPModel(CLIPConfig(**config, projection_dim=768)).state_dict()
    assert shapes_of(run(keymaps.CLIP_TEXT, state)) == TEXT
    assert shapes_of(run(keymaps.CLIP_VISION, state)) == TOWER


def test_scorers_names() -> None:
    with torch.device("meta"):
        clip = CLIPModel(public_clip(CLIPS["b32"])).state_dict()
        dino = ViTModel(public_dino(DINOS["s16"]), add_pooling_layer=False).state_dict()
    assert shapes_of(run(keymaps.CLIP_WHOLE, clip)) == CLIP_B32
    assert shapes_of(run(keymaps.DINO_HF_NEW, dino)) == DINO_S16


@pytest.mark.parametrize("new", [True, False])
def test_llava_names(new: bool) -> None:
    """transformers' module names (new) and what the same module is saved as (the hub's files)."""
    public = PublicLlavaConfig(**{k: v for k, v in llava_hf_json(FULL).items() if k != "architectures"})
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(public).state_dict()
    if not new:
        renamed = {}
        for name, tensor in state.items():
            for there, here in (
                ("model.language_model.", "language_model.model."),
                ("lm_head.", "language_model.lm_head."),
                ("model.vision_tower.", "vision_tower.vision_model."),
                ("model.multi_modal_projector.", "multi_modal_projector."),
            ):
                if name.startswith(there):
                    renamed[here + name.removeprefix(there)] = tensor
        state = renamed
    state = {name: tensor for name, tensor in state.items() if "position_ids" not in name}
    assert shapes_of(run(keymaps.llava_hf(new, 32000, 32064), state)) == LLAVA


def test_sam_names() -> None:
    with torch.device("meta"):
        state = SamModel(SamConfig(**sam_json(SAM_PRESETS["h"]))).state_dict()
    assert shapes_of(run(keymaps.SAM_TRANSFORMERS, state)) == SAM_H
    assert keymaps.convert(keymaps.SAM_OFFICIAL, ["pixel_mean", "pixel_std"]).dropped


def test_llava_original_sizes() -> None:
    """total_size of the released index = (LLaMA + projector) x 2 bytes + 32 rotary buffers of 64 float32."""
    public = run(keymaps.LLAVA_ORIGINAL, meta(LLAVA), "out")
    language = {name: t for name, t in public.items() if ".vision_tower." not in name}
    assert 2 * sum(prod(t.shape) for t in language.values()) + 32 * 64 * 4 == 13_518_798_848
    assert "model.mm_projector.2.bias" in public and "lm_head.weight" in public
    tower = [name for name in public if name.startswith("model.vision_tower.vision_tower.vision_model.")]
    assert len(tower) == len(public) - len(language)


# --- the engine -----------------------------------------------------------------------------------------


def test_dropped_and_unknown_names_are_reported() -> None:
    keys = ["model.layers.3.self_attn.rotary_emb.inv_freq", "model.norm.weight", "optimizer.step"]
    result = convert(keymaps.LLAVA_ORIGINAL, keys)
    assert list(result.names) == ["llama.norm.weight"]
    assert result.dropped == keys[:1] and result.unknown == keys[2:]


def test_two_names_for_one_tensor_are_an_error() -> None:
    table = [Row("a.*", "x.*"), Row("b.*", "x.*")]
    with pytest.raises(ValueError, match=r"b\.w .*a\.w .*x\.w"):
        convert(table, ["a.w", "b.w"])


def test_patterns() -> None:
    table = [Row("l.{}.p{}.*", "layer{}.part{}.*"), Row("a.b", "c")]
    result = convert(table, ["l.10.p2.w.x", "l.x.p2.w", "aXb", "l.1.p2"])
    assert {name: old for name, (old, _) in result.names.items()} == {"layer10.part2.w.x": "l.10.p2.w.x"}
    assert result.unknown == ["l.x.p2.w", "aXb", "l.1.p2"]


def test_ema_names() -> None:
    plain = "model.diffusion_model.input_blocks.0.0.weight"
    keys = [plain, "model_ema.diffusion_modelinput_blocks00weight", "model_ema.decay", "betas"]
    assert keymaps.ldm_ema(keys) == {plain: keys[1]}
