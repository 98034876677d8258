"""LoRAs (arXiv 2106.09685) that are merged into a base when it is converted: W + w·(α/r)·B A.

Their layers are named by kohya's scripts (`lora_unet_...`, `lora_te_...`, with underscores for dots), by
diffusers (`unet....to_q_lora.down.weight`) or by PEFT (`....lora_A.weight`), after diffusers' UNet or the
original one. What is no plain LoRA (DoRA, LoHa, LoKr and their kin) is refused, as is a name that no layer
has.

Letters: O outputs, I inputs of a layer, r rank, k side of a convolution's kernel.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.unet import UNetConfig
from models.weights import keymaps
from models.weights.files import Hashes, parse_json, read_object, visible
from models.weights.loading import (
    LazyTensor,
    finite,
    pick_weights,
    read_checkpoint,
    read_metadata,
    some_names,
)
from moma.weights.refusals import refuse_claims, refuse_codes

Tensors = Mapping[str, LazyTensor]

STEMS = ("pytorch_lora_weights", "adapter_model")  # of the files in diffusers' and PEFT's folders
PEFT_CONFIG, PEFT_METADATA = "adapter_config.json", "lora_adapter_metadata"
# Claims that need not be a plain base's: those of models for few steps, and those about the VAE.
IGNORED = ("architecture", "base_model_version", "basemodel", "scale_factor", "scaling_factor")
NETWORKS = ("unet", "text", "text_2")  # of a bundle
STARTS = {  # how names begin -> network
    "lora_unet_": "unet", "lora_te1_": "text", "lora_te2_": "text_2", "lora_te_": "text", "unet.": "unet",
    "text_encoder_2.": "text_2", "text_encoder.": "text", "diffusion_model.": "unet",
}  # fmt: skip
PEFT_PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<new>down|up|A|B)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.(?P<old>down|up))\.weight"
)
ALPHA = re.compile(r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?)?\.alpha")
A, B = ("down", "A"), ("up", "B")
OTHER_KINDS = {  # what some of their tensors are called
    "a DoRA": r"dora_scale|lora_magnitude_vector",
    "a LoHa": r"hada_",
    "a LoKr": r"lokr_",
    "an OFT": r"oft_|boft",
    "an IA3": r"on_input|ia3",
    "a GLoRA": r"\.[ab][12]\.weight$",
    "a LoCon in Tucker form": r"lora_mid",
    "whole differences of weights": r"\.diff(_b)?$|[._][wb]_norm$",
}
PLAIN_NAME = re.compile(r"[\w.]+")  # of a layer, in PEFT's patterns


@dataclass(frozen=True)
class Change:
    """What one file adds to one weight."""

    down: LazyTensor  # A, (r, I) or (r, I, k, k)
    up: LazyTensor  # B, (O, r) or (O, r, 1, 1)
    scale: float  # w·α/r

    def delta(self) -> Tensor:
        """float32 (O, I·k·k)."""
        return self.scale * (self.up.read().float().flatten(1) @ self.down.read().float().flatten(1))


def parse_lora(text: str) -> tuple[Path, float]:
    """An option's 'FILE[:WEIGHT]'; ValueError where there is no such file, or no finite weight."""
    file, colon, number = text.rpartition(":")
    path, weight = Path(text), 1.0
    if colon and not path.exists():
        with suppress(ValueError):  # of a colon in the name
            path, weight = Path(file), float(number)
    if not path.exists() or not isfinite(weight):
        raise ValueError(f"--lora {text}: expected a file, and after a colon its weight")
    return path, weight


def merge_loras(
    loras: Sequence[tuple[Path, float]],
    networks: Mapping[str, Tensors],
    unet: UNetConfig,
    dtypes: Mapping[str, torch.dtype | None],
) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, list[dict[str, Any]]]]:
    """The networks that LoRAs change, and a record of the LoRAs of each.

    Args:
        loras: files and weights.
        networks: the base's UNet and text encoders, in our names.
        unet: config of that UNet.
        dtypes: of the results, by network; None = as they are.

    Raises:
        ValueError: for what is no LoRA, or none for this base; reads no values but alphas.
    """
    changes: dict[str, dict[str, list[Change]]] = {}
    record: dict[str, list[dict[str, Any]]] = {}
    for path, weight in loras:
        found = read_lora(path, weight, networks, unet)
        file = next(iter(found.values())).down.file
        entry = {"file": file.name, "sha256": Hashes(None).of([file])[0], "weight": weight}
        for (network, name), change in found.items():
            changes.setdefault(network, {}).setdefault(name, []).append(change)
        for network in {network for network, _ in found}:
            record.setdefault(network, []).append(entry)
    results = {}
    for network, own in changes.items():
        tensors = {name: finite(tensor) for name, tensor in networks[network].items()}
        for name, these in own.items():
            dtype = dtypes.get(network) or tensors[name].dtype
            tensors[name] = finite(merged(tensors[name], these, dtype))
        results[network] = tensors
    return results, record


