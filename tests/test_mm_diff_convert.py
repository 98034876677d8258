"""The released folder of MM-Diff, made of pseudo-random weights, goes into a bundle and draws."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moma
from convert_weights import convert as convert_weights
from moma import Bundle, Job
from moma.inputs.faces import Face
from moma.methods.mm_diff.adapter import MMDiffAdapter
from tests.helpers import far, image, latents, mask, same
from tests.mm_diff_release import Files, base_bundle, released, small_adapter, write
from tests.tiny import TinyConfig, build_tiny_bundle, tiny_sdxl


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return base_bundle(tmp_path_factory.mktemp("base") / "bundle")


@pytest.fixture(scope="module")
def adapter(base: Bundle) -> MMDiffAdapter:
    return small_adapter(base)


def converted(folder: Path, base: Bundle, files: Files, said: list[str] | None = None) -> Bundle:
    source = write(folder / "portrait_generation", files)
    convert_weights([source], folder / "bundle", base, say=[].append if said is None else said.append)
    return Bundle.open(folder / "bundle")


def state(bundle: Bundle) -> dict[str, Tensor]:
    return bundle.state("mm_diff")


def draw(bundle: Bundle, **config: object) -> Tensor:
    pipe = moma.load(bundle, "mm-diff", device="cpu", dtype="fp32", config=config)
    landmarks = torch.tensor([[30.0, 30], [60, 30], [45, 50], [33, 65], [57, 65]])
    faces = [Face(torch.randn(512, generator=torch.Generator().manual_seed(i)), landmarks) for i in range(2)]
    people = tuple(
        pipe.encode_subject(image(i), mask(30), word, face=faces[i]) for i, word in enumerate(("cat", "dog"))
    )
    return latents(pipe, [Job(people, "a cat and a dog", 0, negative="snow")])


def test_converts_and_draws(tmp_path: Path, base: Bundle, adapter: MMDiffAdapter) -> None:
    said: list[str] = []
    bundle = converted(tmp_path, base, released(base, adapter), said)
    assert "note: portrait_generation: text encoders with LoRAs: 1, 2" in said
    assert bundle.config("mm_diff") == adapter.cfg
    for name, tensor in state(bundle).items():
        assert torch.equal(tensor, adapter.state_dict()[name]), name
    public, trained = (bundle.state(name) for name in ("mm_diff_public", "mm_diff_vision"))
    differ = {name for name in public if not torch.equal(public[name], trained[name])}
    assert differ and all(name.startswith("encoder.layers.2.") for name in differ)
    found = draw(bundle)
    assert found.isfinite().all()
    assert not torch.allclose(found, draw(bundle, text_lora="both"), atol=1e-2)
    assert not torch.allclose(found, draw(bundle, fuse_scale=0.0), atol=1e-2)


def test_loras_in_16_bit_weights(tmp_path: Path, base: Bundle, adapter: MMDiffAdapter) -> None:
    """Are added in float32 and rounded once; K, V of the subjects' tokens are the base's own."""
    bundle = converted(tmp_path, base, released(base, adapter))
    method = moma.load(bundle, "mm-diff", device="cpu", dtype="bf16", pack=False).method
    plain, lora = bundle.build("unet", dtype=torch.bfloat16), adapter.state_dict()
    blocks = zip(plain.transformer_blocks(), method.base.unet.transformer_blocks(), strict=True)
    for i, (block, (own, changed)) in enumerate(zip(method.frozen, blocks, strict=True)):
        for name, frozen in zip(("to_k", "to_v"), block, strict=True):
            before, after = (getattr(one.attn2, name).weight for one in (own, changed))
            stem = f"unet.{i}.attn2.{name[-1]}"
            assert torch.equal(frozen, before)
            product = lora[f"{stem}.up"] @ lora[f"{stem}.down"]
            assert torch.equal(after, (before.float() + product).bfloat16()) and far(after, before)


def old_names(files: Files) -> None:
    text = files["text_encoder_adapter"]
    for key in [key for key in text if ".self_attn." in key]:
        start, _, rest = key.partition(".self_attn.")
        name, end = rest.split("_proj.lora_linear_layer")
        text[f"{start}.self_attn.to_{name}_lora{end}"] = text.pop(key)


def alphas(files: Files) -> None:
    """Half of the rank, in B twice as large: the same change."""
    text = files["text_encoder_adapter"]
    for key in [key for key in text if key.endswith(".up.weight")]:
        text[key.replace("lora_linear_layer.up.weight", "alpha")] = torch.tensor(text[key].shape[1] / 2)
        text[key] = 2 * text[key]


def position_ids(files: Files) -> None:
    files["custom"]["image_encoder"]["vision_model.embeddings.position_ids"] = torch.arange(17)[None]


@pytest.mark.parametrize("change", [old_names, alphas, position_ids])
def test_other_spellings(
    tmp_path: Path, base: Bundle, adapter: MMDiffAdapter, change: Callable[[Files], None]
) -> None:
    files = released(base, adapter)
    change(files)
    found = state(converted(tmp_path, base, files))
    for name, tensor in adapter.state_dict().items():
        same(found[name], tensor, 1e-6)


def one_encoder(files: Files) -> None:
    text = files["text_encoder_adapter"]
    for key in [key for key in text if key.startswith("text_encoder_2.")]:
        del text[key]


def test_loras_of_one_text_encoder(tmp_path: Path, base: Bundle, adapter: MMDiffAdapter) -> None:
    files, said = released(base, adapter), []
    one_encoder(files)
    bundle = converted(tmp_path, base, files, said)
    assert "note: portrait_generation: text encoders with LoRAs: 1" in said
    assert bundle.config("mm_diff").text_2 is None and bundle.config("mm_diff").text_1
    assert torch.equal(draw(bundle), draw(bundle, text_lora="both"))


def without(part: str, key: str) -> Callable[[Files], object]:
    return lambda files: files[part].pop(key)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda files: files.pop("text_encoder_adapter"), "text_encoder_adapter"),
        (without("custom", "mm_fuse_two"), "fuse"),
        (without("unet_adapter", "3.to_k_lora_image.up.weight"), "image.k.up"),
        (lambda files: files["unet_adapter"].update({"3.gate": torch.ones(1)}), "gate"),
        (lambda files: files["unet_adapter"].update({"99.to_q_lora.up.weight": torch.ones(1)}), "99"),
        (lambda files: files["custom"]["image_encoder"].update({"vision_model.x": torch.ones(1)}), "x"),
        (lambda files: files["custom"]["face_embeds_proj"].pop("refiner.proj_in.weight"), "proj_in"),
    ],
)  # fmt: skip
def test_others_are_refused(
    tmp_path: Path, base: Bundle, adapter: MMDiffAdapter, change: Callable[[Files], object], field: str
) -> None:
    files = released(base, adapter)
    change(files)
    with pytest.raises(ValueError, match=field) as error:
        converted(tmp_path, base, files)
    assert "\n" not in str(error.value) and not (tmp_path / "bundle").exists()


def test_needs_a_clip(tmp_path: Path, adapter: MMDiffAdapter, base: Bundle) -> None:
    build_tiny_bundle(tmp_path / "base", 0, TinyConfig(64, networks=tiny_sdxl()))
    with pytest.raises(ValueError, match="clip-vit-large-patch14"):
        converted(tmp_path, Bundle.open(tmp_path / "base"), released(base, adapter))
