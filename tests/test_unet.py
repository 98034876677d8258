"""Our UNet against diffusers', on the same pseudo-random weights."""

from dataclasses import replace

import pytest
import torch

from models.attention import attention
from models.unet import SD15, UNet, UNetConfig, attention_layers
from models.weights.public_configs import unet_config
from tests.compare import assert_close_to_std
from tests.recipe import fill, normal

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 48,
    "norm_num_groups": 8,
    "in_channels": 4,
    "out_channels": 4,
}
SDXL_LIKE = SMALL | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [2, 4, 8],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 10 + 6 * 8,
}


def tensor(key: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(normal(key, shape))


def pair(json: dict) -> tuple[UNet, torch.nn.Module]:
    """Ours and diffusers', holding the same weights."""
    ours, theirs = UNet(unet_config(json)), diffusers.UNet2DConditionModel(**json)
    fill(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (10, 14)])  # square, wide, not divisible by 2^levels
def test_parity_sd(size: tuple[int, int]) -> None:
    ours, theirs = pair(SMALL)
    x, text, t = tensor("x", 2, 4, *size), tensor("text", 2, 7, 48), torch.tensor([3, 801])
    eps, records = ours(x, t, text)
    assert records == []
    assert_close_to_std(eps, theirs(x, t, text).sample)


@torch.no_grad()
def test_parity_sdxl_layout() -> None:
    """Per-level depth and heads, linear projections, added conditioning."""
    ours, theirs = pair(SDXL_LIKE)
    x, text, t = tensor("x", 2, 4, 16, 16), tensor("text", 2, 7, 48), torch.tensor([3, 801])
    pooled, sizes = tensor("pooled", 2, 10), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    theirs_out = theirs(x, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    added = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).reshape(2, -1)], dim=-1)  # (2, 58)
    assert_close_to_std(ours(x, t, text, added=added)[0], theirs_out)


@torch.no_grad()
def test_batch_equals_singles() -> None:
    ours, _ = pair(SMALL)
    x, text, t = tensor("x", 3, 4, 8, 8), tensor("text", 3, 7, 48), torch.tensor([3, 400, 801])
    batch, _ = ours(x, t, text)
    for i in range(3):
        single, _ = ours(x[i : i + 1], t[i : i + 1], text[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    """Same output and the same gradients of weights and text, with recomputation and without."""
    json = SMALL | {"down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"]}
    results = []
    for on in (False, True):
        cfg = UNetConfig(**{**vars(unet_config(json)), "gradient_checkpointing": on})
        unet = UNet(cfg)
        fill(unet)
        text = tensor("text", 1, 7, 48).requires_grad_()
        eps, _ = unet(tensor("x", 1, 4, 8, 8), torch.tensor([5]), text)
        eps.square().mean().backward()
        grads = {name: p.grad for name, p in unet.named_parameters()}
        assert all(g is not None for g in grads.values())
        results.append((eps.detach(), text.grad, grads["conv_in.weight"]))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_projected_text_changes_nothing(checkpointing: bool) -> None:
    """Keys and values computed beforehand: the same output, records and gradient of the latents."""

    class Hook:
        def self_attn(self, layer, q, k, v, grid):
            return attention(q, k, v), None

        def cross_attn(self, layer, q, k, v, grid):
            return attention(q, k, v), (layer, k.detach(), v.detach())

    cfg = replace(unet_config(SDXL_LIKE), added_cond_dim=None, gradient_checkpointing=checkpointing)
    unet = UNet(cfg)
    fill(unet)
    text = tensor("text", 2, 7, 48)
    kv = unet.text_kv(text)
    results = []
    for given in (text, kv):
        x = tensor("x", 2, 4, 8, 8).requires_grad_()
        eps, records = unet(x, torch.tensor([3, 801]), given, Hook())
        eps.square().mean().backward()
        results.append((eps.detach(), x.grad, records))
    (eps, grad, records), (eps_kv, grad_kv, records_kv) = results
    assert torch.equal(eps, eps_kv) and torch.equal(grad, grad_kv)
    assert len(kv) == len(attention_layers(cfg)) == len(records) == len(records_kv)
    for i, (pair, states, projected) in enumerate(zip(kv, records, records_kv, strict=True)):
        assert states[0] == projected[0] == i
        assert all(
            torch.equal(a, b) and torch.equal(a, c)
            for a, b, c in zip(pair, states[1:], projected[1:], strict=True)
        )


def test_attention_layers_in_execution_order() -> None:
    """The UNet visits its layers 0, 1, 2, ... with the sizes that `attention_layers` lists."""

    class Spy:
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, int]] = []

        def self_attn(self, layer, q, k, v, grid):
            self.seen.append((layer, q.shape[1] * q.shape[3], q.shape[1]))
            assert q.shape[2] == grid[0] * grid[1]
            return q, layer

        def cross_attn(self, layer, q, k, v, grid):
            assert k.shape[2] == 7
            return q, None

    for json in (SMALL, SDXL_LIKE | {"addition_embed_type": None}):
        cfg = unet_config(json)
        spy = Spy()
        with torch.no_grad():
            _, records = UNet(cfg)(torch.zeros(1, 4, 8, 8), torch.tensor([0]), torch.zeros(1, 7, 48), spy)
        layers = attention_layers(cfg)
        assert spy.seen == [(i, layer.channels, layer.heads) for i, layer in enumerate(layers)]
        assert records == list(range(len(layers)))
    assert [layer.channels for layer in attention_layers(SD15)] == (
        [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "AttnDownBlock2D"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
    ],
)
def test_refuses_other_unets(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unet_config(SMALL | change)
