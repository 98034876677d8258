"""MM-Diff against recordings of the released code (tests/golden/README.md)."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from models.attention import merge_heads, split_heads
from models.clip_image import MEAN, STD, normalise
from models.tokenizers import Encoding
from models.unet import Attention, KeysValues, UNetConfig, attention_layers
from moma import Job, SampleConfig
from moma.inputs.faces import Face, aligned, similarity
from moma.methods.mm_diff.adapter import BlockLoRA, MMDiffSizes
from moma.methods.mm_diff.images import face_pixels, padded
from moma.methods.mm_diff.method import MMDiff, MMDiffSubject, SubjectHook
from moma.methods.mm_diff.prompts import MarkedPrompt
from moma.methods.text import Prepared
from moma.sampling.diffusion import solver_steps
from moma.sampling.sampler import denoise
from tests.golden_files import CARRIED, assert_recorded, golden
from tests.mm_diff_case import SIZES, UNET, adapter, filled, recorded_method, tensor, unit
from tests.recipe import uniform

LAYER = 1e-5  # tolerance of attention and modules
NEGATIVE = "longbody, lowres, bad anatomy, bad hands, low quality"
# Attention of one SDXL layer
WIDE = UNetConfig(
    channels=(640,), depth=(1,), mid_depth=0, heads=(10,), context_dim=(2048,), resnets=1, norm_groups=8
)


# --- attention and modules ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block() -> BlockLoRA:
    def key(name: str) -> str:
        part, layer, end = name.split(".")
        image = "_image" if part == "image" else ""
        return f"{int(part != 'attn1')}.to_{layer}_lora{image}.{end}.weight"

    return filled(BlockLoRA(attention_layers(WIDE)[0], 64), key)


def layer(name: str) -> Attention:
    return filled(Attention(640, 640 if name == "attn1" else 2048, 10), lambda key: f"{name}.{key}")


def with_lora(layer: Attention, pairs: torch.nn.ModuleDict) -> Attention:
    for name, pair in pairs.items():
        linear = layer.to_out[0] if name == "out" else getattr(layer, f"to_{name}")
        linear.weight += pair.product()
    return layer


@pytest.fixture(scope="module")
def cross(block: BlockLoRA) -> tuple[Attention, KeysValues]:
    """A layer with its LoRAs, and K and V of the subjects' tokens."""
    plain, tokens = layer("attn2"), tensor("mmdiff_attn/image_tokens", 2, 8, 2048)
    k, v = (
        split_heads(torch.nn.functional.linear(tokens, to.weight) + block.image[name](tokens), 10)
        for name, to in (("k", plain.to_k), ("v", plain.to_v))
    )
    assert_recorded(merge_heads(k)[0], golden("mmdiff_attn")["cross.image_key_first_row"], LAYER)
    return with_lora(plain, block.attn2), (k, v)


@pytest.mark.parametrize(
    ("variant", "present", "scale"),
    [
        ("one_absent", [[1, 1], [1, 0]], 0.8),
        ("both", [[1, 1], [1, 1]], 0.8),
        ("second_only", [[0, 1], [0, 1]], 0.8),
        ("uncond_row", [[0, 0], [1, 1]], 0.8),
        ("repeated_mask", [[0, 0], [1, 1]], 0.8),
        ("fuse0", [[1, 1], [1, 1]], 0.0),
        ("fuse1", [[1, 1], [1, 1]], 1.0),
    ],
)
def test_cross_attention(
    cross: tuple[Attention, KeysValues], variant: str, present: list[list[int]], scale: float
) -> None:
    changed, layers = cross
    keep = torch.tensor(present).bool().repeat_interleave(4, dim=1)  # (2, 8)
    scales = scale * keep.any(dim=1).float()
    hook = SubjectHook([layers], keep[:, None, None], scales[:, None, None, None])
    text, hidden = tensor("mmdiff_attn/text", 2, 77, 2048), tensor("mmdiff_attn/hidden_states", 2, 20, 640)
    out, _ = changed(hidden, text, lambda *qkv: hook.cross_attn(0, *qkv, (4, 5)))
    assert_recorded(out, golden("mmdiff_attn")[f"cross.{variant}"], LAYER)


