"""The released MoMA, reproduced: single attention layers, the autoencoder, and the whole sampling loop.

Preset RELEASE, float32, both attention implementations. Tolerances are absolute.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.attention import split_heads
from models.clip import CLIPText, CLIPTextConfig
from models.tokenizers import Encoding
from models.unet import Attention, UNet, UNetConfig, attention_layers
from models.vae import VAE, VAEConfig
from moma import RELEASE, Job, MoMA, MoMASubject, Pipeline, SampleConfig
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.attention import Gate, ReferenceLayer, context_cross_attention, drop_background
from moma.methods.moma.conditioning import MoMAConditioning, MoMAHook, ReferenceHook
from moma.methods.moma.masks import m_ref_of_layer, min_max
from moma.sampling.base import Base
from moma.sampling.diffusion import solver_steps
from moma.sampling.sampler import Step, denoise
from tests.golden_files import assert_recorded, excerpt, golden
from tests.helpers import condition
from tests.recipe import ellipse, fill, normal, uniform

LAYER = 1e-5  # tolerance of a layer's output
PIPELINE = 5e-4  # of the loop's noise prediction, whose values go up to 12
IMPLS = ["explicit", "fused"]
UNET = UNetConfig(channels=(64, 128, 256, 256))


def tensor(key: str, *shape: int) -> Tensor:
    return torch.from_numpy(normal(f"input/{key}", shape))


def official_key(name: str, unet: UNetConfig = UNET) -> str:
    """Our adapter's parameter name -> the key whose recipe weights the official file holds."""
    down = sum(d * unet.resnets for d in unet.depth)
    part, layer, rest = name.split(".", 2) if name.startswith(("context", "subject")) else ("", "", name)
    if not part:
        return name.removeprefix("projector.") if name.startswith("projector") else name
    i, last = int(layer), len(attention_layers(unet)) - 1  # official order: down, up, mid
    position = last if i == down else i if i < down else i - 1
    rest = rest.replace("to_k", "to_k_ip").replace("to_v", "to_v_ip").replace("scale", "scale_learnable")
    return f"{2 * position + (part == 'context')}.{rest}"


