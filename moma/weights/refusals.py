"""Checkpoints that look like what is wanted and compute something else: told by tensors, header or sidecar.

Every function raises ValueError with the reason, and reads no more than headers and two small buffers.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from models.weights import keymaps
from models.weights.files import read_bytes
from models.weights.loading import LazyTensor, read_metadata
from moma.sampling.diffusion import ScheduleConfig, alphas_cumprod

Tensors = Mapping[str, LazyTensor]

SD2_CONTEXT, REFINER_CONTEXT = 1024, 1280  # width of the text states
VARIANTS = {9: "an inpainting model", 8: "an instruct-pix2pix model"}  # by the UNet's input channels
VERSIONS = {SD2_CONTEXT: "Stable Diffusion 2", REFINER_CONTEXT: "SDXL's refiner"}
SDXL_NAMES = re.compile(r"xl|pony")  # of OTHER_MODEL, those of SDXL itself
_SCHEDULE = ScheduleConfig()
NUMBERS = {
    "linear_start": _SCHEDULE.beta_start,
    "linear_end": _SCHEDULE.beta_end,
    "beta_start": _SCHEDULE.beta_start,
    "beta_end": _SCHEDULE.beta_end,
    "num_train_timesteps": _SCHEDULE.train_steps,
}
TOLERANCE = 0.02  # relative, of what a file says of its schedule: 16 bits round to 0.004
NAME_SHOWN = 60  # characters of what a file says, in a message
# What a file says of itself in its header or beside it (.yaml of LDM, .json of user interfaces): a key,
# without the namespaces "modelspec." and "ss_" of trainers, and a value.
CLAIM = re.compile(r"""([\w.]+)["']?[ \t]*[:=][ \t]*["']?([^"'\n,{}\[\]]*)""")
SIDECARS = (".yaml", ".yml", ".json", ".metadata.json", ".civitai.info")
EPSILON = ("", "none", "null", "epsilon", "eps", "noise")  # what it may say that it predicts
FLAGS = ("v2", "v_parameterization", "v_pred", "zero_terminal_snr", "ztsnr", "rescale_betas_zero_snr")
FALSE = ("", "none", "null", "false", "0", "no")
OTHER_MODEL = re.compile(
    r"xl|flux|pony|turbo|lightning|hyper|lcm|inpaint|pix2pix|refiner|lora|controlnet|textual|v[23]|sd[23]"
    r"|\b[23]\.[0-5]|cascade|pixart|kolors"
)
# Tensors that tell of another forward process.
MARKERS = re.compile(r"v_pred|ztsnr|edm_.*")
# Low-rank changes to weights, by the names of LoRA, LoHa, LoKr, OFT, DoRA and their kin.
LORA = re.compile(r".*(lora|hada_w|lokr_w|oft_(blocks|diag)|dora_scale|ia3|glora|boft).*", re.IGNORECASE)
PAIR_ENDS = re.compile(r"[._]?(down|up|a|b|1|2)(\.\w+)?$")  # of a pair's names
PAIRED = 0.9  # share of matrices in pairs of low rank that only such changes have
# What other software stores with codes of few bits (bitsandbytes, GPTQ, AWQ, scaled float8), and scales that
# are none of such codes.
CODES = re.compile(
    r"(.*\.)?(qweight|qzeros|g_idx|SCB|absmax|quant_map|nested_absmax|quant_state\..*|weight_packed|scaled_fp8"
    r"|comfy_quant|(weight|input)_scale(_inv)?|scale_(weight|input))"
)
PLAIN_SCALES = ("logit_scale", "scale_learnable", "scale_factor")


def side(tensors: Tensors, name: str, axis: int) -> int:
    """Size of a tensor along an axis; 0 where there is no such tensor or axis."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[axis] if -len(shape) <= axis < len(shape) else 0


def refuse_codes(path: Path, tensors: Tensors) -> None:
    """ValueError for codes of few bits, which are meaningless without their scales."""
    codes = [key for key in tensors if CODES.fullmatch(key)]
    if any(tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point for tensor in tensors.values()):
        ends = ((key, key.rpartition(".")[2]) for key in tensors)
        codes += [key for key, end in ends if "scale" in end and end not in PLAIN_SCALES]
    if codes:
        raise ValueError(f"{path}: weights in few bits with scales ({codes[0]}), expected 16 or 32 bits")


def refuse_unet(channels: int, context: int, where: Path) -> None:
    """ValueError for Stable Diffusion variants whose names fit, or nearly fit, SD1.5's or SDXL's."""
    if channels in VARIANTS:
        raise ValueError(
            f"{where}: {VARIANTS[channels]} ({channels} input channels), expected a plain base (4)"
        )
    if context in VERSIONS:
        raise ValueError(
            f"{where}: {VERSIONS[context]} (text width {context}), expected SD1.5 (768) or SDXL (2048)"
        )


