"""The KL autoencoder of Stable Diffusion: images to latents and back.

Parameter names are diffusers' (`AutoencoderKL`). Sources: LDM (arXiv 2112.10752) and diffusers'
autoencoder_kl.py; compared in tests/test_vae.py.

Letters: B batch, C channels, H W pixels, h w latents, f = 2^(levels-1) the reduction, Z latent channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.attention import attention


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder, from fine to coarse; the defaults are Stable Diffusion 1.x's (f = 8)."""

    in_channels: int = 3  # RGB
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2  # per level of the encoder; the decoder has one more
    norm_groups: int = 32
    norm_eps: float = 1e-6
    scaling: float = 0.18215  # the UNet works on latents times this, which have about unit variance
    logvar_range: tuple[float, float] = (-30.0, 20.0)  # range of the posterior's log variance

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists
        object.__setattr__(self, "logvar_range", tuple(self.logvar_range))

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.channels) - 1)


SD15 = VAEConfig()
SDXL = VAEConfig(scaling=0.13025)


class Resnet(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, cfg: VAEConfig, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.norm_groups, dim_in, eps=cfg.norm_eps)
        self.conv1 = nn.Conv2d(dim_in, dim_out, kernel_size=3, padding=1)
        self.norm2 = nn.GroupNorm(cfg.norm_groups, dim_out, eps=cfg.norm_eps)
        self.conv2 = nn.Conv2d(dim_out, dim_out, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim_in, dim_out, kernel_size=1) if dim_in != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))  # (B, C, H, W)
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention of all positions, one head."""

    def __init__(self, cfg: VAEConfig, dim: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(cfg.norm_groups, dim, eps=cfg.norm_eps)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")  # (B, 1, h*w, C)
        y = self.to_out[0](attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x + rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[-2])  # (B, C, h, w)


class Middle(nn.Module):
    """The coarsest level: residual block, attention, residual block."""

    def __init__(self, cfg: VAEConfig, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(cfg, dim)])
        self.resnets = nn.ModuleList([Resnet(cfg, dim, dim), Resnet(cfg, dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))  # (B, C, h, w)


class Downsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2); padded right and below only


class Upsample(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class Level(nn.Module):
    """Residual blocks of one resolution, then a change of resolution unless it is the last level."""

    def __init__(self, cfg: VAEConfig, dim_in: int, dim: int, resnets: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(cfg, dim_in if i == 0 else dim, dim) for i in range(resnets))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)  # (B, C, H, W); a change of resolution comes last
        return x


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> the posterior's moments before `quant_conv`, (B, 2Z, h, w)."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        ch = cfg.channels
        self.conv_in = nn.Conv2d(cfg.in_channels, ch[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, dim in enumerate(ch):
            self.down_blocks.append(Level(cfg, ch[max(i - 1, 0)], dim, cfg.resnets))
            if i < len(ch) - 1:
                self.down_blocks[-1].downsamplers.append(Downsample(dim))
        self.mid_block = Middle(cfg, ch[-1])
        self.conv_norm_out = nn.GroupNorm(cfg.norm_groups, ch[-1], eps=cfg.norm_eps)
        self.conv_out = nn.Conv2d(ch[-1], 2 * cfg.latent_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (B, C0, H, W)
        for level in self.down_blocks:
            x = level(x)  # (B, C, H/2, W/2) per level
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))  # (B, 2Z, h, w)


class Decoder(nn.Module):
    """Latents (B, Z, h, w) after `post_quant_conv` -> images (B, 3, H, W)."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        ch = cfg.channels[::-1]  # from coarse to fine
        self.conv_in = nn.Conv2d(cfg.latent_channels, ch[0], kernel_size=3, padding=1)
        self.mid_block = Middle(cfg, ch[0])
        self.up_blocks = nn.ModuleList()
        for i, dim in enumerate(ch):
            self.up_blocks.append(Level(cfg, ch[max(i - 1, 0)], dim, cfg.resnets + 1))
            if i < len(ch) - 1:
                self.up_blocks[-1].upsamplers.append(Upsample(dim))
        self.conv_norm_out = nn.GroupNorm(cfg.norm_groups, ch[-1], eps=cfg.norm_eps)
        self.conv_out = nn.Conv2d(ch[-1], cfg.in_channels, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))  # (B, C, h, w)
        for level in self.up_blocks:
            x = level(x)  # (B, C, 2h, 2w) per level
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 3, H, W)


class VAE(nn.Module):
    """Encoder to a Gaussian posterior of the latents, and decoder; `VAEConfig` has the sizes."""

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, kernel_size=1)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each (B, Z, H/f, W/f), before `scaling`.

        x: images (B, 3, H, W) in [-1, 1], H and W multiples of f.
        """
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)  # 2 x (B, Z, h, w)
        return mean, torch.exp(0.5 * logvar.clamp(*self.cfg.logvar_range))

    def decode(self, z: Tensor) -> Tensor:
        """Latents z (B, Z, h, w), divided by `scaling` -> images (B, 3, h*f, w*f), not clamped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))  # (B, 3, H, W)
