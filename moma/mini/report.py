"""The paper's claims in miniature: `python -m moma.mini.report --bundle weights/mini --baseline DIR`.

Draws held-out subjects in every setting, classifies the images, and rewrites the tables and images of
docs/mini.md. Each batch is kept in a file under --work, so an interrupted run resumes.

Letters: N pairs, S image side, s side of the predicted masks, h w latents.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.weights.loading import read_checkpoint, save_tensors
from moma.app.files import exit_status, markdown_table, write_text
from moma.app.record import save_png
from moma.app.sheets import Cell, SheetConfig, contact_sheet, mask_image
from moma.evaluate.estimates import Estimate, estimate
from moma.load import load_pipeline
from moma.methods.moma.conditioning import MoMAConditioning
from moma.methods.moma.config import DEFAULT
from moma.methods.moma.method import MoMA, MoMAPrepared
from moma.sampling.config import SampleConfig
from moma.sampling.device import dtype_name, set_precision
from moma.sampling.interface import Job, Result, Runtime
from moma.sampling.pipeline import Pipeline, to_images
from moma.training.common import to_pixels
from moma.training.parallel import Ranks, start_ranks
from moma.weights.bundle import Bundle
from moma.world import classifiers, world
from moma.world.classifiers import BYTE, Prediction, Probes, draw_all, stacked
from moma.world.drawing import stream
from moma.world.measures import iou, retrieved
from moma.world.world import MATERIALS, SCENES, Spec, WorldConfig, draw

MARKS = ("<!-- report:begin -->", "<!-- report:end -->")  # the report owns what lies between them
# Names of settings. The last of MASKS samples with the release's settings where the bundle's differ.
TEXT, BASELINE, MAIN, NONE = "text only", "IP-Adapter", "MoMA, β = 1", "MoMA, β = 0"
MASKS = ("half", "off", "full, release's settings")
MASKING_METHODS = ("half-mask", "no-mask")  # of the registry, in the order of MASKS
MASKING = """Background: against β = 0 with the same noise. Release's settings: soft M_gen above 0.2 from all
layers; Eq. 3 at t < 950."""
RELEASED = ("m_gen_layers", "m_gen_threshold", "m_gen_inside", "subject_below_t")
REAL, OTHER, DECODED = "real renders", "another subject", "real renders, autoencoded"


@dataclass(frozen=True)
class ReportConfig:
    """What is drawn and measured."""

    pairs: int = 240  # of identity and scene: a share of 90% is then known to about 4 points
    textures: int = 120  # of identity and material, 30 of each
    distractors: int = 10  # K: other identities of the same class, so chance is 1 in 11
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.2)  # Table 4's β; 0 and 1 are always needed
    texture_strengths: tuple[float, ...] = (0.0, 0.4, 0.7, 1.0)
    texture_strength: float = 0.4  # the paper's for textures, used where MoMA has a single row
    margin: int = 2  # mask cells around a subject that are not background yet: outline, shadow
    rows: int = 4  # of a figure: the first pairs, not the best
    scale: int = 2  # of the figures' images
    sample: SampleConfig = SampleConfig(batch_size=16)  # noqa: RUF009 (frozen)
    world: WorldConfig = WorldConfig()  # noqa: RUF009
    # Least averages of MoMA at β = 1, in the order of the targets; 0 has to be exceeded.
    wanted: tuple[float, ...] = (0.9, 0.95, 0.8, 0.25, 0.6, 0.0, 0.0)


# --- subjects and prompts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """An unseen subject in the reference and in the wanted image."""

    shown: Spec
    wanted: Spec  # scene and material make the prompt; the pose matters to real renders only
    seed: int  # of the start noise in every setting

    @property
    def prompt(self) -> str:
        return world.prompt(self.wanted.label, self.wanted.scene, self.wanted.material)


def make_pairs(number: int, materials: Sequence[str | None], cfg: ReportConfig) -> list[Pair]:
    """Pairs of the first identities of the test split.

    Args:
        number: of pairs.
        materials: of the wanted images, in turn; None keeps the identity's own colours.
        cfg: what is drawn.
    """
    pairs: dict[tuple[str, int], Pair] = {}
    for i in count():
        if len(pairs) == number:
            return list(pairs.values())
        shown, rng = replace(world.spec(i, "test", cfg.world), material=None), stream("report", i)
        scene = [scene for scene in SCENES if scene != shown.scene][rng.integers(len(SCENES) - 1)]
        material = materials[len(pairs) % len(materials)]
        wanted = Spec(shown.label, shown.number, scene, material, *world.draw_seeds(rng))
        pairs.setdefault((shown.label, shown.number), Pair(shown, wanted, seed=i))


# --- settings ----------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Drawings of N pairs."""

    images: Tensor  # (N, 3, S, S) uint8
    m_gen: Tensor  # (N, h, w) float32, zeros where there is none


