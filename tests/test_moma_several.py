"""MoMA with several subjects: Eq. 3 summed, each subject's cells, texts by region, images of one subject."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import attention, attention_probs
from moma import DEFAULT, Job, Pipeline
from moma.methods.moma.attention import Gate, ReferenceLayer, drop_background, gate_inside, side_by_side
from moma.methods.moma.conditioning import MoMAConditioning
from moma.methods.moma.config import PRESETS
from moma.methods.moma.several import (
    SeveralConditioning,
    SeveralHook,
    SubjectRows,
    allowed_of,
    attention_apart,
    blurred,
    key_scores,
    owned,
    reads_of,
)
from moma.methods.prompts import own_prompt, places_of, read_prompt
from moma.sampling.cuda_graphs import GraphedUNet, RecordableHook
from moma.sampling.diffusion import solver_steps
from moma.sampling.sampler import Step, denoise
from tests.helpers import GRAPHED, QUICK, Rerun, condition, embed, image, latents, mask, same

WORDS = ("cat", "dog", "vase")
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
BOTH = "a cat and a dog in the snow"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def subjects(pipe: Pipeline) -> list[Any]:
    return encoded(pipe)


def encoded(pipe: Pipeline) -> list[Any]:
    """Of different sizes."""
    return [pipe.encode_subject(image(i), mask(12 + 9 * i), word) for i, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def jobs(subjects: list[Any]) -> list[Job]:
    """None, one, two, three, two in regions, one of two in a region."""
    cat, dog, vase = subjects
    return [
        Job((), "a house in the snow", 0),
        Job(dog, "a dog", 1, negative="snow"),
        Job((cat, dog), BOTH, 2, strength=(1.2, None)),
        Job((vase, cat, dog), "a cat, a dog and a vase", 3),
        Job((cat, dog), BOTH, 4, regions=(LEFT, RIGHT)),
        Job((cat, vase), "a cat and a vase", 5, regions=((0.2, 0.2, 0.8, 0.8), None)),
    ]


def configured(pipe: Pipeline, **changes: Any) -> Pipeline:
    return pipe.with_config(replace(DEFAULT, **changes))


# --- the equation ------------------------------------------------------------------------------------


def several(impl: str, on: bool = True, **changes: Any) -> SeveralHook:
    """Two subjects in the first of two images, one in the second; R = 4 rows of a 4x4 grid."""
    method = replace(DEFAULT, attention=impl, **changes)
    keep = [torch.arange(9).expand(4, -1) < n for n in (5, 9)]
    references = [
        ReferenceLayer(rand(4, 3, 9, 8, seed=s), rand(4, 3, 9, 8, seed=5 + s), keep[s]) for s in (0, 1)
    ]
    if impl == "fused":
        references = [drop_background(one) for one in references]
    context = [(rand(4, 3, 2, 8, seed=10 + s), rand(4, 3, 2, 8, seed=15 + s)) for s in (0, 1)]
    beta = torch.tensor([0.4, 1.0, 0.4, 1.0])[:, None, None, None]
    allowed = torch.ones(2, 2, 4, 4, dtype=torch.bool)
    allowed[1, 1] = False
    label = torch.zeros(4, 2, 6)
    label[:, 0, 1] = label[:, 1, 3] = label[:, 1, 4] = 1
    rows = [SubjectRows([context[s]], [references[s]], beta / (s + 1)) for s in (0, 1)]
    cond = SeveralConditioning(
        [], None, label, rows, [torch.tensor([0.7])], allowed, None, frozenset({0}), method
    )
    m_gen = torch.zeros(2, 2, 4, 4)
    m_gen[0, 0, :2], m_gen[0, 1, 3], m_gen[1, 0, :, 1:] = 0.6, 0.9, 0.5
    return cond.hook(500 if on else 990, m_gen)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moma.methods.moma.attention.QUERY_BUCKET", 4)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("impl", ["explicit", "fused"])
def test_equation_3_is_summed(impl: str) -> None:
    """Against loops over rows, subjects and queries: each term with its own K', V', M_ref, M_gen and β."""
    q, k, v = (rand(4, 3, 16, 8, seed=s) for s in (20, 21, 22))
    hook, exact = several(impl), several("explicit")
    z, scores = hook.self_attn(0, q.clone(), k, v, (4, 4))
    m_gen = exact.masks["subject"].flatten(2)  # (R, S, N)
    expected = attention(q, k, v)
    for r in range(4):
        for s, one in enumerate(exact.cond.subjects):
            kept = one.reference[0].key_mask[r]
            for h in range(3):
                probs = (q[r, h] @ one.reference[0].k[r, h, kept].T / 8**0.5).softmax(dim=-1)
                term = probs @ one.reference[0].v[r, h, kept]
                expected[r, h] += 0.7 * term * m_gen[r, s, :, None] * one.beta[r, 0]
    same(z, expected, 1e-5)
    assert scores.shape == (2, 2, 4, 4)
    off, _ = several(impl, on=False).self_attn(0, q, k, v, (4, 4))
    assert torch.equal(off, attention(q, k, v, impl=impl))


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("impl", ["explicit", "fused"])
@pytest.mark.parametrize("masked", [True, False])
def test_context_acts_inside_its_own_m_gen(impl: str, masked: bool) -> None:
    """Unless the config says otherwise, and the image has one subject."""
    q, k, v = rand(4, 3, 16, 8, seed=20), rand(4, 3, 6, 8, seed=21), rand(4, 3, 6, 8, seed=22)
    hook = several(impl, context_masked=masked)
    z, maps = hook.cross_attn(0, q.clone(), k, v, (4, 4))
    expected, m_gen = (
        attention(q, k, v),
        hook.masks["subject"].flatten(2)[:, :, None, :, None],
    )  # (R, S, 1, N, 1)
    for s, one in enumerate(hook.cond.subjects):
        gate = m_gen[:, s].clone()
        if not masked:
            gate[1::2] = 1 - s  # the second image
        expected += attention(q, *one.context[0]) * gate
    same(z, expected, 1e-5)
    probs = attention_probs(q, k).mean(dim=1)  # (R, N, T)
    same(maps[:, 0].flatten(1), probs[..., 1], 1e-6)
    same(maps[:, 1].flatten(1), probs[..., 3] + probs[..., 4], 1e-6)


@pytest.mark.usefixtures("small_buckets")
def test_key_scores_by_hand_and_where_they_are_asked() -> None:
    """The mean over heads of log sum exp, in standard deviations of the foreground; gathering changes
    nothing."""
    q, keep = rand(2, 3, 16, 8, seed=1), torch.arange(9).expand(2, -1) < torch.tensor([[4], [9]])
    references = [ReferenceLayer(rand(2, 3, 9, 8, seed=s), rand(2, 3, 9, 8), keep) for s in (2, 3)]
    fore = torch.zeros(2, 1, 16, 1)
    fore[0, :, 3:9], fore[1, :, :5] = 0.5, 1.0
    found = key_scores(q, references, Gate(fore))
    for b, inside in ((0, slice(3, 9)), (1, slice(0, 5))):
        for s, one in enumerate(references):
            scores = q[b] @ one.k[b, :, keep[b]].mT / 8**0.5  # (H, N, M)
            raw = scores.exp().sum(dim=-1).log().mean(dim=0)[inside]
            same(found[b, s, inside], (raw - raw.mean()) / raw.std(correction=0), 1e-5)
            assert found[b, s].count_nonzero() == len(raw)
    asked = gate_inside(fore)
    assert asked.inside.shape == (2, 8)
    same(key_scores(q, [drop_background(one) for one in references], asked), found, 1e-5)
    nothing = key_scores(q, references, gate_inside(torch.zeros(2, 1, 16, 1)))
    assert nothing.shape == found.shape and not nothing.any()
    assert key_scores(q, references, Gate(torch.zeros(2, 1, 16, 1))).isfinite().all()


def test_each_cell_of_the_foreground_has_one_owner() -> None:
    m_gen, scores = torch.rand(2, 3, 4, 4), rand(2, 3, 4, 4)
    m_gen[0, :, 0] = 0
    allowed = torch.ones(2, 3, 4, 4, dtype=torch.bool)
    allowed[1, 2], allowed[1, :, 3] = False, False
    found = owned(m_gen, scores, allowed)
    assert torch.equal(found.amax(dim=1), m_gen.amax(dim=1).masked_fill(~allowed.any(dim=1), 0))
    assert ((found != 0).sum(dim=1) <= 1).all() and not found[~allowed].any()
    first = scores[0].argmax(dim=0)
    assert all(found[0, s].bool().equal((first == s) & m_gen[0].amax(dim=0).bool()) for s in range(3))


def test_blur_is_a_mean_of_what_there_is() -> None:
    x = rand(1, 2, 5, 5)
    found = blurred(x, 3)
    same(found[0, 1, 2, 3], x[0, 1, 1:4, 2:5].mean(), 1e-6)
    same(found[0, 0, 0, 0], x[0, 0, :2, :2].mean(), 1e-6)
    assert torch.equal(blurred(x, 1), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subjects_apart(dtype: torch.dtype) -> None:
    """No attention between two subjects' cells; the background attends and is attended to."""
    q, k, v = (rand(2, 3, 16, 8, seed=s).to(dtype) for s in (1, 2, 3))
    owners = torch.zeros(2, 16, 2, dtype=dtype)
    owners[:, :5, 0] = owners[:, 9:, 1] = 1
    found = attention_apart(q, k, v, owners, "fused")
    torch.testing.assert_close(
        found.float(), attention_apart(q.float(), k.float(), v.float(), owners.float(), "explicit"),
        rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05,
    )  # fmt: skip
    moved = attention_apart(q, k, v + 100 * owners[:, None, :, 1:], owners, "fused")
    assert torch.equal(moved[:, :, :5], found[:, :, :5]) and not torch.allclose(
        moved[:, :, 5:9], found[:, :, 5:9]
    )


