"""From latents to an image in the memory that there is: whole, or in overlapping tiles.

Images are decoded one by one: each is then the same in every batch, and on a CPU four at once take four
times as long as one.

Letters: Z latent channels, h w latents, f pixels per latent along a side, H = h f, W = w f pixels.
"""

import warnings

import torch
from torch import Tensor

from models.vae import VAE, VAEConfig
from moma.sampling.memory import MARGIN, Toggle, check_toggle, free_memory

# What operators need besides the tensors, layouts and buffers of their own, as a factor. Measured on a CPU
# with Stable Diffusion's decoder, as growth of the process over the tensors of `decoder_bytes`, at 32x32
# latents: 1.4 (fp32), 1.5 (bf16). MARGIN comes on top. Not measured on GPUs.
BUFFERS = 1.5
# Sides of tiles in latents, the first one that fits. 64 is what the autoencoder saw in training; below 16 a
# tile's edges, which it decodes as edges of an image, are most of it.
SIDES = (64, 32, 16)
OVERLAP = 4  # the part of a side, 1 / OVERLAP, over which neighbours are blended


def decode(vae: VAE, z: Tensor, tiles: Toggle = "auto") -> Tensor:
    """Latents z (1, Z, h, w), not scaled -> an image (1, 3, H, W), about [-1, 1], not clamped.

    tiles: "off" = whole, "on" = in tiles where it is larger than the smallest tile, "auto" = in tiles if
    memory would not hold it whole, with a warning: the decoder's GroupNorm and attention look at the whole
    image, so that tiles may differ a little in tone from what it would have made. ValueError for
    another choice.
    """
    check_toggle("tiles", tiles)
    h, w = z.shape[-2:]
    side = tile_side(tiles, vae.cfg, (h, w), z.dtype, free_memory(z.device))
    if side is None:
        return vae.decode(z)
    if tiles == "auto":
        warnings.warn(
            f"memory is short: images of {w * vae.cfg.factor}x{h * vae.cfg.factor} pixels are decoded in "
            f"tiles of {side * vae.cfg.factor}, which may change their tone a little",
            stacklevel=2,
        )
    return decode_tiles(vae, z, side)


def tile_side(
    tiles: Toggle, cfg: VAEConfig, grid: tuple[int, int], dtype: torch.dtype, free: int | None
) -> int | None:
    """Side of the tiles in latents for an image of grid (h, w), None = whole. free: bytes, if known."""

    def fits(h: int, w: int) -> bool:
        return free is None or decoder_bytes(cfg, (h, w), dtype) * (1 + MARGIN) <= free

    smaller = [side for side in SIDES if side < max(grid)]
    if tiles == "off" or not smaller or (tiles == "auto" and fits(*grid)):
        return None
    return next((side for side in smaller if fits(side, side)), smaller[-1])


def decoder_bytes(cfg: VAEConfig, grid: tuple[int, int], dtype: torch.dtype) -> int:
    """Memory that decoding latents of grid (h, w) takes beside the weights: the largest level's, estimated.

    A level's input is held all through it. Its first residual block normalises and activates it; to the later
    ones come their own input, the same normalised and activated, and a product; to a convolution of twice the
    size, after all but the last level, its input and output.
    """
    fine_first = tuple(zip((*cfg.channels[1:], cfg.channels[-1]), cfg.channels, strict=True))  # in, out
    levels = [
        max(3 * wide, wide + (4 if level == 0 else 9) * width) / 4**level
        for level, (wide, width) in enumerate(fine_first)
    ]  # numbers per pixel
    pixels = grid[0] * grid[1] * cfg.factor**2
    return int(BUFFERS * max(levels) * pixels * dtype.itemsize)


def decode_tiles(vae: VAE, z: Tensor, side: int) -> Tensor:
    """z (1, Z, h, w) -> float32 (1, 3, H, W): tiles of side x side latents, blended linearly."""
    h, w = z.shape[-2:]
    f, overlap = vae.cfg.factor, side // OVERLAP * vae.cfg.factor
    image = torch.zeros(1, vae.cfg.in_channels, h * f, w * f, device=z.device)
    total = torch.zeros(h * f, w * f, device=z.device)
    for y in starts(h, side):
        for x in starts(w, side):
            tile = vae.decode(z[..., y : y + side, x : x + side]).float()  # (1, 3, side*f, side*f), or less
            rows, columns = (ramp(n, overlap).to(z.device) for n in tile.shape[-2:])
            weight = rows[:, None] * columns  # (side*f, side*f)
            place = ..., slice(y * f, (y + side) * f), slice(x * f, (x + side) * f)
            image[place] += weight * tile
            total[place] += weight
    return image / total


def starts(length: int, side: int) -> list[int]:
    """Where tiles begin along a side of `length` latents; the last one ends with it."""
    last = max(0, length - side)
    return [*range(0, last, side - side // OVERLAP), last]


def ramp(pixels: int, overlap: int) -> Tensor:
    """Weights of a tile along a side, (pixels,): rising over `overlap` pixels from both ends, else 1."""
    from_start = torch.arange(1, pixels + 1)  # (pixels,)
    return torch.minimum(from_start, from_start.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
