"""Public checkpoints: recognise a file or folder by its content and rename its tensors.

It reads Stable Diffusion 1.5 and XL as a folder (diffusers) or a single file (LDM, as on Civitai), lone VAEs,
UNets and CLIP models, LLaVA-1.5 (original or llava-hf), MoMA's attn_adapters_projectors.th, IP-Adapters,
Segment Anything (its own files or transformers'), and for evaluation whole CLIPs and DINO (the same).
It reads only headers, and refuses what cannot be used with the reason.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.clip import PRESETS as CLIPS
from models.clip import TEXT_PRESETS, VISION_PRESETS, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from models.dino import PRESETS as DINOS
from models.dino import DINOConfig
from models.sam_config import PRESETS as SAMS
from models.sam_config import SAMConfig
from models.unet import SDXL, UNetConfig
from models.vae import SDXL as VAE_SDXL
from models.vae import VAEConfig
from models.weights import keymaps
from models.weights.files import read_bytes, read_object, read_text, visible
from models.weights.keymaps import Table
from models.weights.loading import (
    LazyTensor,
    below,
    joined,
    pick_weights,
    read_checkpoint,
    some_names,
    weight_format,
)
from models.weights.public_configs import (
    architectures,
    check_scheduler,
    check_vit,
    clip_text_config,
    clip_vision_config,
    llava_config,
    sam_config,
    unet_config,
    vae_config,
    value,
)
from moma.methods.moma.adapter import AdapterConfig
from moma.weights.bundle import (
    CLIP_TOKENIZER,
    LLAMA_TOKENIZER,
    TOWER,
    Bundle,
    check_config,
    config_from_json,
    expected_shapes,
    network_kinds,
)
from moma.weights.download import DIFFUSERS_STEMS, MOMA_FILE, TRANSFORMERS_STEMS
from moma.weights.mm_diff import WORDS, is_mm_diff, read_mm_diff
from moma.weights.refusals import (
    refuse_claims,
    refuse_codes,
    refuse_ip_adapter,
    refuse_ldm,
    refuse_lora,
    refuse_unet,
    side,
)

Tensors = Mapping[str, LazyTensor]

EXPORT, EXPORT_FORMAT = "export.json", "moma-export"  # manifest of a training's result

SAM_POSITIONS = "image_encoder.pos_embed"
SAM_FREQUENCIES = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
SAM_HQ = ("mask_decoder.hf_", "mask_decoder.compress_vit_feat", "mask_decoder.embedding_")
DINO_PATCHES = "patch_embed.proj.weight"  # identifies DINO's own files
# Buffers and training state in LDM files.
TRAINING_STATE = re.compile(
    r"(betas|alphas_cumprod|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|scale_factor|loss\.|callbacks"
    r"|model_ema\.|first_stage_model\.(loss\.|model_ema\.)).*"
)
# Dicts that hold a network: the first two in any training's file, the others where they hold all there is.
UNWRAPPED = (keymaps.LDM_UNET_PREFIX, "model.sam_mask_decoder.")
WRAPPERS = ("state_dict.", "module.", "model.", "model_state_dict.", "params.", "net.", "network.")


def _named(kind: str, presets: Mapping[str, Any]) -> dict[str, Any]:
    """Presets by their networks' names in a bundle."""
    return {f"{kind}_{name}": config for name, config in presets.items()}


SDXL_CONFIGS = {
    "unet": SDXL,
    "vae": VAE_SDXL,
    "text": CLIPTextConfig(),
    "text_2": TEXT_PRESETS["bigg"],
    "image_size": 1024,
}