def test_regions_on_a_grid() -> None:
    allowed = allowed_of([((0.0, 0.0, 0.5, 1.0), None), ((0.99, 0.99, 1.0, 1.0),)], (4, 6))
    assert allowed.shape == (2, 2, 4, 6)
    assert allowed[0, 0, :, :3].all() and not allowed[0, 0, :, 3:].any() and allowed[0, 1].all()
    assert allowed[1, 0].sum() == allowed[1, 0, 3, 5] == 1 and not allowed[1, 1].any()
    reads = reads_of([((0.0, 0.0, 0.5, 1.0), None), (None, None)], (4, 6))
    assert reads.shape == (4, 3, 4, 6) and (reads.sum(dim=1) == 1).all()
    assert reads[:2, 0].all() and reads[3, 0].all() and reads[2, 1, :, :3].all() and reads[2, 0, :, 3:].all()


# --- drawings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"ownership": "word", "subjects_apart": True}, pytest.param({}, marks=pytest.mark.slow)]
)
def test_a_drawing_explicit_and_fused(pipe: Pipeline, jobs: list[Job], changes: dict[str, Any]) -> None:
    config = replace(GRAPHED, steps=3, batch_size=len(jobs))
    found = [
        latents(configured(pipe, attention=impl, **changes), jobs, config) for impl in ("explicit", "fused")
    ]
    same(*found, 1e-3 * float(found[0].abs().max()))


