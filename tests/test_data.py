"""Training data: both sources, damaged samples, the stream's order and positions, the shard writer."""

import errno
import io
import json
import os
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moma.data.shards import Other, ReadConfig, ShardWriter, read_shard
from moma.data.stream import Item, KeptBack, StreamConfig, batches, once, skipped_so_far, stream
from moma.data.triplets import ShardSource, SkipLog, Source, Triplet, load, open_source
from tests import recipe

SIZE = (40, 32)
CFG = StreamConfig(seed=5, lanes=4, window=3)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(i: int) -> Image.Image:
    """Plain, so that JPEG keeps it: sample i shows brightness i."""
    return Image.new("RGB", SIZE, (i, i, i))


MASK = Image.new("L", SIZE)
MASK.paste(255, (10, 8, 30, 24))
MASK_PNG = encoded(MASK)
JPEGS = [encoded(grey(i), "JPEG") for i in range(64)]


def number(triplet: Triplet) -> int:
    """The transform of most tests: identifies a sample by its image, not by its name."""
    return int(np.asarray(triplet.image).mean().round())


def write_shards(folder: Path, counts: list[int]) -> Path:
    """Shards with these counts of samples, numbered throughout."""
    i = 0
    for count in counts:
        with ShardWriter(folder, max(count, 1)) as shards:
            for _ in range(count):
                shards.add(f"{i:03d}", JPEGS[i], "jpg", MASK_PNG, "cat", f"a cat, number {i}")
                i += 1
    return folder


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mask.png").write_bytes(MASK_PNG)
    lines = []
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(JPEGS[i])
        lines.append({"image": f"{i}.jpg", "mask": "mask.png", "label": "cat", "caption": f"cat {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def texts(caption: object = "a cat", label: object = "cat") -> bytes:
    return json.dumps({"label": label, "caption": caption}).encode()


def good(key: str, i: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", JPEGS[i]), (f"{key}.mask.png", MASK_PNG), (f"{key}.json", texts())]


def take(items: Iterator[Item], count: int) -> list[tuple[int, int]]:
    return [(item.number, item.sample) for item in islice(items, count)]


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> Source:
    """26 samples in six uneven shards."""
    return open_source(write_shards(tmp_path_factory.mktemp("six"), [4, 7, 1, 5, 6, 3]))


# --- sources -----------------------------------------------------------------------------------------


def test_triplet_of_a_folder(tmp_path):
    write_folder(tmp_path, 1)
    photo = Image.fromarray(recipe.u8("photo", (60, 80, 3)))
    (tmp_path / "sub").mkdir()
    photo.save(tmp_path / "sub" / "photo.png")
    line = {
        "image": "0.jpg", "mask": "mask.png", "label": "red cat", "caption": "Two red cats", "key": "k",
        "reference_image": "sub/photo.png", "reference_mask": "mask.png",
    }  # fmt: skip
    large = Image.new("L", (80, 64))
    large.paste(200, (20, 16, 60, 48))
    large.save(tmp_path / "mask.png")
    photo.resize((80, 64)).save(tmp_path / "sub" / "photo.png")
    (tmp_path / "metadata.jsonl").write_text(f"\n{json.dumps(line)}\n")
    (item,) = once(open_source(tmp_path))
    triplet = item.sample
    assert (triplet.key, triplet.label, triplet.caption) == ("k", "red cat", "Two red cats")
    assert triplet.image.mode == "RGB" and triplet.image.size == triplet.mask.size == SIZE
    expected = np.where(np.asarray(MASK) > 0, 200, 0)  # nearest: no value in between
    assert triplet.mask.mode == "L" and np.array_equal(np.asarray(triplet.mask), expected)
    image, mask = triplet.reference
    assert np.array_equal(np.asarray(image), np.asarray(photo.resize((80, 64))))
    assert np.array_equal(np.asarray(mask), np.asarray(large))


def test_triplet_of_a_shard(tmp_path):
    """Members in any order and in folders, beside others; transparency becomes white; EXIF rotation."""
    clear = Image.new("RGBA", SIZE, (9, 9, 9, 0))
    lossless = encoded(grey(7), "WEBP", lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    members = [
        ("d/a.json", texts()), ("d/a.refmask.png", MASK_PNG), ("d/a.mask.png", MASK_PNG), ("d/._a.jpg", b"x"),
        ("d/a.txt", b"x"), ("d/a.PNG", encoded(clear)), ("d/a.ref.webp", lossless),
        ("e/a.jpg", encoded(grey(9), "JPEG", exif=turned)), ("e/a.json", texts()),
        ("e/a.mask.png", encoded(MASK.transpose(Image.Transpose.ROTATE_270))),
    ]  # fmt: skip
    first, second = (item.sample for item in once(open_source(write_tar(tmp_path / "x.tar", members))))
    assert (first.key, second.key) == ("x.tar:d/a", "x.tar:e/a")
    assert np.asarray(first.image).min() == 255 and np.asarray(first.reference[0]).max() == 7
    assert second.reference is None and second.image.size == second.mask.size == SIZE[::-1]


def test_a_shard_is_read_without_seeking(tmp_path, six):
    """From a pipe."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = six.paths[1].read_bytes()
    thread = threading.Thread(target=lambda: pipe.write_bytes(content))
    thread.start()
    keys = [raw.key for raw in open_source(pipe).read(0)]
    thread.join()
    assert keys == [f"pipe:{i:03d}" for i in range(4, 11)]


def test_ways_to_name_shards(six):
    folder = six.paths[0].parent
    names = [f"{i:05d}.tar" for i in range(6)]
    assert six.shards == names
    assert open_source(f"{folder}/*.tar").shards == names
    assert open_source([str(path) for path in reversed(six.paths)]).shards == names
    assert open_source(six.paths[2]).shards == names[2:3]
    assert open_source(f"{folder.parent}/*0/0000[01].tar").shards == ["00000.tar", "00001.tar"]


def test_refused_places(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "metadata.jsonl").write_text("\n \n")
    both = write_folder(tmp_path / "both", 1)
    (both / "0.tar").touch()
    (tmp_path / "x.zip").touch()
    cases = {
        "gone": "no such file", "gone.tar": "no such file", "empty": "neither metadata.jsonl nor",
        "*.tar": "no file matches", "blank": "is empty", "both": "keep one",
        "x.zip": "expected a tar shard",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            open_source(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError):
        open_source([])


def test_fingerprint_notices_what_changes_in_place(tmp_path):
    """Images exchanged, one byte of the same size, a file that goes or comes; not a copy elsewhere."""
    for name, source in (
        ("folder", open_source(write_folder(tmp_path / "folder", 3))),
        ("shards", open_source(write_shards(tmp_path / "shards", [2, 3]))),
    ):
        names = source.shards if name == "shards" else ("0.jpg", "1.jpg")
        files = [tmp_path / name / file for file in names]
        first, digests = source.fingerprint(), source.digests(0, 2)
        contents = [file.read_bytes() for file in files]
        swapped = contents[::-1]
        middle = len(contents[0]) // 2
        other = bytes([contents[0][middle] ^ 1])
        flipped = [contents[0][:middle] + other + contents[0][middle + 1 :], contents[1]]
        for changed in (swapped, flipped, [None, contents[1]]):
            for file, content in zip(files, changed, strict=True):
                file.unlink() if content is None else file.write_bytes(content)
            assert source.fingerprint() != first and source.digests(0, 2)[0] != digests[0], name
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
            assert source.fingerprint() == first and source.digests(0, 2) == digests
            assert source.names() == open_source(tmp_path / name).names()
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-copy")
        assert open_source(tmp_path / f"{name}-copy").fingerprint() == first


def test_unchanged_files_are_hashed_once(tmp_path, monkeypatch):
    write_folder(tmp_path, 3)
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))  # long ago: it does not change in this moment
    first = open_source(tmp_path).fingerprint()
    monkeypatch.setattr("hashlib.file_digest", lambda *args: pytest.fail("read again"))
    assert open_source(tmp_path).fingerprint() == first


def test_fingerprint(tmp_path, six):
    folder = write_folder(tmp_path / "a", 3)
    first = open_source(folder).fingerprint()
    assert open_source(write_folder(tmp_path / "b", 3)).fingerprint() == first
    assert open_source(write_folder(tmp_path / "b", 4)).fingerprint() != first
    again = open_source(write_shards(tmp_path / "six", [4, 7, 1, 5, 6, 3]))
    assert again.fingerprint() == six.fingerprint()
    again.paths[0].rename(again.paths[0].with_name("x.tar"))
    renamed = open_source(tmp_path / "six")
    assert renamed.fingerprint() != six.fingerprint()
    with (tmp_path / "six" / "x.tar").open("ab") as file:
        file.write(b"\0")
    assert renamed.fingerprint() != open_source(tmp_path / "six" / "00001.tar").fingerprint()
    assert open_source(tmp_path / "six").fingerprint() == renamed.fingerprint()  # asks the disk each time


# --- damaged samples ---------------------------------------------------------------------------------

HUGE = encoded(Image.new("1", (9000, 9000)))  # a small file with 81 megapixels
BOMB = encoded(Image.new("1", (14000, 14000)))  # PIL refuses it
DAMAGED: dict[str, tuple[dict[str, bytes | None], str]] = {
    "cut": ({"jpg": JPEGS[1][: len(JPEGS[1]) // 2 + 100]}, "image is broken or cut off"),
    "text": ({"jpg": b"hello"}, "image is not an image"),
    "gif": ({"jpg": encoded(grey(1), "GIF")}, "image is not an image"),
    "noimage": ({"jpg": None}, "image is missing"),
    "nomask": ({"mask.png": None}, "mask is missing"),
    "nojson": ({"json": None}, "json is missing"),
    "badjson": ({"json": b'{"label": "cat"'}, "its JSON: "),
    "latin": ({"json": b'{"label": "\xe9"}'}, "its JSON: "),
    "deep": ({"json": b"[" * 100_000}, "its JSON: "),
    "list": ({"json": b"[1]"}, "JSON is not an object"),
    "nolabel": ({"json": texts(label=" ")}, "label is ' '"),
    "nocaption": ({"json": texts(None)}, "caption is None"),
    "other": ({"json": texts("a dog")}, "does not name the subject 'cat'"),
    "emptymask": ({"mask.png": encoded(Image.new("L", SIZE, 127))}, "mask is empty"),
    "shape": ({"mask.png": encoded(MASK.resize((40, 40)))}, "expected one shape"),
    "badmask": ({"mask.png": MASK_PNG[:60]}, "mask is broken"),
    "tiny": ({"jpg": encoded(grey(1).resize((31, 31)))}, "31x31 pixels"),
    "huge": ({"jpg": HUGE}, "9000x9000 pixels"),
    "bomb": ({"jpg": BOMB}, "80,000,000"),
    "deepgrey": ({"jpg": encoded(Image.new("I;16", SIZE))}, "16-bit"),
    "twice": ({"png": JPEGS[1]}, "two files for its image"),
    "halfref": ({"ref.jpg": JPEGS[1]}, "mask of the reference is missing"),
    "badref": ({"ref.jpg": b"x", "refmask.png": MASK_PNG}, "reference's image is not an image"),
    "large": ({"jpg": b"0" * 120_000}, "120,000 bytes"),
}  # fmt: skip


def test_damaged_samples_of_shards(tmp_path):
    """Each kind is skipped, counted and reported; its neighbours are delivered."""
    members, expected = [], {}
    for i, (name, (files, reason)) in enumerate(DAMAGED.items()):
        whole = {"jpg": JPEGS[i], "mask.png": MASK_PNG, "json": texts()}
        members += good(f"before-{name}", i)
        members += [(f"{name}.{s}", c) for s, c in (whole | files).items() if c is not None]
        expected[f"x.tar:{name}"] = reason
    told: list[str] = []
    source = ShardSource([write_tar(tmp_path / "x.tar", members)], ReadConfig(file_bytes=119_999))
    skips = SkipLog(told.append)
    items = list(once(source, transform=number, skips=skips))
    assert [item.sample for item in items] == list(range(len(DAMAGED)))
    assert [item.number for item in items] == list(range(0, 2 * len(DAMAGED), 2))
    assert set(skips.reasons) == set(expected) and skips.total == len(expected) == len(told)
    for key, reason in expected.items():
        assert reason in skips.reasons[key], (key, skips.reasons[key])
        assert any(key in line and skips.reasons[key] in line and "\n" not in line for line in told)
    assert [key for item in items for key, _ in item.skipped] == list(expected)[:-1]  # none follows
    # The endless stream in a worker: the same reasons, reported once, counted every time.
    told.clear()
    again = SkipLog(told.append)
    rounds = 3 * len(DAMAGED)
    one = replace(CFG, lanes=1)
    got = take(stream(source, one, workers=1, transform=number, skips=again), rounds)
    assert Counter(sample for _, sample in got) == Counter({i: 3 for i in range(len(DAMAGED))})
    assert again.reasons == skips.reasons and len(told) == len(expected)
    assert 2 * len(expected) <= again.total <= 3 * len(expected)


def test_damaged_samples_of_folders(tmp_path):
    write_folder(tmp_path, 3)
    line = {"image": "0.jpg", "mask": "mask.png", "label": "cat", "caption": "cat"}
    cases: list[tuple[dict | bytes, str]] = [
        (b"{oops", "its JSON: "),
        (line | {"image": "gone.jpg"}, "'gone.jpg' is missing"),
        (line | {"image": "../0.jpg"}, "leaves the folder"),
        (line | {"image": "a/../../0.jpg"}, "leaves the folder"),
        (line | {"image": str(tmp_path / "0.jpg")}, "leaves the folder"),
        (line | {"image": 3}, "path 3 leaves"),
        (line | {"image": "."}, "missing"),
        (line | {"image": "0" * 5000}, "too long"),
        (line | {"reference_mask": "mask.png"}, "its reference is missing"),
        ({"image": "0.jpg", "label": "cat", "caption": "cat"}, "its mask is missing"),
        (line | {"key": 3}, "key is 3"),
    ]
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item, _ in cases]
    keyed = json.dumps(line | {"key": "k"}).encode()
    with (tmp_path / "metadata.jsonl").open("ab") as file:
        file.write(b"\n".join([*lines, keyed, keyed]))
    skips = SkipLog([].append)
    items = list(once(open_source(tmp_path), skips=skips))
    assert [item.key for item in items] == [f"metadata.jsonl:{i}" for i in (1, 2, 3)] + ["k"]
    reasons = [reason for _, reason in cases] + ["'k' came before"]
    assert list(skips.reasons) == [f"metadata.jsonl:{i}" for i in [*range(4, 15), 16]]
    for found, reason in zip(skips.reasons.values(), reasons, strict=True):
        assert reason in found, (found, reason)


def test_shards_that_break(tmp_path):
    """Cut off anywhere, overwritten, emptied or missing: what precedes is delivered, the loss reported."""
    whole = write_tar(tmp_path / "x.tar", [m for i in range(3) for m in good(str(i), i)]).read_bytes()
    end = len(whole.rstrip(b"\0"))
    blocks = [i for i in range(0, end, 512) if whole[i + 257 : i + 262] == b"ustar"]
    assert len(blocks) == 9
    cuts = {blocks[3] + 100: 0, blocks[3]: 0, blocks[4] + 512: 1, blocks[5]: 1, blocks[8] + 500: 2, 0: 0}
    for cut, complete in cuts.items():
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        raws = list(read_shard(tmp_path / "x.tar"))
        assert [raw.fault is None for raw in raws] == [True] * complete + [False], cut
        assert raws[-1].key == (str(complete) if cut else "") and "cut off or damaged" in raws[-1].fault
        assert raws[-1].rest
    # Overwritten: from a header of a sample on, from its first one, all of it, up to the end.
    for first, last, lost in ((4, 5, 1), (3, 4, 1), (3, 6, 1), (0, 1, 1), (5, 7, 2), (8, 9, 1)):
        start, stop = blocks[first], [*blocks, end][last]
        (tmp_path / "x.tar").write_bytes(whole[:start] + b"x" * (stop - start) + whole[stop:])
        source = open_source(tmp_path / "x.tar")
        items, skips = list(once(source, transform=number, skips=SkipLog([].append))), SkipLog([].append)
        assert len(items) == 3 - lost, (first, last)
        list(once(source, transform=number, skips=skips))
        assert skips.total == lost, (first, last, skips.reasons)
    write_tar(tmp_path / "y.tar", good("y", 40))
    source, skips = open_source(tmp_path), SkipLog([].append)
    (tmp_path / "x.tar").unlink()
    assert [item.sample for item in once(source, transform=number, skips=skips)] == [40]
    assert list(skips.reasons) == ["x.tar:"] and "No such file" in skips.reasons["x.tar:"]


def sparse(name: str, size: int) -> bytes:
    """A member of one header whose content is a hole."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for place in (386, 483):  # the length of the hole, the size of the file
        head[place : place + 12] = b"%011o\0" % size
    head[398:410], head[482], head[148:156] = b"%011o\0" % 0, 0, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def test_holes_are_not_filled(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"".join(sparse(f"{i}.jpg", 2**26) for i in range(9)) + bytes(1024))
    raws = list(open_source(tmp_path / "x.tar").read(0))
    assert len(raws) == 9 and all("holes" in raw.fault and raw.nbytes == 0 for raw in raws)


def test_links_of_a_shard_are_not_followed(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEGS[0])
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "s.jpg"), (tarfile.LNKTYPE, "h.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, f"{tmp_path}/a.jpg"
            archive.addfile(info)
    assert list(read_shard(tmp_path / "x.tar")) == []


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_a_fault_that_passes_is_tried_again(tmp_path, monkeypatch, kind):
    """A disk or network fails some reads: all samples come, once each. A lasting fault is not waited for."""
    source = open_source(write_folder(tmp_path, 4) if kind == "folder" else write_shards(tmp_path, [4]))
    source.cfg = ReadConfig(pause=0.001, buffer_bytes=2048)
    if kind == "shard":
        opened, real = [], Path.open

        class Failing(io.FileIO):
            def read(self, size: int = -1) -> bytes:
                if self.tell() >= 4096 * len(opened):
                    raise OSError(errno.EIO, "fault")
                return super().read(size)

        def failing(path: Path, *args: object, **options: object) -> object:
            opened.append(path)
            return Failing(path) if len(opened) in (1, 2) else real(path, *args, **options)

        monkeypatch.setattr(Path, "open", failing)
    else:
        real_read, calls = Path.read_bytes, []

        def read_bytes(path: Path) -> bytes:
            calls.append(path)
            if len(calls) % 3:
                raise OSError(errno.EIO, "fault")
            return real_read(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
    skips = SkipLog([].append)
    assert [item.sample for item in once(source, transform=number, skips=skips)] == [0, 1, 2, 3]
    assert not skips.total


def test_nothing_usable(tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "mask.png").unlink()
    source = open_source(tmp_path)
    for items in (
        once(source, skips=SkipLog([].append)),
        stream(source, CFG),
        stream(source, CFG, workers=2),
    ):
        with pytest.raises(ValueError, match=r"mask\.png") as error:
            next(items)
        assert "\n" not in str(error.value)
    (tmp_path / "mask.png").write_bytes(MASK_PNG)

    def fails(triplet: Triplet) -> None:
        raise OSError(f"no use for\n{triplet.key}")

    with pytest.raises(ValueError, match="metadata"):
        next(stream(source, CFG, transform=fails))


def test_transform_refuses(six):
    def odd(triplet: Triplet) -> int:
        if (i := number(triplet)) % 2 == 0:
            raise ValueError("even")
        return i

    skips = SkipLog([].append)
    assert [item.sample for item in once(six, transform=odd, skips=skips)] == list(range(1, 26, 2))
    assert skips.total == 13 and set(skips.reasons.values()) == {"even"}


def test_warns_by_default(tmp_path):
    write_tar(tmp_path / "x.tar", [*good("a", 1), ("b.jpg", b"")])
    with pytest.warns(UserWarning, match=r"'x.tar:b'"):
        assert len(list(once(open_source(tmp_path)))) == 1


# --- order -------------------------------------------------------------------------------------------


def test_once_goes_by_the_files(six):
    assert [item.sample for item in once(six, transform=number)] == list(range(26))


@pytest.mark.parametrize("counts", [[3] * 8, [6] * 4, [12] * 2, [24]])
def test_an_epoch_holds_everything_once(tmp_path, counts):
    """More shards than lanes, as many, fewer; then other epochs in other orders."""
    got = take(stream(open_source(write_shards(tmp_path, counts)), CFG, transform=number), 72)
    assert [n for n, _ in got] == list(range(72))
    epochs = [[sample for _, sample in got[i : i + 24]] for i in (0, 24, 48)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, sorted(epochs[0])]}) == 4


def test_lanes_have_their_own_epochs(tmp_path):
    """Three samples for four lanes: all of them recur, about equally often."""
    got = take(stream(open_source(write_folder(tmp_path, 3)), CFG, transform=number), 120)
    counts = Counter(sample for _, sample in got)
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 20


def test_windows_are_shuffled(tmp_path):
    """In one lane, samples move within their window only."""
    source = open_source(write_folder(tmp_path, 12))
    got = [s for _, s in take(stream(source, StreamConfig(1, lanes=1, window=4), transform=number), 24)]
    windows = [got[i : i + 4] for i in range(0, 24, 4)]
    assert [sorted(window) for window in windows] == 2 * [list(range(i, i + 4)) for i in (0, 4, 8)]
    assert len({tuple(i % 4 for i in window) for window in windows}) > 2
    assert got[:12] != got[12:]


def test_seed(six):
    orders = [take(stream(six, replace(CFG, seed=seed), transform=number), 26) for seed in (5, 6, 2**70)]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(
    ("world", "workers"),
    [(1, 2), (2, 0), (2, 2), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((1, 1), (1, 4), (4, 1)))],
)
def test_ranks_and_workers_change_nothing(six, world, workers):
    expected = take(stream(six, CFG, transform=number), 60)
    for rank in range(world):
        got = take(stream(six, CFG, rank, world, workers, transform=number), 60 // world)
        assert got == expected[rank::world]


def test_the_global_generator_is_left_alone(six):
    before = torch.get_rng_state()
    take(stream(six, CFG, workers=1, transform=number), 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:4 lanes")
@pytest.mark.parametrize(
    ("world", "workers"),
    [(3, 0), (8, 0), (2, 3), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((6, 0), (5, 2), (16, 1)))],
)
def test_more_ranks_than_lanes(six, world, workers):
    """Or such as do not divide them: the same samples, and the same ones after a continuation by others."""
    expected = take(stream(six, CFG, transform=number), 96)
    items = []
    for rank in range(world):
        items += islice(stream(six, CFG, rank, world, workers, transform=number), 2)
        assert [(i.number, i.sample) for i in items[-2:]] == expected[rank : 2 * world : world]
    position = {}
    for item in sorted(items, key=lambda item: item.number):
        position |= item.position
    for other in (1, 4, world, 2 * world):
        rests = [stream(six, CFG, rank, other, 0, position, number) for rank in range(other)]
        got = sorted(pair for rest in rests for pair in take(rest, 2))
        assert got == expected[2 * world : 2 * world + 2 * other]


def test_sharing_a_lane_is_told(six):
    with pytest.warns(UserWarning, match=r"4 lanes for 24 readers.* 6 times"):
        next(stream(six, CFG, 0, 8, 3))


@pytest.mark.parametrize(("rank", "world"), [(4, 4), (-1, 2)])
def test_ranks_are_counted_from_0(six, rank, world):
    with pytest.raises(ValueError, match=f"rank {rank}"):
        stream(six, CFG, rank, world)


def test_a_window_in_little_memory(six):
    """Samples that wait on the disk come in the same order, and so after a continuation."""
    expected = list(islice(stream(six, CFG, transform=number), 40))
    for limit in (0, 2000):
        small = replace(CFG, window_bytes=limit)
        assert take(stream(six, small, transform=number), 40) == [(i.number, i.sample) for i in expected]
        position = {}
        for item in expected[:9]:
            position |= item.position
        rest = stream(six, small, start=position, transform=number)
        assert take(rest, 4) == [(i.number, i.sample) for i in expected[9:13]]


def test_too_many_skipped(tmp_path):
    """The stream ends with one line that names the field; few may be missing anywhere."""
    source = open_source(write_folder(tmp_path, 20))
    for i in range(4):
        (tmp_path / f"{i}.jpg").unlink()
    told: list[str] = []
    with pytest.raises(ValueError, match=r"max_skipped 0\.1") as error:
        list(islice(stream(source, CFG, skips=SkipLog(told.append, limit=0.1)), 400))
    assert "\n" not in str(error.value) and len(told) == 4
    list(islice(stream(source, CFG, skips=SkipLog(told.append, limit=0.25)), 400))
    items = list(islice(stream(source, CFG, skips=SkipLog(told.append)), 160))
    position = {}
    for item in items:
        position |= item.position
    lost, read = skipped_so_far(position)
    assert lost == sum(len(item.skipped) for item in items) > 20 and read == 160 + lost


def test_kept_back_samples_are_no_skipped_ones(six):
    def odd(triplet: Triplet) -> int:
        if (i := number(triplet)) % 2 == 0:
            raise KeptBack
        return i

    skips, position = SkipLog([].append, limit=0.0, slack=0), {}
    for item in islice(stream(six, CFG, transform=odd, skips=skips), 30):
        position |= item.position
    assert skips.total == 0 and skipped_so_far(position)[0] == 0


# --- positions ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Source:
    """20 samples in three shards, every third broken."""
    folder = tmp_path_factory.mktemp("spoilt")
    for name, numbers in {"a": range(3), "b": range(3, 14), "c": range(14, 20)}.items():
        members = [m for i in numbers for m in (good(f"{i}", i) if i % 3 else [(f"{i}.jpg", b"")])]
        write_tar(folder / f"{name}.tar", members)
    return open_source(folder)


def run(
    source: Source, start: dict[str, int], world: int, size: int, steps: int, workers: int = 0
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """`steps` batches on all ranks: the samples, sorted, and the merged position, through JSON."""
    got, united = [], dict(start)
    for rank in range(world):
        items = stream(source, CFG, rank, world, workers, start, number, SkipLog([].append))
        position = start
        for batch, position in islice(batches(items, size, start), steps):  # noqa: B007
            got += [(item.number, item.sample) for item in batch]
        united = {key: max(united.get(key, 0), position.get(key, 0)) for key in united | position}
    return sorted(got), json.loads(json.dumps(united))


@pytest.mark.parametrize("name", ["six", "spoilt"])
def test_resume_anywhere(name, request):
    """After every single sample of more than two epochs."""
    source = request.getfixturevalue(name)
    items = list(islice(stream(source, CFG, transform=number, skips=SkipLog([].append)), 70))
    position: dict[str, int] = {}
    for i, item in enumerate(items[:-6]):
        position |= item.position
        rest = stream(source, CFG, start=position, transform=number, skips=SkipLog([].append))
        following = list(islice(rest, 6))
        assert [(x.number, x.sample, x.position) for x in following] == [
            (x.number, x.sample, x.position) for x in items[i + 1 : i + 7]
        ]


@pytest.mark.parametrize(
    "steps", [(3, 2), *(pytest.param(n, marks=pytest.mark.slow) for n in ((2, 4), (4, 4)))]
)
def test_resume_with_other_ranks_and_workers(spoilt, steps):
    """Two ranks, then one, then four, then two with workers: the samples of one uninterrupted process."""
    expected, _ = run(spoilt, {}, 1, 1, 64)
    got: list[tuple[int, int]] = []
    position: dict[str, int] = {}
    for world, size, count, workers in ((2, 3, steps[0], 0), (1, 5, steps[1], 2), (4, 1, 3, 0), (2, 1, 2, 2)):
        part, position = run(spoilt, position, world, size, count, workers)
        got += part
    assert got == expected[: len(got)] and len(got) > 40


def test_refused_positions(six, spoilt):
    _, position = run(six, {}, 1, 1, 10)
    for source, cfg in ((spoilt, CFG), (six, replace(CFG, seed=6)), (six, replace(CFG, window=4))):
        with pytest.raises(ValueError, match="position"):
            stream(source, cfg, start=position)
    (_, alone), *_ = batches(islice(stream(six, CFG, 0, 2), 6), 6, {})
    with pytest.raises(ValueError, match="lanes"):
        stream(six, CFG, start=alone)
    assert next(stream(six, CFG, 0, 2, start=alone)).number == 12


def test_resume_reads_on_without_decoding(tmp_path, monkeypatch):
    """Windows before the position are not decoded."""
    source = open_source(write_shards(tmp_path, [40]))
    opened: list[str] = []
    monkeypatch.setattr(
        "moma.data.stream.load",
        lambda source, raw, limits: opened.append(raw.key) or load(source, raw, limits),
    )
    cfg = replace(CFG, lanes=1)
    (_, position), *_ = batches(islice(stream(source, cfg), 20), 20, {})
    opened.clear()
    next(stream(source, cfg, start=position))
    assert len(opened) == 1


# --- several subjects --------------------------------------------------------------------------------


def corner(left: int) -> bytes:
    """A mask of eight columns."""
    mask = Image.new("L", SIZE)
    mask.paste(255, (left, 0, left + 8, 32))
    return encoded(mask)


def check_pair(triplet: Triplet) -> None:
    """Of the sample that both tests below write."""
    (other,) = triplet.others
    assert [one.label for one in (triplet, other)] == ["cat", "cat"]
    assert [one.caption[: one.end] for one in (triplet, other)] == [
        "a white cat and a black cat",
        "a white cat",
    ]
    lefts = [int(np.asarray(one.mask).any(axis=0).argmax()) for one in (triplet, other)]
    assert lefts == [16, 0] and triplet.reference is None
    assert np.asarray(other.reference[0]).max() == 3 and np.asarray(other.image).max() == 9


def test_subjects_of_a_shard(tmp_path):
    with ShardWriter(tmp_path) as shards:
        other = Other(corner(0), "cat", 11, (encoded(grey(3)), MASK_PNG))
        caption = "a white cat and a black cat"
        shards.add("a", encoded(grey(9)), "png", corner(16), "cat", caption, {"end": 27}, None, [other])
    (item,) = once(open_source(tmp_path))
    check_pair(item.sample)


def test_subjects_of_a_folder(tmp_path):
    for name, content in {
        "image": encoded(grey(9)), "0": corner(0), "16": corner(16), "r": encoded(grey(3)), "m": MASK_PNG
    }.items():  # fmt: skip
        (tmp_path / f"{name}.png").write_bytes(content)
    other = {
        "mask": "0.png",
        "label": "cat",
        "end": 11,
        "reference_image": "r.png",
        "reference_mask": "m.png",
    }
    line = {"image": "image.png", "mask": "16.png", "label": "cat", "end": 27, "others": [other],
            "caption": "a white cat and a black cat"}  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (item,) = once(open_source(tmp_path))
    check_pair(item.sample)
    before = open_source(tmp_path).fingerprint()
    (tmp_path / "0.png").write_bytes(corner(1))
    assert open_source(tmp_path).fingerprint() != before


def test_words_that_are_looked_for(tmp_path):
    words = {"others": [{"label": "cat"}], "label": "black cat", "caption": "Cats and a black cat"}
    members = [("a.json", json.dumps(words).encode()), ("a.mask.png", corner(0)), ("a.mask2.png", corner(9))]
    (item,) = once(open_source(write_tar(tmp_path / "x.tar", [*members, ("a.jpg", JPEGS[0])])))
    assert [one.end for one in (item.sample, *item.sample.others)] == [20, 4]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"others": {}}, "others"),
        ({"others": [3]}, "others"),
        ({"others": [{"label": "dog"}] * 8}, "9 subjects"),
        ({"others": [{"label": ""}]}, "label is ''"),
        ({"others": [{"label": "cow"}]}, "'cow'"),
        ({"others": [{"label": "cat"}]}, "cat, cat"),
        ({"others": [{"label": "dog", "end": 4}]}, "end 4"),
        ({"others": [{"label": "dog", "end": "9"}]}, "end '9'"),
        ({"others": [{"label": "dog", "end": 10**30}]}, "end 1000"),
        ({"others": [{"label": "cat", "end": 5}]}, "cat, cat"),
        ({"others": []}, "mask2"),
        ({"others": [{"label": "dog"}] * 2}, "mask is missing"),
    ],
)
def test_subjects_that_do_not_fit(tmp_path, change, reason):
    words = {"label": "cat", "caption": "a cat, a dog"} | change
    members = [("a.json", json.dumps(words).encode()), ("a.mask.png", corner(0)), ("a.mask2.png", corner(9))]
    skips, tar = (
        SkipLog([].append),
        write_tar(tmp_path / "x.tar", [*members, ("a.jpg", JPEGS[0]), *good("b", 1)]),
    )
    assert [item.key for item in once(open_source(tar), skips=skips)] == ["x.tar:b"]
    assert reason in skips.reasons["x.tar:a"] and "\n" not in skips.reasons["x.tar:a"]


