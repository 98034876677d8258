"""Public checkpoints -> one bundle folder (see moma/bundle.py).

    python convert_weights.py SOURCE [SOURCE ...] --out weights/moma
    python convert_weights.py community.safetensors --base-bundle weights/moma --out weights/new
    python convert_weights.py --download --out weights/moma

A source is recognised by its content: a Stable Diffusion 1.5 folder (diffusers) or single file (LDM, as on
Civitai), a VAE folder or file, a CLIP folder, a LLaVA-1.5 folder (original or llava-hf), MoMA's
attn_adapters_projectors.th, an IP-Adapter for SD1.5. Later sources replace the networks of earlier ones; what
no source has comes from --base-bundle.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tqdm import tqdm

from models import keymaps
from models.clip import VISION_PRESETS, CLIPTextConfig, CLIPVisionConfig
from models.keymaps import Table
from models.llava import LlavaConfig
from models.loading import LazyTensor, pick_weights, read_checkpoint, some_names
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.unet import UNetConfig
from models.vae import VAEConfig
from moma.adapter import AdapterConfig
from moma.bundle import (
    CLIP_TOKENIZER,
    CONFIGS,
    LLAMA_TOKENIZER,
    Bundle,
    BundleWriter,
    check_target,
    count,
    expected_shapes,
)
from moma.download import DIFFUSERS_STEMS, MOMA_FILE, TRANSFORMERS_STEMS, DownloadConfig, download

Tensors = Mapping[str, LazyTensor]

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SD2_CONTEXT, SDXL_CONTEXT = 1024, 2048  # widths of their text states


@dataclass(frozen=True)
class Assumed:
    """Sizes of files that come without a config.json; a base bundle's take their place."""

    unet: UNetConfig = field(default_factory=UNetConfig)  # SD1.5
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    image_size: int = 512  # pixels a side that SD1.5 was trained at; its config has latents


@dataclass(frozen=True)
class Network:
    """One network of a source, in our names. config None: not known before the other sources are."""

    config: Any
    tensors: Tensors
    source: str


@dataclass
class Found:
    """What the sources hold together, and what the user should know about it."""

    networks: dict[str, Network] = field(default_factory=dict)
    tokenizers: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # Raw tensors that can be named only once the UNet or the image tower is known: kind -> (path, tensors)
    later: dict[str, tuple[Path, Tensors]] = field(default_factory=dict)

    def put(self, name: str, network: Network) -> None:
        if name in self.networks:
            self.notes.append(f"{name}: {network.source} replaces that of {self.networks[name].source}")
        self.networks[name] = network


def rename(table: Table, tensors: Tensors, found: Found, source: str) -> dict[str, LazyTensor]:
    """Tensors in our names; those that the table does not know become a note."""
    result = keymaps.convert(table, tensors)
    if result.unknown:
        found.notes.append(f"{source}: unused: {some_names(result.unknown)}")
    return {name: tensors[key].map(change) for name, (key, change) in result.names.items()}