def old_vae_key(name: str) -> str:
    """Current name -> the name in the public file that the weights' seeds were taken from."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, was in old.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
    return name


def filled_adapter(unet: UNetConfig) -> Adapter:
    adapter = Adapter(AdapterConfig(), unet)
    fill(adapter, lambda name: official_key(name, unet))
    return adapter


def first_layer(name: str) -> Attention:
    layer = Attention(320, 768 if name == "attn2" else 320, 8)
    fill(layer, lambda key: f"down_blocks.0.attentions.0.transformer_blocks.0.{name}.{key}")
    return layer


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
def test_cross_attention_layer(impl: str) -> None:
    recorded, layer, adapter = (
        golden("attn_cross"),
        first_layer("attn2"),
        Adapter(AdapterConfig(), UNetConfig()),
    )
    fill(adapter.context[0], lambda key: f"1.{key.replace('.weight', '_ip.weight')}")
    hidden, context = tensor("attn_cross/hidden", 2, 1024, 320), tensor("attn_cross/context", 2, 81, 768)
    text, tokens = context[:, :77], context[:, 77:]
    k, v = (split_heads(new(tokens), 8) for new in (adapter.context[0].to_k, adapter.context[0].to_v))
    mask = torch.from_numpy(uniform("input/attn_cross/mask_prev", (1, 1, 512, 512)))
    label = torch.zeros(2, 77)
    label[:, [4, 7]] = 1

    def run(m_gen: Tensor | float) -> tuple[Tensor, Tensor]:
        return layer(
            hidden,
            text,
            lambda q, k_t, v_t: context_cross_attention(q, k_t, v_t, k, v, Gate(m_gen), label, impl),
        )

    rows = mask[:, :, ::16, ::16].reshape(1, 1, 1024, 1)
    out, label_map = run(rows)
    assert_recorded(out, recorded["out_masked"], LAYER)
    label_map = min_max(label_map.unflatten(1, (1, 32, 32)), (1, 2, 3), RELEASE.m_gen_eps)
    assert_recorded(label_map, recorded["mask_i_native"], LAYER)
    assert_recorded(run(1.0)[0], recorded["out_inject"], LAYER)
    assert_recorded(run(1.0)[0], recorded["out_nomask"], LAYER)
    assert_recorded(run(0.5)[0], recorded["out_scale0.5"], LAYER)
    plain = lambda n: layer(hidden, text[:, :n], None)[0]  # noqa: E731
    assert_recorded(plain(77), recorded["out_disabled"], LAYER)
    assert_recorded(plain(73), recorded["out_disabled77"], LAYER)  # the reference pass: 4 tokens cut


@torch.no_grad()
@pytest.mark.parametrize("impl", IMPLS)
def test_self_attention_layer(impl: str) -> None:
    recorded, layer, adapter = (
        golden("attn_self"),
        first_layer("attn1"),
        Adapter(AdapterConfig(), UNetConfig()),
    )
    fill(adapter.subject[0], lambda key: f"0.{official_subject_key(key)}")
    torch.testing.assert_close(adapter.subject[0].scale, recorded["scale_learnable"], rtol=0, atol=0)
    method = replace(RELEASE, attention=impl)
    ref, hidden = tensor("attn_self/ref", 1, 1024, 320), tensor("attn_self/hidden", 2, 1024, 320)
    m_gen = torch.from_numpy(uniform("input/attn_self/mask_ig", (1, 1, 512, 512))).expand(2, -1, -1, -1)
    m_ref = torch.from_numpy(ellipse(512, 512, 256, 200, 180, 120))

    def extract(m_ref: Tensor) -> tuple[Tensor, ReferenceLayer]:
        key_masks = {(32, 32): m_ref_of_layer(m_ref, (32, 32), method.keep_one_key)}
        hook = ReferenceHook(adapter, key_masks, method.attention)
        return layer(ref, ref, lambda q, k, v: hook.self_attn(0, q, k, v, (32, 32)))

    def run(m_ref: Tensor, m_gen: Tensor | None, beta: list[float], subject_on: bool = True) -> Tensor:
        stored = extract(m_ref)[1]
        both = ReferenceLayer(*(torch.cat([x, x]) for x in (stored.k, stored.v, stored.key_mask)))
        both = drop_background(both) if impl == "fused" else both
        cond = MoMAConditioning(
            text=hidden, added=None, label=hidden, context=[], reference=[both],
            lam=[adapter.subject[0].scale], beta=torch.tensor(beta)[:, None, None, None], method=method,
        )  # fmt: skip
        hook = MoMAHook(cond, subject_on, m_gen)
        return layer(hidden, hidden, lambda q, k, v: hook.self_attn(0, q, k, v, (32, 32)))[0]

    out, stored = extract(m_ref)
    assert_recorded(out, recorded["out_extract"], LAYER)
    assert_recorded(stored.k[0], recorded["store_ks"], LAYER)
    assert_recorded(stored.v[0], recorded["store_vs"], LAYER)
    assert_recorded(stored.key_mask.float().view(1, 1, 32, 32), recorded["mask_id_at_32"], 0)
    assert_recorded(run(m_ref, m_gen, [1.0, 1.0]), recorded["out_s1.0"], LAYER)
    assert_recorded(run(m_ref, m_gen, [0.4, 0.4]), recorded["out_s0.4"], LAYER)
    assert_recorded(run(m_ref, m_gen, [0.3, 0.9]), recorded["out_stensor"], LAYER)
    assert_recorded(run(m_ref, None, [1.0, 1.0]), recorded["out_s1.0_noig"], LAYER)
    assert_recorded(run(m_ref * 0, None, [1.0, 1.0]), recorded["out_emptyid"], LAYER)
    assert_recorded(run(m_ref * 0 + 1, None, [1.0, 1.0]), recorded["out_fullid"], LAYER)
    assert_recorded(run(m_ref, m_gen, [1.0, 1.0], subject_on=False), recorded["out_disabled"], LAYER)


def official_subject_key(key: str) -> str:
    return official_key(f"subject.0.{key}").split(".", 1)[1]


@torch.no_grad()
def test_autoencoder(vae: VAE) -> None:
    recorded = golden("vae_full")
    image = torch.from_numpy(2 * uniform("input/vae_full/image", (1, 3, 256, 256)) - 1)
    mean, std = vae.encode(image)
    moments = recorded["moments"]
    assert_recorded(torch.cat([mean, 2 * std.log()], dim=1), moments, 1e-4)
    assert_recorded(std, recorded["std"], 1e-4)
    assert_recorded(vae.decode(tensor("vae_full/latent", 1, 4, 32, 32)), recorded["decoded"], 1e-4)


@pytest.fixture(scope="module")
def vae() -> VAE:
    vae = VAE(VAEConfig())
    fill(vae, old_vae_key)
    return vae


class RecordedTokenizer:
    """The public CLIP tokenizer's answers for the recorded texts (its files are not ours to carry)."""

    def __init__(self, recorded: dict[str, Tensor]) -> None:
        self.table = {
            "car": recorded["ids_label"],
            "photo of a car. A car in autumn with falling leaves.": recorded["ids_cond"],
            "": recorded["ids_uncond"],
        }

    def ids(self, texts: list[str]) -> Tensor:
        return torch.cat([self.table[text] for text in texts])

    def encode(self, text: str) -> Encoding:
        return Encoding(tuple(self.table[text][0].tolist()), spans=(), dropped=())


