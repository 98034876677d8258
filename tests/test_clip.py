"""Our CLIP against transformers' on the same pseudo-random weights, and against stored outputs."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models.clip import (
    TEXT_PRESETS,
    VISION_PRESETS,
    CLIPConfig,
    CLIPText,
    CLIPTextConfig,
    CLIPVision,
    CLIPVisionConfig,
)
from models.clip_image import clip_image
from models.weights.public_configs import clip_text_config, clip_vision_config
from tests.compare import assert_close_to_std
from tests.golden_files import CARRIED
from tests.parity_scorers import clip_pair
from tests.recipe import fill, ints, normal, u8

transformers = pytest.importorskip("transformers")

COMMON = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = COMMON | {"vocab_size": 60, "max_position_embeddings": 12, "projection_dim": 24, "bos_token_id": 58}
VISION = COMMON | {"image_size": 32, "patch_size": 8, "projection_dim": 24}


def ids_ending_at(*lengths: int, end: int) -> torch.Tensor:
    """Rows of 12 ids below `end`, from position `length` on `end`."""
    ids = torch.from_numpy(ints("clip/ids", (len(lengths), 12), 0, end))
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = end
    return ids


def text_pair(json: dict, projection: bool) -> tuple[CLIPText, torch.nn.Module]:
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    theirs = kind(transformers.CLIPTextConfig(**json)).eval()
    ours = CLIPText(clip_text_config({**json, "architectures": [kind.__name__]})).eval()
    return ours, share(ours, theirs, "text_model.")


def vision_pair(json: dict, projection: bool) -> tuple[CLIPVision, torch.nn.Module]:
    kind = transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel
    theirs = kind(transformers.CLIPVisionConfig(**json)).eval()
    ours = CLIPVision(clip_vision_config({**json, "architectures": [kind.__name__]})).eval()
    return ours, share(ours, theirs, "vision_model.")


def share(ours: torch.nn.Module, theirs: torch.nn.Module, prefix: str) -> torch.nn.Module:
    """`theirs`, loaded with our recipe weights; the prefix is absent in some versions of transformers."""
    fill(ours)
    names = {name.removeprefix(prefix): name for name in theirs.state_dict()}
    theirs.load_state_dict({names[key]: value for key, value in ours.state_dict().items()}, strict=True)
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("end", [2, 59])  # 2: the legacy value, which means the largest id
def test_text_parity(act: str, projection: bool, end: int) -> None:
    ours, theirs = text_pair(TEXT | {"hidden_act": act, "eos_token_id": end}, projection)
    ids = ids_ending_at(5, 11, end=59)
    hidden, pooled = ours(ids)
    reference = theirs(ids)
    assert_close_to_std(hidden, reference.last_hidden_state)
    assert_close_to_std(pooled, reference.text_embeds if projection else reference.pooler_output)


@torch.no_grad()
def test_text_pools_at_the_first_end_token() -> None:
    """An end token that is not the largest id, with larger ids before it."""
    ours, theirs = text_pair(TEXT | {"eos_token_id": 30}, projection=False)
    ids = torch.tensor([[7, 59, 8, 30, 9, 30], [59, 1, 30, 30, 2, 58]])
    assert_close_to_std(ours(ids)[1], theirs(ids).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("projection", [False, True])
def test_vision_parity(act: str, projection: bool) -> None:
    ours, theirs = vision_pair(VISION | {"hidden_act": act}, projection)
    pixels = torch.from_numpy(normal("clip/pixels", (2, 3, 32, 32)))
    reference = theirs(pixels, output_hidden_states=True)
    hidden, embeds = ours(pixels)
    assert_close_to_std(hidden, reference.last_hidden_state)
    assert_close_to_std(embeds, reference.image_embeds if projection else reference.pooler_output)
    for layer in (-4, -2, -1, 0, 1, 3):
        assert_close_to_std(ours.hidden(pixels, layer), reference.hidden_states[layer])


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_both_towers_in_one_space(act: str) -> None:
    cfg = CLIPConfig(
        CLIPTextConfig(width=32, layers=2, heads=4, mlp=64, act=act, projection=24, vocab=60, positions=12),
        CLIPVisionConfig(width=48, layers=3, heads=3, mlp=80, act=act, projection=24, image_size=32, patch=8),
    )
    ours, theirs = clip_pair(cfg)
    ids = ids_ending_at(5, 11, end=59)
    pixels = torch.from_numpy(normal("clip/pixels", (3, 3, 32, 32)))
    assert_close_to_std(ours.image_features(pixels), theirs.get_image_features(pixels).pooler_output)
    assert_close_to_std(ours.text_features(ids), theirs.get_text_features(ids).pooler_output)
    assert ours.image_features(pixels).shape == (3, 24) and ours.text_features(ids).shape == (2, 24)
    with pytest.raises(ValueError, match=r"24 .*None"):
        replace(cfg, vision=replace(cfg.vision, projection=None))


@torch.no_grad()
def test_pool_is_the_feature_before_the_projection() -> None:
    ours, _ = vision_pair(VISION, projection=True)
    _, plain = vision_pair(VISION, projection=False)
    pixels = torch.from_numpy(normal("clip/pixels", (2, 3, 32, 32)))
    assert_close_to_std(ours.pool(ours.hidden(pixels)), plain(pixels).pooler_output)


@torch.no_grad()
def test_later_layers_are_not_run() -> None:
    ours, _ = vision_pair(VISION, projection=False)
    pixels = torch.from_numpy(normal("clip/pixels", (1, 3, 32, 32)))
    before = ours.hidden(pixels, -2)
    ours.encoder.layers[-1].mlp.fc1.weight.fill_(float("nan"))
    assert torch.equal(ours.hidden(pixels, -2), before)
    assert ours.hidden(pixels).isnan().any()


@torch.no_grad()
def test_batch_equals_singles() -> None:
    text, _ = text_pair(TEXT | {"eos_token_id": 59}, projection=True)
    ids = ids_ending_at(3, 9, end=59)
    vision, _ = vision_pair(VISION, projection=True)
    pixels = torch.from_numpy(normal("clip/pixels", (2, 3, 32, 32)))
    for network, batch in ((text, ids), (vision, pixels)):
        together = network(batch)
        for i in range(2):
            for whole, alone in zip(together, network(batch[i : i + 1]), strict=True):
                torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-5)


def test_gradients_reach_input_and_parameters() -> None:
    vision, _ = vision_pair(VISION, projection=True)
    pixels = torch.from_numpy(normal("clip/pixels", (1, 3, 32, 32))).requires_grad_()
    vision(pixels)[1].square().sum().backward()
    text, _ = text_pair(TEXT, projection=True)
    text(ids_ending_at(5, end=59))[1].square().sum().backward()
    assert pixels.grad.abs().sum() > 0
    for network in (vision, text):
        for name, parameter in network.named_parameters():
            # A bias of the keys shifts all scores of a query alike: its gradient is zero up to rounding.
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


@torch.no_grad()
def test_bfloat16() -> None:
    vision, _ = vision_pair(VISION, projection=True)
    pixels = torch.from_numpy(normal("clip/pixels", (1, 3, 32, 32)))
    full = vision(pixels)[1]
    half = vision.bfloat16()(pixels.bfloat16())[1]
    assert half.dtype == torch.bfloat16
    assert_close_to_std(half, full, tolerance=0.2)


@torch.no_grad()
def test_golden_text() -> None:
    """SD1.5's text encoder at full size against the release's transformers."""
    golden = load_file(CARRIED / "clip_text.safetensors")
    with torch.device("meta"):
        text = CLIPText(TEXT_PRESETS["sd15"])
    text.to_empty(device="cpu")
    fill(text, lambda key: f"text_model.{key}")
    hidden, _ = text.eval()(golden["input_ids"])
    torch.testing.assert_close(hidden[:, :, ::16], golden["last_hidden_state"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["pad", "default"])
def test_golden_image(mode: str) -> None:
    """LLaVA's process_images on a 300 x 200 image."""
    golden = load_file(CARRIED / "clip_image.safetensors")[mode][0]
    rgb = u8("input/process_images/rgb", (25, 38, 3)).repeat(8, 0).repeat(8, 1)[:200, :300]
    pixels = clip_image(Image.fromarray(rgb), 336, pad=mode == "pad")
    torch.testing.assert_close(pixels[:, ::8, ::8], golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (61, 40), (40, 61), (7, 5), (33, 32)])
