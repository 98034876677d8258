"""Our autoencoder against diffusers', on the same pseudo-random weights."""

import pytest
import torch

from models.vae import SD15, SDXL, VAE
from models.weights.public_configs import vae_config
from tests.compare import assert_close_to_std
from tests.recipe import fill, normal

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 6,
    "norm_num_groups": 8,
}


def pair(json: dict) -> tuple[VAE, torch.nn.Module]:
    ours, theirs = VAE(vae_config(json)), diffusers.AutoencoderKL(**json)
    fill(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_parity(size: tuple[int, int]) -> None:
    ours, theirs = pair(SMALL)
    x, z = torch.from_numpy(normal("x", (2, 3, *size))), torch.from_numpy(normal("z", (2, 6, 5, 9)))
    mean, std = ours.encode(x)
    posterior = theirs.encode(x).latent_dist
    assert ours.cfg.factor == 4 and mean.shape == (2, 6, size[0] // 4, size[1] // 4)
    assert_close_to_std(mean, posterior.mean)
    assert_close_to_std(std, posterior.std)
    assert_close_to_std(ours.decode(z), theirs.decode(z).sample)


def test_gradients_reach_every_weight() -> None:
    vae = VAE(vae_config(SMALL))
    fill(vae)
    mean, std = vae.encode(torch.from_numpy(normal("x", (1, 3, 16, 16))))
    (vae.decode(mean).square().mean() + std.mean()).backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_refuses_other_autoencoders() -> None:
    with pytest.raises(ValueError, match="use_quant_conv"):
        vae_config(SMALL | {"use_quant_conv": False})


def test_scalings_of_the_public_models() -> None:
    assert (SD15.scaling, SDXL.scaling) == (0.18215, 0.13025)