@dataclass(frozen=True)
class DefaultConfigs:
    """Configs of networks that come without a config.json."""

    unet: UNetConfig = field(default_factory=UNetConfig)  # SD1.5
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    towers: tuple[CLIPVisionConfig, ...] = tuple(replace(c, projection=None) for c in VISION_PRESETS.values())
    # scorers, which are recognised by their sizes
    dinos: Mapping[str, DINOConfig] = field(default_factory=lambda: _named("dino", DINOS))
    clips: Mapping[str, CLIPConfig] = field(default_factory=lambda: _named("clip", CLIPS))
    image_size: int = 512  # pixels per side that SD1.5 was trained at; its config has latents
    text_2: CLIPTextConfig | None = None  # where the base has a second text encoder
    sdxl: Mapping[str, Any] = field(default_factory=lambda: SDXL_CONFIGS)  # these fields for SDXL's files
    sams: tuple[SAMConfig, ...] = tuple(SAMS.values())  # recognised by their widths

    def with_base(self, base: Bundle | None) -> "DefaultConfigs":
        """Replace configs by those of the networks in `base`."""
        if base is None:
            return self
        names = ("unet", "vae", "text", "text_2")
        known = {name: base.configs[name] for name in names if name in base.configs}
        towers = [base.configs["vision"]] if "vision" in base.configs else []
        sams = [base.configs["sam"]] if "sam" in base.configs else []
        sizes = {"towers": (*towers, *self.towers), "sams": (*sams, *self.sams)}
        return replace(self, **known, **sizes, image_size=base.image_size)

    def of(self, sdxl: bool) -> "DefaultConfigs":
        """Those of SDXL, if that is what a source is and the base is not."""
        return replace(self, **self.sdxl) if sdxl and not self.unet.added_cond_dim else self


@dataclass(frozen=True)
class Network:
    """One network of a source, with tensors in our names."""

    # The dataclass. LLaVA's depends on its tower, which may come from another source: until then it is the
    # path of its config.json. A tower inside LLaVA of unknown sizes has None.
    config: Any
    tensors: Tensors
    source: str  # for messages


@dataclass
class Source:
    """Content of one file or folder, and notes for the user."""

    name: str
    networks: dict[str, Network] = field(default_factory=dict)
    tokenizers: dict[str, Path] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)  # MethodConfig fields that the weights need
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)  # the same of other methods, by name
    notes: list[str] = field(default_factory=list)
    is_plain_llava: bool = False  # a public LLaVA that does not say that it is MoMA's
    bare_vae: bool = False  # a VAE in a file that does not say how its latents are scaled

    def add(self, network: str, config: Any, tensors: Tensors, where: str = "") -> None:
        self.networks[network] = Network(config, tensors, self.name + where)

    def add_tokenizer(self, folder: Path, files: Sequence[str]) -> None:
        self.tokenizers |= {name: folder / name for name in files if (folder / name).is_file()}

    def rename(self, table: Table, tensors: Tensors) -> dict[str, LazyTensor]:
        """Tensors in our names; a note lists those that the table does not know."""
        result = keymaps.convert(table, tensors)
        if result.unknown:
            self.notes.append(f"unused: {some_names(result.unknown)}")
        named = {}
        for name, (key, change) in result.names.items():
            try:
                named[name] = tensors[key].map(change)
            except (LookupError, RuntimeError):
                where = tensors[key]
                raise ValueError(f"{where.file}: {key} has the shape {list(where.shape)}") from None
        return named

    def rank(self, network: str) -> tuple[bool, bool]:
        """Among sources of a network, the higher one wins: MoMA's LLaVA, and what holds nothing else.

        A LLaVA may hold its tower too.
        """
        return network == "llava" and not self.is_plain_llava, len(self.networks) == 1 or network == "llava"


def read_source(path: Path, defaults: DefaultConfigs, ema: bool = False) -> Source:
    """Read the headers of a public checkpoint.

    Args:
        path: file or folder.
        defaults: configs for networks that come without one.
        ema: take the averaged UNet of a single file.

    Raises: ValueError for what cannot be used.
    """
    path = _inside(path)
    source = Source(_name(path))
    if path.is_dir():
        _read_folder(source, path, defaults)
        if ema and "unet" in source.networks:
            source.notes.append("--ema does not apply, diffusers' main weights are the average")
    elif path.is_file():
        _read_file(source, path, defaults, ema)
    else:
        raise ValueError(f"{path}: no such file or folder")
    return source


def _name(path: Path) -> str:
    """For messages: the repository's name for a snapshot in the hub's cache, which is a hash."""
    path = path.absolute()
    return path.parents[1].name.removeprefix("models--") if path.parent.name == "snapshots" else path.name