class TextWithMaps(MoMA):
    """The base model alone, with M_gen of the label's attention maps."""

    def condition(self, prepared: Sequence[MoMAPrepared], config: SampleConfig) -> MoMAConditioning:
        cond = super().condition(prepared, config)
        silent = [(k, torch.zeros_like(v)) for k, v in cond.context]
        return replace(cond, context=silent, beta=torch.zeros_like(cond.beta))


def generate(pipe: Pipeline, pairs: Sequence[Pair], cfg: ReportConfig, strength: float = 1.0) -> Drawn:
    """Draw pairs.

    Args:
        pipe: draws them.
        pairs: what to draw.
        cfg: how to draw.
        strength: β of Eq. 3.
    """
    return drawn(pipe.run(make_jobs(pipe, pairs, cfg, strength), cfg.sample))


def make_jobs(pipe: Pipeline, pairs: Sequence[Pair], cfg: ReportConfig, strength: float) -> list[Job]:
    """One job for each pair, with everything computed that precedes the denoising; as `generate`."""
    jobs = []
    for pair in pairs:
        image, mask = map(Image.fromarray, draw(pair.shown, cfg.world)[:2])
        options = {"seed": pair.seed, "prompts": [pair.prompt]}
        subject = pipe.encode_subject(image, mask, pair.shown.label, **options)
        jobs.append(Job(subject, pair.prompt, pair.seed, strength=strength))
    return jobs


def drawn(results: Iterable[Result]) -> Drawn:
    """The drawings of a run."""
    results, none = list(results), torch.zeros(1, 1, 1)
    masks = torch.cat([none if r.m_gen is None else r.m_gen for r in results])  # (N, h, w)
    return Drawn(stacked([r.image for r in results]), masks.float().cpu())


def _text_alone(pipe: Pipeline, pairs: Sequence[Pair], cfg: ReportConfig) -> Drawn:
    moma = pipe.method
    method = TextWithMaps(moma.base, moma.adapter, moma.decoder, moma.config)
    return generate(replace(pipe, method=method), pairs, cfg)


@torch.no_grad()
def _autoencoded(pipe: Pipeline, pairs: Sequence[Pair], cfg: ReportConfig) -> Drawn:
    """Real renders after the autoencoder, an upper bound for generators that use it."""
    real, vae = _real(pairs, cfg), pipe.base.vae
    mean, _ = vae.encode(to_pixels(real.images.to(pipe.device)).to(pipe.dtype))  # (N, Z, h, w)
    return Drawn(stacked(to_images(vae.decode(mean))), real.m_gen)


def _real(pairs: Sequence[Pair], cfg: ReportConfig, step: int = 0) -> Drawn:
    """The wanted images as the world draws them, of identities `step` places further in the class."""
    specs = [world.neighbour(pair.wanted, step, cfg.world) for pair in pairs]
    return Drawn(draw_all(specs, cfg.world)[0], torch.zeros(len(pairs), 1, 1))