def read_lora(
    path: Path, weight: float, networks: Mapping[str, Tensors], unet: UNetConfig
) -> dict[tuple[str, str], Change]:
    """What a file changes; reads no values but alphas.

    Args:
        path: of the file, or of its folder.
        weight: w.
        networks: the base's UNet and text encoders, in our names.
        unet: config of that UNet.

    Returns:
        (network, name of its weight) -> change.

    Raises:
        ValueError: for what is no LoRA, or none for this base.
    """
    path = _file(path)
    tensors = read_checkpoint(path)
    _refuse_others(path, tensors, bool(unet.added_cond_dim))
    settings = _settings(path)
    layers = {name: _spellings(name, own, unet) for name, own in networks.items()}
    factors: dict[tuple[str, str], dict[str, LazyTensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = FACTOR.fullmatch(key) or ALPHA.fullmatch(key)
        place = match and _place(match["layer"], layers)
        if place is None:
            unknown.append(key)
            continue
        kind = (match["new"] or match["old"]) if match.re is FACTOR else "alpha"
        part = "down" if kind in A else "up" if kind in B else kind
        if part in factors.setdefault(place, {}):
            raise ValueError(f"{path}: {key} and {factors[place][part].name} both change {'.'.join(place)}")
        factors[place][part] = tensor
    if unknown:
        raise ValueError(
            f"{path}: {some_names(unknown)} fit no layer of {', '.join(networks)}; a LoRA of another base, or"
            " a part of one that is not known"
        )
    if not factors:
        raise ValueError(f"{path}: holds no tensors")
    return {
        place: _change(path, place, parts, networks[place[0]][place[1]], weight, settings)
        for place, parts in factors.items()
    }


def merged(tensor: LazyTensor, changes: Sequence[Change], dtype: torch.dtype) -> LazyTensor:
    """A weight with all changes, added up in float32.

    Args:
        tensor: the weight.
        changes: to it.
        dtype: of the result.
    """

    def read() -> Tensor:
        values = tensor.read().float()
        for change in changes:
            values = values + change.delta().view_as(values)
        return values.to(dtype)

    return replace(tensor, dtype=dtype, read=read)


def _file(path: Path) -> Path:
    """The file with the factors: of a folder, the one that its kind has."""
    if not path.is_dir():
        return path
    name = pick_weights([one.name for one in visible(path)], STEMS)
    if name is None:
        raise ValueError(f"{path}: no {STEMS[0]}.safetensors or {STEMS[1]}.safetensors there; give the file")
    return path / name


def _refuse_others(path: Path, tensors: Tensors, sdxl: bool) -> None:
    """ValueError for what only looks like a plain LoRA."""
    for kind, names in OTHER_KINDS.items():
        if key := next((key for key in tensors if re.search(names, key)), None):
            raise ValueError(f"{path}: {kind} ({key}), expected a plain LoRA")
    refuse_codes(path, tensors)
    refuse_claims(path, tensors, 1.0, sdxl, IGNORED)
    for key, tensor in tensors.items():
        if not key.endswith(".alpha") and not (tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {key} is {kind}, expected 16 or 32 bits")


def _settings(path: Path) -> dict[str, Any]:
    """PEFT's settings by name, after "unet." and the like where the file has those of several networks."""
    if said := read_metadata(path).get(PEFT_METADATA):
        found, where = parse_json(said, f"{path}: {PEFT_METADATA}"), path
    else:
        where = path.with_name(PEFT_CONFIG)
        found = read_object(where) if path.stem == STEMS[1] and where.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {PEFT_METADATA} is not an object")
    for key, value in found.items():
        name = key.rpartition(".")[2]
        if name == "peft_type" and value != "LORA":
            raise ValueError(f"{where}: {key} {value!r:.40}, expected 'LORA'")
        if name in ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save") and value:
            raise ValueError(f"{where}: {key} is set, expected a plain LoRA")
    return found


def _spellings(network: str, weights: Iterable[str], unet: UNetConfig) -> dict[str, str]:
    """What files call a network's layers -> the name of its weight here.

    Args:
        network: its name.
        weights: names of its tensors.
        unet: sizes of the UNet, for its layers' original names.
    """
    weights = [name for name in weights if name.endswith(".weight") and not name.startswith("embeddings.")]
    table = keymaps.ldm_unet([depth > 0 for depth in unet.depth], unet.resnets, bool(unet.added_cond_dim))
    original = keymaps.convert(table, weights, "out").names if network == "unet" else {}
    pairs = [(name, name) for name in weights] + [(name, ours) for name, (ours, _) in original.items()]
    found = {}
    for name, ours in pairs:
        layer = name.removesuffix(".weight")
        if network == "unet":
            names = {layer, re.sub(r"\.(attn\d)\.(to_\w+)(\.0)?$", r".\1.processor.\2", layer)}
        else:
            short = re.sub(r"\.self_attn\.(\w+)_proj$", r".self_attn.to_\1", layer)
            names = {start + one for start in ("", "text_model.") for one in (layer, short)}
        for one in names:
            found[one] = found[one.replace(".", "_")] = ours
    return found


def _place(layer: str, layers: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """The network and the weight that a layer's name means; of the first that has it, if it names none."""
    layer = layer.removeprefix(PEFT_PREFIX)
    if start := next((start for start in STARTS if layer.startswith(start)), None):
        layer = layer.removeprefix(start).removeprefix(PEFT_PREFIX)
        layers = {STARTS[start]: layers.get(STARTS[start], {})}
    return next(((network, own[layer]) for network, own in layers.items() if layer in own), None)


def _change(
    path: Path,
    place: tuple[str, str],
    parts: Mapping[str, LazyTensor],
    target: LazyTensor,
    weight: float,
    settings: Mapping[str, Any],
) -> Change:
    """Check the factors of one weight.

    Args:
        path: of the file.
        place: network and name of the weight.
        parts: down, up and alpha, as far as they are there.
        target: the weight.
        weight: w.
        settings: of PEFT.
    """
    what = next(iter(parts.values())).name
    if not {"down", "up"} <= {*parts}:
        raise ValueError(f"{path}: {what} without its other factor")
    down, up = parts["down"], parts["up"]
    shapes = [_plain(tensor.shape) for tensor in (up, down, target)]
    rank = down.shape[0] if down.shape else 0
    if rank < 1 or [(target.shape[0], rank), (rank, *shapes[2][1:])] != shapes[:2]:
        given = " and ".join(str(list(tensor.shape)) for tensor in (up, down))
        raise ValueError(
            f"{path}: {what} and its other factor have the shapes {given}, expected those of a change of"
            f" {list(target.shape)}"
        )
    if "alpha" in parts:
        alpha = parts["alpha"]
        if alpha.shape not in ((), (1,)):
            raise ValueError(f"{path}: {alpha.name} has the shape {list(alpha.shape)}, expected one number")
        scale = float(alpha.read()) / rank
    else:
        scale = _scale(path, place, rank, settings)
    if not isfinite(scale):
        raise ValueError(f"{path}: {what} has an alpha of {scale * rank}, expected a finite number")
    return Change(finite(down), finite(up), weight * scale)


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Without a kernel of a single pixel, which some files have where others have a matrix."""
    return tuple(shape[:2]) if tuple(shape[2:]) in ((), (1, 1)) else tuple(shape)


def _scale(path: Path, place: tuple[str, str], rank: int, settings: Mapping[str, Any]) -> float:
    """α/r of PEFT's settings, α/√r where they say so (arXiv 2312.03732); 1 without settings."""
    network, name = place
    start, inside = {
        "unet": ("unet.", ""), "text": ("text_encoder.", "text_model."),
        "text_2": ("text_encoder_2.", "text_model."),
    }[network]  # fmt: skip
    layer = inside + name.removesuffix(".weight")
    own = {key.removeprefix(start): value for key, value in settings.items()}
    patterns = own.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
        raise ValueError(f"{path}: alpha_pattern of its settings, expected names of layers")
    alphas = [alpha for end, alpha in patterns.items() if f".{layer}".endswith(f".{end}")]
    alpha = (alphas or [own.get("lora_alpha", rank)])[0]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"{path}: lora_alpha {alpha!r:.40} of its settings, expected a number")
    return alpha / (sqrt(rank) if own.get("use_rslora") else rank)
