"""MoMA's attention blocks: fused equals explicit in values and gradients, rows do not mix."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moma.methods.moma.attention import (
    Gate,
    ReferenceLayer,
    context_cross_attention,
    drop_background,
    gate_inside,
    gathered_queries,
    subject_self_attention,
)

R, H, N, M, D, T = 4, 3, 20, 24, 8, 11


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keep_of(counts: list[int]) -> Tensor:
    """bool (len(counts), M): that many keys kept, at scattered places."""
    places = torch.stack(
        [torch.randperm(M, generator=torch.Generator().manual_seed(i)) for i in range(len(counts))]
    )
    return places < torch.tensor(counts)[:, None]


def reference(counts: list[int]) -> ReferenceLayer:
    return ReferenceLayer(
        rand(len(counts), H, M, D, seed=1), rand(len(counts), H, M, D, seed=2), keep_of(counts)
    )


def self_attention(ref: ReferenceLayer, impl: str, rows: slice = slice(None), **changes) -> Tensor:
    q, k, v = (rand(R, H, N, D, seed=s)[rows] for s in (3, 4, 5))
    m_gen = torch.rand(R, 1, N, 1, generator=torch.Generator().manual_seed(6))[rows]
    beta = torch.tensor([0.4, 1.0, 1.2, 0.0])[:, None, None, None][rows]
    given = {"lam": torch.tensor([0.7]), "beta": beta} | changes
    gate = Gate(given.pop("m_gen", m_gen))
    return subject_self_attention(q, k, v, ref, gate, **given, impl=impl)


COUNTS = {
    "same size": [9, 9, 9, 9],
    "subjects of different size": [3, 24, 1, 9],
    "one without a subject": [5, 0, 7, 24],
    "none with a subject": [0, 0, 0, 0],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_fused_equals_explicit(counts: list[int]) -> None:
    ref = reference(counts)
    dropped = drop_background(ref)
    assert dropped.k.shape[2] == (max(counts) if min(counts) else M)
    explicit = self_attention(ref, "explicit")
    torch.testing.assert_close(self_attention(dropped, "fused"), explicit, rtol=0, atol=1e-6)
    for row in range(R):  # the rest of the batch does not matter
        alone = replace(
            ref, k=ref.k[row : row + 1], v=ref.v[row : row + 1], key_mask=ref.key_mask[row : row + 1]
        )
        single = self_attention(drop_background(alone), "fused", slice(row, row + 1))
        torch.testing.assert_close(single, explicit[row : row + 1], rtol=0, atol=1e-6)


def soft_m_gen(share: list[float], n: int = 4 * N) -> Tensor:
    """M_gen (R, 1, n, 1), soft, not zero at these shares of the queries, at scattered places."""
    soft = 0.5 + torch.rand(R, n, generator=torch.Generator().manual_seed(7)) / 2
    ranks = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(i)) for i in range(R)])
    return (soft * (ranks < torch.tensor(share)[:, None] * n))[:, None, :, None]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(
    "share", [[0.3] * R, [0.1, 0.8, 0.0, 0.5], [0.0] * R, [1.0] * R], ids=["equal", "mixed", "none", "all"]
)
def test_queries_inside_suffice(
    counts: list[int], share: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the queries where M_gen is not zero are asked: same values, same gradients, whatever the batch."""
    monkeypatch.setattr("moma.methods.moma.attention.QUERY_BUCKET", 8)
    m_gen, ref = soft_m_gen(share), reference(counts)
    gate = gate_inside(m_gen)
    if max(share) == 1:
        assert gate.inside is None
    else:
        assert gate.inside.shape == (R, -(-int(max(share) * 4 * N) // 8) * 8)
    found = []
    for impl in ("explicit", "fused"):
        q, k, v = (rand(R, H, 4 * N, D, seed=s).requires_grad_() for s in (3, 4, 5))
        own = replace(ref, k=ref.k.clone().requires_grad_(), v=ref.v.clone().requires_grad_())
        used, asked = (own, Gate(m_gen)) if impl == "explicit" else (drop_background(own), gate)
        lam = torch.tensor([0.7], requires_grad=True)
        z = subject_self_attention(q, k, v, used, asked, lam, 0.8, impl)
        with torch.no_grad():  # where z is overwritten
            assert torch.equal(subject_self_attention(q, k, v, used, asked, lam, 0.8, impl), z)
        leaves = (q, k, v, lam, own.k, own.v)
        found.append([z, *torch.autograd.grad(z.square().sum(), leaves, materialize_grads=True)])
    for explicit, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # a row by itself
        row = slice(1, 2)
        alone = subject_self_attention(
            q[row], k[row], v[row], used.rows(row), gate_inside(m_gen[row]), lam, 0.8, "fused"
        )
    torch.testing.assert_close(alone, z[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1024, 4096, 16384])
def test_numbers_of_queries(n: int) -> None:
    """Enough for those inside, hardly more; few different ones where each would be recorded."""
    for recorded, spare in ((False, 64), (True, n // 4)):
        asked = {inside: gathered_queries(inside, n, recorded) for inside in range(n + 1)}
        assert asked[0] == 0 and asked[n] is None and (len(set(asked.values())) <= 5 or not recorded)
        for inside, count in asked.items():
            assert inside > 0.9 * n - spare if count is None else 0 <= count - inside < spare


def test_nan_stays() -> None:
    """M_gen that is NaN (a constant map under the release's m_gen_eps) is not taken for zero."""
    m_gen = torch.zeros(R, 1, 4 * N, 1)
    m_gen[1, 0, 3] = torch.nan
    gate = gate_inside(m_gen)
    assert (gate.inside[1] == 4 * N + 3).any() and gate.m_gen[1].isnan().sum() == 1


def test_equation_3_by_hand() -> None:
    """Against the formula written with loops over rows, heads and queries."""
    ref = reference([3, 24, 1, 9])
    q, k, v = (rand(R, H, N, D, seed=s) for s in (3, 4, 5))
    m_gen = torch.rand(R, 1, N, 1, generator=torch.Generator().manual_seed(6))
    z = self_attention(ref, "explicit")
    beta = [0.4, 1.0, 1.2, 0.0]
    for r, h, n in [(0, 0, 0), (1, 2, 7), (2, 1, 19), (3, 0, 3)]:
        plain = (q[r, h, n] @ k[r, h].T / D**0.5).softmax(-1) @ v[r, h]
        k_ref, v_ref = ref.k[r, h][ref.key_mask[r]], ref.v[r, h][ref.key_mask[r]]
        subject = (q[r, h, n] @ k_ref.T / D**0.5).softmax(-1) @ v_ref
        torch.testing.assert_close(z[r, h, n], plain + 0.7 * subject * m_gen[r, 0, n, 0] * beta[r])


@pytest.mark.parametrize("name", ["m_gen", "lam", "beta"])
@pytest.mark.parametrize("impl", ["explicit", "fused"])
def test_subject_term_vanishes(name: str, impl: str) -> None:
    """Eq. 3 with M_gen, λ or β at zero is plain self-attention, bit for bit."""
    from models.attention import attention

    zero = torch.zeros(1)
    z = self_attention(reference([3, 24, 1, 9]), impl, **{name: zero})
    q, k, v = (rand(R, H, N, D, seed=s) for s in (3, 4, 5))
    assert torch.equal(z, attention(q, k, v, impl=impl))


def cross(impl: str, gate: Gate, q: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    k, v = rand(R, H, T, D, seed=12)[rows], rand(R, H, T, D, seed=13)[rows]
    k_context, v_context = rand(R, H, 4, D, seed=14)[rows], rand(R, H, 4, D, seed=15)[rows]
    label = torch.zeros(R, T)
    label[0, [2, 5]] = label[1, [1]] = label[2, [0, 1, 2]] = 1  # row 3 has none
    return context_cross_attention(q, k, v, k_context, v_context, gate, label[rows], impl)


@pytest.mark.parametrize("share", [None, [0.1, 0.5, 0.0, 0.3], [0.0] * R, [1.0] * R])
def test_cross_fused_equals_explicit(share: list[float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there is an M_gen (None), and asked only where it is not zero."""
    monkeypatch.setattr("moma.methods.moma.attention.QUERY_BUCKET", 4)
    m_gen = 1.0 if share is None else soft_m_gen(share, N)
    inside = Gate(m_gen) if share is None else gate_inside(m_gen)
    assert (inside.inside is None) == (share in (None, [1.0] * R)) and inside.empty == (share == [0.0] * R)
    found = []
    for impl, gate in (("explicit", Gate(m_gen)), ("fused", inside)):
        q = rand(R, H, N, D, seed=11).requires_grad_()
        z, label_map = cross(impl, gate, q)
        found.append([z, label_map, *torch.autograd.grad(z.square().sum() + label_map.sum(), q)])
        with torch.no_grad():
            assert all(map(torch.equal, cross(impl, gate, q), (z, label_map)))
    for explicit, fused, most in zip(*found, (1e-6, 1e-6, 1e-5), strict=True):  # the last: gradients
        torch.testing.assert_close(fused, explicit, rtol=0, atol=most)
    assert label_map.shape == (R, N) and (label_map[3] == 0).all() and (label_map[:3] > 0).all()


def test_gradients_agree() -> None:
    """Training may use either implementation: same gradients of queries, K', V', λ and the label's map."""
    grads = []
    for impl in ("explicit", "fused"):
        ref = reference([3, 24, 1, 9])
        leaves = [x.requires_grad_() for x in (ref.k, ref.v, torch.tensor([0.7]), rand(R, H, N, D, seed=11))]
        used = drop_background(ref) if impl == "fused" else ref
        z, label_map = cross(impl, Gate(1.0), leaves[3])
        (
            self_attention(used, impl, lam=leaves[2]).square().sum() + z.square().sum() + label_map.sum()
        ).backward()
        grads.append([x.grad for x in leaves])
    for explicit, fused in zip(*grads, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-5, atol=1e-5)


def test_dtype_does_not_depend_on_the_mask() -> None:
    """Under autocast λ is float32: what comes out is of q's dtype, whichever queries are asked."""
    ref = reference([3, 24, 1, 9])
    low = drop_background(ReferenceLayer(ref.k.bfloat16(), ref.v.bfloat16(), ref.key_mask))
    q, k, v = (rand(R, H, 4 * N, D, seed=s).bfloat16() for s in (3, 4, 5))
    found = []
    for share in (0.0, 0.3, 1.0):
        gate = gate_inside(soft_m_gen([share] * R))
        z = subject_self_attention(q, k, v, low, gate, torch.ones(1), 1.0, "fused")
        found.append((z.dtype, gate.inside is None or len(gate.inside[0])))
    assert found == [(torch.bfloat16, 0), (torch.bfloat16, 64), (torch.bfloat16, True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(dtype: torch.dtype) -> None:
    ref = reference([3, 24, 0, 9])
    low = drop_background(ReferenceLayer(ref.k.to(dtype), ref.v.to(dtype), ref.key_mask))
    q, k, v = (rand(R, H, N, D, seed=s).to(dtype) for s in (3, 4, 5))
    one = torch.ones(1, dtype=dtype)
    z = subject_self_attention(q, k, v, low, Gate(1.0), one, 1.0, "fused")
    exact = self_attention(ref, "explicit", m_gen=1.0, lam=torch.ones(1), beta=1.0)
    assert z.dtype == dtype and (z.float() - exact).abs().max() < 0.05