def test_image_parity(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    w, h = size
    image = Image.fromarray(u8(f"clip/image/{size}", (h, w, 3)))
    reference = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(clip_image(image, 32), reference, rtol=0, atol=1e-6)


def test_image_modes() -> None:
    """Grey and RGBA images are read as RGB."""
    rgb = Image.fromarray(u8("clip/image/rgb", (20, 30, 3)))
    assert torch.equal(clip_image(rgb.convert("RGBA"), 16), clip_image(rgb, 16))
    assert clip_image(rgb.convert("L"), 16, pad=True).shape == (3, 16, 16)


def test_presets_read_from_public_files() -> None:
    """The presets equal what the public config.json files say (here: their non-default fields)."""
    sd15 = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "eos_token_id": 2,
    }
    assert clip_text_config(sd15) == TEXT_PRESETS["sd15"]
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2}
    l14 = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": text,
        "text_config_dict": None,
        "vision_config": {"hidden_size": 1},  # old files repeat a part; `_dict` is the one that counts
        "vision_config_dict": vision,
    }
    assert clip_text_config(l14) == TEXT_PRESETS["l14"]
    assert clip_vision_config(l14) == VISION_PRESETS["l14"]
    b32 = {
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": {"eos_token_id": 2},
        "vision_config": {},
    }
    assert clip_text_config(b32) == TEXT_PRESETS["b32"]
    assert clip_vision_config(b32) == VISION_PRESETS["b32"]
    h14 = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
    }
    assert clip_vision_config(h14) == VISION_PRESETS["h14"]
    plain = h14 | {"architectures": ["CLIPVisionModel"]}
    assert clip_vision_config(plain) == replace(VISION_PRESETS["h14"], projection=None)


@torch.no_grad()
def test_wrong_inputs() -> None:
    vision, _ = vision_pair(VISION, projection=False)
    text, _ = text_pair(TEXT, projection=False)
    with pytest.raises(ValueError, match="32, 32"):
        vision(torch.zeros(1, 3, 24, 32))
    with pytest.raises(ValueError, match="CLIP layer 4"):
        vision.hidden(torch.zeros(1, 3, 32, 32), 4)
    with pytest.raises(ValueError, match="13"):
        text(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="activation 'relu'"):
        clip_text_config({"hidden_act": "relu"})
    with pytest.raises(ValueError, match="model_type 'bert'"):
        clip_vision_config({"model_type": "bert"})
    with pytest.raises(ValueError, match="num_channels 4"):
        clip_vision_config({"num_channels": 4})
