"""The released files of MM-Diff (three pickles) <-> our names.

unet_adapter_weights.bin is read below "unet_adapter.", text_encoder_adapter_weights.bin below "text.", and
custom_weights.bin as it is, a dict of parts.
"""

from models.unet import UNetConfig
from models.weights.keymaps import Row, Table, processors

OFFICIAL = ("one", "two")  # of the text encoders


def official(unet: UNetConfig) -> Table:
    """The adapter's rows; those of the image encoder are CLIP's (`models.weights.keymaps.CLIP_VISION`).

    unet: of the base; the release numbers its attention layers down, up, mid.
    """
    rows = [Row("obj_embeds_proj.proj_1.*", "images.proj.0.*")]
    rows += [Row("obj_embeds_proj.proj_2.*", "images.proj.1.*"), Row("obj_embeds_proj.*", "images.*")]
    rows += [Row(f"mm_fuse_{name}.*", f"fuse.{i}.*") for i, name in enumerate(OFFICIAL)]
    rows.append(Row("face_embeds_proj.*", "head.*"))
    down, up = sum(unet.depth) * unet.resnets, sum(unet.depth) * (unet.resnets + 1)
    for layer, ours in processors(down, up, unet.mid_depth):
        own, cross = (f"unet_adapter.{2 * layer + i}" for i in range(2))
        rows += [
            Row(f"{own}.to_*_lora.*.weight", f"unet.{ours}.attn1.*.*"),
            Row(f"{cross}.to_*_lora.*.weight", f"unet.{ours}.attn2.*.*"),
            Row(f"{cross}.to_*_lora_image.*.weight", f"unet.{ours}.image.*.*"),
        ]
    for i, name in enumerate(("", "_2")):
        there, here = f"text.text_encoder{name}.text_model.encoder.layers.{{}}", f"text.{i}.{{}}"
        rows += [
            Row(f"{there}.self_attn.*_proj.lora_linear_layer.*.weight", f"{here}.*_proj.*"),
            Row(f"{there}.self_attn.to_*_lora.*.weight", f"{here}.*_proj.*"),  # before diffusers 0.18
            Row(f"{there}.mlp.*.lora_linear_layer.*.weight", f"{here}.*.*"),
            Row(f"{there}.self_attn.*_proj.lora_linear_layer.alpha", f"{here}.*_proj.alpha"),
            Row(f"{there}.self_attn.*_proj.alpha", f"{here}.*_proj.alpha"),
            Row(f"{there}.self_attn.to_*_lora.alpha", f"{here}.*_proj.alpha"),
            Row(f"{there}.mlp.*.lora_linear_layer.alpha", f"{here}.*.alpha"),
            Row(f"{there}.mlp.*.alpha", f"{here}.*.alpha"),
        ]
    return rows
