"""What the page does: find masks, draw, stop, and read saved images again. It knows no Gradio."""

import queue
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from moma.app.files import OUT_OF_MEMORY
from moma.app.options import Request, records_of, weight_hashes
from moma.app.record import InputFile, Segmented, follow, read_record, save_new
from moma.app.sheets import mask_image
from moma.app.subjects import ImageRequest, SubjectRequest, encode, find_faces, find_images, open_images
from moma.inputs.preprocess import find_mask, on_white, open_image
from moma.inputs.segment import Pick, Point, Segmenter
from moma.load import load_pipeline
from moma.methods import find_method
from moma.methods.prompts import SUBJECT, fill, joined, plain_text
from moma.sampling.config import SampleConfig, check_seed
from moma.sampling.interface import Job, Runtime
from moma.sampling.pipeline import Pipeline, Progress


@dataclass(frozen=True)
class StudioConfig:
    """Limits and looks."""

    subjects: int = 2  # that the page has room for
    images: int = 8  # of one drawing, at most
    preview: float = 0.4  # seconds between previews, which take a call of the VAE's decoder each
    side: int = 1024  # pixels of what is shown of a larger image; browsers and WebP have their limits
    dim: float = 0.25  # how bright the background is where a mask is shown
    strengths: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # β of the strip


class Subject(NamedTuple):
    """A subject of the form."""

    file: Path | None  # None: an image was drawn from a file that the page was not given
    mask: Segmented | None  # None until there is one
    word: str


class Form(NamedTuple):
    """What is asked for."""

    subjects: tuple[Subject, ...]
    prompts: tuple[str, ...]
    negative: str
    seed: int
    count: int  # images per prompt
    method: str
    sample: SampleConfig


class Event(NamedTuple):
    """News of a drawing: a preview, an image, or the end."""

    text: str
    done: float = 0.0  # share of the steps
    preview: Image.Image | None = None
    m_gen: Image.Image | None = None
    saved: Path | None = None  # a finished image, with its settings
    caption: str = ""  # of it
    error: bool = False


class Stopped(Exception):
    """The drawing is not wanted any more."""


