"""models/weights/loading.py: exact reading and writing, refusal of hostile and damaged files, bounded
memory."""

import argparse
import collections
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.weights.files import append_text, atomic_write, read_json
from models.weights.loading import (
    ShardConfig,
    check_safetensors,
    finite,
    in_memory,
    load_into,
    pick_weights,
    read_checkpoint,
    write_safetensors,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {str(d).removeprefix("torch."): torch.randn(3, 5, generator=generator).to(d) for d in DTYPES}
    base = torch.randn(40, generator=generator)
    return values | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "slice": base[7:19:3],
        "shares": base[30:],
        "parameter": nn.Parameter(torch.randn(3, generator=generator)),
    }


def assert_same(got: dict, wanted: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].shape == tuple(tensor.shape) and got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].read(), tensor.detach()), name


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_saved(tmp_path: Path, zipped: bool) -> None:
    torch.save(tensors(), tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(tmp_path / "a.bin"), tensors())


def test_reads_what_safetensors_saved(tmp_path: Path) -> None:
    wanted = {name: tensor.detach().clone() for name, tensor in tensors().items()}
    wanted = {name: tensor.contiguous() for name, tensor in wanted.items()}
    save_file(wanted, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_same(read_checkpoint(tmp_path / "a.safetensors"), wanted)


def test_nested_dicts_are_flattened_and_metadata_left_out(tmp_path: Path) -> None:
    content = {
        "state_dict": collections.OrderedDict(tensors()),
        "epoch": 3,
        "loss": np.float64(0.5),
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.99)),
        "sizes": torch.Size([1, 2]),
        "counts": collections.defaultdict(int, {"a": 1}),
        "dtype": torch.float16,
    }
    torch.save(content, tmp_path / "a.ckpt")
    assert_same(read_checkpoint(tmp_path / "a.ckpt"), {f"state_dict.{k}": v for k, v in tensors().items()})


def test_classes_of_training_frameworks_become_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file names a class whose module does not exist here, as with pytorch_lightning's callbacks."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    settings = type("AttributeDict", (dict,), {"__module__": module.__name__})
    module.ModelCheckpoint, module.AttributeDict = kind, settings
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    callback = kind()
    callback.best = torch.ones(2)
    content = {"callbacks": {kind: {"a": 1}, "b": callback}, "hyper_parameters": settings(lr=1e-4)}
    torch.save(content | {"array": np.ones(2), "w": torch.ones(3)}, tmp_path / "a.ckpt")
    monkeypatch.undo()
    assert_same(read_checkpoint(tmp_path / "a.ckpt"), {"w": torch.ones(3)})


def test_reads_the_state_of_a_module(tmp_path: Path) -> None:
    """It is a dict with an attribute, which names the versions of the layers."""
    wanted = build().state_dict()
    torch.save(wanted, tmp_path / "a.bin")
    assert_same(read_checkpoint(tmp_path / "a.bin"), wanted)


def test_a_tensor_is_read_only_when_asked_for(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(5), "b": torch.zeros(5)}, tmp_path / "a.bin")
    found = read_checkpoint(tmp_path / "a.bin")
    (tmp_path / "a.bin").unlink()
    assert found["a"].shape == (5,)
    with pytest.raises(FileNotFoundError):
        found["a"].read()


def test_sharded_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3), "extra": torch.zeros(1)}, tmp_path / "m-00002-of-00002.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    places = '{"weight_map": {"a": "m-00001-of-00002.bin", "b": "m-00002-of-00002.bin"}}'
    index.write_text(places)
    assert_same(read_checkpoint(index), {"a": torch.ones(2), "b": torch.zeros(3)})
    index.write_text(places.replace('"a":', '"lost": "m-00001-of-00002.bin", "a":'))
    with pytest.raises(ValueError, match="lost"):
        read_checkpoint(index)
    index.write_text(places.replace("m-00001", "../m-00001"))
    with pytest.raises(ValueError, match="plain file name"):
        read_checkpoint(index)
    index.write_text(places.replace('"m-00001', '"../m-00002'))  # the same name twice, once outside
    with pytest.raises(ValueError, match="plain file name"):
        read_checkpoint(index)
    index.write_text(places.replace("m-00001", "gone"))
    with pytest.raises(ValueError, match=r"gone-of-00002\.bin"):
        read_checkpoint(index)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        read_checkpoint(index)


