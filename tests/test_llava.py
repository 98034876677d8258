"""Our LLaVA against stored outputs of the release, and against transformers' on the same weights."""

import pytest
import torch
from safetensors.torch import load_file

from models.clip import CLIPVisionConfig
from models.llama import LlamaConfig
from models.llava import Llava, LlavaConfig
from models.tokenizers import IMAGE_TOKEN
from models.unet import UNetConfig
from models.weights.public_configs import llava_config
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.config import RELEASE
from moma.methods.moma.feature_decoder import FeatureDecoder
from tests.compare import assert_close_to_std
from tests.golden_files import CARRIED
from tests.recipe import fill, ints, normal

transformers = pytest.importorskip("transformers")

IMAGE_ID = 50  # transformers' image token: the first id beyond LLaMA's own
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
HF = {"image_token_index": IMAGE_ID, "vision_config": VISION, "text_config": TEXT, "image_seq_length": 4}
ORIGINAL = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "mm_hidden_size": 128,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
}
TOWER = CLIPVisionConfig(width=128, layers=3, heads=4, mlp=512, image_size=56)


def small() -> Llava:
    model = Llava(llava_config(HF)).eval()
    fill(model)
    return model


def prompts(image: int = IMAGE_TOKEN) -> list[torch.Tensor]:
    """Three prompts of different length, the image at the start, in the middle, at the end."""
    rows = [torch.from_numpy(ints(f"llava/ids/{n}", (n,), 3, IMAGE_ID)) for n in (9, 4, 6)]
    for row, at in zip(rows, (3, 0, 5), strict=True):
        row[at] = image
    return rows


def pixels() -> torch.Tensor:
    return torch.from_numpy(normal("llava/pixels", (3, 3, 16, 16)))


def reference_of(model: Llava) -> torch.nn.Module:
    """transformers' LLaVA with our weights; its embeddings have rows for the ids that we leave out."""
    theirs = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_index=IMAGE_ID,
        )
    ).eval()
    state = {key.replace("vision_model.", ""): value for key, value in theirs.state_dict().items()}
    names = dict(zip(state, theirs.state_dict(), strict=True))
    for key, value in model.state_dict().items():
        public = (
            key.replace("tower.", "model.vision_tower.")
            .replace("projector.0", "model.multi_modal_projector.linear_1")
            .replace("projector.2", "model.multi_modal_projector.linear_2")
            .replace("llama.lm_head", "lm_head")
            .replace("llama.", "model.language_model.")
        )
        if value.shape != state[public].shape:
            extra = state[public].shape[0] - value.shape[0]
            value = torch.cat([value, value.new_full((extra, value.shape[1]), -1.0)])
        state[public] = value
    theirs.load_state_dict({names[key]: value for key, value in state.items()}, strict=True)
    return theirs


class RecordedTokenizer:
    """The public LLaMA tokenizer's answers; a "text" is the number of a recorded prompt."""

    def __init__(self, ids: list[torch.Tensor]) -> None:
        self.ids = ids

    def encode_with_image(self, text: int) -> list[int]:
        return self.ids[text].tolist()


@torch.no_grad()
def test_golden() -> None:
    """The release's forward_MLLM, mapping and projector on a small LLaVA, prompts alone and batched."""
    golden = load_file(CARRIED / "llava.safetensors")
    model = Llava(llava_config(ORIGINAL, TOWER)).eval()

    def public(key: str) -> str:
        part, name = key.split(".", 1)
        if part == "llama":
            return name if name.startswith("lm_head") else f"model.{name}"
        return f"vision_model.{name}" if part == "tower" else f"model.mm_projector.{name}"

    fill(model, public)
    adapter = Adapter(AdapterConfig(mllm_dim=256), UNetConfig())
    fill(adapter.mapping, lambda key: f"mapping.{key}")
    fill(adapter.projector)
    images = torch.from_numpy(normal("input/llava_small/pixels", (2, 3, 56, 56)))
    ids = [golden["p0.input_ids"][0], golden["p1.input_ids"][0]]

    def close(ours: torch.Tensor, name: str, rows: list[int]) -> None:
        expected = torch.cat([golden[f"p{row}.{name}"] for row in rows])
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)

    tower = model.tower.hidden(images, -2)[:, 1:]
    torch.testing.assert_close(tower, golden["tower_features"], rtol=0, atol=2e-5)
    torch.testing.assert_close(model.encode_images(images), golden["image_features"], rtol=0, atol=2e-5)
    for rows in ([0], [1], [0, 1]):
        close(model(images[rows], [ids[row] for row in rows]), "hidden_last", rows)
        features = model.encode_images(images[rows])
        embedding = FeatureDecoder(model, adapter, RecordedTokenizer(ids), RELEASE).embed(features, rows)
        close(embedding, "mllm", rows)
        close(adapter.projector(embedding), "image_prompt", rows)