@dataclass
class Studio:
    """One bundle, and one pipeline in memory. Drawings come one at a time; whoever calls sees to it."""

    runtime: Runtime
    out: Path
    cfg: StudioConfig = field(default_factory=StudioConfig)
    known: dict[str, Path] = field(default_factory=dict)  # sha256 of an image that was given -> where it is
    _pipe: tuple[str, Pipeline] | None = None
    _subjects: tuple[Any, Any] | None = None  # what was encoded last

    # --- the subject ---------------------------------------------------------------------------------

    @cached_property
    def segmenter(self) -> Segmenter | None:
        """SAM, if the bundle has it."""
        has = "sam" in self.runtime.weights.networks
        return Segmenter.load(self.runtime.weights, self.runtime.device) if has else None

    def remember(self, file: Path) -> Path:
        """The file's place; of a copy of a known one, the known one's."""
        digest = InputFile.of(file).sha256
        if digest not in self.known or not self.known[digest].is_file():  # old uploads are deleted
            self.known[digest] = file
        return self.known[digest]

    def image(self, file: Path) -> Image.Image:
        """ValueError, in words for people, if it is none."""
        return open_image(file, what=f"image {file.name!r}")

    def find(self, file: Path) -> tuple[Segmented, str]:
        """The subject's mask as sample.py finds it, and what to know about it.

        ValueError where nothing tells where the subject is.
        """
        image, weights = self.image(file), self.runtime.weights
        segment = self.segmenter.mask if self.segmenter else None
        try:
            found = find_mask(image, segment=segment, plain_first=weights.familiar is not None)
        except ValueError as error:
            why, _, advice = str(error).partition(": ")
            advice = "click it, or paint it" if "--" in advice else advice  # the page has no options
            raise ValueError(f"{why}: {advice}") from None
        notes = [found.doubt()] if found.doubt() else []
        if weights.familiar and not weights.familiar.knows(image):
            notes.append("this image is not of the kind that these weights know: no image will resemble it")
        return Segmented.of(found.mask, found.source), "; ".join(notes)

    def pick(self, file: Path, point: Point) -> Segmented:
        """The mask of what is at a pixel; ValueError without SAM."""
        if self.segmenter is None:
            raise ValueError("these weights have no Segment Anything: paint the mask instead")
        pick = Pick((point,))
        return Segmented.of(self.segmenter.mask(self.image(file), pick), str(pick))

    def painted(self, file: Path, layers: Sequence[Image.Image]) -> Segmented | None:
        """The mask of what was painted on the image; None if nothing was."""
        size = self.image(file).size
        marks = [np.asarray(one.convert("RGBA").resize(size))[..., 3] > 127 for one in layers]  # (H, W)
        inside = np.any(marks, axis=0) if marks else np.zeros(1, bool)
        return Segmented.of(Image.fromarray(np.uint8(255) * inside), "painted") if inside.any() else None

    def small(self, file: Path) -> Image.Image:
        """The image as it is shown."""
        image = self.image(file)
        image.thumbnail((self.cfg.side, self.cfg.side))
        return image

    def shown(self, file: Path, mask: Segmented) -> Image.Image:
        """The image, its background dim."""
        image = on_white(self.small(file))
        mask_of = mask.image().resize(image.size)
        return Image.composite(image, image.point(lambda value: int(value * self.cfg.dim)), mask_of)

    # --- drawing -------------------------------------------------------------------------------------

    def requests(self, form: Form, strip: bool = False) -> list[Request]:
        """A request for each image, each a batch of its own, so that any of them can be drawn again.

        Args:
            form: what is asked for.
            strip: one image at each strength, all from the same noise.

        Raises:
            ValueError: before any weight is read, for anything that cannot be drawn.
        """
        bundle, method = self.runtime.weights, find_method(form.method).method
        for subject in form.subjects:
            if subject.mask is None:
                raise ValueError(f"where is the subject in {subject.file.name}? Click or paint it")
            if not subject.word:
                raise ValueError(f"what does {subject.file.name} show? Give its word, such as cat")
        if not form.prompts:
            raise ValueError("which image? Write a prompt that names the subject")
        prompts = form.prompts[:1] if strip else form.prompts
        words = [subject.word for subject in form.subjects]
        if not words and any(SUBJECT in prompt for prompt in prompts):
            raise ValueError(f"which subject? Give an image of it, or write prompts without {SUBJECT}")
        prompts = [fill(prompt, joined(words)) for prompt in prompts]
        each = 1 if strip else form.count
        strengths = self.cfg.strengths if strip else (form.sample.strength,)
        count, most = len(prompts) * each * len(strengths), max(self.cfg.images, len(strengths))
        if not 1 <= count <= most:
            raise ValueError(f"{count} images: expected 1 to {most} in one go")
        check_seed("seed", form.seed, form.count)
        if not method.has_strength and strengths != (SampleConfig.strength,):
            raise ValueError(f"{form.method} has no strength β: leave it at {SampleConfig.strength:g}")
        config = bundle.method_config(form.method)
        method.check(bundle, config, encoders=True)
        tokenizers = bundle.clip_tokenizers()
        for prompt in prompts:
            method.read(tokenizers, config, words, prompt)
        sample = replace(form.sample.sized(bundle.image_size), batch_size=1)
        for strength in strengths:
            replace(sample, strength=strength).check(bundle.config("vae").factor)
        subjects = tuple(
            SubjectRequest(one.word, (ImageRequest(one.file, segmented=one.mask),)) for one in form.subjects
        )
        return [
            Request(
                method=form.method, config=config, subjects=subjects, images=((prompt, seed),), only=None,
                negative=form.negative, sample=replace(sample, strength=strength), dtype="auto",
            )
            for prompt in prompts for seed in range(form.seed, form.seed + each) for strength in strengths
        ]  # fmt: skip

    def pipeline(self, request: Request) -> Pipeline:
        """The pipeline of the request's method; the one before is forgotten."""
        if self._pipe is None or self._pipe[0] != request.method:
            self._pipe = self._subjects = None  # their memory is free before the next weights load
            self._pipe = request.method, load_pipeline(self.runtime, request.method, request.config)
        return self._pipe[1]

    def draw(self, requests: Sequence[Request], stop: threading.Event) -> Iterator[Event]:
        """Draw in a thread of its own, and tell of it until it is done.

        Args:
            requests: of `requests`.
            stop: once it is set, the drawing ends after the running step; so it does when nobody listens.
        """
        news: queue.Queue[Event | None] = queue.Queue()

        def work() -> None:
            try:
                self._work(requests, stop, news)
            except Stopped:
                news.put(Event("stopped", 1.0))
            except (ValueError, OSError) as error:
                news.put(Event(str(error), error=True))
            except Exception as error:
                short = OUT_OF_MEMORY.search(str(error)) or isinstance(error, MemoryError)
                if not short:
                    traceback.print_exc()  # for whoever runs the server
                news.put(Event("not enough memory for this" if short else repr(error), error=True))
            finally:
                news.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (event := news.get()) is not None:
                yield event
        finally:  # also where the page was closed
            stop.set()
            thread.join()

    def _work(self, requests: Sequence[Request], stop: threading.Event, news: queue.Queue) -> None:
        def check() -> None:
            if stop.is_set():
                raise Stopped

        news.put(Event("loading the weights ..."))
        pipe, bundle = self.pipeline(requests[0]), self.runtime.weights
        check()
        subjects, images = requests[0].subjects, open_images(requests[0].subjects)
        faces = find_faces(subjects, images, pipe.method.needs_face(bundle))
        found = find_images(subjects, images, faces, requests[0].config, self.runtime)
        check()
        if self._subjects is None or self._subjects[0] != subjects:
            news.put(Event("looking at the subject ..."))
            torch.manual_seed(0)  # as sample.py
            with torch.no_grad():
                self._subjects = subjects, encode(subjects, found, [{}] * len(found), pipe.method)
        last, strip = 0.0, len({request.sample.strength for request in requests}) > 1
        for i, request in enumerate(requests):

            def on_step(now: Progress, i: int = i) -> None:
                nonlocal last
                check()
                done = (i + now.done / now.total) / len(requests)
                text = f"image {i + 1} of {len(requests)}, step {now.done} of {now.total}"
                if time.monotonic() - last < self.cfg.preview:
                    return news.put(Event(text, done))
                (seen,) = now.previews()
                m_gen = None if now.m_gen is None else mask_image(now.m_gen[0], seen.size)
                news.put(Event(text, done, seen, m_gen))
                last = time.monotonic()

            ((prompt, seed),) = request.images
            job = Job(self._subjects[1], prompt, seed, request.negative, request.strengths)
            (result,) = pipe.run([job], request.sample, on_step)
            (record,) = records_of(request, found, pipe, bundle)
            self.out.mkdir(parents=True, exist_ok=True)  # whoever tidied up meanwhile loses nothing
            saved = save_new(self.out, f"seed{seed}", result.image, record)
            m_gen = None if result.m_gen is None else mask_image(result.m_gen, result.image.size)
            text = "done" if i + 1 == len(requests) else f"image {i + 1} of {len(requests)}"
            caption = f"β {request.sample.strength:g}" if strip else f"{prompt}, seed {seed}"
            news.put(Event(text, (i + 1) / len(requests), result.image, m_gen, saved, caption))

    # --- replay --------------------------------------------------------------------------------------

    def replay(self, file: Path) -> tuple[Form, list[str]]:
        """The form that draws a saved image again, and what it lacks; ValueError for another file."""
        record = read_record(file)
        subjects, notes = [], []
        for subject in record.subjects:
            one = subject.images[0]
            place = self._place(one.file)
            if place is None:
                notes.append(f"drop {Path(one.file.path).name} as the subject {subject.word!r}")
            mask = one.segmented
            if one.mask is not None:
                notes.append(f"paint the mask of {subject.word!r}: it was a file, {Path(one.mask.path).name}")
            elif mask is None and place is not None:
                mask, _ = self.find(place)
            subjects.append(Subject(place, mask if place else None, subject.word))
        bundle = self.runtime.weights
        if record.method != bundle.method_config(record.method_name):
            notes.append("the image was drawn with other fields of its method, which the page does not have")
        if dict(record.weight_hashes) != weight_hashes(bundle, record.method_name, record.method):
            notes.append(f"the image was drawn with other weights, {record.weights}")
        s = record.sample
        page = SampleConfig(s.steps, s.solver, s.guidance, strength=s.strength, batch_size=s.batch_size)
        own = any(one.strength not in (None, s.strength) or one.region for one in record.subjects)
        several = any(len(one.images) > 1 for one in record.subjects)
        many = len(subjects) > self.cfg.subjects
        if s != page.sized(bundle.image_size) or own or several or many or len(record.batch) > 1:
            notes.append("the page lacks some of its settings: sample.py --replay draws it bit for bit")
        form = Form(
            tuple(subjects), (record.prompt,), record.negative, record.seed, 1, record.method_name,
            record.sample,
        )  # fmt: skip
        return form, notes

    def _place(self, file: InputFile) -> Path | None:
        """Where a recorded file is: it was given, or is where it was."""
        known, then = self.known.get(file.sha256), follow(file.path)
        if known is not None and known.is_file():
            return known
        same = then is not None and then.is_file() and InputFile.of(then).sha256 == file.sha256
        return then if same else None


def lines_of(text: str) -> tuple[str, ...]:
    """The prompts of a text, one per line."""
    lines = (plain_text(line).strip() for line in text.split("\n"))
    return tuple(dict.fromkeys(line for line in lines if line))