@dataclass(frozen=True)
class Setting:
    """A way to draw pairs."""

    bundle: Path
    draw: Callable[[Pipeline, Sequence[Pair], ReportConfig], Drawn]
    method: str = "moma"  # of the registry
    config: Mapping[str, Any] = field(default_factory=dict)  # changed fields of the method's config


def _moma(strength: float) -> str:
    return f"MoMA, β = {strength:g}"


def plan(
    bundle: Path, baseline: Path | None, variants: Mapping[str, Path], cfg: ReportConfig
) -> dict[str, dict[str, Setting]]:
    """All settings of the report.

    Args:
        bundle: MoMA-mini.
        baseline: bundle with an IP-Adapter, if there is one.
        variants: name -> bundle of another MoMA-mini.
        cfg: what is drawn.

    Returns:
        Kind of pairs ("scenes", "textures") -> name of a setting -> the setting.
    """
    both = {TEXT: Setting(bundle, _text_alone)}
    if baseline:
        both[BASELINE] = Setting(baseline, generate, "ip-adapter")
    scenes = {
        name: Setting(bundle, generate, method) for name, method in zip(MASKS, MASKING_METHODS, strict=False)
    }
    released = {name: getattr(DEFAULT, name) for name in RELEASED}
    if released.keys() & Bundle.open(bundle).method.keys():
        scenes[MASKS[-1]] = Setting(bundle, generate, config=released)
    scenes[DECODED] = Setting(bundle, _autoencoded)
    scenes |= {name: Setting(folder, generate) for name, folder in variants.items()}
    sweeps = [
        {_moma(beta): Setting(bundle, partial(generate, strength=beta)) for beta in betas}
        for betas in (cfg.strengths, cfg.texture_strengths)
    ]
    return {"scenes": both | scenes | sweeps[0], "textures": both | sweeps[1]}


class Batch(NamedTuple):
    """Pairs to draw in a setting, and the file that keeps the result."""

    name: str  # of the setting
    setting: Setting
    pairs: Sequence[Pair]
    file: Path


def _batches(named: tuple[str, Setting], pairs: Sequence[Pair], work: Path, facts: list[Any]) -> list[Batch]:
    """The batches of a setting; all that determines a drawing is hashed into the name of its file.

    facts: the configuration, the device and the dtype.
    """
    (name, setting), size = named, ReportConfig().sample.batch_size
    bundle, batches = Bundle.open(setting.bundle), []
    facts = [name, bundle.hashes, bundle.method, bundle.methods, *facts]
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        text = json.dumps([*facts, [asdict(pair) for pair in some]], sort_keys=True)
        file = work / f"{sha256(text.encode()).hexdigest()}.safetensors"
        batches.append(Batch(name, setting, some, file))
    return batches


def _draw(batches: Sequence[Batch], cfg: ReportConfig, runtime: Runtime) -> None:
    """Draw the batches whose files do not exist."""

    @lru_cache(maxsize=1)  # batches of one setting come together
    def load(folder: Path, method: str, *config: tuple[str, Any]) -> Pipeline:
        bundle = Bundle.open(folder)
        config = bundle.method_config(method, **dict(config))
        return load_pipeline(replace(runtime, weights=bundle), method, config)

    for name, setting, pairs, file in batches:
        if not file.exists():
            pipe = load(setting.bundle, setting.method, *setting.config.items())
            save_tensors(file.parent, file.stem, setting.draw(pipe, pairs, cfg)._asdict())
            print(f"{setting.bundle}, {name}: {len(pairs)} images", file=sys.stderr)


def _read(batches: Sequence[Batch]) -> Drawn:
    """The drawings of all batches of a setting."""
    found = [read_checkpoint(batch.file) for batch in batches]
    return Drawn(*(torch.cat([part[key].read() for part in found]) for key in Drawn._fields))


# --- measures ----------------------------------------------------------------------------------------