def test_pick_weights_prefers_safe_full_and_averaged() -> None:
    stem = "diffusion_pytorch_model"
    order = [
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}.bin",
        f"{stem}.fp16.safetensors",
        f"{stem}.fp16.bin",
        f"{stem}.non_ema.safetensors",
        f"{stem}.non_ema.bin",
    ]
    for i in range(len(order)):
        assert pick_weights(set(order[i:]), (stem,)) == order[i]
    assert pick_weights({"config.json"}, (stem,)) is None


# --- hostile files ------------------------------------------------------------------------------


class Reduces:
    """Pickles as a call of `function` with `args`, which a plain unpickler would make."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def attacks(flag: Path) -> dict[str, object]:
    code = f"open({str(flag)!r}, 'w')"
    return {
        "os.system": Reduces(os.system, f"touch {flag}"),
        "eval": Reduces(eval, code),
        "exec": Reduces(exec, code),
        "import": Reduces(__import__, "os"),
        "subprocess": Reduces(subprocess.call, ["touch", str(flag)]),
        "torch.load": Reduces(torch.load, str(flag)),
        "path": Reduces(Path.touch, flag),
    }


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".th"])
@pytest.mark.parametrize("attack", sorted(attacks(Path("flag"))))
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_run_nothing(tmp_path: Path, suffix: str, attack: str, zipped: bool) -> None:
    flag, path = tmp_path / "flag", tmp_path / f"a{suffix}"
    content = {"state_dict": {"w": torch.ones(2)}, "x": attacks(flag)[attack]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused|not a readable") as e:
        read_checkpoint(path)
    assert "\n" not in str(e.value) and not flag.exists()


def test_the_refusal_names_the_global(tmp_path: Path) -> None:
    torch.save({"x": Reduces(os.system, "true")}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"(posix|os)\.system"):
        read_checkpoint(tmp_path / "a.ckpt")


def zip_with_pickle(path: Path, data: bytes, storage: bytes = b"\0" * 64) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", storage)
    return path


def storage_pickle(rest: bytes, count: int = 16) -> bytes:
    """Protocol 2: _rebuild_tensor_v2(storage 0 of `count` floats, then `rest`)."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + b"K%ctQ" % count
    return b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tRs."


GOOD = b"K\0K\x04\x85K\x01\x85\x89N"  # offset 0, shape (4,), stride (1,), requires_grad, hooks


@pytest.mark.parametrize(
    "data",
    [
        storage_pickle(b"K\0K\x11\x85K\x01\x85\x89N"),  # 17 of 16 floats
        storage_pickle(b"K\x0fK\x04\x85K\x01\x85\x89N"),  # begins at the end
        storage_pickle(b"K\0J\xff\xff\xff\xff\x85K\x01\x85\x89N"),  # negative size
        storage_pickle(GOOD, count=99),  # storage longer than its entry
        storage_pickle(GOOD).replace(b"X\x01\0\0\x000X", b"X\x01\0\0\x007X"),  # no such entry
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\0\0\0aK\x01sb.",  # sets an attribute of a class
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb.",  # ... of a function
        storage_pickle(GOOD)[:-2] + b"}X\x04\0\0\0readK\x01sbs.",  # ... of a tensor
        b"\x80\x02}q\0X\x01\0\0\0ah\0s.",  # a dict within itself
        b"\x80\x02K\x01.",  # no dict
        b"\x80\x02garbage",
    ],
)
def test_malformed_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"a\.ckpt: ") as error:
        read_checkpoint(zip_with_pickle(tmp_path / "a.ckpt", data))
    assert "\n" not in str(error.value)


def test_the_handmade_pickle_is_good_without_its_fault(tmp_path: Path) -> None:
    """Otherwise the test above would pass for any reason."""
    values = torch.arange(16.0)
    path = zip_with_pickle(tmp_path / "a.ckpt", storage_pickle(GOOD), values.numpy().tobytes())
    assert_same(read_checkpoint(path), {"w": values[:4]})


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"w": 1}, 2))
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_other_byte_order_and_other_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(ValueError, match="big-endian"):
        read_checkpoint(tmp_path / "b.bin")
    for odd in (torch.eye(2).to_sparse(), torch.ones(2, device="meta")):
        torch.save({"w": odd}, tmp_path / "c.bin")
        with pytest.raises(ValueError, match=r"c\.bin: w"):
            read_checkpoint(tmp_path / "c.bin")


