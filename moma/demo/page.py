"""The page: Gradio's components, and which of the studio's functions each of them calls."""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from moma.app.options import subject_of_file
from moma.app.record import OUTPUTS
from moma.demo.studio import Event, Form, Studio, Subject, lines_of
from moma.methods import METHODS
from moma.sampling.config import SampleConfig
from moma.sampling.diffusion import SOLVERS

EXAMPLES = Path(__file__).parents[2] / "examples"
CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto !important; }
#previews img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
footer { display: none !important; }
"""
INTRO = """# MoMA
Give an image of a subject, and a prompt that names it. Is the mask wrong? Click the subject, or paint it."""


class Slot(NamedTuple):
    """The components of one subject."""

    image: gr.Image
    file: gr.File  # the image's, hidden: `open_image` reads it, and says in words what is wrong with it
    word: gr.Textbox
    shown: gr.Image
    editor: gr.ImageEditor
    mask: gr.State  # (file, Segmented): the mask, and the image that it is of


def plain(act: Callable[..., Any]) -> Callable[..., Any]:
    """A user's mistake as a message on the page."""

    @wraps(act)
    def acted(*given: Any) -> Any:
        try:
            return act(*given)
        except (ValueError, OSError) as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None

    return acted


def theme() -> gr.Theme:
    """With the system's fonts: the page needs no network."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio."""
    stops: dict[str, threading.Event] = {}  # of each tab's drawing
    with gr.Blocks(title="MoMA", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(min_width=320):
                slots = _slots(studio)
                asked = _everyday(studio) + _more()
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", min_width=90)
                    strip = gr.Button("β strip", min_width=90)
                    cancel = gr.Button("Cancel", variant="stop", min_width=90)
            with gr.Column(min_width=320):
                status = gr.Markdown("", elem_id="status")
                with gr.Row(elem_id="previews"):
                    preview = gr.Image(
                        label="predicted image", height=220, interactive=False, min_width=140, buttons=[]
                    )
                    m_gen = gr.Image(label="M_gen", height=220, interactive=False, min_width=140, buttons=[])
                gallery = gr.Gallery(
                    label="images",
                    columns=3,
                    height=460,
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                    elem_id="results",
                )
                saved = gr.File(
                    label="saved image: its settings fill the form",
                    elem_id="replay",
                    file_types=[output.suffix for output in OUTPUTS.values()],
                    height=150,
                )
        form = [part for slot in slots for part in (slot.file, slot.word, slot.mask)] + asked
        results = [status, preview, m_gen, gallery]

        def started(request: gr.Request) -> threading.Event:
            return stops.setdefault(request.session_hash, threading.Event())

        def drawn(given: Sequence[Any], request: gr.Request, strip: bool) -> Iterator[tuple]:
            stop = started(request)
            stop.clear()
            yield "", gr.skip(), gr.skip(), gr.skip()  # the turn has come
            wanted = plain(lambda: studio.requests(form_of(studio, given), strip))()
            yield from shown(studio.draw(wanted, stop))

        def on_draw(*given: Any, request: gr.Request) -> Iterator[tuple]:
            yield from drawn(given, request, False)

        def on_strip(*given: Any, request: gr.Request) -> Iterator[tuple]:
            yield from drawn(given, request, True)

        def on_cancel(request: gr.Request) -> None:
            started(request).set()

        def on_unload(request: gr.Request) -> None:
            if stop := stops.pop(request.session_hash, None):
                stop.set()

        one = {"concurrency_limit": 1, "concurrency_id": "draw", "show_progress": "hidden"}
        running = [
            button.click(lambda: "waiting for its turn ...", None, status, queue=False).then(
                _taking_request(act), form, results, **one
            )
            for button, act in ((draw, on_draw), (strip, on_strip))
        ]
        cancel.click(on_cancel, None, None, queue=False)
        cancel.click(lambda: "stopped", None, status, cancels=running, queue=False)
        page.unload(on_unload)
        filled = [
            part for one in slots for part in (one.image, one.file, one.word, one.editor, one.shown, one.mask)
        ]
        saved.upload(plain(lambda file: fill(studio, file)), saved, [*filled, *asked, status])
    return page


def _taking_request(act: Callable[..., Iterator[tuple]]) -> Callable[..., Iterator[tuple]]:
    """Gradio fills in the request by its annotation."""

    def acted(request: gr.Request, *given: Any) -> Iterator[tuple]:
        yield from act(*given, request=request)

    return acted


def _slots(studio: Studio) -> list[Slot]:
    slots = []
    with gr.Tabs():
        for number in range(1, studio.cfg.subjects + 1):
            with gr.Tab(f"Subject {number}" + " (optional)" * (number > 1)):
                slots.append(_slot(studio, number))
    return slots


def _slot(studio: Studio, number: int) -> Slot:
    """One subject: drop an image, click it or paint over it, and see the mask."""
    with gr.Row():
        image = gr.Image(
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=240,
            min_width=140,
            label="image",
            elem_id=f"image-{number}",
        )
        shown = gr.Image(
            label="mask",
            interactive=False,
            height=240,
            min_width=140,
            buttons=[],
            elem_id=f"mask-{number}",
        )
    file = gr.File(type="filepath", visible="hidden")
    word = gr.Textbox(
        label="What is it? The word that prompts use", placeholder="cat", elem_id=f"word-{number}"
    )
    with gr.Accordion("Paint the mask", open=False):
        editor = gr.ImageEditor(
            type="pil",
            sources=[],
            layers=False,
            label="subject",
            height=380,
            transforms=[],
            brush=gr.Brush(default_size=24, colors=["#e69f00"], color_mode="fixed"),
        )
    mask = gr.State(None)

    def on_image(file: str | None, said: str = "") -> tuple:
        if file is None:
            return None, None, None, said
        background = None
        try:
            path = studio.remember(Path(file))
            background = {"background": studio.small(path), "layers": [], "composite": None}
            said = word_of(path) or said
            found, note = studio.find(path)
        except (ValueError, OSError) as error:
            gr.Warning(" ".join(str(error).split()))
            return None, None, background, said
        if note:
            gr.Warning(note)
        return studio.shown(path, found), (path, found), background, said

    def on_click(file: str, event: gr.SelectData) -> tuple:
        path = studio.remember(Path(file))
        found = plain(lambda: studio.pick(path, tuple(map(int, event.index))))()
        return studio.shown(path, found), (path, found)

    def on_paint(file: str | None, painting: dict | None) -> tuple:
        layers = [layer for layer in (painting or {}).get("layers") or [] if layer is not None]
        path = studio.remember(Path(file)) if file and layers else None
        found = path and studio.painted(path, layers)
        return (studio.shown(path, found), (path, found)) if found else (gr.skip(), gr.skip())

    masks = {"concurrency_limit": 1, "concurrency_id": "mask", "show_progress": "minimal",
             "trigger_mode": "always_last"}  # fmt: skip
    outputs = [shown, mask, editor, word]
    image.input(None, image, file, js="file => file").then(on_image, [file, word], outputs, **masks)
    files = [[str(EXAMPLES / f"{name}.png")] for name in ("cat", "dog", "car", "teapot")]
    gr.Examples(
        files, [image], [file, *outputs], lambda file: (file, *on_image(file)), run_on_click=True,
        label="example images",
    )  # fmt: skip
    image.select(on_click, file, [shown, mask], **masks)
    editor.input(plain(on_paint), [file, editor], [shown, mask], **masks)
    return Slot(image, file, word, shown, editor, mask)


def word_of(path: Path) -> str:
    """The subject's word if its file's name is one."""
    try:
        return subject_of_file(path)
    except ValueError:
        return ""


def _everyday(studio: Studio) -> list[Any]:
    """Prompt, seed, count and strength."""
    prompt = gr.Textbox(
        "a {subject} on the beach\na {subject} at sunset",
        lines=2,
        label="Prompts, one per line",
        info="{subject} stands for the word",
        elem_id="prompt",
    )
    info = "1 for a new scene, 0.4 for a new texture"
    strength = gr.Slider(0, 1.5, SampleConfig().strength, step=0.05, label="strength β", info=info)
    with gr.Row():
        seed = gr.Number(0, precision=0, minimum=0, label="seed", min_width=120, elem_id="seed")
        count = gr.Number(
            1, precision=0, minimum=1, maximum=studio.cfg.images, label="images per prompt", min_width=120
        )
    return [prompt, seed, count, strength]


def _more() -> list[Any]:
    """The others, in the order of `form_of`."""
    base = SampleConfig()
    with gr.Accordion("More settings", open=False):
        negative = gr.Textbox("", label="what images should not show")
        choices = [(entry.title, name) for name, entry in METHODS.items()]
        method = gr.Dropdown(choices, value="moma", label="method")
        with gr.Row():
            steps = gr.Slider(1, 200, base.steps, step=1, label="steps", min_width=140, elem_id="steps")
            guidance = gr.Slider(0, 20, base.guidance, step=0.5, label="guidance", min_width=140)
            solver = gr.Dropdown(list(SOLVERS), value=base.solver, label="solver", min_width=140)
    return [negative, method, steps, guidance, solver]


def form_of(studio: Studio, given: Sequence[Any]) -> Form:
    """What the components hold: file, word, mask of each subject, then `_everyday` and `_more`."""
    subjects = []
    rest = 3 * studio.cfg.subjects
    for i in range(0, rest, 3):
        file, word, mask = given[i : i + 3]
        if file is not None:
            path = studio.remember(Path(file))
            found = mask[1] if mask and mask[0] == path else None  # not the one of the image before
            subjects.append(Subject(path, found, " ".join((word or "").split())))
    prompt, seed, count, strength, negative, method, steps, guidance, solver = given[rest:]
    sample = SampleConfig(steps=int(steps), solver=solver, guidance=float(guidance), strength=float(strength))
    numbers = int(seed or 0), int(count or 0)
    return Form(tuple(subjects), lines_of(prompt), negative or "", *numbers, method, sample)


def fill(studio: Studio, file: str) -> list[Any]:
    """What the components become for a saved image."""
    form, notes = studio.replay(Path(file))
    found: list[Any] = []
    nobody = Subject(None, None, "")
    for file, mask, word in (*form.subjects, *[nobody] * studio.cfg.subjects)[: studio.cfg.subjects]:
        background = file and {"background": studio.small(file), "layers": [], "composite": None}
        seen = mask and (studio.shown(file, mask), (file, mask))
        found += [file and str(file), file and str(file), word, background, *(seen or (None, None))]
    s = form.sample
    found += [form.prompts[0], form.seed, 1, s.strength]
    found += [form.negative, form.method, s.steps, s.guidance, s.solver]
    return [*found, "settings filled in" + "".join(f"; {note}" for note in notes)]


def shown(events: Iterator[Event]) -> Iterator[tuple]:
    """A drawing's news as the values of status, preview, M_gen and gallery."""
    images: list[tuple[str, str]] = []
    yield "", None, None, images
    for event in events:
        if event.error:
            yield "", gr.skip(), gr.skip(), gr.skip()
            raise gr.Error(" ".join(event.text.split()), print_exception=False)
        if event.saved:
            images.append((str(event.saved), event.caption))
        bar = (
            f"{event.text} <progress value='{event.done:.3f}' max='1'></progress>"
            if event.done < 1
            else event.text
        )
        news = event.preview or gr.skip(), event.m_gen or gr.skip()
        yield bar, *news, list(images)
