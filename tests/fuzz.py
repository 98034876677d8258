"""Damaged and senseless inputs by the hundred: `python -m tests.fuzz --kind settings --seed 0 --count 700`.

Each input must be read as what it means or refused by one line, soon, before any weight is loaded. A kind
is a function in KINDS: an endless iterator of cases that a seed decides. Findings are printed; exit status 1
if there are any.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sample
from convert_weights import convert
from models.weights.loading import read_checkpoint
from moma.app.options import OF_SUBJECTS
from moma.app.record import CHUNK, COMMENT, OUTPUTS
from moma.weights.bundle import Bundle
from moma.weights.export import export_ip_adapter
from moma.weights.lora import parse_lora
from moma.weights.tiny import build_tokenizers
from tests import fuzz_images, fuzz_mm_diff, fuzz_people
from tests import make_checkpoints as checkpoints
from tests.fuzz_json import DELETED, VALUES, nodes, replaced, senseless
from tests.fuzz_weights import damaged, edited
from tests.make_checkpoints import TINY, TINY_DEFAULTS
from tests.tiny import build_tiny_bundle

SECONDS = 2.0  # of CPU time that a case may take
STOPPED = 130  # a command's exit status when it was stopped before its work
CAT = Path(__file__).parents[1] / "examples" / "cat.png"


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str  # what it is, for the report
    run: Callable[[], object]  # reads it: returns, or ValueError, OSError or OutOfMemoryError of one line
    wrong: bool = False  # whether nothing but a refusal is right


Kind = Callable[[random.Random, Path], Iterator[Case]]  # the folder is the kind's own


def refused(command: Callable[[list[str]], int], *args: object) -> None:
    """Run a command's function; ValueError with what it said if it ended with status 2.

    Args:
        command: takes the command line and returns an exit status.
        args: the command line.
    """
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = command([str(arg) for arg in args])
    if status == 2:
        raise ValueError(said.getvalue().replace("\r", "\n").rstrip("\n"))
    assert status in (0, STOPPED), f"exit status {status}"


# --- the kinds ---------------------------------------------------------------------------------------


def checked(*args: object) -> None:
    """sample.py's command up to where it would read weights; ValueError for a refusal."""
    with mock.patch("sample._encode_early", side_effect=KeyboardInterrupt):
        refused(sample.run, *args)


Reader = Callable[[Path, Path, Path], None]  # of a file, beside a bundle, into a new one
LDM = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")


def settings(rng: random.Random, folder: Path) -> Iterator[Case]:
    """The settings inside an image that is drawn again, and such files with damaged bytes."""
    weights, out = folder / "tiny", folder / "out"
    build_tiny_bundle(weights)
    start = ["--ref", CAT, "--weights", weights, "--cache", "off", "--dtype", "fp32"]
    refused(sample.run, *start, "--steps", 1, "--prompt", "a cat in the snow", "--out", out)
    image = Image.open(out / "a-cat-in-the-snow-seed0.png")
    text = image.info[CHUNK]
    data, image = json.loads(text), image.convert("RGB")
    # What may be null or left out, and what may hold anything of its type.
    subject = ("subjects", 0)
    optional = {(*subject, "images", 0, name) for name in ("mask", "segmented", "face")}
    optional |= {(*subject, name) for name in ("strength", "region")}
    optional |= {path for path in nodes(data) if path[0:1] in (("sample",), ("method",)) and len(path) == 2}
    exact = {(*subject, "images", 0, "file", "sha256"), ("format",), ("version",), ("prompt",), ("seed",)}
    exact |= {path for path in nodes(data) if path[0:1] in (("weight_hashes",), ("batch",)) and len(path) > 1}
    limited = {("sample", name) for name in ("steps", "height", "width", "batch_size")}

    def case(name: str, edited: str, wrong: bool, spoil: bool = False) -> Case:
        kind, info, exif = rng.choice(list(OUTPUTS)), PngInfo(), Image.Exif()
        info.add_itxt(CHUNK, edited)
        comment = COMMENT + edited.encode("utf-8", "surrogatepass")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        file, content = folder / f"edited{OUTPUTS[kind].suffix}", io.BytesIO()
        image.save(content, OUTPUTS[kind].name, **({"pnginfo": info} if kind == "png" else {"exif": exif}))
        data = fuzz_images.damaged(rng, content.getvalue()) if spoil else content.getvalue()

        def run() -> None:
            file.write_bytes(data)
            checked("--replay", file, *start, "--out", out)

        return Case(f"{kind} {name}", run, wrong)

    places = [path for path in nodes(data) if path]
    while True:
        path, way = rng.choice(places), rng.random()
        old = reduce(lambda value, key: value[key], path, data)
        if way < 0.1:
            yield case("of damaged bytes", text, wrong=False, spoil=True)
            continue
        if way < 0.75:
            new = rng.choice(VALUES)
            wrong = senseless(old, new) and not (new is None and path in optional)
            wrong |= path in exact and new != old
            wrong |= path in limited and new not in (None, 1) and new is not old
        elif way < 0.85:
            new = DELETED
            wrong = path not in optional and path[:1] not in (("versions",), ("sample",), ("method",))
            wrong |= path in (("sample",), ("method",), ("versions",))
        elif way < 0.95:
            holder = path if isinstance(old, dict) else ()
            path, new = (*holder, f"x{rng.random()}"), rng.choice(VALUES)
            wrong = holder != ("versions",)
        else:
            position = rng.randrange(len(text))
            damaged = rng.choice([
                text[:position], text[:position] + rng.choice('"[]{}:,\\0\x00é') + text[position + 1 :],
                "[" * 10_000, '{"a":' * 10_000, "9" * 5000, text[:position] + text[position:] * 2,
                "\ufeff" + text,
            ])  # fmt: skip
            yield case(f"text {damaged!r:.60}", damaged, damaged[:1] != "{" and damaged[:1] != "\ufeff")
            continue
        what = "deleted" if new is DELETED else f"{new!r:.60}"
        yield case(f"{'.'.join(map(str, path))}: {what}", json.dumps(replaced(data, path, new)), wrong)