# --- damaged files ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".old"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"a{suffix}"
    content = {f"w{i}": torch.randn(100) for i in range(20)}
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=suffix == ".bin")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match=str(path)) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_file_cut_after_opening(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "a.safetensors")
    found = read_checkpoint(tmp_path / "a.safetensors")
    with open(tmp_path / "a.safetensors", "r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ValueError, match="truncated"):
        found["w"].read()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        ("a.bin", b"\xef\xbb\xbf \r\n<!DOCTYPE html><html>not found</html>", "HTML"),
        ("a.safetensors", b"<html>", "HTML"),
        ("a.safetensors", b"\x1f\x8b\x08" + b"\0" * 9, "archive"),
        ("a.bin", b"GGUF\x03", "GGUF"),
        ("a.bin", b"hello", r"a\.bin: neither"),
        ("a.bin", b"", "empty"),
        ("a.safetensors", b"\0" * 1000, "zeros"),
        ("a.safetensors", b'{"error": "gated"}', "weight_map"),
        ("a.safetensors", b"\xff" * 100, "damaged or truncated"),
    ],
)
def test_other_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / name)


def test_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"a\.bin"):
        read_checkpoint(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path / "b.bin")


def dicts(leaf: object) -> dict:
    """Four names of one dict, fourteen deep: 2 KB that name 4^14 values."""
    node = leaf
    for _ in range(14):
        node = {str(i): node for i in range(4)}
    return node


class Allocates:
    def __reduce__(self):
        return bytearray, (2**40,)


