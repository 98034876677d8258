"""A bundle: one folder with every network, its sizes and its tokenizers, in one format whatever the source.

    config.json      {"format", "version", "image_size", "method", "networks": {name: {"config", "files",
                     "sha256", "source", "loras" (what was merged into it)}}}
    <name>.safetensors, or <name>-00001-of-0000N.safetensors
    tokenizers/      vocab.json, merges.txt (CLIP), tokenizer.model (LLaMA)

Networks: unet, vae, text, text_2 (SDXL's second text encoder), vision (LLaVA's image tower), llava (its
language model and projector), adapter, for training ip_adapter (an adapter's projector and context) and
ip_vision (the encoder it was made with), and for evaluation dino_s16, dino_b16, clip_b32 and clip_l14 (whole
CLIPs), each with or without the others.
LLaVA's config says if its matrices are stored in 8 or 4 bits (models/weights/quant.py); then its file holds
codes and scales in their place. `Bundle` reads, `BundleWriter` writes; a bundle appears whole or not at all.
Network sam (masks without a click) may stand beside any others or alone.
"""

import errno
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args, get_type_hints

import torch
from torch import Tensor, nn

from models.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from models.dino import DINO, DINOConfig
from models.llava import LlavaConfig
from models.sam import SAM, SAMConfig
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.unet import UNet, UNetConfig
from models.vae import VAE, VAEConfig
from models.weights.files import Hashes, read_object, visible
from models.weights.loading import (
    LazyTensor,
    check_safetensors,
    load_into,
    read_checkpoint,
    sized_by,
    stored_bytes,
    write_safetensors,
)
from models.weights.quant import build_llava
from models.weights.stream import StreamedLlava
from moma.inputs.familiar import FILE as FAMILIAR
from moma.inputs.familiar import Familiar
from moma.methods import METHODS, find_method
from moma.methods.moma.method import MoMA
from moma.sampling.config import check_types
from moma.sampling.interface import text_networks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT, VERSION = "moma-bundle", 1
MANIFEST = "config.json"
ENTRY = {"files": list, "config": dict, "sha256": dict, "source": str}  # what the manifest says of networks
CLIP_TOKENIZER = ("vocab.json", "merges.txt")
LLAMA_TOKENIZER = ("tokenizer.model",)

PUBLIC: dict[str, tuple[type, Callable[..., nn.Module]]] = {  # network -> config dataclass, what builds it
    "unet": (UNetConfig, UNet),
    "vae": (VAEConfig, VAE),
    "text": (CLIPTextConfig, CLIPText),
    "text_2": (CLIPTextConfig, CLIPText),
    "vision": (CLIPVisionConfig, CLIPVision),
    "llava": (LlavaConfig, build_llava),
    "sam": (SAMConfig, SAM),
    "ip_vision": (CLIPVisionConfig, CLIPVision),
    "dino_s16": (DINOConfig, DINO),
    "dino_b16": (DINOConfig, DINO),
    "clip_b32": (CLIPConfig, CLIP),
    "clip_l14": (CLIPConfig, CLIP),
}
SAMPLING = ("unet", "vae", "text", "vision", "llava", "adapter")  # what drawing an image needs
SCORERS = ("dino_s16", "dino_b16", "clip_b32", "clip_l14")  # what only judges images
TOKENIZERS = {  # network -> the files it needs
    "text": CLIP_TOKENIZER,
    "text_2": CLIP_TOKENIZER,
    "clip_b32": CLIP_TOKENIZER,
    "clip_l14": CLIP_TOKENIZER,
    "llava": LLAMA_TOKENIZER,
}
# Files of some bundles beside the networks, and those that each is of: it goes where these go unchanged.
PROBES, CLIP_HEADS = "probes.safetensors", "clip_heads.safetensors"  # MoMA-mini's scorers
COMPANIONS = {FAMILIAR: {"unet"}, PROBES: set(), CLIP_HEADS: {"text", "vision"}}
# What a network's file holds of its module; the rest comes from elsewhere or from initialisation.
PARTS = {"llava": ("llama.", "projector.")}
TOWER = "tower."  # where the llava module keeps the network "vision"
LM_HEAD = "llama.lm_head."
NEGATIVE = ("tower_layer", "logvar_range")  # fields of configs that may be below 0,
ZERO = ("depth", "mid_depth", "end_id", "eos")  # or 0, as those that are 0 by default
COUNTS = ("layers", "decoder_layers", "depth", "mid_depth", "resnets")  # fields that count modules
MOST, LARGEST = 256, 2**31  # of them, and of other sizes
SHOWN = 100  # characters of a wrong value in a message


