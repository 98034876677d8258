"""What a stranger's file of less than 1 MB may cost: the bounds are 1 GiB and 10 s for every reader."""

import io
import json
import os
import pickle
import resource
import signal
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.weights.files import read_json
from models.weights.loading import read_checkpoint
from moma.app.record import CHUNK, read_record, read_stamp
from moma.data.captions import read_captions, training_caption
from moma.data.shards import read_shard
from moma.evaluate.draw import ResumeFile
from moma.evaluate.protocol import read_official
from moma.inputs.preprocess import open_mask
from moma.training.log import read_log
from tests.fuzz import checked
from tests.fuzz_images import encoded, use
from tests.helpers import MINI, ROOT

BYTES, MEMORY, SECONDS = 1_000_000, 2**30, 10
PIXELS = (9000, 8888)  # what the reader of images takes, nearly


def cost(read: Callable[[], object]) -> tuple[str, float, int]:
    """What became of a reader in a process of its own; its seconds of CPU time and bytes of memory."""
    gets, puts = os.pipe()
    if not (child := os.fork()):
        signal.alarm(20 * SECONDS)
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            said = f"{read()!r:.40}"
        except (ValueError, OSError) as error:
            said = f"refused: {error!s:.200}"
        except BaseException as error:
            said = f"traceback: {error!r:.200}"
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(puts, json.dumps([said, time.process_time() - start, memory]).encode())
        os._exit(0)
    os.close(puts)
    os.waitpid(child, 0)
    with open(gets, "rb") as file:
        text = file.read()
    return tuple(json.loads(text)) if text else ("traceback: killed", 20 * SECONDS, 0)


def image(mode: str) -> Image.Image:
    """A subject in the middle of an image of many pixels."""
    made = Image.new(mode, PIXELS)
    colour = tuple({"R": 200, "A": 255}.get(band, 40) for band in made.getbands())
    made.paste(colour if len(colour) > 1 else 60_000, (2000, 2000, 5000, 6000))
    return made


def profile() -> bytes:
    """sRGB's with another red."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    place = data.find(b"rXYZ", 128)
    start = struct.unpack(">I", data[place + 4 : place + 8])[0]
    data[start + 8 : start + 12] = struct.pack(">i", 60_000)
    return bytes(data)


def scans() -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = encoded(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xc4") : -2]
    return data[:-2] + last * ((BYTES - len(data)) // len(last)) + data[-2:]


def pages(kind: str) -> bytes:
    """An animation of empty frames."""
    frames = [Image.new("P", (40, 40))] * 250
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def texts() -> bytes:
    """Settings and other texts of a PNG that are far larger unpacked."""
    info = PngInfo()
    info.add_itxt(CHUNK, '{"a": [' + "[]," * 300_000 + "[]]}", zip=True)
    for number in range(60):
        info.add_text(f"x{number}", "x" * 1_000_000, zip=True)
    return encoded(Image.new("L", (64, 64)), "PNG", pnginfo=info)


def torch_file(content: object, **options: object) -> bytes:
    torch.save(content, file := io.BytesIO(), **options)
    return file.getvalue()


def colliding(count: int) -> bytes:
    """A torch file with a dict of integers of one hash. Python would take as long to make it."""
    pairs = b"".join(pickle.dumps(n * (2**61 - 1), 2)[2:-1] + b"N" for n in range(20, count))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}(" + pairs + b"u.")
        archive.writestr("a/version", "3")
    return file.getvalue()


def allocating(size: int) -> bytes:
    """A torch file that asks for memory."""
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr(
            "a/data.pkl", b"\x80\x02cbuiltins\nbytearray\n" + pickle.dumps((size,), 2)[2:-1] + b"R."
        )
        archive.writestr("a/version", "3")
    return file.getvalue()


def safetensors(header: dict[str, object], values: bytes = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + values


def entry(*shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 0 if 0 in shape else 4]}


def member(kind: bytes, count: int, size: int = 0) -> bytes:
    """Headers of a tar that each describe the next one, or claim a size."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf() * count + bytes(1024)


def read_all(path: Path) -> object:
    return {name: tensor.read() for name, tensor in read_checkpoint(path).items()}


def clip(path: Path) -> object:
    merges = path.with_name("merges.txt")
    merges.write_text("#version\n" + "a b\n" * 200_000)
    return ClipTokenizer(path, merges, 77).encode("a cat " * 100)


def prompts(path: Path) -> None:
    start = ("--ref", ROOT / "examples" / "cat.png", "--weights", MINI, "--cache", "off", "--num", "1")
    checked(*start, "--out", path.parent / "out", "--prompts", path)