@pytest.mark.parametrize("interval", [(0, 1000), (400, 800)])
def test_a_batch_is_its_singles(pipe: Pipeline, jobs: list[Job], interval: tuple[int, int]) -> None:
    """Images of no, one, two and three subjects."""
    config = replace(QUICK, guidance_interval=interval, batch_size=len(jobs))
    batch = latents(pipe, jobs, config)
    for i, job in enumerate(jobs):
        same(latents(pipe, [job], config), batch[i : i + 1], 1e-3 * float(batch.abs().max()))
    kinds = [type(condition(pipe, [job], config)) for job in jobs[1:3]]
    assert kinds == [MoMAConditioning, SeveralConditioning]
    for job, one in zip(jobs[2:], batch[2:], strict=True):
        for changed in (job.subjects[1:] + job.subjects[:1], job.subjects[:1]):
            other = replace(
                job, subjects=changed, prompt="a cat, a dog and a vase", strength=None, regions=()
            )
            assert not torch.allclose(latents(pipe, [other], config)[0], one, atol=1e-2)


def test_every_choice_of_a_subject_has_an_effect(pipe: Pipeline, jobs: list[Job]) -> None:
    job = jobs[2]
    plain = latents(pipe, [job], QUICK)
    others = [latents(pipe, [replace(job, strength=s)], QUICK) for s in ((1.2, 0.1), (0.1, 1.0))]
    others += [latents(pipe, [replace(job, regions=r)], QUICK) for r in ((LEFT, RIGHT), (RIGHT, LEFT))]
    choices = {"subjects_apart": True}, {"unconditional_beta": 0.5}
    others += [latents(configured(pipe, **choice), [job], QUICK) for choice in choices]
    for i, one in enumerate([plain, *others]):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in others[i:])