Values = dict[str, Tensor]  # name of a measure -> its value for each image, (N,) bool or float
HEADINGS = {
    "class": "class %", "scene": "scene %", "material": "material %", "identity": "identity %",
    "pattern": "pattern %", "colour": "colour error", "mask": "M_gen IoU", "change": "background change",
    "tint": "background tint", "difference": "difference",
}  # fmt: skip
FIDELITY = ("class", "scene", "identity", "pattern", "colour")
INTRO = """{pairs} unseen subjects, each in another scene than its reference's, and {textures} of another
material; {sample.steps} steps, guidance {sample.guidance:g}, the same noise in every row. Small networks
trained on real renders classify the images; brackets hold 95% intervals. Identity: share of images that
these networks find nearer to another render of their subject than to those of {distractors} others of the
class (chance: 1 in {of}). Colour error: of the main and the second colour, 0..255. M_gen IoU: of where the
last M_gen is above 0 with the subject that these networks find. Background, outside of subjects: mean
difference, and how much nearer to the subject's main colour.
"""


def measure(
    shown: Mapping[str, Drawn], pairs: Sequence[Pair], probes: Probes, cfg: ReportConfig
) -> dict[str, Values]:
    """Measure drawings with the classifiers.

    Args:
        shown: name of a setting -> its drawings of the pairs.
        pairs: what was to be drawn.
        probes: the classifiers.
        cfg: what is measured.

    Returns:
        Name of a setting -> its measures.
    """
    wanted = [pair.wanted for pair in pairs]
    true = classifiers.truth_of(wanted, cfg.world)
    others = classifiers.gallery(probes, wanted, cfg.distractors, cfg.world)  # (N, 1 + K, E)
    seen = {name: classifiers.classify(probes, its.images) for name, its in shown.items()}
    values = {}
    for name, its in shown.items():
        mask = F.adaptive_avg_pool2d(seen[name].mask.float(), its.m_gen.shape[-2:]) > 0.5  # (N, h, w)
        values[name] = {
            **classifiers.compare(seen[name].truth, true),
            "identity": retrieved(seen[name].embedding, others),
            "mask": iou(its.m_gen > 0, mask),
        }
        if name in (MAIN, *MASKS):
            both = (shown[NONE], seen[NONE]), (its, seen[name])
            values[name] |= background(*both, true.colours[:, :3], cfg.margin)
    return values


def background(
    base: tuple[Drawn, Prediction], other: tuple[Drawn, Prediction], colour: Tensor, margin: int
) -> Values:
    """Changes of the background, outside of either image's subject and its margin.

    Args:
        base: drawings, and what the classifiers see in them.
        other: drawings from the same noise.
        colour: main colours of the subjects, (N, 3) in 0..1.
        margin: in cells of the predicted mask.

    Returns:
        change: mean difference, 0..255; tint: how much nearer the background came to the subject's main
        colour, which only spilling causes.
    """
    subject = (base[1].mask | other[1].mask).float()[:, None]  # (N, 1, s, s)
    near = F.max_pool2d(subject, 2 * margin + 1, stride=1, padding=margin)
    then, later, colour = base[0].images.float(), other[0].images.float(), colour[..., None, None] * BYTE
    outside = F.interpolate(1 - near, size=later.shape[-2:], mode="nearest")[:, 0]  # (N, S, S)
    maps = {"change": (later - then).abs(), "tint": (then - colour).abs() - (later - colour).abs()}
    area = outside.sum(dim=(1, 2)).clamp_min(1)  # (N,)
    return {name: (x.mean(dim=1) * outside).sum(dim=(1, 2)) / area for name, x in maps.items()}


