"""Full-size UNet and autoencoder against diffusers', with the same pseudo-random weights; float32, CPU."""

from functools import partial

import diffusers
import torch
from torch import Tensor

from models.unet import SD15, SDXL, UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.weights.public_configs import unet_config, vae_config
from tests.parity_case import Case
from tests.parity_language import build, share
from tests.recipe import normal

SD15_JSON = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "in_channels": 4,
    "out_channels": 4,
}
SDXL_JSON = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "in_channels": 4,
    "out_channels": 4,
}
VAE_JSON = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def tensor(key: str, *shape: int) -> Tensor:
    return torch.from_numpy(normal(f"parity/{key}", shape))


@torch.no_grad()
def noise_prediction(cfg: UNetConfig, json: dict, size: int) -> tuple[Tensor, Tensor]:
    """eps (2, 4, size, size) at two timesteps."""
    assert unet_config(json) == cfg
    ours = build(lambda: UNet(cfg))
    theirs = share(lambda: diffusers.UNet2DConditionModel(**json), ours.state_dict())
    x, t, text = (
        tensor("x", 2, 4, size, size),
        torch.tensor([1, 801]),
        tensor("text", 2, 77, cfg.context_dim[0]),
    )
    if cfg.added_cond_dim is None:
        return ours(x, t, text)[0], theirs(x, t, text).sample
    pooled, sizes = tensor("pooled", 2, 1280), torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
    added = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=-1)  # (2, 2816)
    cond = {"text_embeds": pooled, "time_ids": sizes}
    return ours(x, t, text, added=added)[0], theirs(x, t, text, added_cond_kwargs=cond).sample


@torch.no_grad()
def autoencoder(part: str) -> tuple[Tensor, Tensor]:
    """Posterior mean of, or image from, 512 x 512."""
    assert vae_config(VAE_JSON) == VAEConfig()
    ours = build(lambda: VAE(VAEConfig()))
    theirs = share(lambda: diffusers.AutoencoderKL(**VAE_JSON), ours.state_dict())
    if part == "encode":
        x = tensor("x", 1, 3, 512, 512)
        return ours.encode(x)[0], theirs.encode(x).latent_dist.mean
    z = tensor("z", 1, 4, 64, 64)
    return ours.decode(z), theirs.decode(z).sample


CASES = [
    Case("UNet SD1.5, 64x64 latents", partial(noise_prediction, SD15, SD15_JSON, 64)),
    Case("UNet SDXL, 32x32 latents", partial(noise_prediction, SDXL, SDXL_JSON, 32)),
    Case("VAE encode, 512x512", partial(autoencoder, "encode")),
    Case("VAE decode, 512x512", partial(autoencoder, "decode")),
]