def below(prefix: str, tensors: Tensors) -> dict[str, LazyTensor]:
    """The tensors whose names start with prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; the folder is incomplete") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON; is it a git-lfs pointer or cut short? ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return data


def from_public(kind: Any, path: Path, *more: Any) -> Any:
    """A config from a public config.json, with the file in the message when it does not fit."""
    try:
        return kind.from_public(read_json(path), *more)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}, which a {kind.__name__} needs") from error
    except (ValueError, TypeError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


# --- recognising and reading sources -----------------------------------------------------------------


def read_source(path: Path, found: Found, assumed: Assumed, ema: bool) -> None:
    """Adds what is at `path` to `found`; ValueError if it is not what this project can use."""
    if path.is_dir():
        read_folder(path, found, ema)
    elif path.is_file():
        read_file(path, found, assumed, ema)
    else:
        raise ValueError(f"{path}: no such file or folder")


def read_folder(path: Path, found: Found, ema: bool) -> None:
    config_path = path / "config.json"
    if not any(path.iterdir()):
        raise ValueError(f"{path}: empty folder")
    if (path / "unet").is_dir():
        read_diffusers(path, found)
        if ema:
            found.notes.append(f"{path.name}: --ema does not apply, diffusers' main weights are the average")
    elif config_path.is_file():
        config = read_json(config_path)
        kind = config.get("model_type", "")
        if config.get("format") == "moma-bundle":
            raise ValueError(f"{path}: already a bundle; give it as --base-bundle")
        if config.get("_class_name") == "AutoencoderKL":
            read_vae_folder(path, found)
        elif config.get("_class_name") == "UNet2DConditionModel":
            read_unet_folder(path, found)
        elif "llava" in kind or "mm_projector_type" in config:
            read_llava(path, found)
        elif kind.startswith("clip"):
            read_clip(path, config, found)
        else:
            what = config.get("_class_name") or kind or "nothing known"
            raise ValueError(f"{path}: config.json describes {what}, expected a VAE, UNet, CLIP or LLaVA")
    elif not (path / MOMA_FILE).is_file():
        raise ValueError(f"{path}: neither unet/ nor config.json in it; give the model's own folder or file")
    if (path / MOMA_FILE).is_file():
        found.later["adapter"] = (path / MOMA_FILE, read_checkpoint(path / MOMA_FILE))


def weights_of(folder: Path, stems: Sequence[str]) -> dict[str, LazyTensor]:
    name = pick_weights({path.name for path in folder.iterdir()}, stems)
    if name is None:
        raise ValueError(f"{folder}: no weights there, expected {stems[0]}.safetensors or .bin")
    return read_checkpoint(folder / name)


def read_diffusers(path: Path, found: Found) -> None:
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        refuse_prediction(read_json(scheduler).get("prediction_type", "epsilon"), scheduler)
    read_unet_folder(path / "unet", found, path.name)
    for part, read in (("vae", read_vae_folder), ("text_encoder", read_text_folder)):
        if (path / part).is_dir():
            read(path / part, found, path.name)
        else:
            found.notes.append(f"{path.name}: has no {part}/")
    take_tokenizer(path / "tokenizer", CLIP_TOKENIZER, found)


def refuse_prediction(kind: str, where: Path) -> None:
    if kind != "epsilon":
        raise ValueError(f"{where}: the model predicts {kind!r}, expected 'epsilon' as Stable Diffusion 1.5")


def refuse_unet(channels: int, context: int, where: Path) -> None:
    """ValueError for the Stable Diffusion variants whose weights fit, or nearly fit, SD1.5's names."""
    variants = {9: "an inpainting model", 8: "an instruct-pix2pix model"}
    if channels in variants:
        raise ValueError(
            f"{where}: {variants[channels]} ({channels} input channels), expected plain SD1.5 (4)"
        )
    widths = {SD2_CONTEXT: "Stable Diffusion 2", SDXL_CONTEXT: "SDXL"}
    if context in widths:
        raise ValueError(f"{where}: {widths[context]} (text width {context}), expected SD1.5 (768)")


def read_unet_folder(path: Path, found: Found, source: str = "") -> None:
    public = read_json(path / "config.json")
    width = public.get("cross_attention_dim", 0)
    refuse_unet(public.get("in_channels", 0), width if isinstance(width, int) else 0, path)
    config = from_public(UNetConfig, path / "config.json")
    tensors = rename(keymaps.DIFFUSERS_UNET, weights_of(path, DIFFUSERS_STEMS), found, path.name)
    found.put("unet", Network(config, tensors, source or path.name))


def read_vae_folder(path: Path, found: Found, source: str = "") -> None:
    config = from_public(VAEConfig, path / "config.json")
    tensors = rename_vae(weights_of(path, DIFFUSERS_STEMS), config, found, path.name)
    found.put("vae", Network(config, tensors, source or path.name))


def rename_vae(tensors: Tensors, config: VAEConfig, found: Found, source: str) -> dict[str, LazyTensor]:
    if any(".mid.attn_1." in key for key in tensors):
        table: Table = keymaps.ldm_vae(len(config.channels))
    elif any(key.endswith(".query.weight") for key in tensors):
        table = keymaps.DIFFUSERS_VAE_OLD
    else:
        table = keymaps.DIFFUSERS_VAE
    return rename(table, tensors, found, source)


