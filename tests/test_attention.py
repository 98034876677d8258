"""The two forms of attention agree, and do what they say."""

import pytest
import torch

from models.attention import attention

BIAS = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(5))
CASES = {
    "plain": {},
    "some keys": {"mask": torch.rand(2, 1, 1, 10, generator=torch.Generator().manual_seed(3)) > 0.5},
    "no keys": {"mask": torch.zeros(2, 1, 1, 10, dtype=torch.bool)},
    "each query its own": {"mask": torch.rand(10, 10, generator=torch.Generator().manual_seed(4)) > 0.5},
    "causal": {"causal": True},
    "causal, some keys": {"causal": True, "mask": torch.arange(10).expand(2, 1, 1, 10) < 7},
    "scaled": {"scale": 0.1},
    "biased": {"bias": BIAS},
    "biased, causal": {"bias": BIAS[:1, :1], "causal": True},
    "biased, some keys": {"bias": BIAS, "mask": torch.arange(10) < 7},
}


def qkv(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_fused_equals_explicit(options: dict, dtype: torch.dtype) -> None:
    explicit, fused = (attention(*qkv(dtype), **options, impl=impl) for impl in ("explicit", "fused"))
    assert explicit.dtype == fused.dtype == dtype
    torch.testing.assert_close(explicit, fused, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("impl", ["explicit", "fused"])
def test_by_hand(impl: str) -> None:
    q, k, v = qkv()
    z = attention(q, k, v, causal=True, impl=impl)
    weights = (q[1, 2, 4] @ k[1, 2, :5].T / 8**0.5).softmax(-1)  # query 4 sees keys 0..4
    torch.testing.assert_close(z[1, 2, 4], weights @ v[1, 2, :5])
    z = attention(q, k, v, bias=BIAS, impl=impl)
    weights = (q[1, 2, 4] @ k[1, 2].T / 8**0.5 + BIAS[1, 2, 4]).softmax(-1)
    torch.testing.assert_close(z[1, 2, 4], weights @ v[1, 2])
    mean = attention(q, k, v, CASES["no keys"]["mask"], impl=impl)
    torch.testing.assert_close(mean, v.mean(dim=2, keepdim=True).expand_as(v), rtol=0, atol=1e-6)


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match="impl"):
        attention(*qkv(), impl="flash")
