"""Our DINO against transformers' ViTModel on the same pseudo-random weights; how images are prepared."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from models.clip_image import clip_image, resize_short
from models.dino import DINO, PRESETS, DINOConfig
from models.dino_image import MEAN, STD, dino_image
from tests.compare import assert_close_to_std
from tests.parity_scorers import dino_pair
from tests.recipe import normal, u8

CONFIG = DINOConfig(width=32, layers=3, heads=4, mlp=80, image_size=32, patch=8)


def pixels(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(normal("dino/pixels", (count, 3, 32, 32)))


@torch.no_grad()
@pytest.mark.parametrize("cfg", [CONFIG, replace(CONFIG, heads=2, patch=16, eps=1e-2)])
def test_parity(cfg: DINOConfig) -> None:
    ours, theirs = dino_pair(cfg)
    assert_close_to_std(ours(pixels()), theirs(pixels()).last_hidden_state[:, 0])


@torch.no_grad()
def test_batch_equals_singles() -> None:
    ours, _ = dino_pair(CONFIG)
    together = ours(pixels(3))
    assert together.shape == (3, 32)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], ours(pixels(3)[i : i + 1]), rtol=0, atol=1e-5)


def test_public_sizes() -> None:
    """Parameter counts of the published backbones, 21.67 and 85.80 M."""
    for name, count in (("s16", 21_665_664), ("b16", 85_798_656)):
        with torch.device("meta"):
            assert sum(p.numel() for p in DINO(PRESETS[name]).parameters()) == count


@torch.no_grad()
def test_wrong_sizes() -> None:
    ours, _ = dino_pair(CONFIG)
    with pytest.raises(ValueError, match=r"\(1, 3, 24, 32\)"):
        ours(torch.zeros(1, 3, 24, 32))
    with pytest.raises(ValueError, match="width"):
        DINOConfig(heads=5)
    with pytest.raises(ValueError, match="image_size"):
        DINOConfig(patch=15)


# --- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 420), (500, 256), (97, 64)])  # the longer edge's rest is even
def test_image_as_transformers_prepares_it(shape: tuple[int, int]) -> None:
    transforms = pytest.importorskip("transformers.image_transforms")
    image = Image.fromarray(u8("dino/image", (*shape, 3)))
    size = transforms.get_resize_output_image_size(np.asarray(image), 256, default_to_square=False)
    x = transforms.resize(np.asarray(image), size, resample=Image.Resampling.BICUBIC)
    x = transforms.rescale(transforms.center_crop(x, (224, 224)), 1 / 255)
    x = transforms.normalize(x, MEAN, STD).transpose(2, 0, 1)
    torch.testing.assert_close(dino_image(image), torch.from_numpy(x).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width, left", [(256, 16), (257, 16), (259, 18), (261, 18)])
def test_the_centre_is_rounded_half_to_even(width: int, left: int) -> None:
    """Columns that tell their place: which of them the square begins with, as torchvision's CenterCrop."""
    columns = np.zeros((256, width, 3), np.uint8)
    columns[..., 0] = np.arange(width) % 256
    red = dino_image(Image.fromarray(columns))[0] * STD[0] + MEAN[0]
    assert round(red[0, 0].item() * 255) == left


def test_image_of_other_modes_and_known_values() -> None:
    grey = dino_image(Image.new("L", (80, 60), 255))
    assert grey.shape == (3, 224, 224) and grey.dtype == torch.float32
    wanted = (torch.ones(3) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(grey[:, 7, 9], wanted)
    assert dino_image(Image.new("RGBA", (40, 90)), 32).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(32, 20_000), (20_000, 32), (3, 5000)])
@pytest.mark.parametrize("prepare", [clip_image, dino_image])
def test_thin_images_are_cut_before_they_are_enlarged(size, prepare):
    """The square is that of the middle; the enlarged whole would have gigabytes."""
    image = Image.fromarray(u8("thin", (size[1], size[0], 3)))
    borders = tuple((side - min(side, 20 * min(size))) // 2 for side in size)
    with_room = ImageOps.crop(image, borders)
    assert (prepare(image, 64) - prepare(with_room, 64)).abs().max() < 0.1
    assert resize_short(image, 64).width * resize_short(image, 64).height <= 8 * 64**2


def test_a_thin_image_is_padded_within_bounds():
    assert clip_image(Image.new("RGB", (200_000, 32)), 8, pad=True).shape == (3, 8, 8)