def captioned(path: Path) -> object:
    return [training_caption(text, "cat") for text in read_captions(path, {"a"}).values()]


def official(path: Path) -> object:
    return read_official(path.read_text())


def caption(text: str) -> bytes:
    return json.dumps({"image_id": "a", "caption": text}).encode() + b"\n"


views = (lambda values: {str(n): values for n in range(4500)})(torch.zeros(200_000))
CASES: dict[str, tuple[Callable[[], bytes], Callable[[Path], object]]] = {
    "image: scans": (scans, use),
    "image: pages": (partial(pages, "TIFF"), use),
    "image: texts": (texts, read_record),
    "JSON: lists": (lambda: b"[" + b"[]," * 300_000 + b"[]]", read_json),
    "JSON: deep": (lambda: b"[" * 900_000, read_json),
    "JSON: lists of lists": (lambda: b"[" + b"[" * 60 + b"],[" * 300_000 + b"]" * 61, read_json),
    "safetensors: names": (lambda: safetensors({f"{n:x}": entry(0) for n in range(14_000)}), read_all),
    "safetensors: shape": (lambda: safetensors({"a": entry(*[1] * 400_000)}, bytes(4)), read_all),
    "torch: one storage": (lambda: torch_file(views), read_all),
    "torch: one storage, old": (lambda: torch_file(views, _use_new_zipfile_serialization=False), read_all),
    "torch: one hash": (lambda: colliding(60_000), read_all),
    "torch: memory": (lambda: allocating(10**13), read_all),
    "resume: memory": (lambda: allocating(10**13), lambda path: ResumeFile.open(path, 50)),
    "resume: one storage": (lambda: torch_file(views), lambda path: ResumeFile.open(path, 50)),
    "tar: long names": (lambda: member(b"L", 1900), lambda path: list(read_shard(path))),
    "tar: headers for all": (lambda: member(b"g", 1900), lambda path: list(read_shard(path))),
    "tar: size": (lambda: member(b"x", 1, 8 * 10**9), lambda path: list(read_shard(path))),
    "tokenizer: noise": (lambda: os.urandom(900_000), LlamaTokenizer),
    "tokenizer: merges": (lambda: (MINI / "tokenizers" / "vocab.json").read_bytes(), clip),
    "prompts: lines": (lambda: b"a cat\n" * 150_000, prompts),
    "prompts: one": (lambda: b"a cat" + b"(" * 900_000, prompts),
    "captions: words": (lambda: caption("red and " * 110_000), captioned),
    "captions: signs": (lambda: caption("a-" * 450_000), captioned),
    "protocol": (lambda: b"prompt_list = [\n" + b"'a {0}',\n" * 100_000, official),
    "log": (lambda: b'{"step":1}\n' * 80_000, read_log),
}  # fmt: skip
LARGE: dict[str, tuple[Callable[[], bytes], Callable[[Path], object]]] = {
    "image: RGBA": (lambda: encoded(image("RGBA"), "PNG"), use),
    "image: RGBA with a profile": (lambda: encoded(image("RGBA"), "PNG", icc_profile=profile()), use),
    "image: 32 bits": (lambda: encoded(image("I"), "TIFF", compression="tiff_adobe_deflate"), use),
    "image: JPEG 2000": (lambda: encoded(image("RGBA"), "JPEG2000"), use),
    "image: AVIF": (lambda: encoded(image("RGB"), "AVIF", speed=10), use),
    "mask: 32 bits": (lambda: encoded(image("I"), "TIFF", compression="tiff_adobe_deflate"), open_mask),
    "mask: fractions": (lambda: encoded(image("F"), "TIFF", compression="tiff_adobe_deflate"), open_mask),
    "stamp": (lambda: encoded(image("RGBA"), "PNG"), read_stamp),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_a_small_file_costs_little(case, tmp_path):
    make, read = (CASES | LARGE)[case]
    (path := tmp_path / "file").write_bytes(make())
    assert path.stat().st_size < BYTES
    said, seconds, memory = cost(partial(read, path))
    assert not said.startswith("traceback"), said
    assert seconds < SECONDS and memory < MEMORY, f"{said}: {seconds:.1f} s, {memory / 2**20:.0f} MiB"


def test_costs_are_seen():
    held = cost(lambda: len(bytearray(2**27)) and bytearray(b"x") * 2**27)
    busy = cost(lambda: sum(range(3 * 10**6)))
    assert held[2] > 2**26 and busy[1] > 0.01
    assert cost(lambda: [][0])[0].startswith("traceback")
