"""Captions by BLIP-2, as the paper has them: `python -m moma.data.blip2 --images DIR --model DIR --out DIR`.

Writes `captions.jsonl` for `moma.data.openimages --captions`. A run that was killed continues when it is
started again, and under torchrun each process describes its share. transformers is needed
(`pip install -e .[captions]`).
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from tqdm import tqdm

from models.weights.files import parse_json, read_text, visible
from moma.app.files import Parser, check_writable, exit_status, given_text, write_text
from moma.inputs.preprocess import on_white, open_image
from moma.sampling.device import DTYPES, choose_device, choose_dtype

RESULT, PART = "captions.jsonl", "part-{:03}.jsonl"
FIELDS = ("image_id", "caption")  # texts, of each line
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
PART_BYTES = 2**32  # of a file of captions: OpenImages has 9 million images


@dataclass(frozen=True)
class Blip2Config:
    """How images are described."""

    batch: int = 16
    max_new: int = 30  # tokens; BLIP-2's captions have some 10
    beams: int = 5


class Blip2:
    """BLIP-2 of transformers."""

    def __init__(self, model: Any, processor: Any, cfg: Blip2Config) -> None:
        self.model, self.processor, self.cfg = model, processor, cfg

    @classmethod
    def load(cls, model: str, device: str, dtype: str, cfg: Blip2Config) -> Self:
        """Read it.

        Args:
            model: a folder, or a name on the hub such as Salesforce/blip2-opt-2.7b.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps".
            dtype: "auto", "bf16", "fp16" or "fp32".
            cfg: lengths.

        Raises:
            ValueError: without transformers, or for anything that is no BLIP-2.
        """
        place = choose_device(device)
        try:
            from transformers import Blip2ForConditionalGeneration, Blip2Processor
        except ImportError as error:
            raise ValueError(f"BLIP-2 needs transformers ({error}): pip install -e .[captions]") from None
        try:
            processor = Blip2Processor.from_pretrained(model)
            network = Blip2ForConditionalGeneration.from_pretrained(
                model, dtype=choose_dtype(dtype, place)[0], use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{model}: no BLIP-2 ({' '.join(str(error).split()):.200})") from None
        return cls(network.eval().to(place), processor, cfg)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption per image, on one line."""
        given = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)  # (B, 3, S, S)
        answers = self.model.generate(**given, max_new_tokens=self.cfg.max_new, num_beams=self.cfg.beams)
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def find_images(folder: Path) -> dict[str, Path]:
    """image_id, the name without its ending -> file; ValueError for none, or two of one name."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    names = Counter(path.stem for path in files)
    if not files:
        raise ValueError(f"{folder}: has no image ({', '.join(sorted(SUFFIXES))})")
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"{folder}: two images are called {twice[0]}, expected names without their endings once"
        )
    return {path.stem: path for path in files}


def read_parts(out: Path) -> dict[str, str]:
    """image_id -> caption, of all processes' files; a line that a killed process left unfinished is none."""
    found = {}
    for part in (path for path in visible(out) if path.match(PART.replace("{:03}", "*"))):
        *lines, _ = read_text(part, PART_BYTES).split("\n")
        for line in lines:
            data = parse_json(line, str(part)) if line else dict.fromkeys(FIELDS, "")
            if not isinstance(data, dict) or not all(isinstance(data.get(name), str) for name in FIELDS):
                raise ValueError(f"{part}: {line!r:.100}: expected {', '.join(FIELDS)}; delete the file")
            found[data["image_id"]] = data["caption"]
    return found


def describe(
    captioner: Blip2, images: Mapping[str, Path], out: Path, rank: int = 0, ranks: int = 1
) -> Iterator[str]:
    """Describe this process's share of what has no caption yet; yields each image_id once it is written.

    Args:
        captioner: of the images.
        images: of `find_images`.
        out: folder of the captions.
        rank: of this process.
        ranks: how many there are.
    """
    done, names = read_parts(out), sorted(images)
    todo = [name for name in names[rank::ranks] if name not in done]
    path = out / PART.format(rank)
    mend_end(path)
    with path.open("a", encoding="utf-8") as part:
        for start in range(0, len(todo), captioner.cfg.batch):
            batch, opened = todo[start : start + captioner.cfg.batch], {}
            for name in batch:
                try:
                    opened[name] = on_white(open_image(images[name]))
                except ValueError as error:
                    tqdm.write(f"note: {error}: gets no caption", file=sys.stderr)
            captions = dict(zip(opened, captioner(list(opened.values())), strict=True)) if opened else {}
            for name in batch:  # an empty caption is no caption, and is not asked for again
                line = {"image_id": name, "caption": captions.get(name, "")}
                part.write(json.dumps(line, ensure_ascii=False) + "\n")
            part.flush()
            yield from batch


def mend_end(path: Path) -> None:
    """Cut off a line that a killed process left unfinished."""
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)


def finish(images: Mapping[str, Path], out: Path) -> Path | None:
    """Write the result once every image has its line; None before."""
    done = read_parts(out)
    if any(name not in done for name in images):
        return None
    lines = [
        json.dumps({"image_id": name, "caption": done[name]}, ensure_ascii=False) for name in sorted(images)
    ]
    write_text(out / RESULT, "\n".join(lines) + "\n")
    return out / RESULT


def main(argv: Sequence[str] | None = None) -> None:
    """ValueError for a user's mistake."""
    cfg = Blip2Config()
    parser = Parser("python -m moma.data.blip2", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of images; names are their ids")
    add(
        "--model",
        type=given_text,
        required=True,
        metavar="DIR|ID",
        help="BLIP-2, such as Salesforce/blip2-opt-2.7b",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the captions")
    add("--batch-size", type=int, default=cfg.batch, metavar="N", help=f"default: {cfg.batch}")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights (default: auto)")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: expected 1 or more")
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    images = find_images(args.images)
    check_writable("--out", args.out)
    device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" and ranks > 1 else args.device
    captioner = Blip2.load(args.model, device, args.dtype, Blip2Config(args.batch_size))
    for _ in tqdm(describe(captioner, images, args.out, rank, ranks), unit="image", disable=rank > 0):
        pass
    print(finish(images, args.out) or f"{args.out}: other processes are not done yet")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("blip2", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