def _inside(path: Path) -> Path:
    """The folder that holds the model, of a hub's cache (models--X--Y) or of an unpacked archive."""
    if not path.is_dir():
        return path
    if (path / "snapshots").is_dir():
        ref = path / "refs" / "main"
        snapshots = visible(path / "snapshots")
        if ref.is_file() and (snapshot := path / "snapshots" / read_text(ref).strip()) in snapshots:
            return snapshot
        if len(snapshots) != 1:
            raise ValueError(
                f"{path}: {len(snapshots)} snapshots; give one of them, of the folder snapshots/"
            )
        return snapshots[0]
    match visible(path):
        case [only] if only.is_dir() and only.name != "unet":
            return _inside(only)
    return path


def read_config(path: Path, parse: Callable[..., Any], *more: Any) -> Any:
    """parse(JSON of the file, *more), with the file in the message of a ValueError."""
    data = read_object(path)
    try:
        config = parse(data, *more)
        check_config(config)
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}") from error
    except (ArithmeticError, LookupError) as error:
        raise ValueError(f"{path}: a size is 0 or missing ({error})") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


@contextmanager
def _named_after(path: Path) -> Iterator[None]:
    """ValueErrors begin with the path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# --- folders -----------------------------------------------------------------------------------------


def _read_folder(source: Source, path: Path, defaults: DefaultConfigs) -> None:
    if not visible(path):
        raise ValueError(f"{path}: empty folder")
    if (path / EXPORT).is_file():
        _read_export(source, path)
        return
    if is_mm_diff(path):
        sizes, adapter, vision = read_mm_diff(path, defaults.unet)
        source.add("mm_diff", sizes, adapter)
        source.add(WORDS, None, vision)  # some of its tensors; a CLIP completes them
        loras = [str(i) for i, own in enumerate((sizes.text_1, sizes.text_2), 1) if own]
        source.notes.append(f"text encoders with LoRAs: {', '.join(loras) or 'none'}")
        return
    if (path / "unet").is_dir():
        _read_diffusers(source, path)
    elif (path / "config.json").is_file():
        _read_model(source, path, defaults)
    elif not (path / MOMA_FILE).is_file():
        raise ValueError(f"{path}: neither unet/ nor config.json in it; give the model's own folder or file")
    if (path / MOMA_FILE).is_file():
        _read_adapter(source, path / MOMA_FILE, "adapter", _read_weights(path / MOMA_FILE), defaults)


def _read_export(source: Source, path: Path) -> None:
    """A training's export: networks in our names, their configs, and the method fields they need."""
    data, kinds = read_object(path / EXPORT), network_kinds()
    if data.get("format") != EXPORT_FORMAT:
        raise ValueError(f"{path / EXPORT}: not an export of this version")
    try:
        source.method, source.methods = dict(data["method"]), dict(data.get("methods", {}))
        entries = {
            name: (kinds[name][0], e["config"], list(e["files"])) for name, e in data["networks"].items()
        }
        outside = [file for *_, files in entries.values() for file in files if Path(file).name != file]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path / EXPORT}: damaged or of another version ({error})") from None
    if outside:
        raise ValueError(f"{path / EXPORT}: names the file {outside[0]!r}, which is not a plain file name")
    for name, (kind, values, files) in entries.items():
        config = config_from_json(kind, values, f"{path / EXPORT}: {name}")
        tensors = {key: t for file in files for key, t in read_checkpoint(path / file).items()}
        source.add(name, config, tensors)


def _read_weights(path: Path) -> dict[str, LazyTensor]:
    tensors = read_checkpoint(path)
    refuse_codes(path, tensors)
    return tensors