def test_self_attention(block: BlockLoRA) -> None:
    hidden = tensor("mmdiff_attn/hidden_states", 2, 20, 640)
    out, _ = with_lora(layer("attn1"), block.attn1)(hidden, hidden, None)
    assert_recorded(out, golden("mmdiff_attn")["self.out"], LAYER)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "sizes", "unet", "count", "patches"),
    [
        ("mmdiff_modules", SIZES, UNET, 3, 65),
        pytest.param(
            "mmdiff_modules_full", MMDiffSizes(), WIDE, 2, 257,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif("MOMA_GOLDEN" not in os.environ, reason="needs the full recordings"),
            ],
        ),
    ],
)  # fmt: skip
def test_modules(case: str, sizes: MMDiffSizes, unet: UNetConfig, count: int, patches: int) -> None:
    recorded, own = golden(case), adapter(sizes, unet)
    images = own.images(tensor(f"{case}/image_embeds", count, sizes.embed_dim))
    for i, (width, fuse) in enumerate(zip(sizes.text_dims, own.fuse, strict=True)):
        assert_recorded(images[i], recorded[f"obj_embeds_{i + 1}"], LAYER)
        word = tensor(f"{case}/word_{i + 1}", count, width)
        assert_recorded(fuse(word, images[i]), recorded[f"fused_word_{i + 1}"], LAYER)
    face, seen = (
        unit(f"{case}/face_embeds", count, 512),
        tensor(f"{case}/clip_face_embeds", count, patches, sizes.patch_dim),
    )
    head = own.head
    x = head.layer_norm(head.proj(face).unflatten(-1, (4, -1)))
    assert_recorded(x, recorded["face_tokens"], LAYER)
    dense, (attend, feed_forward) = head.refiner.proj_in(seen), head.refiner.layers[0]
    assert_recorded(attend(x, dense), recorded["layer0_attn"], LAYER)
    first = x + attend(x, dense)
    assert_recorded(first + feed_forward(first), recorded["after_layer0"], LAYER)
    assert_recorded(head.refiner(x, seen), recorded["refined"], LAYER)
    assert_recorded(head(face, seen), recorded["subject_embeds"], LAYER)
    none = head(face[:1] * 0, seen[:1] * 0)
    assert_recorded(none, recorded["uncond_subject_embeds"], LAYER)


# --- the whole loop -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def method() -> MMDiff:
    return recorded_method()


def encodings(ids: Tensor) -> tuple[Encoding, ...]:
    return tuple(Encoding(tuple(row.tolist()), spans=(), dropped=()) for row in ids)


def subjects(method: MMDiff, run: str, images: int, faces: int) -> list[MMDiffSubject]:
    """One subject for each image, the last one with the faces that are left."""
    key, recorded = f"mmdiff_loop_small/{run}", golden("mmdiff_loop_small")
    pixels = torch.from_numpy(uniform(f"input/{key}/object_pixel_values", (images, 3, 224, 224)))
    embeddings = method.vision(normalise(pixels))[1]
    assert_recorded(embeddings, recorded[f"{run}.image_embeds"], 3e-5)
    seen = method.patches.hidden(tensor(f"{key}/face_pixel_values", faces, 3, 224, 224), -2)
    tokens = method.adapter.head(unit(f"{key}/face_embeds", faces, 512), seen)  # (faces, 4, X)
    assert_recorded(tokens.flatten(0, 1), recorded[f"{run}.subject_tokens"][1], 3e-5)
    all_of = [
        MMDiffSubject("", None, embeddings[min(i, images - 1)][None], tokens[i][None]) for i in range(faces)
    ]
    return [*all_of[: images - 1], all_of[images - 1].with_more(all_of[images:])]