@torch.no_grad()
def test_hidden_states_parity() -> None:
    ours = small()
    theirs = reference_of(ours)
    for image, row, row_theirs in zip(pixels(), prompts(), prompts(IMAGE_ID), strict=True):
        expanded = torch.cat([i.repeat(4) if i == IMAGE_ID else i[None] for i in row_theirs])[None]
        reference = theirs.model(input_ids=expanded, pixel_values=image[None]).last_hidden_state
        embeds, lengths = ours.splice([row], ours.encode_images(image[None]))
        assert lengths.tolist() == [expanded.shape[1]]
        assert_close_to_std(ours.llama(embeds), reference)
        assert_close_to_std(ours(image[None], [row]), reference[:, -1])


@torch.no_grad()
def test_batch_equals_singles() -> None:
    ours = small()
    extra = torch.from_numpy(normal("llava/extra", (3, 1, 32)))
    for appended in (None, extra):
        together = ours(pixels(), prompts(), appended)
        for i in range(3):
            one = slice(i, i + 1)
            alone = ours(pixels()[one], prompts()[one], None if appended is None else appended[one])
            torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_generation_batch_equals_singles() -> None:
    ours = small()
    theirs = reference_of(ours)
    together = ours.generate(pixels(), prompts(), max_new=8)
    for i, row in enumerate(prompts(IMAGE_ID)):
        one = slice(i, i + 1)
        assert together[i] == ours.generate(pixels()[one], prompts()[one], max_new=8)[0]
        expanded = torch.cat([t.repeat(4) if t == IMAGE_ID else t[None] for t in row])[None]
        found = theirs.generate(
            input_ids=expanded,
            pixel_values=pixels()[one],
            attention_mask=torch.ones_like(expanded),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            suppress_tokens=list(range(IMAGE_ID, TEXT["vocab_size"])),
        )[0, expanded.shape[1] :].tolist()
        assert together[i] == (found[: found.index(2)] if 2 in found else found)


@torch.no_grad()
def test_splice() -> None:
    """The order of a row: text, image, text, the appended embedding, padding."""
    ours = small()
    features, extra = torch.full((3, 4, 32), 5.0), torch.full((3, 1, 32), 6.0)
    embeds, lengths = ours.splice(prompts(), features, extra)
    assert lengths.tolist() == [13, 8, 10]  # n - 1 words, 4 patches, 1 appended
    words = ours.llama.embed_tokens(prompts()[0].clamp(min=0))
    assert torch.equal(embeds[0], torch.cat([words[:3], features[0], words[4:], extra[0]]))
    assert (embeds[1, 8:] == 0).all()
    assert torch.equal(embeds[1, :4], features[1])


@torch.no_grad()
def test_fewer_layers() -> None:
    ours = small()
    embeds, lengths = ours.splice(prompts(), ours.encode_images(pixels()))
    expected = ours.llama(embeds, 1)[torch.arange(3), lengths - 1]
    assert torch.equal(ours(pixels(), prompts(), layers=1), expected)
    assert not torch.equal(ours(pixels(), prompts()), expected)


def test_gradients_reach_pixels_and_extra() -> None:
    ours = small()
    images = pixels().requires_grad_()
    extra = torch.zeros(3, 1, 32, requires_grad=True)
    ours(images, prompts(), extra).square().sum().backward()
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert (extra.grad.abs().sum(dim=(1, 2)) > 0).all()
    for name in ("projector.0.weight", "projector.2.bias", "llama.layers.0.self_attn.q_proj.weight"):
        assert ours.get_parameter(name).grad.abs().sum() > 0


@torch.no_grad()
def test_bfloat16() -> None:
    ours = small()
    full = ours(pixels(), prompts())
    half = ours.bfloat16()(pixels().bfloat16(), prompts())
    assert half.dtype == torch.bfloat16
    assert_close_to_std(half, full, tolerance=0.3)


@pytest.mark.parametrize("count", [0, 2])
def test_one_image_token_per_prompt(count: int) -> None:
    ids = torch.tensor([5] * 3 + [IMAGE_TOKEN] * count)
    with pytest.raises(ValueError, match=f"prompt 0 holds {count}"):
        small().splice([ids], torch.zeros(1, 4, 32))


def test_public_config() -> None:
    """llava-hf's sparse file, the original's, and what is refused."""
    hf = {
        "model_type": "llava",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    assert llava_config(hf) == LlavaConfig()
    linear = {key: value for key, value in ORIGINAL.items() if key != "mm_projector_type"}
    assert llava_config(linear, TOWER).projector == "linear"
    assert Llava(llava_config(linear, TOWER)).projector[0].weight.shape == (256, 128)
    expected = LlamaConfig(width=256, mlp=688, layers=4, heads=8, kv_heads=8)
    assert llava_config(ORIGINAL, TOWER).llama == expected
    with pytest.raises(ValueError, match="CLIP"):
        llava_config(ORIGINAL)
    for key, value in (
        ("mm_hidden_size", 1024),
        ("mm_projector_type", "mlp3x_gelu"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
        ("mm_patch_merge_type", "spatial_unpad"),
    ):
        with pytest.raises(ValueError, match=str(value)):
            llava_config(ORIGINAL | {key: value}, TOWER)
    with pytest.raises(KeyError, match="mm_vision_select_layer"):
        llava_config({"mm_hidden_size": 128}, TOWER)
    with pytest.raises(ValueError, match="'full'"):
        llava_config(hf | {"vision_feature_select_strategy": "full"})