def _weights_of(folder: Path, stems: Sequence[str], sdxl: bool = False) -> dict[str, LazyTensor]:
    """Weights of a model's folder; under another name if they are in its only file that holds any.

    Args:
        folder: of the model.
        stems: names that the file may have.
        sdxl: whether it is SDXL's by its config.
    """
    names = [path.name for path in visible(folder) if path.is_file()]
    name = pick_weights(names, stems)
    if name is None and len(found := [n for n in names if _holds_weights(folder / n)]) == 1:
        name = found[0]
    if name is None:
        raise ValueError(f"{folder}: no weights there, expected {stems[0]}.safetensors or .bin")
    tensors = _read_weights(folder / name)
    if stems == DIFFUSERS_STEMS:
        refuse_claims(folder / name, tensors, (VAE_SDXL if sdxl else VAEConfig()).scaling, sdxl)
    return tensors


def _holds_weights(path: Path) -> bool:
    try:
        return weight_format(path) in ("safetensors", "zip", "legacy")
    except ValueError:
        return False


def _read_diffusers(source: Source, path: Path) -> None:
    """A Stable Diffusion folder; single files beside its parts are ignored."""
    _read_unet(source, path / "unet")
    sdxl = bool(source.networks["unet"].config.added_cond_dim)
    scheduler, index = path / "scheduler" / "scheduler_config.json", path / "model_index.json"
    if scheduler.is_file():
        with _named_after(scheduler):
            check_scheduler(read_object(scheduler), sdxl)
    parts = [("vae", _read_vae), ("text_encoder", _read_text)]
    for part, read in parts + [("text_encoder_2", _read_second_text)] * sdxl:
        if (path / part).is_dir():
            read(source, path / part)
        else:
            source.notes.append(f"has no {part}/")
    source.add_tokenizer(path / "tokenizer", CLIP_TOKENIZER)
    for name, file in source.tokenizers.items():
        second = path / "tokenizer_2" / name
        if sdxl and second.is_file() and content(second) != content(file):
            raise ValueError(f"{second}: differs from {file}, and a bundle holds one vocabulary")
    if sdxl and index.is_file() and read_object(index).get("force_zeros_for_empty_prompt") is False:
        source.notes.append(
            'where no negative prompt is given, its pipeline reads ""; here --negative " " does'
        )


def _read_model(source: Source, path: Path, defaults: DefaultConfigs) -> None:
    """A folder of one model, recognised by its config.json (in old files by the fields)."""
    config = read_object(path / "config.json")
    with _named_after(path / "config.json"):
        kind, layout = (value(config, key, str, "") for key in ("model_type", "_class_name"))
    if config.get("format") == "moma-bundle":
        raise ValueError(f"{path}: already a bundle; give it as --base-bundle")
    if layout == "AutoencoderKL" or (not layout and "latent_channels" in config):
        _read_vae(source, path)
    elif layout == "UNet2DConditionModel" or (not layout and "cross_attention_dim" in config):
        _read_unet(source, path)
    elif kind.startswith("sam"):
        config = read_config(path / "config.json", sam_config)
        _add_sam(source, config, keymaps.SAM_TRANSFORMERS, _weights_of(path, TRANSFORMERS_STEMS))
    elif "llava" in kind or "mm_projector_type" in config:
        _read_llava(source, path, config, defaults)
    elif kind == "clip_text_model":
        _read_text(source, path)
        source.add_tokenizer(path, CLIP_TOKENIZER)
    elif kind.startswith("clip"):
        _read_clip(source, path, config, defaults)
        source.add_tokenizer(path, CLIP_TOKENIZER)  # also for a single-file model, which has none
    elif kind == "vit":
        _read_vit(source, path, defaults)
    else:
        what = layout or kind or "nothing known"
        known = "a VAE, UNet, CLIP, LLaVA, DINO or SAM"
        raise ValueError(f"{path}: config.json describes {what}, expected {known}")


def _read_unet(source: Source, path: Path) -> None:
    public = read_object(path / "config.json")
    sizes = (public.get(key, 0) for key in ("in_channels", "cross_attention_dim"))
    refuse_unet(*(size if isinstance(size, int) else 0 for size in sizes), path)
    config = read_config(path / "config.json", unet_config)
    source.add("unet", config, _weights_of(path, DIFFUSERS_STEMS, bool(config.added_cond_dim)))


def _read_vae(source: Source, path: Path) -> None:
    config = read_config(path / "config.json", vae_config)
    _add_vae(source, config, _weights_of(path, DIFFUSERS_STEMS, config.scaling == VAE_SDXL.scaling))