def read_text_folder(path: Path, found: Found, source: str = "") -> None:
    config = replace(from_public(CLIPTextConfig, path / "config.json"), projection=None)
    tensors = weights_of(path, TRANSFORMERS_STEMS)
    table = keymaps.CLIP_TEXT if any("text_model." in key for key in tensors) else keymaps.CLIP_BARE
    named = rename(table, tensors, found, path.name)
    named.pop("text_projection.weight", None)
    found.put("text", Network(config, named, source or path.name))


def take_tokenizer(folder: Path, files: Sequence[str], found: Found) -> None:
    for name in files:
        if (folder / name).is_file():
            found.tokenizers[name] = folder / name


def read_clip(path: Path, config: Mapping[str, Any], found: Found) -> None:
    """A CLIP folder: LLaVA's tower, or with a projection only for images, IP-Adapter's encoder."""
    if config["model_type"] == "clip_text_model":
        read_text_folder(path, found)
        take_tokenizer(path, CLIP_TOKENIZER, found)
        return
    vision = from_public(CLIPVisionConfig, path / "config.json")
    for_ip_adapter = "CLIPVisionModelWithProjection" in (config.get("architectures") or [])
    tensors = weights_of(path, TRANSFORMERS_STEMS)
    table = keymaps.CLIP_VISION if any("vision_model." in key for key in tensors) else keymaps.CLIP_BARE
    named = rename(table, tensors, found, path.name)
    if not for_ip_adapter:  # LLaVA reads hidden states, the projection would be dead weight
        vision = replace(vision, projection=None)
        named.pop("visual_projection.weight", None)
    found.put("ip_vision" if for_ip_adapter else "vision", Network(vision, named, path.name))


def read_llava(path: Path, found: Found) -> None:
    config = read_json(path / "config.json")
    tensors = weights_of(path, TRANSFORMERS_STEMS)
    found.later["llava"] = (path, tensors)
    take_tokenizer(path, LLAMA_TOKENIZER, found)
    if "vision_config" in config and (path / "preprocessor_config.json").is_file():
        found.notes.append(f"{path.name}: llava-hf layout; its extra words <image> and <pad> are cut off")


# --- single files ------------------------------------------------------------------------------------


def read_file(path: Path, found: Found, assumed: Assumed, ema: bool) -> None:
    if path.suffix == ".json":
        raise ValueError(f"{path}: only describes weights; give the folder it lies in")
    tensors = read_checkpoint(path)
    tensors = below("state_dict.", tensors) or tensors
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in tensors)

    if any("lora_" in key.lower() for key in tensors):
        raise ValueError(f"{path}: a LoRA, which changes a model; merge it into a full checkpoint first")
    if has("conditioner.embedders."):
        raise ValueError(f"{path}: SDXL, expected a Stable Diffusion 1.5 checkpoint")
    if has(keymaps.LDM_UNET_PREFIX):
        read_ldm(path, tensors, found, assumed, ema)
    elif has("self_cross_attentions.", "llm_mapping."):
        found.later["adapter"] = (path, tensors)
    elif has("ip_adapter.", "adapter_modules."):
        refuse_ip_adapter(path, tensors)
        found.later["ip_adapter"] = (path, tensors)
    elif has("encoder.conv_in.", "first_stage_model.encoder."):
        named = below(keymaps.LDM_VAE_PREFIX, tensors) or tensors
        named = {key: value for key, value in named.items() if not _is_training_state(key)}
        found.put("vae", Network(assumed.vae, rename_vae(named, assumed.vae, found, path.name), path.name))
    elif has("down_blocks."):
        sizes = tensors["conv_in.weight"].shape[1] if "conv_in.weight" in tensors else 0
        refuse_unet(sizes, 0, path)
        found.put("unet", Network(assumed.unet, tensors, path.name))
    else:
        raise ValueError(
            f"{path}: not a checkpoint known here; its tensors are called {some_names(list(tensors))}"
        )


# Buffers and parts of the training that LDM files carry along.
_TRAINING_STATE = re.compile(
    r"(betas|alphas_cumprod|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|scale_factor|loss\.|callbacks"
    r"|model_ema\.|cond_stage_model\.logit_scale|first_stage_model\.(loss\.|model_ema\.)).*"
)