def refuse_lora(path: Path, tensors: Tensors) -> None:
    """ValueError for a file with low-rank changes: by names, or if most matrices are pairs of low rank."""
    named = next((key for key in tensors if LORA.fullmatch(key)), None)
    matrices = {key: tensor.shape for key, tensor in tensors.items() if len(tensor.shape) > 1}
    pairs: dict[str, list[tuple[int, ...]]] = {}
    for key, shape in matrices.items():
        pairs.setdefault(PAIR_ENDS.sub("", key.lower()), []).append(shape)
    low = 0
    for one, other in (shapes for shapes in pairs.values() if len(shapes) == 2):
        for (out, inner, *_), (also, into, *_) in ((one, other), (other, one)):
            low += inner == also and 2 * inner <= min(out, into)
    if named or (low and 2 * low > PAIRED * len(matrices)):
        what = named or next(iter(matrices))
        raise ValueError(f"{path}: a LoRA or the like ({what}); merge a plain one into a base with --lora")


def refuse_claims(
    path: Path, tensors: Tensors, scaling: float, sdxl: bool = False, ignored: Sequence[str] = ()
) -> None:
    """ValueError for a file that says, in it or beside it, that it is not like SD1.5, or like SDXL.

    Args:
        path: of the weights.
        tensors: in it.
        scaling: of the VAE's latents.
        sdxl: what it is by its tensors.
        ignored: keys of what it says.
    """
    if marker := next((key for key in tensors if MARKERS.fullmatch(key)), None):
        raise ValueError(f"{path}: {marker} tells of 'v_prediction' or the like, expected 'epsilon'")
    bases = (path.with_suffix(""), path)
    sidecars = {base.with_name(base.name + end): None for base in bases for end in SIDECARS}
    claims = [(path, *claim) for claim in read_metadata(path).items()]
    for file in (file for file in sidecars if file != path and file.is_file()):
        claims += [(file, *claim) for claim in CLAIM.findall(read_bytes(file).decode(errors="replace"))]
    for file, name, said in claims:
        key, text = name.lower().rpartition(".")[2].removeprefix("ss_"), said.strip().lower()
        if key in ignored:
            continue
        numbers = {**NUMBERS, "scale_factor": scaling, "scaling_factor": scaling}
        if _is_wrong(key, SDXL_NAMES.sub("", text) if sdxl else text, numbers):
            shown, version = said.strip()[:NAME_SHOWN], "XL 1.0" if sdxl else "1.5"
            raise ValueError(
                f"{file}: says {key} {shown!r}, expected a model like Stable Diffusion {version}"
            )


def _is_wrong(key: str, text: str, numbers: Mapping[str, float]) -> bool:
    """Whether a claim speaks of another kind of model."""
    if key in ("prediction_type", "parameterization"):
        return text not in EPSILON
    if key in FLAGS:
        return text not in FALSE
    if key in ("architecture", "base_model_version", "basemodel"):
        return bool(OTHER_MODEL.search(text))
    if key == "beta_schedule":
        return text not in ("scaled_linear", *FALSE)
    with suppress(ValueError):
        return key in numbers and not abs(float(text) / numbers[key] - 1) <= TOLERANCE
    return False


def refuse_ldm(path: Path, tensors: Tensors, scaling: float, sdxl: bool = False) -> None:
    """ValueError for single files of other models than Stable Diffusion 1.x and SDXL.

    Args:
        path: of the file.
        tensors: in it.
        scaling: of the VAE's latents.
        sdxl: what it is by its tensors.
    """
    encoders = [any(key.startswith(prefix) for key in tensors) for prefix in keymaps.SDXL_TEXT_PREFIXES]
    if encoders == [True, False]:
        raise ValueError(f"{path}: SDXL's refiner, which has one text encoder; expected SDXL's base")
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        raise ValueError(f"{path}: Stable Diffusion 2 (an OpenCLIP text encoder), expected SD1.5")
    channels = side(tensors, f"{keymaps.LDM_UNET_PREFIX}input_blocks.0.0.weight", 1)
    contexts = (side(tensors, key, -1) for key in tensors if key.endswith(".attn2.to_k.weight"))
    refuse_unet(channels, max(contexts, default=0), path)
    refuse_claims(path, tensors, scaling, sdxl)
    alphas = alphas_cumprod(ScheduleConfig())
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    buffers = {"alphas_cumprod": alphas, "betas": betas, "scale_factor": torch.tensor(scaling)}
    for name, values in buffers.items():
        found = tensors[name].read().double() if name in tensors else values
        same = found.shape == values.shape and ((found - values).abs() <= TOLERANCE * values).all()
        if not same:
            raise ValueError(f"{path}: {name} differs from SD1.5's, so its noise schedule or latents do")


def refuse_ip_adapter(path: Path, tensors: Tensors) -> None:
    keys = {re.sub(r"^[^.]*\.", "", key): tensor for key, tensor in tensors.items()}
    if "latents" in keys:
        raise ValueError(f"{path}: IP-Adapter Plus (a resampler), expected the plain ip-adapter")
    if "proj.0.weight" in keys:
        raise ValueError(f"{path}: IP-Adapter Full Face (an MLP), expected the plain ip-adapter")