def trace(pipe: Pipeline, job: Job, unet: Any = None) -> list[Step]:
    config = GRAPHED
    with torch.no_grad():
        start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        path = solver_steps(pipe.base.schedule, 6, config.solver)
        return list(denoise(unet or pipe.base.unet, condition(pipe, [job], config), path, start, 7.5, "ddim"))


@pytest.mark.parametrize("ownership", ["reference", "word", "regions"])
def test_masks_are_disjoint_and_regions_keep_them(pipe: Pipeline, jobs: list[Job], ownership: str) -> None:
    pipe = configured(pipe, ownership=ownership)
    for step in trace(pipe, jobs[4]):
        cat, dog = step.state["m_gen"][0]
        assert cat[:, :8].any() and dog[:, 8:].any() and not cat[:, 8:].any() and not dog[:, :8].any()
    if ownership != "regions":
        masks = torch.cat([step.state["m_gen"] for step in trace(pipe, jobs[2])])  # (n, 2, h, w)
        assert ((masks != 0).sum(dim=1) <= 1).all() and masks.amax(dim=(0, 2, 3)).min() > 0


def test_before_there_are_maps(pipe: Pipeline, jobs: list[Job]) -> None:
    """One subject alone acts everywhere, two nowhere, and where one alone may be it acts."""
    start = condition(pipe, jobs, GRAPHED).start  # (B, 3, h, w)
    assert not start[0].any() and (start[1, 0] == 1).all() and not start[1, 1:].any()
    assert not start[2:4].any() and (start[4, :2].sum(dim=0) == 1).all() and start[4, 0, :, :8].all()
    assert start[5, 1].sum() > 0 and not start[5, 0].any() and not start[5, :, 4:12, 4:12].any()


def test_each_region_reads_its_own_prompt(pipe: Pipeline, jobs: list[Job]) -> None:
    """At one step, cells of a region see no word of the other subject."""
    cond = condition(pipe, [jobs[4]], GRAPHED)
    hook, tokens = cond.hook(500, None), cond.text[0][0].shape[2]
    own = tokens // 3
    read = hook._read((16, 16), tokens)[:, 0].unflatten(1, (16, 16))  # (R, h, w, P*T)
    assert read[0, ..., :own].all() and not read[0, ..., own:].any()  # the negative text
    assert read[1, :, :8, own : 2 * own].all() and not read[1, :, :8, 2 * own :].any()
    assert read[1, :, 8:, 2 * own :].all() and not read[1, ..., :own].any()
    (prepared,) = pipe.method.prepare([jobs[4]])
    assert [one.text for one in prepared.own] == [
        "photo of a cat. a cat in the snow",
        "photo of a dog. a dog in the snow",
    ]


@pytest.mark.parametrize("changes", [{"subjects_apart": True, "context_masked": False}, {}])
def test_graphs_change_nothing(pipe: Pipeline, jobs: list[Job], changes: dict[str, Any]) -> None:
    pipe, recorder = configured(pipe, **changes), Rerun()
    eager = trace(pipe, jobs[3])
    graphed = trace(pipe, jobs[3], GraphedUNet(pipe.base.unet, lambda: recorder))
    for a, b in zip(graphed, eager, strict=True):
        same(a.latents, b.latents, 1e-5)
        same(a.state["m_gen"], b.state["m_gen"], 1e-5)
    assert recorder.replayed
    cond = condition(pipe, jobs[3:4], GRAPHED)
    assert isinstance(cond.hook(500, None), RecordableHook)