def _is_training_state(key: str) -> bool:
    return _TRAINING_STATE.fullmatch(key) is not None


def read_ldm(path: Path, tensors: Tensors, found: Found, assumed: Assumed, ema: bool) -> None:
    refuse_ldm(path, tensors)
    unet = below(keymaps.LDM_UNET_PREFIX, tensors)
    averages = keymaps.ldm_ema(tensors)
    if ema:
        if len(averages) < len(unet):
            raise ValueError(f"{path}: has no full set of averaged weights; leave out --ema")
        unet = {plain.removeprefix(keymaps.LDM_UNET_PREFIX): tensors[key] for plain, key in averages.items()}
    elif averages:
        found.notes.append(f"{path.name}: also has averaged weights, which --ema takes instead")
    config = assumed.unet
    table = keymaps.ldm_unet([depth > 0 for depth in config.depth], config.resnets)
    found.put("unet", Network(config, rename(table, unet, found, path.name), path.name))

    if vae := below(keymaps.LDM_VAE_PREFIX, tensors):
        vae = {key: value for key, value in vae.items() if not _is_training_state(key)}
        named = rename_vae(vae, assumed.vae, found, path.name)
        found.put("vae", Network(assumed.vae, named, path.name))
    else:
        found.notes.append(f"{path.name}: has no VAE")
    if text := below(keymaps.LDM_TEXT_PREFIX, tensors):
        text = {key: value for key, value in text.items() if key != "logit_scale"}
        inner = any(key.startswith("transformer.text_model.") for key in text)
        table = keymaps.LDM_TEXT if inner else keymaps.LDM_TEXT_BARE
        found.put("text", Network(assumed.text, rename(table, text, found, path.name), path.name))
    else:
        found.notes.append(f"{path.name}: has no text encoder")
    prefixes = (keymaps.LDM_UNET_PREFIX, keymaps.LDM_VAE_PREFIX, keymaps.LDM_TEXT_PREFIX)
    others = [key for key in tensors if not key.startswith(prefixes) and not _is_training_state(key)]
    if others:
        found.notes.append(f"{path.name}: unused: {some_names(others)}")


def refuse_ldm(path: Path, tensors: Tensors) -> None:
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        raise ValueError(f"{path}: Stable Diffusion 2 (an OpenCLIP text encoder), expected SD1.5")
    first = tensors.get(f"{keymaps.LDM_UNET_PREFIX}input_blocks.0.0.weight")
    channels = first.shape[1] if first is not None and len(first.shape) > 1 else 0
    contexts = {t.shape[-1] for key, t in tensors.items() if key.endswith(".attn2.to_k.weight") and t.shape}
    refuse_unet(channels, max(contexts, default=0), path)
    if "v_pred" in tensors:
        refuse_prediction("v_prediction", path)
    for sidecar in (path.with_suffix(".yaml"), path.with_suffix(".json")):
        if sidecar.is_file():
            text = sidecar.read_text(encoding="utf-8", errors="replace")
            if re.search(r"parameterization\W+v\b|v_prediction", text):
                refuse_prediction("v_prediction", sidecar)


def refuse_ip_adapter(path: Path, tensors: Tensors) -> None:
    keys = {re.sub(r"^[^.]*\.", "", key): tensor for key, tensor in tensors.items()}
    if "latents" in keys:
        raise ValueError(f"{path}: IP-Adapter Plus (a resampler), expected the plain ip-adapter_sd15")
    if "proj.0.weight" in keys:
        raise ValueError(f"{path}: IP-Adapter Full Face (an MLP), expected the plain ip-adapter_sd15")
    if "1.to_k_ip.weight" in keys and keys["1.to_k_ip.weight"].shape[1] == SDXL_CONTEXT:
        raise ValueError(f"{path}: IP-Adapter for SDXL (text width {SDXL_CONTEXT}), expected ip-adapter_sd15")


# --- what depends on several sources ------------------------------------------------------------------