BOMBS = {
    "references": dicts({}),
    "references to a tensor": dicts(torch.zeros(1)),
    "strides of 0": {"w": torch.zeros(1).expand(10**12)},
    "bytearray": {"w": torch.zeros(1), "x": Allocates()},
    "sparse": {"w": torch.eye(2).to_sparse()},
    "line break": {"w\nx": torch.zeros(1)},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", BOMBS)
def test_small_files_with_large_costs(case: str, zipped: bool, tmp_path: Path) -> None:
    torch.save(BOMBS[case], tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.ckpt: ") as error:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value)


def test_a_compressed_entry_is_not_unpacked(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a/data.pkl", b"x")
        with archive.open(packed_entry("a/byteorder"), "w", force_zip64=True) as file:
            for _ in range(512):
                file.write(bytes(2**20))
    with pytest.raises(ValueError, match="compressed"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_tensor_is_mapped_where_it_lies(tmp_path: Path) -> None:
    count = 2**28  # too large to be read without notice
    sizes = {"odd": ("U8", 3, 0, 3), "wide": ("F32", count, 3, 3 + 4 * count)}  # not aligned
    header = {
        name: {"dtype": d, "shape": [n], "data_offsets": [a, b]} for name, (d, n, a, b) in sizes.items()
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"abc" + np.float32(1.5).tobytes())
        file.truncate(8 + len(text) + 3 + 4 * count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    found = {name: tensor.read() for name, tensor in read_checkpoint(tmp_path / "a.safetensors").items()}
    assert found["odd"].tolist() == [97, 98, 99] and found["wide"][[0, -1]].tolist() == [1.5, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def packed_entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_BZIP2
    return info


def test_an_index_that_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(ValueError, match=r"m\.safetensors\.index\.json"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["m.ckpt", "m.sft", "M.SAFETENSORS", "6ce0161689b3853acaa03779ec93eafe75a02f4c"]
)
def test_content_decides_what_a_file_is(name: str, tmp_path: Path) -> None:
    save_file({key: t.detach().clone().contiguous() for key, t in tensors().items()}, tmp_path / name)
    assert_same(read_checkpoint(tmp_path / name), tensors())
    torch.save(tensors(), tmp_path / "pickle.safetensors")
    assert_same(read_checkpoint(tmp_path / "pickle.safetensors"), tensors())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_name_file_and_tensor(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    values = {"a.weight": torch.ones(3), "b.weight": torch.tensor([1.0, value])}
    save_file({name: t.to(dtype) for name, t in values.items()}, tmp_path / "x.safetensors")
    read = {name: finite(t) for name, t in read_checkpoint(tmp_path / "x.safetensors").items()}
    assert read["a.weight"].read().float().sum() == 3
    with pytest.raises(ValueError, match=r"x\.safetensors: b\.weight"):
        read["b.weight"].read()


# --- writing ------------------------------------------------------------------------------------


def lazy(content: dict[str, torch.Tensor]) -> dict:
    return {name: in_memory(tensor.detach(), Path("memory")) for name, tensor in content.items()}


@pytest.mark.parametrize("limit", [1, 100, 10**9])
def test_written_shards_are_what_safetensors_reads(tmp_path: Path, limit: int) -> None:
    done = []
    hashes = write_safetensors(tmp_path, "net", lazy(tensors()), None, ShardConfig(limit), done.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(hashes)
    merged = {}
    for file, digest in hashes.items():
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == digest
        merged |= load_file(tmp_path / file)
    assert set(merged) == set(tensors())
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors().items())
    assert sum(done) == sum(tensor.nbytes for tensor in tensors().values())
    expected = {1: len([t for t in tensors().values() if t.numel()]), 10**9: 1}
    if limit in expected:
        assert abs(len(hashes) - expected[limit]) <= 1  # an empty tensor joins any shard


def test_dtype_applies_to_floats_only(tmp_path: Path) -> None:
    write_safetensors(tmp_path, "net", lazy(tensors()), torch.bfloat16)
    got = load_file(tmp_path / "net.safetensors")
    for name, tensor in tensors().items():
        wanted = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(got[name], wanted) and got[name].dtype == wanted.dtype, name


def test_float16_overflow_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"big .*7e.04"):
        write_safetensors(tmp_path, "net", lazy({"big": torch.tensor([1.0, 70000.0])}), torch.float16)
    assert not list(tmp_path.iterdir())
    write_safetensors(
        tmp_path, "net", lazy({"nan": torch.tensor([float("inf"), float("nan")])}), torch.float16
    )


def test_atomic_write_replaces_the_whole_file_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with atomic_write(path) as part:
        part.write_text("old")
        assert not path.exists() and part.parent == tmp_path
    with pytest.raises(KeyError), atomic_write(path) as part:
        part.write_text("ne")
        raise KeyError
    assert os.listdir(tmp_path) == ["x.json"] and path.read_text() == "old"
    with atomic_write(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_writers_follow_no_link(tmp_path: Path) -> None:
    """A temporary name is new with each write, and a link under the final name is replaced or refused."""
    elsewhere, path = tmp_path / "precious", tmp_path / "out.txt"
    elsewhere.write_text("kept")
    path.symlink_to(elsewhere)
    with pytest.raises(OSError, match=path.name):
        append_text(path, "more")
    names = set()
    for _ in range(2):
        with atomic_write(path) as part:
            names.add(part)
            assert not part.is_symlink()
    assert len(names) == 2 and not path.is_symlink() and elsewhere.read_text() == "kept"


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": "b\xe2\x80\xa8c"}',
        b'\xef\xbb\xbf{"a":\r\n "b\xe2\x80\xa8c"}',
        '{"a": "b\u2028c"}'.encode("utf-16"),
    ],
)
def test_marks_of_editors_are_no_content(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    assert read_json(tmp_path / "x.json") == {"a": "b\u2028c"}


LIMIT = 2**18  # bytes, in the next test


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b"[" * 65 + b"]" * 65, b'{"a": ', b'{"a": "\xff"}', b"[" + b"1," * LIMIT + b"1]", b""],
)
def test_json_is_bounded(data: bytes, tmp_path: Path) -> None:
    """Too deep, cut short, not UTF-8, too large, empty: one line that names the file."""
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json") as error:
        read_json(tmp_path / "x.json", LIMIT)
    assert "\n" not in str(error.value)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> torch.Tensor:
        raise ValueError("lost")

    content = lazy({"a": torch.ones(3), "b": torch.ones(3)})
    content["b"] = type(content["b"])((3,), torch.float32, Path("x"), fail)
    with pytest.raises(ValueError, match="lost"):
        write_safetensors(tmp_path, "net", content)
    assert not list(tmp_path.iterdir())


# --- loading into a module ----------------------------------------------------------------------


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def file_of(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    state = build().state_dict()
    for name, value in changes.items():
        state[name.replace("_", ".", 1)] = value
    save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_load_into(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    module, wanted = load_into(build, [path]), load_file(path)
    assert {name: value.dtype for name, value in module.state_dict().items()} == dict.fromkeys(
        wanted, torch.float32
    )
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())
    half = load_into(build, [path], dtype=torch.bfloat16)
    assert all(torch.equal(v, wanted[n].bfloat16()) for n, v in half.state_dict().items())


def test_load_into_reports_every_kind_of_misfit(tmp_path: Path) -> None:
    path = file_of(tmp_path, **{"0_weight": torch.ones(4, 3), "1_bias": None, "2_other": torch.ones(1)})
    with pytest.raises(ValueError) as error:
        load_into(build, [path])
    message = str(error.value)
    assert "missing: 1.bias" in message and "unexpected: 2.other (a.safetensors)" in message
    assert "mis-shaped: 0.weight (a.safetensors: [4, 3] instead of [3, 4])" in message
    assert str(path) in message and "\n" not in message and "missing: 0.weight" not in message


def test_load_into_ignores_only_what_it_is_told(tmp_path: Path) -> None:
    path = file_of(tmp_path, **{"2_other": torch.ones(1)})
    load_into(build, [path], ignore=("2.",))
    with pytest.raises(ValueError, match="unexpected"):
        load_into(build, [path], ignore=("3.",))


def test_load_into_with_prefixes(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 4), "bias": torch.zeros(3)}, tmp_path / "linear.safetensors")
    save_file({"1.weight": torch.ones(3), "1.bias": torch.ones(3)}, tmp_path / "norm.safetensors")
    groups = {"0.": [tmp_path / "linear.safetensors"], "": [tmp_path / "norm.safetensors"]}
    assert load_into(build, groups)[0].weight.sum() == 12


def test_changing_loaded_weights_leaves_the_file(tmp_path: Path) -> None:
    path = file_of(tmp_path)
    before = path.read_bytes()
    module = load_into(build, [path])
    with torch.no_grad():
        module[0].weight.zero_()
    assert path.read_bytes() == before


def test_check_safetensors(tmp_path: Path) -> None:
    check_safetensors(file_of(tmp_path))
    with pytest.raises(ValueError, match="no such file"):
        check_safetensors(tmp_path / "b.safetensors")


# --- memory -------------------------------------------------------------------------------------

MEMORY = """
    import sys
    from pathlib import Path
    import torch
    from models.weights.loading import load_into, read_checkpoint, write_safetensors

    def status(field):
        line = next(x for x in open("/proc/self/status") if x.startswith(field))
        return int(line.split()[1]) / 1024

    folder = Path(sys.argv[1])
    def build():
        return torch.nn.ModuleDict(
            {f"l{i}": torch.nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for i in range(40)}
        )
    start = status("VmHWM")
    write_safetensors(folder, "out", read_checkpoint(folder / "in.ckpt"), torch.bfloat16)
    converted = status("VmHWM") - start
    before = status("RssAnon")
    module = load_into(build, [folder / "out.safetensors"])
    assert sum(p.numel() for p in module.parameters()) == 40 * 2048 * 2048
    print(converted, status("RssAnon") - before)
"""


@pytest.mark.slow  # a process of its own
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_by_a_tensor_not_by_the_file(tmp_path: Path) -> None:
    """A 320 MiB checkpoint of 8 MiB tensors: converted in a few tensors' memory, loaded without a copy."""
    torch.save(
        {f"l{i}.weight": torch.zeros(2048, 2048, dtype=torch.float16) for i in range(40)},
        tmp_path / "in.ckpt",
    )
    root = Path(__file__).parent.parent
    script = textwrap.dedent(MEMORY)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    converted, loaded = (float(x) for x in run.stdout.split())
    assert converted < 160, "MiB above the start while converting 320 MiB"
    assert loaded < 30, "MiB of memory of its own after loading 320 MiB"