# Option -> values that are right and values that nothing can be drawn with; {} = a folder of files.
OPTIONS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "--prompt": (["a cat in the snow", "a (cat:1.2) <lora:x:1>", "雪の中のcat", "cat " * 300, "ｃａｔ\u2028"],
        ["", " ", "a dog", "a cat <image>", "a cat " * 3000, "a cat \udce9", "a category"]),
    "--subject": (["cat", "Cat", " cat ", "-"], ["", " ", "\u200b"]),
    "--num": (["1", "2"], ["0", "-1", "1.5", "x", "", "1000000", "9" * 5000]),
    "--seed": (["0", "7", "4294967200"], ["-1", "4294967296", "x", "1e3", ""]),
    "--strength": (["0", "1", "0.4", "-"], ["-1", "nan", "inf", "1e999", "1e39", "x", ""]),
    "--guidance": (["0", "1", "7.5"], ["-1", "nan", "-inf", "1e39", "x"]),
    "--guidance-interval": (["0 1000", "300 600"], ["600 300", "0 1001", "-1 5", "1", "a b"]),
    "--size": (["64", "64x72"],
        ["4", "0", "-64", "60", "64x", "x64", "99999", "8x8", "1x2x3", "1e2", "9" * 5000]),
    "--steps": (["1", "2", "30", "999"], ["0", "-5", "1000", "1e2", "x", "9" * 5000]),
    "--solver": (["ddim", "dpm"], ["euler", ""]),
    "--grid": (["even", "trailing"], ["karras", ""]),
    "--turns": (["auto", "off", "on"], ["2"]),
    "--negative": (["", "a dog", "zebra " * 200, "[x]"], ["\udce9"]),
    "--preset": (["default"], ["best", ""]),
    "--set": (["m_gen_threshold=0.3", "m_gen_layers=[0,1]", "geometry=crop", "m_gen_share=0"],
        ["m_gen_threshold=2", "m_gen_threshold=NaN", "geometry=stretch", "geometry", "=", "x=1",
         "mllm_layers=99", "m_gen_layers=" + "[" * 9999, "m_gen_layers=[99]", "subject_below_t=-1",
         "lambda_init=Infinity", "context_masked=1", "reference_text_cut=77", "m_gen_eps=" + "9" * 5000]),
    "--batch-size": (["1", "3"], ["0", "-1", "99999", "x"]),
    "--device": (["cpu", "auto", "cpu:0"], ["cpu:1", "cpu:-1", "cuda:99", "mps:7", "quantum", "", "meta"]),
    "--dtype": (["fp32", "auto"], ["int8", "float32", ""]),
    "--stream": (["auto", "off", "on"], ["maybe", ""]),
    "--tiles": (["auto", "off", "on"], ["1"]),
    "--cuda-graph": (["auto", "off"], ["on", "x"]),
    "--cache": (["off", "{}/cache"], ["{}/empty.txt", "{}/empty.txt/x", "x" * 300]),
    "--method": (["moma", "text", "no-mask", "reference-attention"], ["mine", "", "ip-adapter"]),
    "--mask": (["{}/mask.png"], ["no", "{}", "{}/empty.txt", "", "{}/gone.png", "{}/tall.png", "{}/cut.png"]),
    "--point": (["-"], ["3,4", "3", "x", "-1,-1", "3,4:5,6", ":", "1,2:x"]),
    "--region": (["-"], ["0,0,1,1", "0.2,0.2,0.1,1", "nan,0,1,1", "0,0,1", "0,0,1,1e9", "x", ""]),
    "--face-file": (["-"], ["no", "{}", "{}/empty.txt"]),
    "--face-number": (["-"], ["1", "0", "x"]),
    "--object": ([], ["1", "0", "x"]),
    "--prompts": (["{}/prompts.txt"],
        ["no.txt", "{}", "{}/empty.txt", "{}/bytes.txt", "{}/gone.png", "/dev/zero"]),
    "--ref": ([],
        ["no", "{}", "{}/empty.txt", "", "{}/gone.png", "{}/cut.png", "/dev/zero", "x" * 300, "a\0b"]),
    "--replay": ([], ["no.png", "{}/cat.png", "{}/mask.png", "{}", "{}/gone.png", "/dev/zero"]),
    "--weights": ([], ["{}", "no", "{}/empty.txt", "", "x" * 300]),
    "--out": (["{}/out/deep"], ["{}/empty.txt", "{}/empty.txt/x", "/proc/x", "x" * 300]),
    "--format": (["png", "jpeg", "webp"], ["gif", "JPEG", ""]),
    "--batch-refs": (["{}/many"], ["no", "{}/cat.png", "{}/empty.txt", "{}/one", "/dev/zero", "a\0b"]),
    "--debug": ([], ["x"]),
    "--stepz": ([], ["3"]),
}  # fmt: skip