def add_llava(found: Found, base: Bundle | None) -> None:
    path, tensors = found.later["llava"]
    public = read_json(path / "config.json")
    named = rename(llava_table(tensors, public), tensors, found, path.name)
    inside = below("tower.", named)
    language = {key: value for key, value in named.items() if not key.startswith("tower.")}
    tower = found.networks.get("vision")

    vision = tower.config if tower else None
    if vision is None and base is not None and "vision" in base.networks:
        vision = base.config("vision")
    if vision is None and "vision_config" not in public:  # llava-hf has one, the original only names a model
        if not inside:
            model = public.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
            raise ValueError(
                f"{path}: without an image tower; give the CLIP folder of {model} as a source too"
            )
        vision = guess_tower(inside, path)
    config = from_public(LlavaConfig, path / "config.json", vision)
    config = replace(config, llama=replace(config.llama, lm_head="llama.lm_head.weight" in language))

    if tower and inside:
        if tower.config != config.vision:
            raise ValueError(f"{path}: its tower is {config.vision}, the CLIP folder's is {tower.config}")
        difference, where = compare(inside, tower.tensors)
        found.notes.append(
            f"vision: taken from {tower.source}; the tower inside {path.name} differs by at most "
            f"{difference:.3g}{f' ({where})' if where else ''}"
        )
    elif inside:
        found.put("vision", Network(config.vision, inside, f"{path.name} (the tower inside)"))
    if (path / "mm_projector.bin").is_file():
        found.notes.append(f"{path.name}: mm_projector.bin not read, the shards hold the projector")
    found.put("llava", Network(config, language, path.name))


def llava_table(tensors: Tensors, public: Mapping[str, Any]) -> Table:
    if "text_config" not in public:
        return keymaps.LLAVA_ORIGINAL
    new = any(key.startswith("model.language_model.") for key in tensors)
    embed = "model.language_model.embed_tokens.weight" if new else "language_model.model.embed_tokens.weight"
    padded = tensors[embed].shape[0] if embed in tensors else 0
    return keymaps.llava_hf(new, min(padded, public.get("image_token_index", padded)), padded)


