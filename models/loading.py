"""Checkpoint files: read lazily, write as safetensors, load into a module.

Reading gives a mapping name -> `LazyTensor`: shape and dtype are known from the header, the values are
read on demand, so that a 10 GB file is converted tensor by tensor. Pickled files (.bin, .ckpt, .pt, .pth,
.th) go through an unpickler that knows a fixed list of names and calls nothing else: a file that wants
more is refused, nothing of it runs.

Formats: safetensors = 8 bytes header length, JSON header, raw little-endian bytes
(github.com/huggingface/safetensors); torch.save = an uncompressed zip with `data.pkl` and one entry
`data/<key>` per storage (torch/serialization.py).
"""

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
HEADER_ALIGNMENT = 64  # bytes; data that starts aligned can be used where it is mapped
ZIP_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # the last two fields are the lengths of name and extra
MAX_NESTING = 16  # dicts within dicts; real checkpoints have 3, more is a cycle
NAMES_IN_ERROR = 6  # keys spelled out per kind of problem, so that the message stays one readable line
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: `shape` and `dtype` now, the values from `read()` (a fresh tensor on the CPU)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def map(self, function: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """The same tensor after `function` (which must run on meta tensors, as the shape comes from one)."""
        result = function(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return LazyTensor(tuple(result.shape), result.dtype, self.file, lambda: function(self.read()))

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets attributes of a tensor")  # only a hostile file would


def _read_span(
    file: Path, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Read the elements of one tensor, `offset` bytes into the file; ValueError if the file ends before."""
    buffer = torch.empty(_extent(shape, stride), dtype=dtype)
    with open(file, "rb") as stream:
        stream.seek(offset)
        got = stream.readinto(buffer.view(torch.uint8).numpy()) if buffer.numel() else 0
    if got != buffer.nbytes:
        raise ValueError(f"{file}: ends before its last tensor; the file is truncated, fetch it again")
    return buffer.as_strided(shape, stride)


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Number of storage elements from the first to the last element of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


# --- reading -------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> dict[str, LazyTensor]:
    """Tensors of a checkpoint by name.

    path: .safetensors, a torch pickle, or the `*.index.json` of a sharded one. Nested dicts are flattened
    with dots; what is no tensor is left out. ValueError (one line) for a missing, damaged, unknown or
    unsafe file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".json":
        return _read_index(path)
    with open(path, "rb") as stream:
        head = stream.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise ValueError(f"{path}: a git-lfs pointer instead of the weights; run `git lfs pull` there")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        return _read_zip(path)
    if head.startswith(b"\x80"):
        return _read_legacy(path)
    raise ValueError(f"{path}: neither safetensors nor a torch checkpoint; damaged or of another kind")


def pick_weights(names: Collection[str], stems: Sequence[str]) -> str | None:
    """Which of a model folder's file names to read: safetensors before pickles, full before half precision,
    plain before `non_ema` (diffusers' plain file is the average); an index where the weights are sharded."""
    kinds = ("safetensors", "bin")
    whole = [(f".{kind}", f".{kind}.index.json") for kind in kinds]
    half = [(f".fp16.{kind}", f".{kind}.index.fp16.json") for kind in kinds]
    other = [(f".non_ema.{kind}",) for kind in kinds]
    endings = [ending for group in (*whole, *half, *other) for ending in group]
    return next((stem + end for end in endings for stem in stems if stem + end in names), None)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an `*.index.json`."""
    try:
        places: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = {Path(file).name: file for file in places.values()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: no weight_map from tensor names to files in it") from error
    if outside := [file for name, file in files.items() if name != file]:
        raise ValueError(f"{index}: names the shard {outside[0]!r}, which is not a plain file name")
    return places


def shard_files(index: Path) -> list[Path]:
    """The files that an `*.index.json` names, whether they are there or not."""
    return [index.parent / file for file in sorted(set(_weight_map(index).values()))]


def _read_index(path: Path) -> dict[str, LazyTensor]:
    places = _weight_map(path)
    content = {}
    for file in shard_files(path):
        if not file.is_file():
            raise ValueError(f"{file}: shard listed in {path.name} is missing")
        content[file.name] = read_checkpoint(file)
    if lost := [name for name, file in places.items() if name not in content[file]]:
        raise ValueError(f"{path}: {some_names(lost)} not in the shards that the index names")
    return {name: content[file][name] for name, file in places.items()}


@contextmanager
def _open_safetensors(path: Path, device: str = "cpu") -> Iterator[Any]:
    """safe_open, which checks that header and file size agree, with a one-line ValueError."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error


def check_safetensors(path: Path) -> None:
    """ValueError if the file is missing, cut short or has no valid header; reads no weights."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with _open_safetensors(path):
        pass


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    check_safetensors(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, expected a float or integer type")
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        tensors[name] = _stored(path, 8 + length + entry["data_offsets"][0], shape, _contiguous(shape), dtype)
    return tensors


def _stored(
    path: Path, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> LazyTensor:
    return LazyTensor(shape, dtype, path, lambda: _read_span(path, offset, shape, stride, dtype))


def _read_legacy(path: Path) -> dict[str, LazyTensor]:
    """torch.save before version 1.6: one stream, so all of it is read; torch's own restricted loader."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or unsafe stream
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a readable torch checkpoint ({reason})") from error
    return dict(_flatten(path, content))


# --- torch's zip files -----------------------------------------------------------------------------


class _Inert:
    """Stands for an object that is only metadata: takes any arguments, keeps nothing, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, *state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def add(self, value: Any) -> None: ...


class _Call:
    """A callable handed to a pickle; unlike a function, a pickle cannot set attributes on it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets attributes of a function")


@dataclass(frozen=True)
class _Storage:
    """One entry `data/<key>`: where its bytes begin, how many there are, what they are typed as."""

    offset: int
    nbytes: int
    dtype: torch.dtype

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets attributes of a storage")


# Packages whose classes appear in training checkpoints as metadata; they become inert, none is imported.
INERT_PACKAGES = {
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "omegaconf",
    "numpy",
    "typing",
    "pathlib",
    "argparse",
    "copyreg",
    "copy_reg",
    "_codecs",
}
INERT_BUILTINS = {
    *("int", "long", "float", "complex", "bool", "str", "unicode", "bytes", "bytearray"),
    *("object", "slice", "range"),
}
CONTAINERS: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (dict, list, set)},
}


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and LazyTensors; every name a pickle asks for goes through `find_class`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str, data: bytes) -> None:
        super().__init__(BytesIO(data))
        self.path, self.archive, self.root = path, archive, root
        rebuild = _Call(self._rebuild)
        self.names: dict[tuple[str, str], Any] = {
            **CONTAINERS,
            ("collections", "defaultdict"): _Call(lambda *args: {}),
            ("collections", "Counter"): _Call(lambda *args: {}),
            ("builtins", "tuple"): _Call(tuple),
            ("torch", "Size"): _Call(tuple),
            ("torch", "device"): _Inert,
            ("torch", "Tensor"): _Inert,
            ("torch.nn.parameter", "Parameter"): _Inert,
            ("torch._utils", "_rebuild_tensor"): rebuild,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
            ("torch._utils", "_rebuild_tensor_v3"): _Call(self._rebuild_v3),
            ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *flags: data),
            ("torch._utils", "_rebuild_parameter_with_state"): _Call(lambda data, *flags: data),
            ("torch._tensor", "_rebuild_from_type_v2"): _Call(self._rebuild_from_type),
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.names:
            return self.names[module, name]
        if module in ("torch", "torch.storage"):
            if name in STORAGE_DTYPES:
                return STORAGE_DTYPES[name]
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
        if module in ("builtins", "__builtin__") and name in INERT_BUILTINS:
            return _Inert
        if module.split(".")[0] in INERT_PACKAGES:
            return _Inert
        raise ValueError(
            f"{self.path}: the pickle asks for {module}.{name}, which no weights need; "
            "refused, nothing of it was run (a .safetensors version of the file has no such names)"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage without a type")
        info = self.archive.getinfo(f"{self.root}/data/{key}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} is compressed or too short")
        return _Storage(_entry_offset(self.path, info), info.file_size, dtype)

    def _rebuild(
        self, storage: _Storage, offset: int, shape: Any, stride: Any, *flags: Any, dtype: Any = None
    ) -> LazyTensor:
        shape, stride, dtype = tuple(shape), tuple(stride), dtype or storage.dtype
        numbers = (offset, *shape, *stride)
        if any(not isinstance(n, int) or n < 0 for n in numbers) or len(shape) != len(stride):
            raise pickle.UnpicklingError("a tensor of impossible shape")
        if (offset + _extent(shape, stride)) * dtype.itemsize > storage.nbytes:
            raise pickle.UnpicklingError("a tensor larger than its storage")
        return _stored(self.path, storage.offset + offset * dtype.itemsize, shape, stride, dtype)

    def _rebuild_v3(self, storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> LazyTensor:
        _, _, dtype, *_ = rest  # requires_grad, hooks, dtype, metadata
        return self._rebuild(storage, offset, shape, stride, dtype=dtype)

    def _rebuild_from_type(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        return function(*args)  # a tensor with Python attributes; they are left out


def _entry_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a zip entry begin (the local header's lengths may differ from the directory's)."""
    with open(path, "rb") as stream:
        stream.seek(info.header_offset)
        *_, name, extra = ZIP_LOCAL_HEADER.unpack(stream.read(ZIP_LOCAL_HEADER.size))
    offset = info.header_offset + ZIP_LOCAL_HEADER.size + name + extra
    if offset + info.file_size > path.stat().st_size:
        raise zipfile.BadZipFile("entry beyond the end")
    return offset


def _read_zip(path: Path) -> dict[str, LazyTensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path}: a zip archive, but not one that torch.save wrote")
            root = pickles[0].removesuffix("/data.pkl")
            if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
                raise ValueError(f"{path}: written on a big-endian machine, expected little-endian")
            if archive.getinfo(pickles[0]).compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: a compressed archive, but torch.save writes uncompressed ones")
            content = _Unpickler(path, archive, root, archive.read(pickles[0])).load()
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way, and always inside our own containers
        raise ValueError(f"{path}: damaged or truncated torch checkpoint ({error})") from error
    return dict(_flatten(path, content))


def _flatten(path: Path, content: Any) -> Iterator[tuple[str, LazyTensor]]:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    seen: set[str] = set()

    def walk(node: Any, name: str, depth: int) -> Iterator[tuple[str, LazyTensor]]:
        if depth > MAX_NESTING:
            raise ValueError(f"{path}: dicts nested deeper than {MAX_NESTING}, not a checkpoint")
        if isinstance(node, dict):
            for key, value in node.items():
                yield from walk(value, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(node, LazyTensor | Tensor):
            if name in seen:
                raise ValueError(f"{path}: two tensors are called {name}")
            seen.add(name)
            yield name, node if isinstance(node, LazyTensor) else in_memory(node, path)

    yield from walk(content, "", 0)


def in_memory(tensor: Tensor, file: Path) -> LazyTensor:
    """A tensor that is already there, in the form of one that is not."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, file, lambda: tensor)


# --- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardConfig:
    """How weights are cut into files."""

    # Largest file in bytes; 5 GB is what hubs and other tools use, and one shard is one download to repeat.
    max_bytes: int = 5_000_000_000


def write_safetensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    config: ShardConfig | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, str]:
    """Write `<stem>.safetensors`, or `<stem>-00001-of-0000N.safetensors`, one tensor in memory at a time.

    dtype: type of the floating-point tensors in the file, None = as they are. progress: called with the
    bytes written. Returns file name -> sha256. A file appears under its name only when complete.
    ValueError if a value is finite in the source and infinite in `dtype`.
    """
    config = config or ShardConfig()
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = prod(tensor.shape) * _target(tensor, dtype).itemsize
        if shards[-1] and size + nbytes > config.max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    hashes = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        hashes[file] = _write_shard(folder / file, {name: tensors[name] for name in names}, dtype, progress)
    return hashes


def _target(tensor: LazyTensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype


def _write_shard(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None,
    progress: Callable[[int], Any] | None,
) -> str:
    if odd := [name for name in tensors if tensors[name].dtype not in DTYPE_NAMES]:
        raise ValueError(
            f"{tensors[odd[0]].file}: {odd[0]} has dtype {tensors[odd[0]].dtype}, which is no weight's"
        )
    # Wide types first, so that every tensor stays aligned to its own item size.
    names = sorted(tensors, key=lambda name: (-_target(tensors[name], dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor, kind = tensors[name], _target(tensors[name], dtype)
        end = offset + prod(tensor.shape) * kind.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    digest = hashlib.sha256()
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as stream:

            def put(data: Any) -> None:
                stream.write(data)
                digest.update(data)

            put(len(text).to_bytes(8, "little"))
            put(text)
            for name in names:
                values = _cast(name, tensors[name], _target(tensors[name], dtype))
                put(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                if progress is not None:
                    progress(values.nbytes)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return digest.hexdigest()


def _cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
    values = tensor.read()
    assert tuple(values.shape) == tensor.shape and values.dtype == tensor.dtype
    cast = values.to(dtype)
    narrower = dtype == torch.float16 and values.dtype != dtype
    if narrower and not torch.equal(cast.isfinite(), values.isfinite()):
        raise ValueError(
            f"{tensor.file}: {name} reaches {values.abs().max():.3g}, beyond float16; use bf16 or fp32"
        )
    return cast


# --- loading into a module -------------------------------------------------------------------------


def load_into(
    build: Callable[[], nn.Module],
    files: Sequence[Path] | Mapping[str, Sequence[Path]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ignore: Sequence[str] = (),
) -> nn.Module:
    """Build a module without memory of its own and put the tensors of safetensors files in.

    files: paths, or name prefix -> paths (the prefix is put before the names in these files). dtype: of the
    parameters, None = as stored. ignore: prefixes of names that may be in the files without a place in the
    module. On the CPU, tensors whose dtype stays are mapped from the file (private pages: writing to them
    does not touch it). ValueError, before any weight is read, lists every missing, unexpected or mis-shaped
    name; both sides must agree exactly.
    """
    with torch.device("meta"):
        module = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    groups = files if isinstance(files, Mapping) else {"": files}
    places: dict[str, tuple[Path, str]] = {}
    unexpected, misshaped = [], []
    for prefix, paths in groups.items():
        for path in paths:
            for key, tensor in _read_safetensors(Path(path)).items():
                name = prefix + key
                if name not in wanted:
                    if not name.startswith(tuple(ignore)):
                        unexpected.append(f"{name} ({path.name})")
                elif tensor.shape != wanted[name]:
                    shapes = f"{list(tensor.shape)} instead of {list(wanted[name])}"
                    misshaped.append(f"{name} ({path.name}: {shapes})")
                else:
                    places[name] = (Path(path), key)
    missing = [name for name in wanted if name not in places and not _named(name, misshaped)]
    problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    if any(problems.values()):
        where = ", ".join(str(path) for paths in groups.values() for path in paths)
        listed = "; ".join(f"{kind}: {some_names(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{where}: does not fit {type(module).__name__}: {listed}")

    state = {}
    for path in {path: None for path, _ in places.values()}:
        with _open_safetensors(path, str(device)) as file:
            for name, (place, key) in places.items():
                if place == path:
                    values = file.get_tensor(key)
                    state[name] = values.to(dtype) if values.is_floating_point() else values
    module.load_state_dict(state, strict=True, assign=True)
    rest = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not rest, f"{type(module).__name__} keeps {rest} out of its state dict"
    return module


def _named(name: str, problems: list[str]) -> bool:
    return any(problem.startswith(f"{name} (") for problem in problems)


def some_names(names: Sequence[str]) -> str:
    """The first few names, for a message of one line."""
    more = len(names) - NAMES_IN_ERROR
    return ", ".join(names[:NAMES_IN_ERROR]) + (f" and {more} more" if more > 0 else "")