@dataclass(frozen=True)
class Table:
    """Settings by measures; the cells of measures that a row lacks stay empty."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Mapping[str, Values]
    facts: Mapping[str, Mapping[str, str]] = field(
        default_factory=dict
    )  # first columns: heading -> row -> text

    def numbers(self) -> dict[str, dict[str, Estimate]]:
        """Row -> measure -> its average."""
        return {
            row: {name: estimate(found[name]) for name in self.columns if name in found}
            for row, found in self.rows.items()
        }

    def markdown(self) -> str:
        heads = ["", *self.facts, *(HEADINGS[name] for name in self.columns)]
        lines = []
        for row, found in self.numbers().items():
            facts = [texts.get(row, "") for texts in self.facts.values()]
            cells = (_cell(name, found[name]) if name in found else "" for name in self.columns)
            lines.append([row, *facts, *cells])
        return "\n\n".join(filter(None, [f"### {self.title}", self.note, markdown_table(heads, lines)]))


def _cell(name: str, found: Estimate) -> str:
    times = 100 if HEADINGS[name].endswith("%") else 1
    mean, low, high = (f"{times * value:.3g}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def _tables(
    values: Mapping[str, Mapping[str, Values]], new: Tensor, variants: Sequence[str], cfg: ReportConfig
) -> list[Table]:
    """values: kind of pairs -> setting -> measures; new: (N,) bool, combinations that were never trained."""
    scenes, textures = values["scenes"], values["textures"]
    low = _moma(cfg.texture_strength)
    methods = {name: name for name in (TEXT, BASELINE) if name in scenes} | {MAIN: low}
    compared = {row: scenes[row] | {"material": textures[made]["material"]} for row, made in methods.items()}
    if new.any():
        rest = {name: x[new] for name, x in scenes[MAIN].items() if name != "material"}
        compared["the same, combinations never trained"] = rest
    masks = {"full": scenes[MAIN]} | {name: scenes[name] for name in MASKS if name in scenes}
    every, spilled = (*FIDELITY, "mask"), ("scene", "identity", "mask", "change", "tint")
    materials = f"Materials: MoMA with β = {cfg.texture_strength:g}."

    others, bounds = (MAIN, *variants), (REAL, DECODED, OTHER)

    def chosen(of: Mapping[str, Values], names: Iterable[str]) -> dict[str, Values]:
        return {name: of[name] for name in names}

    sweep = chosen(scenes, map(_moma, cfg.strengths))
    made = chosen(textures, map(_moma, cfg.texture_strengths))
    return [
        Table("Methods (Table 1)", materials, ("material", *FIDELITY), compared),
        Table("Masking (Table 3, Fig. 9)", MASKING, spilled, masks),
        Table("Strength in new scenes (Table 4)", "", every, sweep),
        Table("Strength for new textures (Fig. 8)", "", ("material", "class", "scene"), made),
        Table("Adapters trained otherwise", "All at β = 1.", every, chosen(scenes, others)),
        Table("Upper and lower bounds", "", FIDELITY, chosen(scenes, bounds)),
    ]


def _targets(
    values: Mapping[str, Mapping[str, Values]], cfg: ReportConfig
) -> dict[str, tuple[float, Estimate]]:
    """Name -> the value of `ReportConfig.wanted` and the average found; those with a baseline come last."""
    scenes, textures = values["scenes"], values["textures"]

    def ahead(key: str, of: str) -> Tensor:
        return scenes[MAIN][key].float() - scenes[of][key].float()

    found = {
        "scene accuracy": scenes[MAIN]["scene"],
        "class accuracy": scenes[MAIN]["class"],
        f"identity found among {cfg.distractors + 1} of its class": scenes[MAIN]["identity"],
        "the same, ahead of β = 0": ahead("identity", NONE),
        "IoU of M_gen and subject": scenes[MAIN]["mask"],
    }
    if BASELINE in scenes:
        low, rival = textures[_moma(cfg.texture_strength)]["material"], textures[BASELINE]["material"]
        prompts = torch.cat([ahead("scene", BASELINE), low.float() - rival.float()])
        found[f"scenes, and materials at β = {cfg.texture_strength:g}, ahead of {BASELINE}"] = prompts
        found[f"identity, ahead of {BASELINE}"] = ahead("identity", BASELINE)
    rows = zip(found.items(), cfg.wanted, strict=False)
    return {text: (least, estimate(values)) for (text, values), least in rows}


def _verdicts(found: Mapping[str, tuple[float, Estimate]]) -> str:
    rows = []
    for text, (least, e) in found.items():
        met = "met" if (e.mean >= least if least else e.low > 0) else "**missed**"
        if not least and e.low <= 0 < e.high:
            met = "undecided"
        asked = f"at least {least:g}" if least else "above 0"
        rows.append((text, asked, f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})", met))
    return markdown_table(("MoMA, β = 1", "wanted", "found", ""), rows)


# --- the page ----------------------------------------------------------------------------------------


def _figure(path: Path, pairs: Sequence[Pair], columns: Mapping[str, Tensor], cfg: ReportConfig) -> None:
    """Save the references of the first pairs beside columns of images (N, 3, S, S) or masks (N, h, w)."""
    shown = draw_all([pair.shown for pair in pairs[: cfg.rows]], cfg.world)[0]
    side = cfg.scale * cfg.world.size

    def cell(image: Tensor, *lines: str) -> Cell:
        picked = (
            mask_image(image[None]) if image.ndim == 2 else Image.fromarray(image.permute(1, 2, 0).numpy())
        )
        return Cell(picked.resize((side, side), Image.Resampling.NEAREST), lines)

    rows = [
        [
            cell(shown[i], "reference"),
            *(cell(images[i], name, pair.prompt) for name, images in columns.items()),
        ]
        for i, pair in enumerate(pairs[: cfg.rows])
    ]
    save_png(path, contact_sheet(rows, SheetConfig(cell=side, gap=6, caption=28, font=11)))


def _figures(
    folder: Path,
    drawings: Mapping[str, Mapping[str, Drawn]],
    pairs: Mapping[str, list[Pair]],
    cfg: ReportConfig,
) -> str:
    """Save the images; returns the Markdown that shows them."""
    sheets = {
        "methods": ("scenes", [TEXT, BASELINE, _moma(cfg.strengths[1]), MAIN]),
        "strength": ("scenes", [_moma(beta) for beta in cfg.strengths]),
        "textures": ("textures", [_moma(beta) for beta in cfg.texture_strengths]),
        "masking": ("scenes", [NONE, MAIN, "half", "off"]),
    }
    for name, (kind, settings) in sheets.items():
        of = drawings[kind]
        columns = {setting: of[setting].images for setting in settings if setting in of}
        last = {"M_gen": of[MAIN].m_gen} if name == "masking" else {}
        _figure(folder / f"{name}.png", pairs[kind], columns | last, cfg)
    return "\n".join(f"![{name}]({folder.name}/{name}.png)\n" for name in sheets)


def around(page: Path) -> tuple[str, str]:
    """The text before and after the marks of a page. ValueError for a page without them."""
    old = page.read_text(encoding="utf-8") if page.exists() else f"# {page.stem}\n\n{MARKS[0]}\n{MARKS[1]}\n"
    if not all(old.count(mark) == 1 for mark in MARKS):
        raise ValueError(f"{page}: expected the lines {MARKS[0]} and {MARKS[1]}, once each")
    return old.split(MARKS[0])[0], old.split(MARKS[1])[1]


def rewrite(page: Path, text: str) -> None:
    """Put a text between the marks of a page. ValueError for a page without them."""
    before, after = around(page)
    write_text(page, f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


# --- the command -------------------------------------------------------------------------------------


def parser_of(
    name: str, about: str, paths: Mapping[str, tuple[str | None, str]], numbers: Mapping[str, int]
) -> argparse.ArgumentParser:
    """The parser of a command of MoMA-mini.

    Args:
        name: of the module.
        about: its docstring.
        paths: option -> default and help.
        numbers: option -> default.
    """
    parser = argparse.ArgumentParser(f"python -m {name}", description=about.split("\n\n")[1])
    for option, (path, text) in paths.items():
        text = f"{text} (default: {path})" if path else text
        parser.add_argument(option, type=Path, default=path and Path(path), help=text)
    for option, number in numbers.items():
        parser.add_argument(option, type=int, default=number, help=f"(default: {number})")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cfg, page = ReportConfig(), "page to rewrite between its marks; images and numbers.json go beside it"
    paths = {
        "--bundle": ("weights/mini", "MoMA-mini"),
        "--probes": ("weights/mini/probes.safetensors", "the classifiers"),
        "--baseline": (None, "bundle with an IP-Adapter trained as long"),
        "--work": ("out/report", "folder of the drawings, reused by the next run"),
        "--page": ("docs/mini.md", page),
    }
    numbers = {"--pairs": cfg.pairs, "--textures": cfg.textures, "--steps": cfg.sample.steps}
    parser = parser_of("moma.mini.report", __doc__, paths, numbers)
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=BUNDLE", help="another MoMA-mini"
    )
    args = parser.parse_args(argv)
    if min(args.pairs, args.textures) < 1:
        raise ValueError("--pairs and --textures: expected 1 or more")
    if bad := [text for text in args.variant if "=" not in text]:
        raise ValueError(f"--variant {bad[0]!r}: expected NAME=BUNDLE")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report; under torchrun the ranks share the drawing. ValueError for wrong arguments."""
    set_precision()
    args = _parse(argv)
    with start_ranks(args.device) as ranks:
        _report(args, ranks)


