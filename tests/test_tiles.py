"""Decoding in the memory there is: tiles against the whole image, and when they are taken."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from models.vae import SD15, VAE, VAEConfig
from moma.sampling.memory import MARGIN
from moma.sampling.tiles import BUFFERS, SIDES, decode, decode_tiles, decoder_bytes, ramp, starts, tile_side
from moma.weights.bundle import Bundle
from tests.helpers import MINI
from tests.recipe import fill, normal

SMALL = VAEConfig(channels=(16, 32, 32), resnets=1, norm_groups=8)  # f = 4


def latents(*shape: int) -> Tensor:
    return torch.from_numpy(normal("z", shape))


def small_vae() -> VAE:
    vae = VAE(SMALL)
    fill(vae)
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("grid", [(40, 23), (17, 50), (16, 33), (5, 60)])
def test_tiles_of_a_local_decoder_are_the_whole(grid: tuple[int, int]) -> None:
    """Where no pixel looks beyond its own latent, tiles change nothing, whatever the sizes."""
    mix = latents(3, 4, 1, 1)
    local = SimpleNamespace(
        cfg=SMALL, decode=lambda z: F.interpolate(F.conv2d(z, mix), scale_factor=SMALL.factor)
    )
    z = latents(1, 4, *grid)
    torch.testing.assert_close(decode_tiles(local, z, 16), local.decode(z), rtol=0, atol=1e-5)


def test_blending_is_linear() -> None:
    """Two neighbours' weights add up to 1 over their overlap, and fall and rise by equal steps."""
    first, second = ramp(16, 4)[-4:], ramp(16, 4)[:4]
    torch.testing.assert_close(first + second, torch.ones(4))
    torch.testing.assert_close(second.diff(), torch.full((3,), 0.2))
    assert starts(40, 16) == [0, 12, 24] and starts(41, 16) == [0, 12, 24, 25] and starts(9, 16) == [0]


@torch.no_grad()
def test_tiles_of_a_smooth_image() -> None:
    """MoMA-mini's trained autoencoder on an image that runs from colour to colour, values -0.6 to 0.6."""
    vae = Bundle.open(MINI).build("vae", dtype=torch.float32).eval()
    side = 16 * vae.cfg.factor * 2
    across = torch.linspace(-0.6, 0.6, side).expand(side, side)
    image = torch.stack([across, across.T, -across])[None]  # (1, 3, side, side)
    z = vae.encode(image)[0]
    whole, tiled = vae.decode(z), decode_tiles(vae, z, 16)
    assert tiled.shape == whole.shape and tiled.dtype == torch.float32
    difference = (tiled - whole).abs()
    assert difference.mean() < 0.03 and difference.max() < 0.15
    assert difference.mean() < (whole - image).abs().mean()  # less than the autoencoder itself loses


@torch.no_grad()
def test_one_at_a_time_is_the_batch() -> None:
    vae, z = small_vae(), latents(3, 4, 9, 13)
    alone = torch.cat([decode(vae, one, "off") for one in z.split(1)])
    torch.testing.assert_close(alone, vae.decode(z), rtol=0, atol=1e-5)


class Living(TorchDispatchMode):
    """Most bytes of tensors made under it that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            storage = tensor.untyped_storage()
            self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.most = max(self.most, sum(self.sizes.values()))
        return made


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [(16, 32, 64, 64), (64, 64), (8, 64)])
def test_memory_of_the_decoder(channels: tuple[int, ...], dtype: torch.dtype) -> None:
    """The estimate without what operators hold inside is what its tensors take."""
    vae = VAE(VAEConfig(channels=channels, resnets=1, norm_groups=8)).to(dtype)
    with Living() as living:
        vae.decode(latents(1, 4, 12, 20).to(dtype))
    assert living.most == pytest.approx(decoder_bytes(vae.cfg, (12, 20), dtype) / BUFFERS, rel=0.15)


def test_when_tiles_are_taken() -> None:
    def side(tiles: str, grid: tuple[int, int], free: int | None) -> int | None:
        return tile_side(tiles, SD15, grid, torch.float32, free)

    def room(*grid: int) -> int:
        return int(decoder_bytes(SD15, grid, torch.float32) * (1 + MARGIN))

    assert 1.2e9 < decoder_bytes(SD15, (64, 64), torch.float32) < 1.5e9  # 512 pixels
    assert side("auto", (64, 64), None) is side("auto", (64, 64), room(64, 64)) is None
    assert side("auto", (64, 64), room(64, 64) - 1) == 32
    assert side("auto", (128, 96), room(64, 64)) == 64
    assert side("auto", (128, 96), 0) == SIDES[-1]  # nothing fits: the least that can be asked for
    assert side("off", (64, 64), 0) is None
    assert side("on", (64, 64), None) == 32 and side("on", (65, 8), None) == 64
    assert side("on", (64, 64), room(16, 16)) == 16
    assert side("on", (16, 16), None) is side("auto", (16, 16), 0) is None  # no smaller tile


def test_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short; not where tiles, or none, were asked for."""
    vae, z = small_vae(), latents(1, 4, 20, 20)
    monkeypatch.setattr("moma.sampling.tiles.free_memory", lambda device: 0)
    with pytest.warns(UserWarning, match="80x80.*64"):
        tiled = decode(vae, z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(vae, z, "on"), tiled)
        assert torch.equal(decode(vae, z, "off"), vae.decode(z))
        monkeypatch.setattr("moma.sampling.tiles.free_memory", lambda device: None)
        assert torch.equal(decode(vae, z), vae.decode(z))
    with pytest.raises(ValueError, match="tiles 'maybe'"):
        decode(vae, z, "maybe")
