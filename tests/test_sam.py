"""Our SAM against transformers' on the same pseudo-random weights, and what holds whatever the weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.attention import attention
from models.sam import (
    BACKGROUND,
    BOX_END,
    BOX_START,
    FOREGROUND,
    IGNORED,
    NOT_A_POINT,
    SAM,
    Prompts,
    from_windows,
    relative_bias,
    relative_positions,
    to_windows,
)
from models.sam_config import PRESETS
from models.sam_image import MEAN, STD, placement, preprocess, to_image, to_input
from models.weights.public_configs import sam_config
from tests.compare import assert_close_to_std
from tests.make_checkpoints import TINY as SCALE
from tests.make_checkpoints import sam_json
from tests.recipe import normal, u8, uniform

transformers = pytest.importorskip("transformers")
from tests.sam_reference import build_sam, reference, share_sam  # noqa: E402

TINY = SCALE.sam
SIDE = TINY.image_size
POINTS = torch.from_numpy(uniform("sam/points", (2, 3, 2, 2))) * SIDE
LABELS = torch.tensor([[[1, 1], [1, 0], [0, 1]], [[0, 0], [1, 1], [1, 0]]])
CORNERS = torch.from_numpy(uniform("sam/boxes", (2, 3, 2, 2))).cumsum(dim=2) / 2 * SIDE  # start < end
BOX_LABELS = torch.tensor([BOX_START, BOX_END]).expand(2, 3, 2)


def pixels(batch: int = 2, side: int = SIDE) -> Tensor:
    return torch.from_numpy(normal("sam/pixels", (batch, 3, side, side)))


@pytest.fixture(scope="module")
def ours() -> SAM:
    with torch.no_grad():
        return build_sam(TINY).requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(ours: SAM) -> torch.nn.Module:
    return share_sam(ours)


@pytest.fixture(scope="module")
def features(ours: SAM) -> Tensor:
    return ours.encode(pixels())


def test_configs_from_json() -> None:
    for cfg in (TINY, *PRESETS.values()):
        assert sam_config(sam_json(cfg)) == cfg
    assert sam_config({"model_type": "sam"}) == PRESETS["b"]
    huge = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120}
    huge |= {"global_attn_indexes": [7, 15, 23, 31]}  # what facebook/sam-vit-huge adds to the defaults
    assert sam_config({"model_type": "sam", "vision_config": huge}) == PRESETS["h"]


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ({"model_type": "sam2"}, "'sam2', expected 'sam'"),
        ({"model_type": "sam", "vision_config": {"use_rel_pos": False}}, "use_rel_pos False, expected True"),
        ({"model_type": "sam", "mask_decoder_config": {"iou_head_depth": 4}}, "iou_head_depth 4, expected 3"),
    ],
)
def test_other_networks_are_refused(public: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sam_config(public)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 50}, "width 50"),
        ({"image_size": 81}, "image_size 81"),
        ({"out_channels": 36}, "out_channels 36"),
        ({"global_blocks": (3,)}, r"\b3\b"),
    ],
)
def test_impossible_sizes(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **sizes)


def test_names_and_sizes_of_the_official_files() -> None:
    """Parameters of sam_vit_{b,l,h}, and shapes that the published files have."""
    with torch.device("meta"):
        states = {name: SAM(cfg).state_dict() for name, cfg in PRESETS.items()}
    counts = {name: sum(value.numel() for value in state.values()) for name, state in states.items()}
    assert counts == {"b": 93_735_728, "l": 312_343_088, "h": 641_090_864}
    shapes = {name: tuple(value.shape) for name, value in states["b"].items()}
    known = {
        "image_encoder.pos_embed": (1, 64, 64, 768),
        "image_encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "image_encoder.blocks.0.attn.rel_pos_h": (27, 64),
        "image_encoder.blocks.11.attn.rel_pos_w": (127, 64),
        "image_encoder.blocks.2.attn.qkv.bias": (2304,),
        "image_encoder.blocks.2.mlp.lin1.weight": (3072, 768),
        "image_encoder.neck.3.weight": (256,),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "prompt_encoder.point_embeddings.3.weight": (1, 256),
        "prompt_encoder.not_a_point_embed.weight": (1, 256),
        "prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "prompt_encoder.no_mask_embed.weight": (1, 256),
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image.k_proj.weight": (128, 256),
        "mask_decoder.transformer.layers.0.self_attn.out_proj.weight": (256, 256),
        "mask_decoder.transformer.layers.0.norm4.bias": (256,),
        "mask_decoder.transformer.layers.0.mlp.lin1.weight": (2048, 256),
        "mask_decoder.transformer.final_attn_token_to_image.q_proj.bias": (128,),
        "mask_decoder.transformer.norm_final_attn.weight": (256,),
        "mask_decoder.iou_token.weight": (1, 256),
        "mask_decoder.mask_tokens.weight": (4, 256),
        "mask_decoder.output_upscaling.3.weight": (64, 32, 2, 2),
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "mask_decoder.iou_prediction_head.layers.2.bias": (4,),
    }
    assert known.items() <= shapes.items()


# --- against transformers ----------------------------------------------------------------------------


@torch.no_grad()
def test_features(features: Tensor, theirs: torch.nn.Module) -> None:
    assert features.shape == (2, 32, 10, 10)
    assert_close_to_std(features, theirs.get_image_embeddings(pixels()))


@torch.no_grad()
@pytest.mark.parametrize("prompts", [slice(0, 3), slice(1, 2)], ids=["three prompts", "one prompt"])
@pytest.mark.parametrize("kind", ["points", "boxes", "points and box", "not a point"])
def test_masks(ours: SAM, theirs: torch.nn.Module, features: Tensor, kind: str, prompts: slice) -> None:
    points, labels, corners = POINTS[:, prompts], LABELS[:, prompts], CORNERS[:, prompts]
    box_labels = BOX_LABELS[:, prompts]
    if kind == "boxes":
        public = {"input_boxes": corners.flatten(2)}
        mine = Prompts(corners, box_labels)
    elif kind == "points and box":
        public = {"input_points": points, "input_labels": labels, "input_boxes": corners.flatten(2)}
        mine = Prompts(torch.cat([points, corners], dim=2), torch.cat([labels, box_labels], dim=2))
    else:
        if kind == "not a point":
            labels = torch.where(labels == BACKGROUND, NOT_A_POINT, labels)
        public = {"input_points": points, "input_labels": labels}
        mine = Prompts(points, labels)
    logits, iou = ours.decode(features, mine)
    their_logits, their_iou = reference(theirs, features, **public)
    assert logits.shape == (2, labels.shape[1], 4, 40, 40)
    assert_close_to_std(logits, their_logits)
    assert_close_to_std(iou, their_iou)


@torch.no_grad()
def test_masks_refine_masks(ours: SAM, theirs: torch.nn.Module, features: Tensor) -> None:
    first, plain = POINTS[:, :1], LABELS[:, :1]
    earlier = torch.from_numpy(normal("sam/masks", (2, 1, 40, 40)))
    logits, iou = ours.decode(features, Prompts(first, plain), earlier)
    their_logits, their_iou = reference(theirs, features, earlier, input_points=first, input_labels=plain)
    assert_close_to_std(logits, their_logits)
    assert_close_to_std(iou, their_iou)
    assert (logits - ours.decode(features, Prompts(first, plain))[0]).abs().max() > logits.std()


@pytest.mark.parametrize("size", [(50, 80), (97, 61), (80, 80), (33, 200), (7, 5)])
def test_images(size: tuple[int, int]) -> None:
    """Size, values and padding; the way back cuts the padding off."""
    processor = transformers.models.sam.image_processing_pil_sam.SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        image_mean=[m / 255 for m in MEAN], image_std=[s / 255 for s in STD],
    )  # fmt: skip
    image = Image.fromarray(u8("sam/image", (*size, 3)))
    theirs = processor(image, return_tensors="pt")
    x, place = preprocess(image, 64)
    assert x.shape == (1, 3, 64, 64)
    torch.testing.assert_close(x, theirs["pixel_values"].float(), rtol=0, atol=1e-4)
    assert tuple(theirs["reshaped_input_sizes"][0].tolist()) == place.inside
    logits = torch.from_numpy(normal("sam/logits", (2, 3, 16, 16)))
    back = processor.post_process_masks(
        [logits], theirs["original_sizes"], theirs["reshaped_input_sizes"], binarize=False
    )[0]
    assert back.shape[-2:] == size
    torch.testing.assert_close(to_image(logits, place), back, rtol=0, atol=1e-5)


def test_points_follow_the_image() -> None:
    place = placement(50, 100, 64)
    assert place.inside == (32, 64)
    points = to_input(torch.tensor([[0, 0], [100, 50], [25, 25]]), place)
    torch.testing.assert_close(points, torch.tensor([[0.0, 0], [64, 32], [16, 16]]))


def test_the_way_there_and_back() -> None:
    """A mark stays where it was: a mask drawn in the input at `to_input` of a place covers that place."""
    place = placement(60, 90, 64)
    x, y = to_input(torch.tensor([67.0, 20.0]), place).tolist()
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    logits = 36 - (rows - y) ** 2 - (columns - x) ** 2  # a disc of radius 6 pixels
    where = (to_image(logits, place) > 0).nonzero().float()
    torch.testing.assert_close(where.mean(dim=0) + 0.5, torch.tensor([20.0, 67.0]), rtol=0, atol=0.3)


# --- its parts ---------------------------------------------------------------------------------------


def test_windows() -> None:
    x = torch.arange(2 * 5 * 6).reshape(2, 5, 6, 1).float() + 1
    windows = to_windows(x, 4)
    assert windows.shape == (2 * 2 * 2, 4, 4, 1)
    torch.testing.assert_close(windows[1, :, :2], x[0, :4, 4:])  # the second of the upper row
    assert not windows[1, :, 2:].any() and not windows[3, 1:].any()
    torch.testing.assert_close(windows[6, :1], x[1, 4:, :4])
    assert torch.equal(from_windows(windows, 5, 6), x)


@pytest.mark.parametrize("size", [3, 5, 8])  # smaller, as the table, larger
def test_relative_positions(theirs: torch.nn.Module, size: int) -> None:
    table = torch.from_numpy(normal("sam/table", (9, 6)))
    attn = theirs.vision_encoder.layers[0].attn
    torch.testing.assert_close(relative_positions(table, size), attn.get_rel_pos(size, size, table))
    if size == 5:
        assert torch.equal(relative_positions(table, 5)[1, 4], table[1])  # one that is 3 before it: -3 + 4


def test_relative_bias_by_hand() -> None:
    q = torch.from_numpy(normal("sam/q", (1, 2, 6, 4)))
    table_h, table_w = (torch.from_numpy(normal(f"sam/{side}", (n, 4))) for side, n in (("h", 3), ("w", 5)))
    bias = relative_bias(q, table_h, table_w, 2, 3)
    for query in range(6):
        for key in range(6):
            down, right = query // 3 - key // 3, query % 3 - key % 3
            expected = q[0, 1, query] @ (table_h[down + 1] + table_w[right + 2])
            torch.testing.assert_close(bias[0, 1, query, key], expected)


def test_attention_with_relative_positions() -> None:
    """The fused form with this bias is the explicit one."""
    q, k, v = (torch.from_numpy(normal(f"sam/{name}", (2, 3, 16, 8))) for name in "qkv")
    tables = [torch.from_numpy(normal(f"sam/table {side}", (7, 8))) for side in "hw"]
    bias = relative_bias(q, *tables, 4, 4)
    fused, explicit = (attention(q, k, v, bias=bias, impl=impl) for impl in ("fused", "explicit"))
    torch.testing.assert_close(fused, explicit, rtol=0, atol=1e-5)


# --- batches -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_prompt_is_by_itself(ours: SAM, features: Tensor) -> None:
    """An image and a prompt alone are as in a batch, of prompts of unequal kinds and lengths too."""
    points, labels = torch.cat([POINTS, CORNERS], dim=2), torch.cat([LABELS, BOX_LABELS], dim=2)
    labels[0, 0, 2:] = IGNORED  # two points
    labels[1, 2, 1:] = IGNORED  # a point
    labels[0, 2, :2] = IGNORED  # a box
    logits, iou = ours.decode(features, Prompts(points, labels))
    for b in range(2):
        alone = ours.encode(pixels()[b : b + 1])
        for p in range(3):
            part = labels[b, p] != IGNORED
            mine = Prompts(points[b, p, part][None, None], labels[b, p, part][None, None])
            one, one_iou = ours.decode(alone, mine)
            torch.testing.assert_close(logits[b, p], one[0, 0], rtol=0, atol=1e-4)
            torch.testing.assert_close(iou[b, p], one_iou[0, 0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_other_sizes_of_images(ours: SAM) -> None:
    """Positions are resampled: a ramp over the trained grid stays one, with its ends where they were."""
    ramp = (torch.arange(10) + 0.5) / 10
    encoder = SAM(TINY).image_encoder
    encoder.pos_embed.copy_(ramp[:, None].expand(1, 10, 10, 48))
    positions = encoder._positions(20)
    assert positions.shape == (1, 20, 20, 48)
    expected = (torch.arange(20) + 0.5) / 20
    torch.testing.assert_close(positions[0, 7, 3:-3, 5], expected[3:-3], rtol=0, atol=5e-3)
    assert ours.encode(pixels(1, 160)).shape == (1, 32, 20, 20)
    with pytest.raises(ValueError, match="8"):
        ours.encode(pixels(1, 81))
    with pytest.raises(ValueError, match="SAM image"):
        ours.encode(pixels()[:, :, :72])


def test_prompts_that_do_not_fit(ours: SAM, features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"points \(1, 3, 2, 2\), labels \(1, 3, 2\)"):
        ours.decode(features, Prompts(POINTS[:1], LABELS[:1]))
    with pytest.raises(ValueError, match="SAM prompts"):
        ours.decode(features, Prompts(POINTS[:, :, 0], LABELS))


@torch.no_grad()
def test_bfloat16(ours: SAM, features: Tensor) -> None:
    half = SAM(TINY).bfloat16()
    half.load_state_dict(ours.state_dict())
    mine = half.encode(pixels().bfloat16())
    assert mine.dtype == torch.bfloat16
    assert_close_to_std(mine, features, tolerance=0.3)
    logits, iou = half.decode(mine, Prompts(POINTS, LABELS))
    assert logits.dtype == iou.dtype == torch.float32
    assert_close_to_std(logits, ours.decode(features, Prompts(POINTS, LABELS))[0], tolerance=0.6)


# --- training ----------------------------------------------------------------------------------------


def test_official_initialisation() -> None:
    encoder = SAM(TINY).image_encoder
    assert not encoder.pos_embed.any()
    assert not any(block.attn.rel_pos_h.any() or block.attn.rel_pos_w.any() for block in encoder.blocks)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    sam = SAM(TINY)
    x = pixels().requires_grad_()
    prompts = Prompts(torch.cat([POINTS, CORNERS], dim=2), torch.cat([LABELS, BOX_LABELS], dim=2))
    features = sam.encode(x)
    logits, iou = sam.decode(features, Prompts(POINTS, LABELS))
    refined, _ = sam.decode(features, prompts, logits[:, :, 0])
    (logits.square().mean() + refined.square().mean() + iou.square().mean()).backward()
    assert x.grad.any()
    assert not [name for name, p in sam.named_parameters() if p.grad is None or not p.grad.any()]


def test_it_learns() -> None:
    """From its first initialisation: the square below the point."""
    torch.manual_seed(0)
    sam = SAM(replace(TINY, image_size=32, patch=4, layers=2, width=32))
    x = torch.full((1, 3, 32, 32), -1.0)
    x[:, :, 2:14, 2:14], x[:, :, 16:28, 8:28] = 1, 1
    points = torch.tensor([[[[8.0, 8]], [[20.0, 20]]]])
    target = torch.zeros(1, 2, 1, 32, 32)
    target[:, 0, :, 2:14, 2:14], target[:, 1, :, 16:28, 8:28] = 1, 1
    target = target.expand(-1, -1, 4, -1, -1)
    prompts = Prompts(points, torch.full((1, 2, 1), FOREGROUND))
    optimiser = torch.optim.AdamW(sam.parameters(), lr=3e-3)
    for _ in range(40):
        logits, _ = sam.decode(sam.encode(x), prompts)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    right = ((logits > 0) == (target > 0)).float().mean(dim=(0, 2, 3, 4))  # (2,), of each prompt
    assert right.min() > 0.97


def test_input_by_hand() -> None:
    """A grey image."""
    x, _ = preprocess(Image.new("L", (8, 4), 100), 8)
    expected = (100 - np.float32(MEAN)) / np.float32(STD)
    torch.testing.assert_close(x[0, :, 2, 3], torch.from_numpy(expected))
    assert not x[:, :, 4:].any() and x[:, :, :4].all()
