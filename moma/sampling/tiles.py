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

# Memory of the operators' own layouts and buffers, as a factor of the tensors that `decoder_bytes` counts,
# on a CPU (docs/performance.md); MARGIN comes on top.
BUFFERS = 1.5
# Sides of tiles in latents, the first one that fits. 64 is what the autoencoder saw in training; below 16 a
# tile's edges, which it decodes as edges of an image, are most of it.
SIDES = (64, 32, 16)
OVERLAP = 4  # the part of a side, 1 / OVERLAP, over which neighbours are blended


def decode(vae: VAE, z: Tensor, tiles: Toggle = "auto") -> Tensor:
    """Decode latents, whole or in tiles.

    Tiles may differ a little in tone from the whole image: the decoder's GroupNorm and attention look at all
    of it.

    Args:
        vae: the autoencoder.
        z: latents (1, Z, h, w), not scaled.
        tiles: "off" = whole; "on" = in tiles if larger than the smallest tile; "auto" = in tiles, with a
        warning,
            if memory does not hold the whole.

    Returns:
        The image (1, 3, H, W), about [-1, 1], not clamped.

    Raises:
        ValueError: for another choice.
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
    """Side of the tiles in latents; None = decode the whole image.

    Args:
        tiles: as in `decode`.
        cfg: the autoencoder's.
        grid: (h, w) of the latents.
        dtype: of the weights.
        free: bytes of memory; None = not known.
    """

    def fits(h: int, w: int) -> bool:
        return free is None or decoder_bytes(cfg, (h, w), dtype) * (1 + MARGIN) <= free

    smaller = [side for side in SIDES if side < max(grid)]
    if tiles == "off" or not smaller or (tiles == "auto" and fits(*grid)):
        return None
    return next((side for side in smaller if fits(side, side)), smaller[-1])


def decoder_bytes(cfg: VAEConfig, grid: tuple[int, int], dtype: torch.dtype) -> int:
    """Memory that decoding takes beside the weights, an estimate for the largest level.

    A level's input is held throughout it. Its first residual block normalises and activates it; the later
    ones hold their own input, the same normalised and activated, and a product; the convolution of twice the
    size, after all but the last level, holds its input and output.

    Args:
        cfg: the autoencoder's.
        grid: (h, w) of the latents.
        dtype: of the weights.

    Returns:
        Bytes.
    """
    fine_first = tuple(zip((*cfg.channels[1:], cfg.channels[-1]), cfg.channels, strict=True))  # in, out
    levels = [
        max(3 * wide, wide + (4 if level == 0 else 9) * width) / 4**level
        for level, (wide, width) in enumerate(fine_first)
    ]  # numbers per pixel
    pixels = grid[0] * grid[1] * cfg.factor**2
    return int(BUFFERS * max(levels) * pixels * dtype.itemsize)


def decode_tiles(vae: VAE, z: Tensor, side: int) -> Tensor:
    """Decode in tiles that are blended linearly.

    Args:
        vae: the autoencoder.
        z: latents (1, Z, h, w), not scaled.
        side: of a tile, in latents.

    Returns:
        float32 (1, 3, H, W).
    """
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