def network_kinds() -> dict[str, tuple[type, Any]]:
    """Every network that a bundle may hold: the public ones and the methods' own, name -> (config, class)."""
    return PUBLIC | {name: kind for e in METHODS.values() for name, kind in e.method.own_networks.items()}


def build_network(name: str, config: Any, unet: UNetConfig | None = None) -> nn.Module:
    """An uninitialised network.

    Args:
        name: in the bundle.
        config: its dataclass.
        unet: the sizes that methods' own networks follow.
    """
    build = network_kinds()[name][1]
    return build(config) if name in PUBLIC else build(config, unet)


@cache
def expected_tensors(
    name: str, config: Any, unet: UNetConfig | None = None, count: int | None = None
) -> dict[str, Tensor]:
    """What the file of a network must hold, on the meta device.

    Args:
        name: in the bundle.
        config: its dataclass.
        unet: the sizes that methods' own networks follow.
        count: tensors that there are, if the sizes come from elsewhere (`sized_by`).
    """
    with sized_by(count):
        state = build_network(name, config, unet).state_dict()
    return {key: value for key, value in state.items() if key.startswith(PARTS.get(name, ""))}


def expected_shapes(name: str, config: Any, unet: UNetConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the file of a network must hold; arguments as `build_network`.

    Args:
        name: in the bundle.
        config: its dataclass.
        unet: the sizes that methods' own networks follow.
    """
    return {key: tuple(value.shape) for key, value in expected_tensors(name, config, unet).items()}


def check_config(config: Any) -> None:
    """ValueError for a network's config with a value of another type, or a size that no network has."""
    check_types(config)
    for name, value, usual in ((f.name, getattr(config, f.name), f.default) for f in fields(config)):
        if is_dataclass(value):
            check_config(value)
        numbers = [x for x in (value if isinstance(value, tuple) else (value,)) if type(x) in (int, float)]
        low = any(x < 0 or (x == 0 and name not in ZERO and usual != 0) for x in numbers)
        high = MOST if name in COUNTS else LARGEST
        if (low and name not in NEGATIVE) or not all(abs(x) <= high for x in numbers) or len(numbers) > MOST:
            raise ValueError(f"{name} {value!s:.{SHOWN}}: expected more than 0 and at most {high}")


def config_from_json(kind: type, data: Any, where: str) -> Any:
    """A config dataclass (nested ones too) from its `asdict`.

    Args:
        kind: the dataclass.
        data: parsed JSON.
        where: begins the error messages.

    Raises:
        ValueError: for a field that it does not have, or one that is missing.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object with the fields of {kind.__name__}")
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{where}: field {unknown[0]!r} is unknown; written by a newer version?")
    hints = get_type_hints(kind)
    values = {}
    for key, value in data.items():
        kinds = [hint for hint in (hints[key], *get_args(hints[key])) if is_dataclass(hint)]
        if kinds and (value is not None or kinds[0] is hints[key]):  # an optional one may be null
            value = config_from_json(kinds[0], value, f"{where}.{key}")
        values[key] = tuple(value) if isinstance(value, list) else value
    try:
        config = kind(**values)
        check_config(config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{where}: not the fields of {kind.__name__} ({error})") from error
    return config


# --- reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """An opened folder: everything is checked except the weights' names, which `build` checks."""

    folder: Path
    image_size: int  # pixels a side that the base model was trained at
    method: Mapping[str, Any]  # fields of MoMA's config that these weights need otherwise than the preset
    methods: Mapping[str, Mapping[str, Any]]  # the same of other methods, by name
    networks: Mapping[str, Mapping[str, Any]]  # name -> config, files, sha256, source, as in config.json
    configs: Mapping[str, Any]  # name -> config dataclass

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """ValueError (one line) for a folder that is no bundle or an incomplete one; reads no weights."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder}: no {MANIFEST} there; make a bundle with convert_weights.py")
        data = read_object(path)
        if data.get("format") != FORMAT:
            raise ValueError(f"{path}: not a bundle; convert public weights with convert_weights.py first")
        if data.get("version") != VERSION:
            raise ValueError(f"{path}: version {data.get('version')!r}, expected {VERSION}; convert again")
        networks = data.get("networks")
        if not isinstance(networks, dict) or not networks:
            raise ValueError(f"{path}: names no networks")
        configs, kinds = {}, network_kinds()
        for name, entry in networks.items():
            if name not in kinds:
                raise ValueError(f"{path}: network {name!r}, expected one of {', '.join(kinds)}")
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(k), kind) for k, kind in ENTRY.items()
            ):
                raise ValueError(
                    f"{path}: network {name!r} lacks its files or its {', '.join(list(ENTRY)[1:])}"
                )
            if not entry["files"] or not all(isinstance(file, str) for file in entry["files"]):
                raise ValueError(f"{path}: {name} names no files")
            configs[name] = config_from_json(kinds[name][0], entry["config"], f"{path}: {name}")
            for file in entry["files"]:
                if Path(file).name != file:
                    raise ValueError(f"{path}: {name} names the file {file!r}, expected a plain file name")
                check_safetensors(folder / file)
        bundle = cls(
            folder,
            data.get("image_size", 0),
            data.get("method", {}),
            data.get("methods", {}),
            networks,
            configs,
        )
        bundle._check(path)
        return bundle

    def _check(self, path: Path) -> None:
        if type(self.image_size) is not int or self.image_size <= 0:
            raise ValueError(f"{path}: image_size {self.image_size!r}, expected pixels")
        if not isinstance(self.method, dict):
            raise ValueError(f"{path}: method {self.method!r}, expected an object of overrides")
        if not isinstance(self.methods, dict) or not all(isinstance(x, dict) for x in self.methods.values()):
            raise ValueError(f"{path}: methods {self.methods!r}, expected an object of overrides by name")
        for name in {"moma", *self.methods}:
            self.method_config(name)
        for network, files in TOKENIZERS.items():
            if network in self.networks:
                for file in files:
                    self.tokenizer(file)
        if ("adapter" in self.networks or "ip_adapter" in self.networks) and "unet" not in self.networks:
            raise ValueError(f"{path}: an adapter without the unet that it belongs to")
        if "llava" in self.networks and "vision" not in self.networks:
            raise ValueError(f"{path}: llava without vision, its image tower")

    def method_config(self, name: str, preset: str = "default", **overrides: Any) -> Any:
        """A method's config for drawing with these weights.

        Args:
            name: in the registry.
            preset: of the method.
            overrides: fields on top of what these weights need.

        Raises:
            ValueError: for an unknown method, preset, field or value, or a field that could have no effect.
        """
        entry = find_method(name)
        for field in overrides:
            if field in entry.overrides:
                value = entry.overrides[field]
                raise ValueError(f"method field {field!r}: {name} is {field}={value!r}, leave it out")
            if field in entry.method.training_fields:
                raise ValueError(f"method field {field!r}: acts in training alone, give it to train.py")
        known = {field.name for field in fields(entry.method.Config)}
        shared = {key: value for key, value in self.method.items() if entry.method is MoMA or key in known}
        own = self.methods.get(name, {})
        return entry.method.configure(preset, **{**shared, **own, **overrides, **entry.overrides})

    def config(self, name: str) -> Any:
        """The network's config dataclass; ValueError if the bundle does not have the network."""
        if name not in self.configs:
            raise ValueError(
                f"{self.folder}: has no {name}, only {', '.join(self.configs)}; "
                f"convert a source of it with --base-bundle {self.folder}"
            )
        return self.configs[name]

    def files(self, name: str) -> list[Path]:
        """The network's weight files."""
        self.config(name)
        return [self.folder / file for file in self.networks[name]["files"]]

    def tokenizer(self, file: str) -> Path:
        """Path of vocab.json, merges.txt or tokenizer.model; ValueError if it is missing."""
        path = self.folder / "tokenizers" / file
        if not path.is_file():
            raise ValueError(f"{path}: missing; copy it there or convert the source again")
        return path

    def clip_tokenizer(self, network: str = "text") -> ClipTokenizer:
        """A text encoder's or a whole CLIP's, at its number of positions."""
        config = self.config(network)
        text = config.text if isinstance(config, CLIPConfig) else config
        vocab, merges = (self.tokenizer(file) for file in CLIP_TOKENIZER)
        return ClipTokenizer(vocab, merges, text.positions, text.pad)

    def clip_tokenizers(self) -> tuple[ClipTokenizer, ...]:
        """One for each text encoder of the base."""
        return tuple(self.clip_tokenizer(name) for name in text_networks(self.config("unet")))

    def llama_tokenizer(self) -> LlamaTokenizer:
        """LLaVA's."""
        return LlamaTokenizer(self.tokenizer(*LLAMA_TOKENIZER))

    @property
    def familiar(self) -> Familiar | None:
        """Which images these weights know, if they know one kind only; ValueError for a damaged file."""
        return Familiar.read(self.folder)

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of every weight file."""
        return self.hashes_of(*self.networks)

    def hashes_of(self, *names: str) -> dict[str, str]:
        """sha256 of the files of some networks, by content; config.json may record those of other files."""
        files = [path for name in names for path in self.files(name)]
        found = zip(files, Hashes.below(self.folder).of(files), strict=True)
        return {path.name: digest for path, digest in found}

    def build(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        lm_head: bool = False,
        mapped: bool = True,
    ) -> nn.Module:
        """The network with its weights. llava comes with its tower, the network "vision".

        Args:
            name: in the bundle.
            device: of the parameters; "meta" = check the files and read no weights.
            dtype: of the parameters; None = as stored.
            lm_head: llava only: to generate text, which MoMA does not need.
            mapped: as `load_into`.

        Raises:
            ValueError: if the bundle lacks it, or a file does not fit.
        """
        config = self.config(name)
        unet = self.configs.get("unet")
        if name == "llava":
            if lm_head and not config.llama.lm_head:
                raise ValueError(f"{self.folder}: llava was stored without lm_head, so it cannot write text")
            config = replace(config, llama=replace(config.llama, lm_head=lm_head))
            groups = {"": self.files("llava"), TOWER: self.files("vision")}
            ignore = () if lm_head else (LM_HEAD,)
            return load_into(lambda: build_llava(config), groups, device, dtype, ignore, mapped)
        files = self.files(name)
        return load_into(lambda: build_network(name, config, unet), files, device, dtype, (), mapped)

    def stream(self, device: torch.device, dtype: torch.dtype) -> StreamedLlava:
        """As `build("llava", device, dtype)`, with weights that are read whenever they are needed."""
        config = self.config("llava")
        config = replace(config, llama=replace(config.llama, lm_head=False))
        return StreamedLlava(config, self._without_head(), device, dtype)

    def _without_head(self) -> dict[str, LazyTensor]:
        """What the llava module is made of, its tower included."""
        tower = {TOWER + key: tensor for key, tensor in self.tensors("vision").items()}
        return tower | {k: t for k, t in self.tensors("llava").items() if not k.startswith(LM_HEAD)}

    def nbytes(self, names: Sequence[str], dtype: torch.dtype | None) -> int:
        """What the networks' weights take in memory as `build` makes them, llava with its tower."""
        return sum(
            stored_bytes(self._without_head() if name == "llava" else self.tensors(name), dtype)
            for name in names
        )

    def tensors(self, name: str) -> dict[str, LazyTensor]:
        """What a network's files hold, by name."""
        return {key: tensor for file in self.files(name) for key, tensor in read_checkpoint(file).items()}

    def state(self, name: str) -> dict[str, Tensor]:
        """The same with its values, as stored."""
        return {key: tensor.read() for key, tensor in self.tensors(name).items()}


# --- writing -----------------------------------------------------------------------------------------


def check_target(target: Path, overwrite: bool) -> None:
    """ValueError if a bundle may not be written to `target`."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file, expected a folder to write to")
    if target.is_dir() and visible(target):
        if not overwrite:
            raise ValueError(f"{target}: not empty; choose another folder or add --overwrite")
        if not (target / MANIFEST).is_file():
            raise ValueError(f"{target}: holds no bundle; --overwrite replaces bundles only")


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """While it lasts, ValueError for other processes that would write the same bundle.

    The claim is a lock on a file beside the target, which the system drops when the process ends.
    """
    path = target.with_name(f".{target.name}.lock")
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and os.path.samestat(os.fstat(handle), path.stat())  # else just removed
        except OSError as error:
            mine = error.errno not in (errno.EAGAIN, errno.EACCES)  # a disk without locks
        if not mine:
            raise ValueError(f"{target}: another process is writing it; wait, or choose another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


class BundleWriter:
    """Context manager that fills a hidden folder beside the target and renames it when all went well.

    An interrupted run leaves at most `.<name>.<random>.part`, which the next run to the same target removes.
    A second writer is refused while the first one is at work.
    """

    def __init__(self, target: str | Path, image_size: int, overwrite: bool = False) -> None:
        """ValueError if target has content and overwrite is not set, or if that content is no bundle."""
        self.target = Path(target).resolve()  # of a link, what it points to is replaced
        self.overwrite, self.claim = overwrite, ExitStack()
        self.image_size = image_size
        self.method: dict[str, Any] = {}
        self.methods: dict[str, dict[str, Any]] = {}
        self.networks: dict[str, dict[str, Any]] = {}
        check_target(self.target, overwrite)

    def __enter__(self) -> Self:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.claim.enter_context(claimed(self.target))
        try:
            check_target(self.target, self.overwrite)
            for left in self.target.parent.glob(f".{glob.escape(self.target.name)}.*.part"):
                shutil.rmtree(left, ignore_errors=True)  # of a killed run; links are not followed
            self.part = self._beside()
            (self.part / "tokenizers").mkdir()
        except BaseException:
            self.claim.close()
            raise
        return self

    def _beside(self) -> Path:
        """A new hidden folder beside the target, under a name that was free."""
        path = self.target.with_name(f".{self.target.name}.{secrets.token_hex(8)}.part")
        path.mkdir()
        return path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            shutil.rmtree(self.part, ignore_errors=True)
            self.claim.close()

    def _finish(self) -> None:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "image_size": self.image_size,
            "networks": self.networks,
            "method": self.method,
            **({"methods": self.methods} if self.methods else {}),
        }
        (self.part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        Bundle.open(self.part)
        old = self._beside()
        if self.target.exists():
            os.replace(self.target, old)
        os.replace(self.part, self.target)
        shutil.rmtree(old, ignore_errors=True)

    def add(
        self,
        name: str,
        config: Any,
        tensors: Mapping[str, LazyTensor],
        source: str,
        dtype: torch.dtype | None = None,
        progress: Callable[[int], Any] | None = None,
        loras: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write one network.

        Args:
            name: in the bundle.
            config: its dataclass.
            tensors: by name, read one at a time.
            source: where they come from, for people.
            dtype: to store; None = as they are.
            progress: called with the bytes written.
            loras: what was merged into it: file, sha256, weight.
        """
        hashes = write_safetensors(self.part, name, tensors, dtype, progress=progress)
        self.networks[name] = {
            "config": asdict(config),
            "files": list(hashes),
            "sha256": hashes,
            "source": source,
            **({"loras": list(loras)} if loras else {}),
        }

    def take(self, base: Bundle, name: str) -> None:
        """A network of another bundle as it is: hard links, or copies on another disk."""
        for path in base.files(name):
            _link(path, self.part / path.name)
        self.networks[name] = dict(base.networks[name])

    def take_companions(self, base: Bundle, names: Collection[str]) -> None:
        """The files beside another bundle's networks; names: of those that are taken as they are."""
        for file, networks in COMPANIONS.items():
            if networks <= {*names} and (base.folder / file).is_file():
                shutil.copyfile(base.folder / file, self.part / file)

    def add_tokenizer(self, name: str, path: Path) -> None:
        shutil.copyfile(path, self.part / "tokenizers" / name)

    def check_space(self, nbytes: int) -> None:
        """ValueError if the disk has no room for that many bytes."""
        free = shutil.disk_usage(self.part).free
        if free < nbytes:
            raise ValueError(f"{self.target}: needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # of a link, link(2) would copy the link itself
    except OSError:
        shutil.copyfile(source, target)