# --- writer ------------------------------------------------------------------------------------------


def export(folder: Path, stop: int | None = None, error: type[BaseException] = RuntimeError) -> None:
    """Eleven samples in shards of four, skipping existing ones; `error` is raised before sample `stop`."""
    with ShardWriter(folder, 4) as shards:
        for i in range(11):
            if i == stop:
                raise error
            if str(i) not in shards.done_keys():
                ref = (encoded(grey(i)), MASK_PNG) if i == 3 else None
                shards.add(str(i), JPEGS[i], ".JPG", MASK_PNG, "cat", f"猫 cat {i}", {"source": "me"}, ref)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_writer_and_reader(tmp_path):
    export(tmp_path)
    assert list(contents(tmp_path)) == ["00000.tar", "00001.tar", "00002.tar"]
    triplets = [item.sample for item in once(open_source(tmp_path))]
    assert [number(t) for t in triplets] == list(range(11))
    assert [t.caption for t in triplets] == [f"猫 cat {i}" for i in range(11)]
    assert [i for i, t in enumerate(triplets) if t.reference] == [3]
    assert np.array_equal(np.asarray(triplets[3].reference[0]), np.asarray(grey(3)))
    raw = next(read_shard(tmp_path / "00000.tar"))
    assert json.loads(raw.fields["json"]) == {"caption": "猫 cat 0", "label": "cat", "source": "me"}