def _report(args: argparse.Namespace, ranks: Ranks) -> None:
    cfg = ReportConfig(pairs=args.pairs, textures=args.textures)
    cfg = replace(cfg, sample=replace(cfg.sample, steps=args.steps))
    probes, folder = classifiers.load_probes(args.probes), args.page.with_suffix("")
    variants = {name: Path(path) for name, path in (text.split("=", 1) for text in args.variant)}
    pairs = {
        "scenes": make_pairs(cfg.pairs, [None], cfg),
        "textures": make_pairs(cfg.textures, MATERIALS, cfg),
    }
    for path in (args.work, folder):
        path.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.choose(Bundle.open(args.bundle), str(ranks.device), args.dtype, stream="off")
    drawing = replace(cfg, pairs=0, textures=0, rows=0, scale=0, wanted=())  # these change no drawing
    facts = [asdict(drawing), runtime.device.type, dtype_name(runtime.dtype)]
    planned = {
        kind: {named[0]: _batches(named, pairs[kind], args.work, facts) for named in settings.items()}
        for kind, settings in plan(args.bundle, args.baseline, variants, cfg).items()
    }
    every = [batch for settings in planned.values() for batches in settings.values() for batch in batches]
    _draw(every[ranks.rank :: ranks.world], cfg, runtime)
    ranks.gather(None)  # until all have drawn
    if not ranks.main:
        return
    drawings = {}
    for kind, settings in planned.items():
        real = {REAL: _real(pairs[kind], cfg), OTHER: _real(pairs[kind], cfg, cfg.distractors + 1)}
        drawings[kind] = {name: _read(batches) for name, batches in settings.items()} | real
    values = {kind: measure(shown, pairs[kind], probes, cfg) for kind, shown in drawings.items()}
    wanted = [pair.wanted for pair in pairs["scenes"]]
    new = torch.tensor([world.held_out(what.label, what.scene, None, cfg.world) for what in wanted])
    tables, targets = _tables(values, new, list(variants), cfg), _targets(values, cfg)
    numbers = {"targets": targets, **{table.title: table.numbers() for table in tables}}
    write_text(folder / "numbers.json", json.dumps(numbers, indent=1, ensure_ascii=False))
    verdict, intro = _verdicts(targets), INTRO.format(**vars(cfg), of=cfg.distractors + 1)
    images = _figures(folder, drawings, pairs, cfg)
    rewrite(args.page, "\n".join([intro, verdict, images, *(table.markdown() for table in tables)]))
    print(verdict)


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("report", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