@torch.no_grad()
@pytest.mark.parametrize(
    ("run", "images", "faces", "steps", "start"),
    [("one", 1, 1, 5, 2), ("refs3", 1, 3, 4, 0), ("two", 2, 2, 5, 2)],
)
def test_loop(method: MMDiff, run: str, images: int, faces: int, steps: int, start: int) -> None:
    recorded, ids = golden("mmdiff_loop_small"), load_file(CARRIED / "mmdiff_ids.safetensors")
    method = method.with_config(replace(method.config, start_merge_step=start))
    negative = None if run == "refs3" else ids["negative_ids"]
    places = tuple(recorded[f"{run}.image_token_idx"][0, :images].tolist())
    prompt = MarkedPrompt("", encodings(ids[f"{run}.ids"]), (), (places, places))
    latents = tensor(f"mmdiff_loop_small/{run}/init_latents", 1, 4, 32, 32)
    people = subjects(method, run, images, faces)
    job = Job(tuple(people), "", 0, "" if negative is None else NEGATIVE, text=prompt, latents=latents)
    config = SampleConfig(steps=steps, guidance=5.0, grid="leading", height=256, width=256)
    prepared = [Prepared(job, prompt, encodings(ids[f"{run}.ids"] if negative is None else negative))]
    for name, merged in (("pure", False), ("fused", True)):
        states, pooled = method.read_texts(prepared, merged)
        assert_recorded(states, recorded[f"{run}.text_{name}"], 1e-4)
        assert_recorded(pooled, recorded[f"{run}.pooled_{name}"], 1e-4)
    schedule = solver_steps(method.base.schedule, steps, "ddim", "leading")
    assert [step.t for step in schedule] == recorded[f"{run}.timesteps"].tolist()
    done = list(denoise(method.base.unet, method.condition(prepared, config), schedule, latents, 5.0, "ddim"))
    noise = torch.cat([step.noise_pred for step in done])
    assert_recorded(noise, recorded[f"{run}.noise_pred"], 2e-4)
    scales = torch.stack([step.alpha_next.sqrt() for step in schedule])[:, None, None, None]
    theirs = recorded[f"{run}.latents"]
    ours = torch.cat([step.latents for step in done]) / scales  # Euler's scaling
    assert_recorded(ours, theirs, 4e-5 * float(theirs.abs().max()))


# --- images -------------------------------------------------------------------------------------------


def drawn(h: int, w: int) -> Image.Image:
    """The recordings' image."""
    y, x = np.mgrid[:h, :w].astype(np.float64)
    waves = [np.sin(x / (7 + 3 * i) + y / (11 - 2 * i) + i) * np.cos(y / (17 + i) - x / 29) for i in range(3)]
    return Image.fromarray(
        np.clip(np.round(127.5 + 127.5 * np.stack(waves, axis=-1)), 0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize(("name", "h", "w"), [("wide", 201, 300), ("tall", 300, 187), ("square", 260, 260)])
def test_whole_images(name: str, h: int, w: int) -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    ours = (padded(drawn(h, w), 224) * std + mean) * 255
    assert_recorded(ours, golden("mmdiff_preprocess")[f"{name}.object_u8"].float(), 1e-3)


@pytest.mark.parametrize("side", [224, 112])
def test_faces(side: int) -> None:
    recorded = golden("mmdiff_preprocess")
    landmarks = recorded["face.landmarks"]
    np.testing.assert_allclose(similarity(landmarks, side), recorded[f"face.M{side}"].numpy(), atol=1e-4)
    crop = torch.from_numpy(np.array(aligned(drawn(300, 260), landmarks, side)))
    assert_recorded(crop, recorded[f"face.crop{side}_rgb"].float(), 1)


def test_pixels_of_a_face() -> None:
    recorded = golden("mmdiff_preprocess")
    seen = face_pixels(drawn(300, 260), Face(torch.ones(512), recorded["face.landmarks"]), 224)
    assert_recorded(seen, recorded["face.pixel_values_every8"], 1.001 / 255 / min(STD))  # a byte