def test_interrupted_exports_resume(tmp_path):
    export(tmp_path / "whole")
    for stop in (0, 3, 4, 5, 10):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            export(folder, stop, KeyboardInterrupt)
        assert list(contents(folder)) == [f"{i:05d}.tar" for i in range(stop // 4)]
        export(folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_killed_export(tmp_path):
    """The process ends without any cleanup."""
    export(tmp_path / "whole")
    if (child := os.fork()) == 0:
        shards = ShardWriter(tmp_path / "killed", 4)
        for i in range(6):
            ref = (encoded(grey(i)), MASK_PNG) if i == 3 else None
            shards.add(str(i), JPEGS[i], "jpg", MASK_PNG, "cat", f"猫 cat {i}", {"source": "me"}, ref)
        os._exit(9)
    os.waitpid(child, 0)
    assert list(contents(tmp_path / "killed")) == [".00001.tar.part", "00000.tar"]
    assert ShardWriter(tmp_path / "killed").done_keys() == set("0123")
    assert list(contents(tmp_path / "killed")) == ["00000.tar"]
    export(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_failed_write_leaves_no_half_sample(tmp_path, monkeypatch):
    shards = ShardWriter(tmp_path)
    shards.add("a", JPEGS[0], "jpg", MASK_PNG, "cat", "cat")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=tmp_path.name):
        patch.setattr(tarfile.TarFile, "addfile", full)
        shards.add("b", JPEGS[0], "jpg", MASK_PNG, "cat", "cat")
    assert shards.done_keys() == frozenset() and not contents(tmp_path)
    shards.add("a", JPEGS[0], "jpg", MASK_PNG, "cat", "cat")
    shards.close()
    assert [raw.key for raw in read_shard(tmp_path / "00000.tar")] == ["a"]


REFUSED: list[tuple[Callable[[ShardWriter], None], str]] = [
    (lambda w: w.add("a.b", b"", "jpg", b"", "cat", "cat"), "key 'a.b'"),
    (lambda w: w.add("a/b", b"", "jpg", b"", "cat", "cat"), "key 'a/b'"),
    (lambda w: w.add("", b"", "jpg", b"", "cat", "cat"), "key ''"),
    (lambda w: w.add("a", b"", "gif", b"", "cat", "cat"), "image 'gif'"),
    (lambda w: w.add("0", b"", "jpg", b"", "cat", "cat"), "already written"),
    (lambda w: w.add("a", b"", "jpg", b"", "cat", "cat", None, None, [Other(b"", "cat")] * 8), "9 subjects"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused_samples(tmp_path, call, message):
    export(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(ShardWriter(tmp_path))


def test_refused_folders(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file"):
        ShardWriter(tmp_path / "file")
    with pytest.raises(ValueError, match="'file'"):
        ShardWriter(tmp_path)
    with pytest.raises(ValueError, match="0"):
        ShardWriter(tmp_path / "new", 0)
    export(tmp_path / "cut")
    path = tmp_path / "cut" / "00001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"00001.tar"):
        ShardWriter(tmp_path / "cut")