def commands(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Command lines of sample.py."""
    build_tiny_bundle(folder / "tiny")
    shutil.copy(CAT, folder / "cat.png")
    for name in ("dog/1.png", "dog/2.png", "many/cat.png", "many/dog.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(CAT, folder / name)
    (folder / "one").mkdir()
    for name in ("cut.png", "one/cut.png"):
        (folder / name).write_bytes(CAT.read_bytes()[:3000])
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    with Image.open(CAT) as image:
        mask = image.getchannel("A")
    mask.save(folder / "mask.png")
    mask.resize((40, 90)).save(folder / "tall.png")
    (folder / "empty.txt").write_text("\ufeff\n # nothing\n")
    (folder / "bytes.txt").write_bytes(b"a cat \xe9")
    (folder / "prompts.txt").write_text("\ufeffa cat\r\n# a dog\na cat\u2028in the snow\n", encoding="utf-8")
    start = {"--ref": "{}/cat.png", "--weights": "{}/tiny", "--out": "{}/out", "--cache": "off",
             "--steps": "1", "--size": "64", "--dtype": "fp32", "--prompt": "a cat"}  # fmt: skip
    more = [f"--{name.replace('_', '-')}" for name in OF_SUBJECTS]
    while True:
        line, wrong, args = dict(start), False, []
        if (kind := rng.random()) < 0.2:  # many subjects, one after the other
            del line["--ref"]
            line |= {"--batch-refs": "{}/many", "--prompt": "a {subject}"}
        elif kind < 0.45:  # a second subject
            line |= {"--method": "reference-attention", "--prompt": "a cat and a dog"}
            args += [
                "--ref",
                str(folder / rng.choice(["dog", "dog/1.png"])),
                "--subject",
                "dog",
                "--subject",
                "cat",
            ]
        for option in rng.sample(list(OPTIONS), rng.randint(1, 4)):
            right, others = OPTIONS[option]
            bad = not right or rng.random() < 0.4
            line[option], wrong = rng.choice(others if bad else right), wrong or bad
        if args and (repeated := [option for option in more if option in line]):
            args += [repeated[0], "-"]  # for both; others once
        for option, value in line.items():
            values = value.split() if option == "--guidance-interval" else [value]
            args += [option, *(text.replace("{}", str(folder)) for text in values)]
        name = " ".join(f"{key} {value!r:.40}" for key, value in line.items() if start.get(key) != value)
        yield Case(name, partial(checked, *args), wrong)


# Keys of public configs that every reader needs, in files of which each is read whole.
READ = (
    "_class_name", "block_out_channels", "layers_per_block", "norm_num_groups", "in_channels", "out_channels",
    "act_fn", "latent_channels", "cross_attention_dim", "attention_head_dim", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps", "rms_norm_eps",
    "vocab_size", "hidden_act", "mm_vision_select_layer", "mm_projector_type", "mm_hidden_size",
)  # fmt: skip
WHOLE = ("sd15/unet/config.json", "vae/config.json", "llava/config.json", "ip_vision/config.json")


def sources(folder: Path) -> dict[str, Path]:
    """A tiny checkpoint of each kind, and a bundle called "base"."""
    tokenizers = folder / "tokenizers"
    build_tokenizers(tokenizers)
    made = {
        "sd15": checkpoints.make_sd15(folder / "sd15", TINY, tokenizers),
        "vae": checkpoints.make_vae(folder / "vae", TINY),
        "clip": checkpoints.make_clip(folder / "clip", TINY),
        "llava": checkpoints.make_llava(folder / "llava", TINY, tokenizers),
        "moma": checkpoints.make_moma(folder / "a.th", TINY),
    }
    convert(list(made.values()), folder / "base", defaults=TINY_DEFAULTS, say=lambda _: None)
    return made | {
        "base": folder / "base",
        "ldm": checkpoints.make_ldm(folder / "m.safetensors", TINY),
        "ckpt": checkpoints.make_ldm(folder / "m.ckpt", TINY),
        "ip_vision": checkpoints.make_ip_vision(folder / "ip_vision", TINY),
        "ip_adapter": checkpoints.make_ip_adapter(folder / "ip.bin", TINY),
        "lora": checkpoints.make_lora(folder / "lora.safetensors", TINY),
        "sam": checkpoints.make_sam(folder / "sam.pth", TINY),
        "sam_hf": checkpoints.make_sam_hf(folder / "sam_hf", TINY),
        "dino": checkpoints.make_dino(folder / "dino.pth", TINY),
        "dino_hf": checkpoints.make_dino_hf(folder / "dino_hf", TINY),
        "llava_hf": checkpoints.make_llava_hf(folder / "llava_hf", TINY, tokenizers),
    }


def convert_one(source: Path, base: Path, out: Path) -> None:
    """Convert a source beside a bundle, quietly; ValueError for a refusal."""
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):
        convert([source], out, Bundle.open(base), defaults=TINY_DEFAULTS, say=lambda _: None)


def merge_one(lora: Path, base: Path, out: Path) -> None:
    """Merge a LoRA into a bundle, likewise."""
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):
        convert([], out, Bundle.open(base), say=lambda _: None, loras=[parse_lora(str(lora))])


def use_all(folder: Path, out: Path) -> None:
    """Build all networks of a bundle, and export its adapter to `out`."""
    bundle = Bundle.open(folder)
    for name in bundle.networks:
        bundle.build(name)
    out.unlink(missing_ok=True)
    export_ip_adapter(folder, out)


def configs(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Edited config.json files and indexes of public models and bundles."""
    made = sources(folder)
    names = ("sd15", "vae", "clip", "llava", "ip_vision", "sam_hf", "dino_hf", "llava_hf")
    files = [path for name in names for path in sorted(made[name].rglob("*.json"))]
    files = [path for path in files if path.name not in ("vocab.json", "model_index.json")]
    files += [made["base"] / "config.json"] * len(files)
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    copied = Path(shutil.copytree(made["base"], folder / "copied"))
    while True:
        path = rng.choice(files)
        data, bundle = json.loads(texts[path]), path.parent == made["base"]
        place = rng.choice([one for one in nodes(data) if one])
        old = reduce(lambda value, key: value[key], place, data)
        if (way := rng.random()) < 0.8:
            new = rng.choice(VALUES)
            text = json.dumps(replaced(data, place, new))
            known = bundle and place[:1] == ("networks",) and "sha256" not in place[:-1]
            known |= path.relative_to(folder).as_posix() in WHOLE and place[-1] in READ
            wrong = senseless(old, new) and known and not (new is None and place[-1] == "kv_heads")
        elif way < 0.9:
            new, text, wrong = "deleted", json.dumps(replaced(data, place, DELETED)), False
        else:
            cut, wrong = rng.randrange(len(texts[path])), False
            new = rng.choice(["", "\0", "[" * 5000, "\ufeff", "}", "\u2028", '{"a":' * 3000])
            text = texts[path][:cut] + new + texts[path][cut + rng.randrange(3) :]

        def run(path: Path = path, text: str = text, bundle: bool = bundle) -> None:
            file = copied / "config.json" if bundle else path
            file.write_text(text, encoding="utf-8", errors="surrogatepass")
            try:
                if bundle:
                    use_all(copied, folder / "exported.safetensors")
                else:
                    source = folder / path.relative_to(folder).parts[0]
                    convert_one(source, made["base"], folder / "out")
            finally:
                file.write_text(texts[path], encoding="utf-8")

        yield Case(f"{path.relative_to(folder)} {place} = {new!r:.60}", run, wrong)


def weights(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Damaged checkpoint files, and whole ones with tensors that no network has."""
    made = sources(folder)
    names = ("ldm", "ckpt", "moma", "ip_adapter", "sam", "dino", "lora")
    contents = {name: {k: t.read().clone() for k, t in read_checkpoint(made[name]).items()} for name in names}
    # In LDM files, what is beside the networks is ignored, and in adapters' files what has other names.
    used = {}
    for name, found in contents.items():
        starts = LDM if name in ("ldm", "ckpt") else ("",)
        named = (key for key in found if key.removeprefix("state_dict.").startswith(starts))
        used[name] = [key for key in named if "position_ids" not in key and "llm_mapping.proj" not in key]
    used["lora"] = [key for key in contents["lora"] if not key.endswith(".alpha")]  # which may be anything
    while True:
        name = rng.choice(names)
        source, read = made[name], merge_one if name == "lora" else convert_one
        file = folder / f"edited{source.suffix}"
        if rng.random() < 0.5:
            way, at, data = damaged(rng, source.read_bytes())

            def run(read: Reader = read, file: Path = file, data: bytes = data) -> None:
                file.write_bytes(data)
                read(file, made["base"], folder / "out")

            yield Case(f"{name} {way} at {at}", run, way in ("cut", "empty", "other"))
            continue
        tensors, key, way, wrong = edited(rng, contents[name], used[name])

        def run(read: Reader = read, file: Path = file, tensors: dict[str, torch.Tensor] = tensors) -> None:
            if file.suffix == ".safetensors":
                save_file(tensors, file)
            else:
                torch.save(tensors, file)
            read(file, made["base"], folder / "out")

        yield Case(f"{name} {key} {way}", run, wrong)


def of_tuples(kind: Callable[[random.Random, Path], Iterator[fuzz_images.Case]]) -> Kind:
    """Cases of other files."""
    return lambda rng, folder: (Case(*case) for case in kind(rng, folder))


KINDS: dict[str, Kind] = {
    "settings": settings,
    "people": of_tuples(fuzz_people.cases),
    "commands": commands,
    "images": of_tuples(fuzz_images.images),
    "masks": of_tuples(fuzz_images.masks),
    "configs": configs,
    "weights": weights,
    "mm-diff": of_tuples(fuzz_mm_diff.cases),
}


# --- what is run -------------------------------------------------------------------------------------


def finding(case: Case, seconds: float = SECONDS) -> tuple[str, str]:
    """What came of a case: "accepted" or "refused", and what is wrong with that, "" = nothing."""
    start = time.process_time()
    try:
        with warnings.catch_warnings(action="ignore"):
            case.run()
        outcome, problem = "accepted", "accepted nonsense" if case.wrong else ""
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        text = str(error)
        outcome, problem = "refused", "" if text.strip() and "\n" not in text else f"not one line: {text!r}"
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(place.filename).name}:{place.lineno}"
        outcome, problem = "traceback", f"{type(error).__name__}: {error} ({at})"
    took = time.process_time() - start
    return outcome, problem or (f"took {took:.1f} s" if took > seconds else "")


def check(kind: str, seed: int, count: int) -> tuple[Counter[str], list[str]]:
    """Run the first `count` cases of a kind: how they ended, and the findings."""
    outcomes, findings = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(islice(KINDS[kind](random.Random(seed), Path(folder)), count)):
            outcome, problem = finding(case)
            outcomes[outcome] += 1
            if problem:
                findings.append(f"{kind} {number}: {case.name}: {problem}")
    return outcomes, findings


def main(argv: Sequence[str] | None = None) -> int:
    """Print findings and counts; 1 if there are findings."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args(argv)
    outcomes, findings = check(args.kind, args.seed, args.count)
    for line in findings:
        print(line)
    counts = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    print(f"{args.kind}, seed {args.seed}: {counts}; {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