def _add_vae(source: Source, config: VAEConfig, tensors: Tensors) -> None:
    """A VAE with any of the three kinds of names."""
    if any(".mid.attn_1." in key for key in tensors):
        table = keymaps.ldm_vae(len(config.channels))
    elif any(key.endswith(".query.weight") for key in tensors):
        table = keymaps.DIFFUSERS_VAE_OLD
    else:
        table = keymaps.DIFFUSERS_VAE
    weights = {key: tensor for key, tensor in tensors.items() if not TRAINING_STATE.fullmatch(key)}
    source.add("vae", config, source.rename(table, weights))


def _read_text(source: Source, path: Path) -> None:
    config = replace(read_config(path / "config.json", clip_text_config), projection=None)
    tensors = _weights_of(path, TRANSFORMERS_STEMS)
    table = keymaps.CLIP_TEXT if any("text_model." in key for key in tensors) else keymaps.CLIP_BARE
    named = source.rename(table, tensors)
    named.pop("text_projection.weight", None)  # Stable Diffusion reads the hidden states
    source.add("text", config, named)


def _read_second_text(source: Source, path: Path) -> None:
    """SDXL's, with its projection, and what its tokenizer pads with."""
    config = read_config(path / "config.json", clip_text_config)
    named = source.rename(keymaps.CLIP_TEXT, _weights_of(path, TRANSFORMERS_STEMS))
    source.add("text_2", replace(config, pad=_padding(path.parent / "tokenizer_2")), named)


def _padding(folder: Path) -> str:
    """The token that a tokenizer pads with; OpenCLIP's where it does not say."""
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        token = read_object(path).get("pad_token") if path.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            return str(token)
    return TEXT_PRESETS["bigg"].pad


def content(path: Path) -> Any:
    """Content of a tokenizer's file, independent of its formatting."""
    if path.suffix == ".json":
        return read_object(path)
    lines = read_bytes(path).split(b"\n")
    return [line.strip() for line in lines if line.strip() and not line.startswith(b"#version")]


def _read_clip(source: Source, path: Path, public: Mapping[str, Any], defaults: DefaultConfigs) -> None:
    """Add a scorer if both towers have its sizes, else only the image tower."""
    vision = read_config(path / "config.json", clip_vision_config)
    tensors = _weights_of(path, TRANSFORMERS_STEMS)
    name = next((name for name, config in defaults.clips.items() if config.vision == vision), None)
    if name and public.get("model_type") == "clip" and any(key.startswith("text_model.") for key in tensors):
        config = CLIPConfig(read_config(path / "config.json", clip_text_config), vision)
        source.add(name, config, source.rename(keymaps.CLIP_WHOLE, tensors))
    else:
        _add_vision(source, vision, tensors, public)


def _add_vision(
    source: Source, config: CLIPVisionConfig, tensors: Tensors, public: Mapping[str, Any]
) -> None:
    """Add LLaVA's tower or, for a CLIPVisionModelWithProjection, IP-Adapter's encoder."""
    table = keymaps.CLIP_VISION if any("vision_model." in key for key in tensors) else keymaps.CLIP_BARE
    named = source.rename(table, tensors)
    if "CLIPVisionModelWithProjection" in architectures(public):
        source.add("ip_vision", config, named)
    else:  # LLaVA reads hidden states
        named.pop("visual_projection.weight", None)
        source.add("vision", replace(config, projection=None), named)


def _read_vit(source: Source, path: Path, defaults: DefaultConfigs) -> None:
    """DINO as transformers has it."""
    tensors = _weights_of(path, TRANSFORMERS_STEMS)
    if head := [key for key in tensors if key.startswith(("classifier.", "pooler.", "vit."))]:
        raise ValueError(f"{path}: has {head[0]}, so it is a ViT classifier; expected DINO")
    new = any(key.startswith("layers.") for key in tensors)
    named = source.rename(keymaps.DINO_HF_NEW if new else keymaps.DINO_HF, tensors)
    config = _add_dino(source, path, _fused(named), defaults)
    with _named_after(path / "config.json"):
        check_vit(read_object(path / "config.json"), config.layers, config.heads)


