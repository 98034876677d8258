"""Packed weights compute what the plain layers compute."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.unet import UNet, UNetConfig, attention_layers
from models.vae import VAE, VAEConfig
from models.weights.packed import MAX_TOKENS, ChunkedFeedForward, can_pack, optimize_layout, pack_weights
from moma.bench.measure import relative_error
from moma.weights.tiny import fill

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
UNET = UNetConfig(
    channels=(32, 64), depth=(1, 1), heads=(4, 4), context_dim=(16, 16), resnets=1, norm_groups=8
)  # fmt: skip
VAE_CONFIG = VAEConfig(channels=(32, 64), resnets=1)


def filled(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    fill(network, torch.Generator().manual_seed(0))
    return network.to(dtype).eval().requires_grad_(False)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and relative_error(a, b) < TOLERANCE[a.dtype]


@pytest.fixture(params=list(TOLERANCE), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if not can_pack(CPU, request.param):
        pytest.skip(f"this machine does not pack {request.param}")
    return request.param


@pytest.mark.parametrize("size", [(8, 8), (7, 12)])
@pytest.mark.parametrize("linear", [False, True])
def test_a_unet(dtype: torch.dtype, size: tuple[int, int], linear: bool) -> None:
    unet = filled(UNet(replace(UNET, linear_projection=linear)), dtype)
    x, text = rand(2, 4, *size).to(dtype), rand(2, 5, 16).to(dtype)
    t = torch.tensor([3, 900])
    expected = unet(x, t, text)[0]
    close(pack_weights(unet)(x, t, text)[0], expected)
    assert not [m for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def test_a_vae(dtype: torch.dtype) -> None:
    vae = filled(VAE(VAE_CONFIG), dtype)
    x, z = rand(1, 3, 16, 24).to(dtype), rand(2, 4, 8, 12).to(dtype)
    expected = *vae.encode(x), vae.decode(z)
    pack_weights(vae)
    for a, b in zip((*vae.encode(x), vae.decode(z)), expected, strict=True):
        close(a, b)


def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    unet = pack_weights(filled(UNet(UNET), dtype))
    x, text, t = rand(5, 4, 8, 8).to(dtype), rand(5, 5, 16).to(dtype), torch.arange(5)
    together = unet(x, t, text)[0]
    for i in range(5):
        close(unet(x[i : i + 1], t[i : i + 1], text[i : i + 1])[0], together[i : i + 1])


def test_feed_forward_in_chunks() -> None:
    """Several chunks, the last one smaller: the same values, also where nothing is packed."""
    unet = filled(UNet(UNET), torch.float64)
    x, text, t = rand(3, 4, 32, 40).double(), rand(3, 5, 16).double(), torch.arange(3)
    assert MAX_TOKENS < 3 * 32 * 40
    names = list(unet.state_dict())
    expected = unet(x, t, text)[0]
    torch.testing.assert_close(optimize_layout(unet, CPU, torch.float64)(x, t, text)[0], expected)
    assert list(unet.state_dict()) == names
    assert [type(b.ff) for b in unet.transformer_blocks()] == [ChunkedFeedForward] * len(
        attention_layers(UNET)
    )


@pytest.mark.parametrize(("device", "kind"), [("cuda", torch.float32), ("cpu", torch.float64)])
def test_where_it_cannot_be(device: str, kind: torch.dtype) -> None:
    assert not can_pack(torch.device(device), kind)


@pytest.mark.parametrize(("kind", "last"), [(torch.bfloat16, True), (torch.float32, False)])
def test_channels_last_for_a_gpu(kind: torch.dtype, last: bool) -> None:
    """As it is done there, seen here: the layout changes, the values stay."""
    unet, x, text, t = (
        filled(UNet(UNET), kind),
        rand(2, 4, 8, 8).to(kind),
        rand(2, 5, 16).to(kind),
        torch.arange(2),
    )
    expected = unet(x, t, text)[0]
    assert optimize_layout(unet, torch.device("cuda"), kind) is unet
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == last
    close(unet(x, t, text)[0], expected)