@pytest.fixture(scope="module")
def pipe(vae: VAE) -> Iterator[Pipeline]:
    unet, text, adapter = UNet(UNET), CLIPText(CLIPTextConfig()), filled_adapter(UNET)
    fill(unet)
    fill(text, lambda key: f"text_model.{key}")
    base = Base(unet, vae, (text,), (RecordedTokenizer(golden("unet_moma_small")),), image_size=256)
    yield Pipeline(MoMA(base, adapter, None, RELEASE))


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, int], list[ReferenceLayer]]:
    """The reference passes so far."""
    return {}


def reference(pipe: Pipeline, known: dict[tuple[str, int], list[ReferenceLayer]]) -> list[ReferenceLayer]:
    """The recorded case's reference pass, computed once for each way to compute it."""
    key = pipe.method.config.attention, pipe.method.config.reference_text_cut
    if key not in known:
        image = torch.from_numpy(2 * uniform("input/unet_moma_small/image", (1, 3, 256, 256)) - 1)
        m_ref = torch.from_numpy(ellipse(512, 512, 256, 200, 180, 120))
        noises = [
            tensor(f"unet_moma_small/{name}", 1, 4, 32, 32) for name in ("posterior_noise", "ref_noise")
        ]
        known[key] = pipe.method.reference_pass(image, m_ref, "car", 0, *noises)
    return known[key]


PROMPT = "A car in autumn with falling leaves."


def job(layers: list[ReferenceLayer], name: str, init: int, strength: float) -> Job:
    """The feature decoder's recording is compared in tests/test_llava.py; here its embedding is an input."""
    features = {PROMPT: tensor("unet_moma_small/llava_emb", 1, 1024)}
    latents = tensor(f"unet_moma_small/init_latents/{name}/{init}", 1, 4, 32, 32)
    return Job(MoMASubject("car", None, layers, features), PROMPT, 0, strength=strength, latents=latents)


@torch.no_grad()
def test_reference_pass(pipe: Pipeline, references: dict) -> None:
    recorded = golden("unet_moma_small")
    layers = reference(pipe, references)
    mid = 6  # the middle block, the release's processor 30
    for name, layer in (("0", 0), ("30", mid)):
        assert_recorded(layers[layer].k[0], recorded[f"ref_k_{name}"], 1e-4)
        assert_recorded(layers[layer].v[0], recorded[f"ref_v_{name}"], 1e-4)
    tokens = pipe.method.adapter.projector(
        torch.cat([torch.zeros(1, 1024), tensor("unet_moma_small/llava_emb", 1, 1024)])
    )
    assert_recorded(tokens[:1], recorded["image_prompt_uncond"], LAYER)
    assert_recorded(tokens[1:], recorded["image_prompt_cond"], LAYER)
    text = pipe.base.text_encoders[0](recorded["ids_cond"])[0]
    assert_recorded(text, recorded["text_cond"], 1e-4)