def _fused(tensors: Tensors) -> dict[str, LazyTensor]:
    """Join attn.q, .k and .v to attn.qkv; if one is missing, the shape check reports it later."""
    result = dict(tensors)
    for key in (key for key in tensors if ".attn.q." in key):
        names = [key.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(name in tensors for name in names):
            result[key.replace(".attn.q.", ".attn.qkv.")] = joined([result.pop(name) for name in names])
    return result


def _add_dino(source: Source, path: Path, tensors: Tensors, defaults: DefaultConfigs) -> DINOConfig:
    """Add S/16 or B/16, recognised by shapes, as the files do not say."""

    def ends(config: DINOConfig) -> tuple[tuple[int, ...], ...]:
        return (1, 1 + config.patches, config.width), (config.width, 3, config.patch, config.patch)

    found = tuple(tensors[key].shape if key in tensors else () for key in ("pos_embed", DINO_PATCHES))
    name = next((name for name, config in defaults.dinos.items() if ends(config) == found), None)
    if name is None:
        shapes = " and ".join(str(list(shape)) for shape in found)
        raise ValueError(
            f"{path}: a ViT whose pos_embed and patch_embed are {shapes}, expected DINO's S/16 or B/16"
        )
    source.add(name, defaults.dinos[name], tensors)
    return defaults.dinos[name]


def _read_llava(source: Source, path: Path, public: Mapping[str, Any], defaults: DefaultConfigs) -> None:
    tensors = _weights_of(path, TRANSFORMERS_STEMS)
    own = source.name + str(public.get("_name_or_path", ""))
    source.is_plain_llava = "moma" not in own.lower() and not (path / MOMA_FILE).is_file()
    if "text_config" in public:
        tower = read_config(path / "config.json", llava_config).vision
        named = source.rename(_llava_hf_table(tensors, public), tensors)
        source.notes.append("llava-hf layout; its extra tokens <image> and <pad> are dropped")
    else:
        named = source.rename(keymaps.LLAVA_ORIGINAL, tensors)
        tower = guess_tower(below(TOWER, named), defaults.towers)
    if (path / "mm_projector.bin").is_file():
        source.notes.append("mm_projector.bin not read, the shards hold the projector")
    if inside := below(TOWER, named):
        source.add("vision", tower, inside, " (the tower inside)")
    language = {key: value for key, value in named.items() if not key.startswith(TOWER)}
    source.add("llava", path / "config.json", language)
    source.add_tokenizer(path, LLAMA_TOKENIZER)


def _llava_hf_table(tensors: Tensors, public: Mapping[str, Any]) -> Table:
    new = any(key.startswith("model.language_model.") for key in tensors)
    embed = "model.language_model.embed_tokens.weight" if new else "language_model.model.embed_tokens.weight"
    padded = side(tensors, embed, 0)
    return keymaps.llava_hf(new, min(padded, public.get("image_token_index", padded)), padded)


def guess_tower(tensors: Tensors, towers: Sequence[CLIPVisionConfig]) -> CLIPVisionConfig | None:
    """Config of a tower that came without one: the known CLIP model of the same shapes, or None."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return next((config for config in towers if expected_shapes("vision", config) == shapes), None)


# --- single files ------------------------------------------------------------------------------------


def _read_file(source: Source, path: Path, defaults: DefaultConfigs, ema: bool) -> None:
    if weight_format(path) == "index":
        raise ValueError(f"{path}: only describes weights; give the folder it lies in")
    tensors: Tensors = _read_weights(path)
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    refuse_lora(path, tensors)
    while (wrapper := _wrapper(tensors)) is not None:
        tensors = below(wrapper, tensors)

    def has(*starts: str) -> bool:
        return any(key.startswith(starts) for key in tensors)

    if has("input_blocks."):  # a UNet alone, in the names of its original code
        tensors = {keymaps.LDM_UNET_PREFIX + key: tensor for key, tensor in tensors.items()}
    if has(keymaps.LDM_UNET_PREFIX):
        sdxl = has("conditioner.embedders.", f"{keymaps.LDM_UNET_PREFIX}label_emb.")
        _read_ldm(source, path, tensors, defaults.of(sdxl), ema, sdxl)
    elif has("self_cross_attentions.", "llm_mapping."):
        _read_adapter(source, path, "adapter", tensors, defaults)
    elif has("ip_adapter.", "adapter_modules."):
        refuse_ip_adapter(path, tensors)
        _read_adapter(source, path, "ip_adapter", tensors, defaults)
    elif has("image_encoder.", "mask_decoder.", "sam_mask_decoder.", "model.sam_mask_decoder."):
        _add_sam(source, _sam_config(path, tensors, defaults), keymaps.SAM_OFFICIAL, tensors)
    elif has("encoder.conv_in.", "first_stage_model.encoder."):
        refuse_claims(path, tensors, defaults.vae.scaling, bool(defaults.unet.added_cond_dim))
        source.bare_vae = True
        _add_vae(source, defaults.vae, below(keymaps.LDM_VAE_PREFIX, tensors) or tensors)
    elif has("down_blocks."):
        defaults = defaults.of(has("add_embedding."))
        refuse_claims(path, tensors, defaults.vae.scaling, has("add_embedding."))
        refuse_unet(side(tensors, "conv_in.weight", 1), 0, path)
        source.add("unet", defaults.unet, tensors)
    elif DINO_PATCHES in (backbone := _dino_backbone(tensors)):
        if "head.weight" in backbone:
            raise ValueError(f"{path}: has head.weight, so it is a ViT classifier; expected DINO")
        _add_dino(source, path, backbone, defaults)
    else:
        raise ValueError(
            f"{path}: not a known checkpoint; its tensors are called {some_names(list(tensors))}"
        )


def _wrapper(tensors: Tensors) -> str | None:
    """The name of the dict that all tensors are in, or a training's network among other things."""
    for wrapper in WRAPPERS:
        inside = [key for key in tensors if key.startswith(wrapper)]
        plain = any(key.startswith(UNWRAPPED) for key in inside)
        if inside and not plain and (wrapper in WRAPPERS[:2] or len(inside) == len(tensors)):
            return wrapper
    return None


def _dino_backbone(tensors: Tensors) -> Tensors:
    """Backbone of a DINO training's teacher, without the head; a lone backbone stays."""
    for wrapper in ("teacher.", "module.", "backbone."):
        tensors = below(wrapper, tensors) or tensors
    return tensors


def _read_ldm(
    source: Source, path: Path, tensors: Tensors, defaults: DefaultConfigs, ema: bool, sdxl: bool
) -> None:
    """Stable Diffusion 1.5 or XL in one file; the VAE and the text encoders may be missing.

    Args:
        source: to fill.
        path: of the file.
        tensors: in it.
        defaults: configs of its networks.
        ema: take the averaged UNet.
        sdxl: what it is by its tensors.
    """
    refuse_ldm(path, tensors, defaults.vae.scaling, sdxl)
    unet = below(keymaps.LDM_UNET_PREFIX, tensors)
    averages = keymaps.ldm_ema(tensors)
    if ema:
        if len(averages) < len(unet):
            raise ValueError(f"{path}: has no full set of averaged weights; leave out --ema")
        unet = {plain.removeprefix(keymaps.LDM_UNET_PREFIX): tensors[key] for plain, key in averages.items()}
    elif averages:
        source.notes.append("also has averaged weights, which --ema takes instead")
    table = keymaps.ldm_unet([depth > 0 for depth in defaults.unet.depth], defaults.unet.resnets, sdxl)
    if unknown := keymaps.convert(table, unet).unknown:
        raise ValueError(
            f"{path}: an extended or distilled UNet (it has {some_names(unknown)}), expected a plain one"
        )
    source.add("unet", defaults.unet, source.rename(table, unet))

    if vae := below(keymaps.LDM_VAE_PREFIX, tensors):
        _add_vae(source, defaults.vae, vae)
    else:
        source.notes.append("has no VAE")
    first, second = keymaps.SDXL_TEXT_PREFIXES
    text_prefix = first if sdxl else keymaps.LDM_TEXT_PREFIX
    if text := below(text_prefix, tensors):
        source.add("text", defaults.text, source.rename(keymaps.LDM_TEXT, text))
    else:
        source.notes.append("has no text encoder")
    if text := below(second, tensors):
        source.add("text_2", defaults.text_2, source.rename(keymaps.OPEN_CLIP_TEXT, _separated(text)))
    prefixes = (keymaps.LDM_UNET_PREFIX, keymaps.LDM_VAE_PREFIX, text_prefix, second)
    others = [key for key in tensors if not key.startswith(prefixes) and not TRAINING_STATE.fullmatch(key)]
    if others:
        source.notes.append(f"unused: {some_names(others)}")


def _separated(tensors: Tensors) -> dict[str, LazyTensor]:
    """OpenCLIP's attn.in_proj as q_proj, k_proj and v_proj."""
    result = dict(tensors)
    for key in (key for key in tensors if ".attn.in_proj_" in key):
        whole = result.pop(key)
        if side(tensors, key, 0) % 3:
            raise ValueError(f"{whole.file}: {key} has the shape {list(whole.shape)}, expected three parts")
        for i, part in enumerate("qkv"):
            own = whole.map(lambda x, i=i: x[i * len(x) // 3 : (i + 1) * len(x) // 3])
            result[key.replace(".in_proj_", f".{part}_proj.")] = own
    return result


def _read_adapter(source: Source, path: Path, name: str, tensors: Tensors, defaults: DefaultConfigs) -> None:
    """MoMA's .th or an IP-Adapter; its layers are numbered by the default UNet."""
    # training on several GPUs may leave the name of the wrapper
    tensors = {re.sub(r"(^|\.)module\.", r"\1", key): tensor for key, tensor in tensors.items()}
    keys = [f"{body}.1.to_k_ip.weight" for body in ("ip_adapter", "adapter_modules", "self_cross_attentions")]
    context = max(side(tensors, key, 1) for key in keys)
    unet = defaults.of(context == defaults.sdxl["unet"].context_dim[0]).unet
    down, up = sum(unet.depth) * unet.resnets, sum(unet.depth) * (unet.resnets + 1)
    table_of = keymaps.moma_th if name == "adapter" else keymaps.ip_adapter
    named = source.rename(table_of(down, up, unet.mid_depth), tensors)
    try:
        width, embed = named["projector.proj.weight"].shape
        tokens = width // named["projector.norm.weight"].shape[0]
        mllm = named["mapping.gate_proj.weight"].shape[1] if name == "adapter" else AdapterConfig().mllm_dim
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path}: the image projector or mapping is missing or misshapen ({error})"
        ) from error
    source.add(name, AdapterConfig(mllm_dim=mllm, embed_dim=embed, tokens=tokens), named)


def _sam_config(path: Path, tensors: Tensors, defaults: DefaultConfigs) -> SAMConfig:
    """Config of an official file by its shapes; ValueError for networks derived from SAM."""
    if any(key.startswith(SAM_HQ) for key in tensors):
        raise ValueError(f"{path}: SAM-HQ, expected the plain sam_vit_b, l or h")
    if SAM_POSITIONS not in tensors:
        raise ValueError(
            f"{path}: SAM 2, MobileSAM or the like (it has no {SAM_POSITIONS}), expected sam_vit_b, l or h"
        )
    width = side(tensors, SAM_POSITIONS, -1)
    for config in defaults.sams:
        if config.width == width:
            return config
    known = ", ".join(str(config.width) for config in defaults.sams)
    raise ValueError(f"{path}: a SAM whose image encoder is {width} wide, expected {known}")


def _add_sam(source: Source, config: SAMConfig, table: Table, tensors: Tensors) -> None:
    source.add("sam", config, exact_frequencies(source.rename(table, tensors)))


def exact_frequencies(tensors: Tensors) -> dict[str, LazyTensor]:
    """SAM's tensors with frequencies that keep their dtype, as half precision would move points."""
    kept = {key: replace(t, castable=False) for key, t in tensors.items() if key == SAM_FREQUENCIES}
    return {**tensors, **kept}
