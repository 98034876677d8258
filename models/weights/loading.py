"""Checkpoint files: read lazily, write as safetensors, load into a module.

Reading returns a mapping name -> `LazyTensor`: shape and dtype come from the header, values are read on
demand, so that a 10 GB file can be converted tensor by tensor. Pickled files (.bin, .ckpt, .pt, .pth, .th) go
through torch's restricted unpickler, which only calls what builds tensors; it skips the metadata of training
frameworks and refuses files that ask for more.

Formats: safetensors = 8 bytes header length, JSON header, raw little-endian bytes
(github.com/huggingface/safetensors); torch.save = an uncompressed zip with `data.pkl` and one entry
`data/<key>` per storage (torch/serialization.py).
"""

import hashlib
import io
import json
import pickletools
import re
import zipfile
from bisect import bisect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.weights.files import atomic_write, check_file, parse_json, read_object

_SAFETENSORS_DTYPES = {
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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {
    dtype: name
    for name, dtype in _SAFETENSORS_DTYPES.items()
    if dtype.itemsize > 1 or not dtype.is_floating_point
}  # of what is written: networks do not compute in float8
_HEADER_ALIGNMENT = 64  # bytes; aligned data can be used where it is mapped
_MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
_MAX_NESTING = 16  # dicts within dicts; real checkpoints have 3, more hint at a cycle
_MAX_MISSING = 1000  # parameters that a network may have and its file lack, to be listed by name
_MAX_ENTRIES = 2**18  # of all dicts, each counted wherever it is named; real checkpoints have 2**14
_MAX_RANK = 8  # dimensions of a tensor; networks have 5
_MAX_SHARED = 4  # times its size that a file's tensors may take: they may share values
# Integers of more than 64 bits in a pickle, of which torch writes one: as keys of a dict, thousands can have
# one hash, and each would be compared with all before it.
_MAX_LARGE = 16
_NAMES_IN_ERROR = 6  # keys listed per kind of problem, so that a message stays one line
# What a file may be instead of weights -> its first bytes, in lower case.
_FOREIGN = {
    "a git-lfs pointer instead of the weights; run `git lfs pull` there": (b"version https://git-lfs",),
    "a web page (HTML) instead of the weights; fetch the file itself": (
        b"<!doctype html",
        b"<html",
        b"<?xml",
    ),
    "an archive; unpack it and give what is in it": (
        b"\x1f\x8b",
        b"7z\xbc\xaf",
        b"rar!",
        b"bzh",
        b"\xfd7zxz",
    ),
    "weights of llama.cpp (GGUF), which are rounded; give the original ones": (b"gguf",),
    "weights of Keras or TensorFlow (HDF5); give those of PyTorch": (b"\x89hdf",),
    "an image": (b"\x89png", b"\xff\xd8\xff"),
}
# A call that the restricted unpickler allows, although its argument alone decides how much memory it takes.
_ALLOCATES = re.compile(rb"c(?:__builtin__|builtins)\nbytearray\n")
_PICKLE_BYTES = 2**26  # of an old file that are searched for it: its pickles come before its values
# What training checkpoints hold beside tensors; `_Skipped` stands in for it, so that nothing is imported.
METADATA = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|numpy|typing|pathlib|argparse|copyreg)\..*"
    r"|collections\.defaultdict|builtins\.(int|float|bool|str|bytes|object|slice|range|list|dict|tuple)"
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: `shape` and `dtype` at once, values (on the CPU, read-only) from `read()`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], Tensor]
    castable: bool = True  # False: the format fixes the dtype (of codes and scales, for example)
    name: str = ""  # in the file

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def map(self, function: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """The tensor after `function`, which must run on meta tensors to give the shape."""
        result = function(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        shape, dtype = tuple(result.shape), result.dtype
        return replace(self, shape=shape, dtype=dtype, read=lambda: function(self.read()))


def in_memory(tensor: Tensor, file: Path) -> LazyTensor:
    """A LazyTensor whose values are in memory."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, file, lambda: tensor)


def finite(tensor: LazyTensor) -> LazyTensor:
    """The tensor, which when it is read raises ValueError for values that are NaN or infinite."""

    def read() -> Tensor:
        values = tensor.read()
        known = values.half() if values.dtype.itemsize == 1 else values  # float8 has no isfinite
        if values.is_floating_point() and not known.isfinite().all():
            count = int((~known.isfinite()).sum())
            raise ValueError(
                f"{tensor.file}: {tensor.name} holds {count} values that are NaN or infinite, so that it can "
                "only draw noise; fetch the file again or take another"
            )
        return values

    return replace(tensor, read=read)


def below(prefix: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors whose names start with the prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def joined(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Concatenate along the first dimension; ValueError if the other dimensions differ."""
    first = parts[0]
    if len({part.shape[1:] for part in parts}) > 1 or not first.shape:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise ValueError(f"{first.file}: tensors of the shapes {shapes} do not concatenate")
    rows = sum(part.shape[0] for part in parts)
    return replace(
        first, shape=(rows, *first.shape[1:]), read=lambda: torch.cat([part.read() for part in parts])
    )


# --- reading -------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> dict[str, LazyTensor]:
    """Tensors of a checkpoint by name; nested dicts are flattened with dots, other values left out.

    path: safetensors, a torch pickle, or the index of a sharded checkpoint, under any name. ValueError (one
    line) for a missing, damaged, unknown or unsafe file.
    """
    path = Path(path)
    if weight_format(path) == "index":
        return _read_index(path)
    return _read_file(path)


def weight_format(path: Path) -> str | None:
    """What the first bytes of a file say: safetensors, zip, legacy (torch's old format) or index (JSON).

    None: nothing. ValueError if there is no file, or one that is known to be something else.
    """
    check_file(path)
    with open(path, "rb") as stream:
        head = stream.read(64)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    formats = {b"PK": "zip", b"\x80": "legacy", b"{": "index", b"[": "index"}
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, kind in formats.items():
        if (head if kind in ("zip", "legacy") else text).startswith(start):
            return kind
    for what, starts in _FOREIGN.items():
        if text.lower().startswith(starts):
            raise ValueError(f"{path}: {what}")
    if not head.strip(b"\0"):
        raise ValueError(f"{path}: {'zeros' if head else 'empty'}; fetch it again")
    # a damaged header is told by those who read it
    return "safetensors" if path.suffix.lower() == ".safetensors" else None


def _read_file(path: Path) -> dict[str, LazyTensor]:
    """Any checkpoint in one file."""
    readers = {"safetensors": _read_safetensors, "zip": _read_zip, "legacy": _read_legacy}
    if not (reader := readers.get(weight_format(path) or "")):
        raise ValueError(f"{path}: neither safetensors nor a torch checkpoint")
    tensors = reader(path)
    if odd := [name for name in tensors if not name.isprintable()]:
        raise ValueError(f"{path}: a tensor is called {odd[0]!r}, not a checkpoint")
    if odd := [name for name, tensor in tensors.items() if len(tensor.shape) > _MAX_RANK]:
        raise ValueError(f"{path}: {odd[0]} has {len(tensors[odd[0]].shape)} dimensions, not a checkpoint")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside the tensors; {} for other files."""
    if weight_format(path) != "safetensors":
        return {}
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def pick_weights(names: Collection[str], stems: Sequence[str]) -> str | None:
    """Choose which of a model folder's files to read; None if there are no weights.

    The order is: safetensors before pickles, full before half precision, plain before `non_ema` (diffusers'
    plain file is the average). Where weights are sharded, it is the index.

    Args:
        names: file names in the folder.
        stems: what the file name may begin with.
    """
    formats = ("safetensors", "bin")
    whole = [end for f in formats for end in (f".{f}", f".{f}.index.json")]
    half = [end for f in formats for end in (f".fp16.{f}", f".{f}.index.fp16.json")]
    endings = [*whole, *half, *(f".non_ema.{f}" for f in formats)]
    return next((stem + end for end in endings for stem in stems if stem + end in names), None)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an `*.index.json`."""
    try:
        files: dict[str, str] = dict(read_object(index)["weight_map"])
        outside = [file for file in files.values() if Path(file).name != file]
    except (KeyError, TypeError, ValueError) as error:
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise ValueError(f"{index}: no weight_map from tensor names to files in it{why}") from error
    if outside:
        raise ValueError(f"{index}: names the shard {outside[0]!r}, which is not a plain file name")
    return files


def shard_files(index: Path) -> list[Path]:
    """The files that an `*.index.json` names, present or not."""
    return [index.parent / file for file in sorted(set(_weight_map(index).values()))]


def _read_index(path: Path) -> dict[str, LazyTensor]:
    files = _weight_map(path)
    content = {}
    for file in shard_files(path):
        if not file.is_file():
            raise ValueError(f"{file}: shard listed in {path.name} is missing")
        content[file.name] = _read_file(file)
    if lost := [name for name, file in files.items() if name not in content[file]]:
        raise ValueError(f"{path}: {some_names(lost)} missing from the shards")
    return {name: content[file][name] for name, file in files.items()}


@contextmanager
def _open_safetensors(path: Path, device: str = "cpu") -> Iterator[Any]:
    """safe_open, which checks that header and file size agree, with ValueError for its errors."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error


def check_safetensors(path: Path) -> None:
    """ValueError if the file is missing, cut short or has no valid header; reads no weights."""
    check_file(path)
    with _open_safetensors(path):
        pass


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    check_safetensors(path)
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(size), str(path))
    header.pop("__metadata__", None)
    if odd := [name for name, entry in header.items() if entry["dtype"] not in _SAFETENSORS_DTYPES]:
        dtype = header[odd[0]]["dtype"]
        raise ValueError(f"{path}: {odd[0]} has dtype {dtype}, expected a float or integer type")

    def lazy(name: str, entry: dict[str, Any]) -> LazyTensor:
        shape, dtype = tuple(entry["shape"]), _SAFETENSORS_DTYPES[entry["dtype"]]
        start, end = (8 + size + offset for offset in entry["data_offsets"])

        def read() -> Tensor:  # mapped anew, so that only this tensor stays mapped
            if start == end:
                return torch.empty(shape, dtype=dtype)
            try:
                storage = torch.UntypedStorage.from_file(str(path), False, end)[start:end]
            except (RuntimeError, OSError) as error:
                raise ValueError(f"{path}: damaged or truncated safetensors file ({error})") from error
            return torch.empty(0, dtype=dtype).set_(storage).view(shape)

        return LazyTensor(shape, dtype, path, read, name=name)

    return {name: lazy(name, header[name]) for name in sorted(header)}


class _Skipped:
    """Stands in for a class or function of METADATA: builds dicts, which the unpickler may fill."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _SkippedArray:
    """The same for numpy's, whose state is a tuple, which a dict refuses."""

    def __new__(cls, *args: Any) -> "_SkippedArray":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Replace torch's many errors, which advise to load unsafely, by a ValueError of one line."""
    try:
        yield
    except MemoryError as error:
        raise ValueError(f"{path}: needs more memory than there is") from error
    except Exception as error:
        raise ValueError(f"{path}: damaged, truncated or unsafe, not a readable torch checkpoint") from error


def _read_zip(path: Path) -> dict[str, LazyTensor]:
    """torch.save since version 1.6. Reads only `data.pkl`: on "meta", torch notes where values lie."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        named = {end: [i for i in infos if i.filename.endswith(end)] for end in ("/data.pkl", "/byteorder")}
        packed = any(info.compress_type != zipfile.ZIP_STORED for info in infos)
        pickles, orders = ([b"" if packed else archive.read(i) for i in found] for found in named.values())
    if not pickles:
        raise ValueError(f"{path}: a zip archive, but not one that torch.save wrote")
    if packed:
        raise ValueError(f"{path}: a compressed archive, but torch.save writes uncompressed ones")
    for data in pickles:
        _check_pickle(path, data)
    if not set(orders) <= {b"little"}:  # torch would crash on such a file under "meta"
        raise ValueError(f"{path}: written on a big-endian machine, expected little-endian")
    with _readable(path), open(path, "rb") as stream:  # by its path, torch would go by the name
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    if refused := [name for name in wanted if not METADATA.fullmatch(name)]:
        raise ValueError(
            f"{path}: the pickle asks for {refused[0]}, which weights do not need; refused, none of it ran "
            "(a .safetensors version of the file is safe)"
        )
    skipped = [(_SkippedArray if name.startswith("numpy.") else _Skipped, name) for name in wanted]
    with _readable(path), torch.serialization.safe_globals(skipped), open(path, "rb") as stream:
        content = torch.load(stream, map_location="meta", weights_only=True)
    entries = sorted((info.header_offset, info.file_size) for info in infos)

    def lazy(name: str, tensor: Tensor) -> LazyTensor:
        storage = tensor.untyped_storage()
        if (start := storage._checkpoint_offset) is None:  # of its bytes in the file
            raise ValueError(f"{path}: {name} has no values")
        _, room = entries[bisect(entries, (start,)) - 1]  # the entry whose header precedes them
        skip, shape, stride = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        count = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if storage.nbytes() > room:  # torch has grown it to the size of the tensor
            raise ValueError(f"{path}: damaged, {name} is larger than its stored values")

        def read() -> Tensor:
            flat = torch.empty(count, dtype=tensor.dtype)
            with open(path, "rb") as stream:
                stream.seek(start + skip * flat.itemsize)
                got = stream.readinto(flat.view(torch.uint8).numpy()) if count else 0
            if got != flat.nbytes:
                raise ValueError(f"{path}: truncated before its last tensor; fetch it again")
            return flat.as_strided(shape, stride)

        return LazyTensor(shape, tensor.dtype, path, read, name=name)

    return {name: lazy(name, tensor) for name, tensor in _flatten(path, content).items()}


def _read_legacy(path: Path) -> dict[str, LazyTensor]:
    """torch.save before version 1.6: one stream, which must be read whole."""
    with open(path, "rb") as stream:
        _check_pickle(path, stream.read(_PICKLE_BYTES))
        stream.seek(0)
        with _readable(path):
            content = torch.load(stream, map_location="cpu", weights_only=True)
    return {
        name: replace(in_memory(tensor, path), name=name) for name, tensor in _flatten(path, content).items()
    }


def _check_pickle(path: Path, data: bytes) -> None:
    """ValueError for pickles, one after another, that cost far more than their size to load."""
    if _ALLOCATES.search(data):
        raise ValueError(f"{path}: the pickle asks for bytearray, which weights do not need; refused")
    large, stream = 0, io.BytesIO(data)
    with suppress(ValueError):  # what follows the pickles, or one that torch will not read either
        while True:
            for _, value, _ in pickletools.genops(stream):
                large += isinstance(value, int) and value.bit_length() > 64
    if large > _MAX_LARGE:
        raise ValueError(f"{path}: the pickle holds {large} integers of more than 64 bits; refused")


def _flatten(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors")
    found: dict[str, Tensor] = {}
    size, entries, total = path.stat().st_size, 0, 0

    def walk(node: Any, name: str, depth: int) -> None:
        nonlocal entries, total
        entries += 1
        if entries > _MAX_ENTRIES:
            raise ValueError(f"{path}: more than {_MAX_ENTRIES:,} entries, not a checkpoint")
        if depth > _MAX_NESTING:
            raise ValueError(f"{path}: dicts nested deeper than {_MAX_NESTING}, not a checkpoint")
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}.{key}" if name else str(key), depth + 1)
        elif isinstance(node, Tensor):
            if name in found:
                raise ValueError(f"{path}: two tensors are called {name}")
            if node.layout != torch.strided or node.is_quantized:
                raise ValueError(f"{path}: {name} is sparse or quantised, expected plain dense tensors")
            total += node.nbytes
            if node.nbytes > size or total > _MAX_SHARED * size:  # by strides of 0, or many of one storage
                raise ValueError(f"{path}: damaged, {name} is larger than its stored values")
            found[name] = node.detach()

    walk(content, "", 0)
    return found


# --- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardConfig:
    """How weights are split into files."""

    max_bytes: int = 5_000_000_000  # of a file, as hubs and other tools use


def save_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """`write_safetensors` for tensors in memory.

    Args:
        folder: to write to.
        stem: of the files' names.
        tensors: by name, on any device.
    """
    lazy = {name: in_memory(tensor.detach().cpu().contiguous(), folder) for name, tensor in tensors.items()}
    return write_safetensors(folder, stem, lazy)


def write_safetensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    config: ShardConfig | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, str]:
    """Write `<stem>.safetensors`, or `<stem>-00001-of-0000N.safetensors`, tensor by tensor.

    A file appears under its name only when it is complete.

    Args:
        folder: where to write.
        stem: start of the file names.
        tensors: by name.
        dtype: of the floating-point tensors in the file; None = as they are.
        config: when to start a new file.
        progress: called with the number of bytes after each tensor.

    Returns: file name -> sha256.
    Raises: ValueError if a value is finite in the source and infinite in `dtype`.
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


def stored_bytes(tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None = None) -> int:
    """Bytes that `write_safetensors` writes, without headers."""
    return sum(prod(tensor.shape) * _target(tensor, dtype).itemsize for tensor in tensors.values())


def _target(tensor: LazyTensor, dtype: torch.dtype | None) -> torch.dtype:
    casts = dtype is not None and tensor.castable and tensor.dtype.is_floating_point
    return dtype if casts else tensor.dtype


def _write_shard(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None,
    progress: Callable[[int], Any] | None,
) -> str:
    dtypes = {name: _target(tensor, dtype) for name, tensor in tensors.items()}
    if odd := [name for name, d in dtypes.items() if d not in _DTYPE_NAMES]:
        dtype_name = str(dtypes[odd[0]]).removeprefix("torch.")
        cast = "; choose another with --dtype" if dtypes[odd[0]].is_floating_point else ""
        raise ValueError(f"{tensors[odd[0]].file}: {odd[0]} is {dtype_name}, which is not written{cast}")
    # wide dtypes first, so that every tensor is aligned to its item size
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape, stored = tensors[name].shape, dtypes[name]
        end = offset + prod(shape) * stored.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[stored], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
    digest = hashlib.sha256()
    with atomic_write(path) as part, open(part, "wb") as stream:

        def put(data: Any) -> None:
            stream.write(data)
            digest.update(data)

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name in names:
            values = _cast(name, tensors[name], dtypes[name])
            put(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(values.nbytes)
    return digest.hexdigest()


def _cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> Tensor:
    values = tensor.read()
    assert tuple(values.shape) == tensor.shape and values.dtype == tensor.dtype
    cast = values.to(dtype)
    narrower = dtype == torch.float16 and values.dtype != dtype and values.itemsize > 1
    if narrower and not torch.equal(cast.isfinite(), values.isfinite()):
        raise ValueError(
            f"{tensor.file}: {name} reaches {values.abs().max():.3g}, beyond float16; use bf16 or fp32"
        )
    return cast


# --- loading into a module -------------------------------------------------------------------------


@contextmanager
def sized_by(count: int | None) -> Iterator[None]:
    """Build modules on the meta device, and stop where their sizes cannot be those of a file.

    Args:
        count: tensors in the file; None = the sizes are known to be good.

    Raises:
        ValueError: as soon as there are far more parameters, or if the sizes make no network.
    """
    made = 0

    def limit(*_: Any) -> None:
        nonlocal made
        made += 1
        if count is not None and made > _MAX_MISSING + 2 * count:
            raise ValueError(
                f"describes a network of more than {made - 1} tensors, but the file holds {count}"
            )

    hook = nn.modules.module.register_module_parameter_registration_hook(limit)
    try:
        with torch.device("meta"):
            yield
    except (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        raise ValueError(f"sizes that make no network ({' '.join(str(error).split())})") from error
    finally:
        hook.remove()


def load_into(
    build: Callable[[], nn.Module],
    files: Sequence[Path] | Mapping[str, Sequence[Path]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ignore: Sequence[str] = (),
    mapped: bool = True,
) -> nn.Module:
    """Build a module on the meta device and fill it from safetensors files.

    Args:
        build: makes the module.
        files: paths, or name prefix -> paths; the prefix is put before the names in these files.
        device: of the module; "meta" = check the files and read no values.
        dtype: of the parameters; None = as stored. Buffers always stay as stored.
        ignore: prefixes of names that the files may hold and the module may lack.
        mapped: on the CPU, leave tensors that keep their dtype in the file and map them (privately: writing
            to them leaves it). What is replaced soon is better read: a file stays mapped, and counts, until
            the last of its tensors is gone.

    Raises: ValueError, before any weight is read, that lists the missing, unexpected and mis-shaped names.
    """
    groups = files if isinstance(files, Mapping) else {"": files}
    sources = [(prefix, Path(path)) for prefix, paths in groups.items() for path in paths]
    stored = {prefix + key: t for prefix, path in sources for key, t in _read_safetensors(path).items()}
    with sized_by(len(stored)):
        module = build()
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    known = {name: t for name, t in stored.items() if name in wanted or not name.startswith(tuple(ignore))}
    if problems := state_dict_mismatch(wanted, known):
        where = ", ".join(str(path) for _, path in sources)
        raise ValueError(does_not_fit(where, type(module).__name__, problems))

    if torch.device(device).type == "meta":
        return module
    cast = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    state = {}
    for prefix, path in sources:
        with _open_safetensors(path, str(device)) as file:
            for name in (prefix + key for key in file.keys()):  # noqa: SIM118 (not a mapping)
                if name in wanted:
                    target = dtype if name in cast and dtype else stored[name].dtype
                    if torch.device(device).type != "cpu" or (mapped and target == stored[name].dtype):
                        state[name] = file.get_tensor(name.removeprefix(prefix)).to(target)
                    else:  # mapped for as long as the copy takes
                        state[name] = stored[name].read().to(target, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
    rest = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not rest, f"{type(module).__name__} keeps {rest} out of its state dict"
    return module


def does_not_fit(where: str, network: str, problems: Mapping[str, list[str]]) -> str:
    """The message about weights that do not fit.

    Args:
        where: the file or folder.
        network: its name.
        problems: of `state_dict_mismatch`.
    """
    listed = "; ".join(f"{problem}: {some_names(names)}" for problem, names in problems.items())
    return f"{where}: does not fit {network}: {listed}"


def state_dict_mismatch(
    wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor]
) -> dict[str, list[str]]:
    """Kind of problem -> names of tensors that differ from `wanted` (name -> shape); {} if none does."""
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [f"{name} ({t.file.name})" for name, t in tensors.items() if name not in wanted],
        "mis-shaped": [
            f"{name} ({tensors[name].file.name}: {list(tensors[name].shape)} instead of {list(shape)})"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    return {problem: names for problem, names in problems.items() if names}


def some_names(names: Sequence[str]) -> str:
    """The first names and the number of the others, for a message."""
    more = len(names) - _NAMES_IN_ERROR
    return ", ".join(names[:_NAMES_IN_ERROR]) + (f" and {more} more" if more > 0 else "")