def check(trace: list[Step], name: str) -> None:
    """Every step's timestep, noise prediction, latents and mask are the recorded ones."""
    recorded = golden("unet_moma_small")
    assert trace and [step.t for step in trace] == recorded[f"{name}.timesteps"][: len(trace)].tolist()
    for part, tolerance in (("noise_pred", PIPELINE), ("latents", None), ("m_gen", 1e-4)):
        found = [step.state["m_gen"] if part == "m_gen" else getattr(step, part) for step in trace]
        theirs = recorded[f"{name}.{'M_gen' if part == 'm_gen' else part}"]
        bound = tolerance or 1e-4 * theirs.abs().max().item()
        assert_recorded(torch.cat(found), theirs[: len(trace)], bound)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "init", "strength", "steps", "below", "count"),  # the first `count` of `steps`
    [
        ("s0.4", 10, 0.4, 6, 950, 3),
        pytest.param("s0.4", 10, 0.4, 6, 950, 6, marks=pytest.mark.slow),
        ("trange600", 3, 1.0, 6, 600, 4),
        pytest.param("trange600", 3, 1.0, 6, 600, 6, marks=pytest.mark.slow),
        ("t950", 0, 1.0, 20, 950, 3),
        pytest.param("t950", 0, 1.0, 20, 950, 20, marks=pytest.mark.slow),
    ],
)
def test_sampling_loop(
    pipe: Pipeline,
    references: dict,
    name: str,
    init: int,
    strength: float,
    steps: int,
    below: int,
    count: int,
) -> None:
    pipe = pipe.with_config(replace(RELEASE, attention="fused", subject_below_t=below))
    one = job(reference(pipe, references), name, init, strength)
    schedule = solver_steps(pipe.base.schedule, steps, "ddim", "leading")[:count]
    conditioning = condition(pipe, [one], SampleConfig())
    check(list(denoise(pipe.base.unet, conditioning, schedule, one.latents, 7.5, "ddim")), name)


class Kept:
    """Every step of a drawing."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.keep = self.steps.append

    def read(self) -> None: ...


@torch.no_grad()
@pytest.mark.parametrize("impl", [pytest.param("explicit", marks=pytest.mark.slow), "fused"])
def test_drawing(pipe: Pipeline, references: dict, impl: str) -> None:
    """`Pipeline.run` from start noise to bytes."""
    pipe, trace = pipe.with_config(replace(RELEASE, attention=impl)), Kept()
    config = SampleConfig(steps=6, height=256, width=256, grid="leading")
    (result,) = pipe.run([job(reference(pipe, references), "s1.0", 1, 1.0)], config, resume=trace)
    check(trace.steps, "s1.0")
    ours = torch.from_numpy(np.array(result.image)).permute(2, 0, 1)[None]  # (1, 3, 256, 256) uint8
    theirs = golden("unet_moma_small")["s1.0.image"] * 255
    assert_recorded(ours, theirs, 1.0 + 0.05)  # truncation to bytes loses up to one step
    assert (excerpt(ours, theirs) == theirs.floor()).float().mean() > 0.99  # it truncates, as the release


@pytest.mark.slow  # the planted mistakes show the same
@torch.no_grad()
def test_wrong_semantics_are_seen(pipe: Pipeline, references: dict) -> None:
    """The recorded case is sharp enough to tell the release from its neighbours."""
    recorded = golden("unet_moma_small")
    path = solver_steps(pipe.base.schedule, 6, "ddim", "leading")
    for change in (
        {"reference_text_cut": 0},
        {"context_masked": False},
        {"m_gen_threshold": 0.0},
        {"m_gen_norm": "none"},
    ):
        other = pipe.with_config(replace(RELEASE, **change))
        one = job(reference(other, references), "s1.0", 1, 1.0)
        conditioning = condition(other, [one], SampleConfig())
        steps = denoise(
            other.base.unet,
            conditioning,
            path[:2],
            one.latents,
            7.5,
            "ddim",
        )
        ours = torch.cat([step.noise_pred for step in steps])
        with pytest.raises(AssertionError):
            assert_recorded(ours, recorded["s1.0.noise_pred"][:2], 10 * PIPELINE)