@pytest.mark.parametrize("preset", ["release", "paper"])
def test_presets_draw_several(pipe: Pipeline, jobs: list[Job], preset: str) -> None:
    method = replace(PRESETS[preset], template="release", ownership="word", m_gen_eps=1e-8)
    pipe = pipe.with_config(method)
    again = {one.word: one for one in encoded(pipe)}
    jobs = [replace(job, subjects=tuple(again[one.word] for one in job.subjects)) for job in jobs[1:4]]
    assert latents(pipe, jobs, QUICK).isfinite().all()


def test_each_subject_asks_its_own_question_once(
    pipe: Pipeline, subjects: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the whole prompt and its own label, whatever the number of images."""
    asked: list[tuple[str, str]] = []

    def embed(self: Any, inputs: list[Any]) -> list[Tensor]:
        asked.extend((one.word, one.prompt) for one in inputs)
        return [torch.zeros(1, 64) + len(one.word) for one in inputs]

    monkeypatch.setattr(type(pipe.method), "embed", embed)
    cat, dog, _ = subjects
    prepared = pipe.method.prepare([Job((dog, cat), BOTH, seed) for seed in range(3)])
    assert asked == [("dog", BOTH), ("cat", BOTH)]
    assert all(one.embeddings[0] is prepared[0].embeddings[0] for one in prepared)


# --- words -------------------------------------------------------------------------------------------


def named(text: str, *words: str) -> list[list[str]]:
    return [[text[a:b] for a, b in each] for each in places_of(words, text)]


def test_phrases_tell_subjects_of_one_class_apart(pipe: Pipeline) -> None:
    text = "a striped cat and a spotted cat, the cat asleep"
    assert named(text, "striped cat", "cat", "spotted cat") == [["striped cat"], ["cat"], ["spotted cat"]]
    found = read_prompt(pipe.base.tokenizers, ["cat", "striped cat"], "a striped cat beside a cat")
    assert not set(found.labels[0]) & set(found.labels[1]) and all(found.labels)
    twice = places_of(["cat", "Cat"], "a cat and a cat")
    assert twice == [[(2, 5)], [(12, 15)]] and places_of(["cat", "cat"], "two cats") == [[(4, 8)]] * 2
    same_word = read_prompt(pipe.base.tokenizers, ["cat", "cat"], "a cat and a cat")
    assert not set(same_word.labels[0]) & set(same_word.labels[1])
    with pytest.raises(ValueError, match="'cat'"):
        read_prompt(pipe.base.tokenizers, ["cat", "striped cat"], "a striped cat")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat and a dog in the snow", ["a cat in the snow", "a dog in the snow"]),
        (
            "in the snow, a cat beside a big dog",
            ["in the snow, a cat", "in the snow, a big dog"],
        ),
        ("A cat with the brown dog", ["A cat", "the brown dog"]),
        ("cat, dog, night", ["cat, night", "dog, night"]),
        ("the old cat & dogs", ["the old cat", "dogs"]),
    ],
)
def test_a_subjects_own_prompt(prompt: str, expected: list[str]) -> None:
    assert [own_prompt(["cat", "dog"], prompt, i) for i in range(2)] == expected


def test_three_subjects_own_prompts() -> None:
    prompt = "a cat, a dog and a vase at night"
    found = [own_prompt(WORDS, prompt, i) for i in range(3)]
    assert found == ["a cat at night", "a dog at night", "a vase at night"]


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words", "prompt", "regions", "named"),
    [
        ({"ownership": "word"}, ("cat", "cat"), "a cat and a cat", (), "'cat'"),
        ({"ownership": "word"}, ("cat", "cats"), "two cats", (), "'cat'"),
        ({"ownership": "regions"}, ("cat", "dog"), BOTH, (), "region"),
        ({"ownership": "regions"}, ("cat", "dog"), BOTH, (LEFT, None), "region"),
        ({"ownership": "regions"}, ("cat", "dog"), BOTH, (LEFT, (0.4, 0.5, 1.0, 1.0)), "1 and 2"),
        ({}, ("cat", "dog"), "a cat in the snow", (), "'dog'"),
        ({}, ("cat", "striped cat"), "a striped cat", (), "'cat'"),
    ],
)
def test_what_leaves_subjects_open_is_refused(
    pipe: Pipeline, subjects: list[Any], config: dict, words: tuple, prompt: str, regions: tuple, named: str
) -> None:
    pipe = configured(pipe, **config)
    both = tuple(replace(subjects[i], word=word) for i, word in enumerate(words))
    with pytest.raises(ValueError, match=named):
        pipe.run([Job(both, prompt, 0, regions=regions)], QUICK)


def test_two_cats_are_told_apart_by_their_keys(pipe: Pipeline, subjects: list[Any]) -> None:
    both = tuple(replace(subjects[i], word="cat") for i in range(2))
    assert latents(pipe, [Job(both, "two cats", 0)], QUICK).isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [{"ownership_blur": 2}, {"ownership_blur": 0}, {"ownership_blur": 10**10 - 1}, {"ownership": "masks"}],
)
def test_values_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        replace(DEFAULT, **changes)


def test_layers_that_are_not_there(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match="99"):
        configured(pipe, ownership_layers=(99,))
    assert configured(pipe, ownership_layers=[0, 2]).method.config.ownership_layers == (0, 2)


# --- several images of one subject -------------------------------------------------------------------


def test_images_of_one_subject(pipe: Pipeline, subjects: list[Any]) -> None:
    """Attention over both images' subject keys; the mean of their embeddings, whether asked before or not."""
    first, second = subjects[0], pipe.encode_subject(image(7), mask(20), "cat", prompts=["a cat"])
    one = pipe.method.join_images([first, second])
    layer = one.layers[0]
    assert layer.k.shape[2] == layer.key_mask.shape[1] == 2 * first.layers[0].k.shape[2]
    q = rand(1, layer.k.shape[1], 5, layer.k.shape[3])
    kept = [x.k[:, :, x.key_mask[0]] for x in (first.layers[0], second.layers[0])]
    values = [x.v[:, :, x.key_mask[0]] for x in (first.layers[0], second.layers[0])]
    same(
        attention(q, layer.k, layer.v, layer.mask),
        attention(q, torch.cat(kept, dim=2), torch.cat(values, dim=2)), 1e-5,
    )  # fmt: skip
    expected = (embed(pipe, first, "a cat") + embed(pipe, second, "a cat")) / 2
    (prepared,) = pipe.method.prepare([Job(one, "a cat", 0)])
    same(prepared.embeddings[0], expected, 1e-6)
    known = pipe.method.join_images([replace(first, features={"a cat": embed(pipe, first, "a cat")}), second])
    same(known.features["a cat"], expected, 1e-6)
    jobs = [Job(one, "a cat", 0), Job(first, "a cat", 0), Job((one, subjects[1]), BOTH, 1)]
    batch = latents(pipe, jobs, QUICK)
    for i, job in enumerate(jobs):
        same(latents(pipe, [job], QUICK), batch[i : i + 1], 1e-3 * float(batch.abs().max()))
    assert not torch.allclose(batch[0], batch[1], atol=1e-2)
    assert pipe.method.join_images([first]) is first


def test_more_keys_change_nothing() -> None:
    """Rows with fewer are padded, also those without any key inside M_ref."""
    keep = torch.arange(6).expand(3, -1) < torch.tensor([[2], [6], [0]])
    layer = ReferenceLayer(rand(3, 2, 6, 4, seed=1), rand(3, 2, 6, 4, seed=2), keep)
    q, wide = rand(3, 2, 5, 4), layer.padded(9)
    assert wide.k.shape[2] == 9 and layer.padded(6) is layer
    for one in (wide, drop_background(wide)):
        same(attention(q, one.k, one.v, one.mask), attention(q, layer.k, layer.v, layer.mask), 1e-6)
    assert side_by_side([layer, layer]).key_mask.sum() == 2 * keep.sum()
    assert math.isfinite(float(layer.absent().k.sum())) and layer.absent().key_mask.shape == (3, 1)