def guess_tower(tensors: Tensors, path: Path) -> CLIPVisionConfig:
    """Sizes of a tower that came without its config: the known CLIP model of the same shapes."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for preset in VISION_PRESETS.values():
        config = replace(preset, projection=None)
        if expected_shapes("vision", config) == shapes:
            return config
    places = shapes.get("embeddings.position_embedding.weight", (1, 0))
    raise ValueError(
        f"{path}: the image tower inside ({places[1]} wide, {isqrt(places[0] - 1)} patches a side) is no "
        "known CLIP model; give its CLIP folder as a source too"
    )


def compare(a: Tensors, b: Tensors) -> tuple[float, str]:
    """Largest absolute difference of the tensors that both have, and where it is."""
    worst, where = 0.0, ""
    for name in tqdm([name for name in a if name in b], desc="comparing towers", leave=False):
        if a[name].shape != b[name].shape:
            shapes = f"{list(a[name].shape)} and {list(b[name].shape)}"
            raise ValueError(f"{a[name].file} and {b[name].file}: {name} has the shapes {shapes}")
        difference = (a[name].read().float() - b[name].read().float()).abs().max().item()
        if not difference <= worst:  # also when it is not a number
            worst, where = difference, name
    return worst, where


def add_adapter(name: str, found: Found, unet: UNetConfig, hidden: int | None) -> None:
    """MoMA's .th or an IP-Adapter; hidden: LLaMA's width if there is one, which mapping must fit."""
    path, tensors = found.later[name]
    down, up = sum(unet.depth) * unet.resnets, sum(unet.depth) * (unet.resnets + 1)
    table_of = keymaps.moma_th if name == "adapter" else keymaps.ip_adapter
    table = table_of(down, up, unet.mid_depth)
    named = rename(table, tensors, found, path.name)
    try:
        width, embed = named["projector.proj.weight"].shape
        tokens = width // named["projector.norm.weight"].shape[0]
        mllm = named["mapping.gate_proj.weight"].shape[1] if name == "adapter" else AdapterConfig().mllm_dim
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path}: the image projector or mapping is missing or misshapen ({error})"
        ) from error
    if hidden is not None and name == "adapter" and mllm != hidden:
        raise ValueError(f"{path}: made for an MLLM of width {mllm}, but the LLaVA here has {hidden}")
    encoder = found.networks.get("ip_vision")
    if name == "ip_adapter" and encoder and encoder.config.projection != embed:
        raise ValueError(
            f"{path}: made for image embeddings of width {embed}, but {encoder.source} gives "
            f"{encoder.config.projection}; use the image_encoder folder that came with it"
        )
    config = AdapterConfig(mllm_dim=mllm, embed_dim=embed, tokens=tokens)
    found.put(name, Network(config, named, path.name))


def check(name: str, network: Network, unet: UNetConfig | None, found: Found) -> Network:
    """The network without tensors that have no place in it; ValueError for missing or mis-shaped ones."""
    wanted = expected_shapes(name, network.config, unet)
    missing = [key for key in wanted if key not in network.tensors]
    misshaped = [
        f"{key} ({list(network.tensors[key].shape)} instead of {list(shape)})"
        for key, shape in wanted.items()
        if key in network.tensors and network.tensors[key].shape != shape
    ]
    unused = [key for key in network.tensors if key not in wanted]
    problems = {"missing": missing, "mis-shaped": misshaped, "unused": unused}
    if missing or misshaped:
        listed = "; ".join(f"{kind}: {some_names(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{network.source}: does not fit {name}: {listed}")
    if unused:
        found.notes.append(f"{network.source}: {name}: unused: {some_names(unused)}")
    tensors = {key: network.tensors[key] for key in wanted}
    return replace(network, tensors=tensors)


# --- the whole conversion ----------------------------------------------------------------------------


def convert(
    sources: Sequence[Path],
    out: Path,
    base: Bundle | None = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    llm: bool = True,
    overwrite: bool = False,
    assumed: Assumed | None = None,
    say: Callable[[str], Any] = print,
) -> None:
    """Write the bundle `out` from `sources` and, for what they lack, `base`.

    dtype: of the networks from sources, None = as they are (a base's files are taken over unchanged). ema:
    take a single file's averaged UNet. llm: False leaves LLaVA and its tower out. Raises ValueError, with
    nothing written, for sources that cannot be used.
    """
    assumed = assumed or Assumed()
    if base is not None:
        known = {name: base.configs[name] for name in ("unet", "vae", "text") if name in base.configs}
        assumed = replace(assumed, **known, image_size=base.image_size)
    writer = BundleWriter(out, assumed.image_size, overwrite)
    found = Found()
    for path in sources:
        read_source(path, found, assumed, ema)
    if not llm:
        found.later.pop("llava", None)
        found.networks.pop("vision", None)
    kept = [name for name in (base.networks if base else ()) if llm or name not in ("llava", "vision")]
    if "llava" in found.later:
        add_llava(found, base)
    kept = [name for name in kept if name not in found.networks]

    def config(name: str) -> Any:
        if name in found.networks:
            return found.networks[name].config
        return base.configs[name] if base and name in kept else None

    unet = config("unet")
    for name in ("adapter", "ip_adapter"):
        if name in found.later:
            if unet is None:
                path = found.later[name][0]
                raise ValueError(f"{path}: needs the UNet it belongs to; add its source or --base-bundle")
            add_adapter(name, found, unet, config("llava").llama.width if config("llava") else None)
    if (llava := config("llava")) and (vision := config("vision")) and llava.vision != vision:
        raise ValueError(f"vision: {vision} is not the image tower that LLaVA was made with, {llava.vision}")
    networks = {name: check(name, network, unet, found) for name, network in found.networks.items()}
    for name in kept:
        if name in ("adapter", "ip_adapter") and "unet" in networks:
            check(name, Network(base.configs[name], base_tensors(base, name), f"{base.folder}"), unet, found)
    tokenizers = pick_tokenizers({*networks, *kept}, found, base)
    check_tokenizers(tokenizers, config("text"), config("llava"))
    if not networks:
        raise ValueError("nothing to convert: give at least one source")

    for note in found.notes:
        say(f"note: {note}")
    sizes = {name: stored_bytes(network.tensors, dtype) for name, network in networks.items()}
    with writer, tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="writing") as bar:
        writer.check_space(sum(sizes.values()))
        for name in CONFIGS:  # one order whatever the sources' order
            if name in networks:
                bar.set_postfix_str(name)
                network = networks[name]
                writer.add(name, network.config, network.tensors, network.source, dtype, bar.update)
            elif name in kept:
                writer.take(base, name)
        writer.method |= base.method if base else {}
        for name, path in tokenizers.items():
            writer.add_tokenizer(name, path)
    summarise(Bundle.open(out), say)


def base_tensors(base: Bundle, name: str) -> dict[str, LazyTensor]:
    return {key: value for file in base.files(name) for key, value in read_checkpoint(file).items()}


def stored_bytes(tensors: Tensors, dtype: torch.dtype | None) -> int:
    return sum(
        t.nbytes // t.dtype.itemsize * dtype.itemsize if dtype and t.dtype.is_floating_point else t.nbytes
        for t in tensors.values()
    )


def pick_tokenizers(networks: set[str], found: Found, base: Bundle | None) -> dict[str, Path]:
    chosen = {}
    for network, files in (("text", CLIP_TOKENIZER), ("llava", LLAMA_TOKENIZER)):
        for file in files if network in networks else ():
            if file in found.tokenizers:
                chosen[file] = found.tokenizers[file]
            elif base is not None and network in base.networks:
                chosen[file] = base.tokenizer(file)
            else:
                raise ValueError(f"{network}: no source has its {file}; put it beside the weights")
    return chosen


def check_tokenizers(files: Mapping[str, Path], text: Any, llava: Any) -> None:
    """ValueError unless they can be read and the networks know all their tokens."""
    pairs = []
    if text:
        vocab, merges = (files[name] for name in CLIP_TOKENIZER)
        ClipTokenizer(vocab, merges)
        pairs.append((vocab, len(read_json(vocab)), text.vocab))
    if llava:
        (model,) = (files[name] for name in LLAMA_TOKENIZER)
        LlamaTokenizer(model)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
        pairs.append((model, pieces, llava.llama.vocab))
    for path, tokens, known in pairs:
        if tokens > known:
            raise ValueError(f"{path}: has {tokens} tokens, but the network it is for has {known}")


def summarise(bundle: Bundle, say: Callable[[str], Any]) -> None:
    for name, entry in bundle.networks.items():
        tensors = base_tensors(bundle, name)
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
        size = sum(path.stat().st_size for path in bundle.files(name))
        say(
            f"{name:10} {count(tensors) / 1e6:9.1f} M  {'+'.join(kinds):16} {size / 1e9:7.3f} GB  "
            f"{entry['source']}"
        )
    needed = ("unet", "vae", "text", "vision", "llava", "adapter")
    if lacking := [name for name in needed if name not in bundle.networks]:
        say(f"{bundle.folder}: complete for what was given; sampling also needs {', '.join(lacking)}")
    else:
        say(f"{bundle.folder}: ready")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="file or folder, any order")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    parser.add_argument("--base-bundle", type=Path, help="bundle to take everything from that no source has")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the converted weights")
    parser.add_argument(
        "--ema", action="store_true", help="take the averaged UNet of a single-file checkpoint"
    )
    parser.add_argument("--no-llm", action="store_true", help="leave out LLaVA")
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle at --out")
    parser.add_argument("--download", action="store_true", help="fetch the released weights first (~20 GB)")
    parser.add_argument(
        "--base-id", default=DownloadConfig.base_id, help="with --download: the SD1.5 model on the hub"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("weights/cache"), help="with --download: folder for it"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        check_target(args.out, args.overwrite)  # before a download of hours
        base = Bundle.open(args.base_bundle) if args.base_bundle else None
        sources = list(args.sources)
        if args.download:
            fetched = download(DownloadConfig(base_id=args.base_id), args.cache, llm=not args.no_llm)
            sources = fetched + sources
        if not sources:
            raise ValueError("no SOURCE given; name files and folders, or add --download")
        convert(
            sources,
            args.out,
            base=base,
            dtype=DTYPES[args.dtype],
            ema=args.ema,
            llm=not args.no_llm,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
