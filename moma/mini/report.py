"""The papers' claims in miniature: `python -m moma.mini.report --bundle weights/mini`.

Draws unseen subjects in every setting, classifies the images, and rewrites the tables and images of
docs/mini.md. Each batch is kept in a file under --work, so an interrupted run resumes.

Letters: N images, S W sides of an image, h w latents.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from models.weights.loading import read_checkpoint, save_tensors
from moma.app.files import Parser, counted, exit_status, markdown_table, write_text
from moma.app.options import MINI
from moma.app.record import save_png, short_path
from moma.app.sheets import Cell, SheetConfig, contact_sheet, mask_image
from moma.evaluate.estimates import Estimate, estimate
from moma.load import load_pipeline
from moma.methods.moma.config import DEFAULT
from moma.mini.asked import Asked, Drawn, duos, generate, real, real_autoencoded, singles, text_alone
from moma.mini.config import ReportConfig
from moma.mini.rated import Table, Values, backgrounds, classified, measure, measure_duos
from moma.sampling.config import parse_field
from moma.sampling.device import dtype_name, set_precision
from moma.sampling.interface import Runtime
from moma.sampling.pipeline import Pipeline
from moma.training.parallel import Ranks, start_ranks
from moma.weights.bundle import Bundle
from moma.world import classifiers, world
from moma.world.classifiers import draw_all
from moma.world.world import MATERIALS

MARKS = ("<!-- report:begin -->", "<!-- report:end -->")  # the report owns what lies between them
# Names of settings.
TEXT, MAIN, NONE = "text only", "MoMA, β = 1", "MoMA, β = 0"
# Other methods: name -> of the registry, and the network of the bundle that it needs.
IP_ADAPTER, MM_DIFF, REFERENCE = "IP-Adapter", "MM-Diff", "reference attention"
OTHERS = {
    IP_ADAPTER: ("ip-adapter", "ip_adapter"),
    MM_DIFF: ("mm-diff", "mm_diff"),
    REFERENCE: ("reference-attention", "unet"),
}
MASKS = {"half": "half-mask", "off": "no-mask"}  # name -> method of the registry
RELEASE = "full, release's settings"  # drawn where the bundle's differ
MASKING = """Background: against β = 0 with the same noise. Release's settings: soft M_gen above 0.2 from all
layers; Eq. 3 at t < 950."""
RELEASED = ("m_gen_layers", "m_gen_threshold", "m_gen_inside", "subject_below_t")
REAL, OTHER, DECODED = "real renders", "another subject", "real renders, autoencoded"
NEW = "combinations never trained"


# --- settings ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A way to draw."""

    bundle: Path
    draw: Callable[[Pipeline, Sequence[Asked], ReportConfig], Drawn] = generate
    method: str = "moma"  # of the registry
    config: Mapping[str, Any] = field(default_factory=dict)  # changed fields of the method's config


def _moma(strength: float) -> str:
    return f"MoMA, β = {strength:g}"


def _uncond(beta: float) -> str:
    return f"MoMA, unconditional β = {beta:g}"


def variant(text: str) -> tuple[str, Setting]:
    """ "name=bundle@method,field=value,..." as a setting; method and fields may be left out.

    ValueError for another form.
    """
    found = re.fullmatch(r"([^=]+)=([^@,]+)(?:@([\w-]+))?((?:,\w+=[^,]+)*)", text)
    if not found:
        raise ValueError(f"--variant {text!r}: expected NAME=BUNDLE[@METHOD][,FIELD=VALUE...]")
    name, bundle, method, fields = found.groups()
    config = dict(parse_field(one) for one in fields.split(",")[1:])
    return name, Setting(Path(bundle), method=method or "moma", config=config)


def plan(bundle: Path, variants: Mapping[str, Setting], cfg: ReportConfig) -> dict[str, dict[str, Setting]]:
    """All settings of the report.

    Args:
        bundle: MoMA-mini.
        variants: name -> another setting.
        cfg: what is drawn.

    Returns:
        Kind of images ("scenes", "textures", "duos") -> name of a setting -> the setting.
    """
    opened = Bundle.open(bundle)
    has = opened.configs
    others = {name: Setting(bundle, method=own) for name, (own, needs) in OTHERS.items() if needs in has}
    both = {TEXT: Setting(bundle, text_alone)} | others
    scenes = {name: Setting(bundle, method=method) for name, method in MASKS.items()}
    released = {name: getattr(DEFAULT, name) for name in RELEASED}
    if released.keys() & opened.method.keys():
        scenes[RELEASE] = Setting(bundle, config=released)
    scenes[DECODED] = Setting(bundle, real_autoencoded)
    scenes |= {_uncond(x): Setting(bundle, config={"unconditional_beta": x}) for x in cfg.unconditional}
    sweeps = [
        {_moma(beta): Setting(bundle, partial(generate, strength=beta)) for beta in betas}
        for betas in (cfg.strengths, cfg.texture_strengths)
    ]
    two = {TEXT: Setting(bundle, method="text")} | others | {MAIN: Setting(bundle)}
    return {
        "scenes": both | scenes | variants | sweeps[0],
        "textures": both | sweeps[1],
        "duos": two | variants,
    }


class Batch(NamedTuple):
    """Images to draw in a setting, and the file that keeps the result."""

    name: str  # of the setting
    setting: Setting
    asked: Sequence[Asked]
    file: Path


def _batches(
    name: str, setting: Setting, asked: Sequence[Asked], work: Path, cfg: ReportConfig, runtime: Runtime
) -> list[Batch]:
    """The batches of a setting; all that determines a drawing is hashed into the name of its file.

    Args:
        name: of the setting.
        setting: how to draw.
        asked: what to draw.
        work: folder of the files.
        cfg: of the drawings.
        runtime: device and dtype.
    """
    bundle, batches = Bundle.open(setting.bundle), []
    facts = [name, setting.method, dict(setting.config), bundle.hashes, bundle.method, bundle.methods]
    facts += [asdict(cfg.sample), asdict(cfg.world), runtime.device.type, dtype_name(runtime.dtype)]
    for start in range(0, len(asked), cfg.sample.batch_size):
        some = asked[start : start + cfg.sample.batch_size]
        text = json.dumps([*facts, [asdict(one) for one in some]], sort_keys=True)
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

    for name, setting, asked, file in batches:
        if not file.exists():
            pipe = load(setting.bundle, setting.method, *setting.config.items())
            save_tensors(file.parent, file.stem, setting.draw(pipe, asked, cfg)._asdict())
            print(f"{setting.bundle}, {name}: {counted(len(asked), 'image')}", file=sys.stderr)


def _read(batches: Sequence[Batch]) -> Drawn:
    """The drawings of all batches of a setting."""
    found = [read_checkpoint(batch.file) for batch in batches]
    return Drawn(*(torch.cat([part[key].read() for part in found]) for key in Drawn._fields))


# --- tables --------------------------------------------------------------------------------------------

Measured = Mapping[str, Mapping[str, Values]]  # kind of images -> name of a setting -> measures
FIDELITY = ("class", "scene", "identity", "pattern", "colour", "sharpness")
DUOS = ("both", "each", "swapped")
INTRO = """{pairs} unseen subjects, each in another scene than its reference's, {new:.0%} of them in
combinations of class and scene that were never trained, {textures} of another material, and {duos} images of
two subjects; {sample.steps} steps, guidance {sample.guidance:g}, the same noise in every row. Small networks
trained on real renders classify the images; brackets hold 95% intervals. Identity: share of images that
these networks find nearer to another render of their subject than to those of {distractors} others of the
class (chance: 1 in {of}). Colour error: of the main and the second colour, 0..255. Sharpness: mean absolute
Laplacian inside the subject. M_gen IoU: of where the last M_gen is above 0 with the subject that these
networks find. Background, outside of subjects: mean difference, and how much nearer to the subject's main
colour. Two subjects: both present; of all subjects, those that are there and found; those that are there with
colours nearer to the other's.
"""


def _tables(values: Measured, new: Tensor, variants: Sequence[str], cfg: ReportConfig) -> list[Table]:
    """The report's tables; new: (N,) bool, combinations that were never trained."""
    scenes, textures, two = (values[kind] for kind in ("scenes", "textures", "duos"))
    every, spilled = (*FIDELITY, "mask"), ("scene", "identity", "mask", "change", "tint")
    low, compared = _moma(cfg.texture_strength), {}
    for name in (TEXT, *OTHERS, MAIN):
        if name in scenes:
            compared[name] = scenes[name] | {"material": textures[low if name == MAIN else name]["material"]}
            if new.any() and name in (IP_ADAPTER, MM_DIFF, MAIN):
                rest = {key: x[new] for key, x in scenes[name].items() if key != "material"}
                compared[f"{name}, {NEW}"] = rest

    def chosen(of: Mapping[str, Values], *names: str) -> dict[str, Values]:
        return {name: of[name] for name in names if name in of}

    masks = {"full": scenes[MAIN]} | chosen(scenes, *MASKS, RELEASE)
    made = chosen(textures, *map(_moma, cfg.texture_strengths))
    shares = map(_uncond, cfg.unconditional)
    trained = {name: scenes[name] | {key: two[name][key] for key in DUOS} for name in (MAIN, *variants)}
    about = f"Materials: MoMA with β = {cfg.texture_strength:g}."
    return [
        Table("Methods (Table 1)", about, ("material", *FIDELITY), compared),
        Table("Two subjects", "", ("scene", *DUOS), chosen(two, TEXT, *OTHERS, MAIN, REAL)),
        Table("Masking (Table 3, Fig. 9)", MASKING, spilled, masks),
        Table("Strength in new scenes (Table 4)", "", every, chosen(scenes, *map(_moma, cfg.strengths))),
        Table("Strength for new textures (Fig. 8)", "", ("material", "class", "scene"), made),
        Table("Guidance of the subject term", "", every, chosen(scenes, MAIN, *shares)),
        Table("Adapters trained otherwise", "All at β = 1.", (*every, *DUOS), trained),
        Table("Upper and lower bounds", "", FIDELITY, chosen(scenes, REAL, DECODED, OTHER)),
    ]


def _targets(values: Measured, new: Tensor, cfg: ReportConfig) -> dict[str, Estimate]:
    """Name, as in `ReportConfig.wanted` -> the average found."""
    scenes, textures, two = (values[kind] for kind in ("scenes", "textures", "duos"))
    main, material = scenes[MAIN], textures[_moma(cfg.texture_strength)]["material"]
    found = {name: main[name] for name in ("identity", "pattern", "class", "scene")}
    found |= {"colour error": main["colour"], "M_gen IoU": main["mask"], "material at β = 0.4": material}
    found["sharpness, less the base's"] = main["sharpness"] - scenes[TEXT]["sharpness"]
    if new.any():
        found[f"identity in {NEW}"] = main["identity"][new]
    if rival := scenes.get(IP_ADAPTER):
        less = {name: main[name].float() - rival[name].float() for name in ("identity", "class", "scene")}
        less["material at β = 0.4"] = material.float() - textures[IP_ADAPTER]["material"].float()
        found |= {f"{name}, less IP-Adapter's": value for name, value in less.items()}
    names = {"both": "both present", "each": "identity of each", "swapped": "other's colours"}
    for method, setting in (("MoMA", MAIN), ("MM-Diff", MM_DIFF)):
        for key, name in names.items() if setting in two else ():
            start = f"two subjects, {method}: {name}"
            found[start] = two[setting][key]
            if IP_ADAPTER in two and key != "swapped":
                found[f"{start}, less IP-Adapter's"] = found[start].float() - two[IP_ADAPTER][key].float()
    return {name: estimate(found[name]) for name in cfg.wanted if name in found}


def _verdicts(found: Mapping[str, Estimate], cfg: ReportConfig) -> str:
    rows = []
    for name, e in found.items():
        least, most = cfg.wanted[name]
        asked = f"at most {most:g}" if least == 0 and most not in (1, float("inf")) else f"at least {least:g}"
        met = "met" if least <= e.mean <= most else "**missed**"
        rows.append((name, asked, f"{e.mean:.3f} ({e.low:.3f} to {e.high:.3f})", met))
    return markdown_table(("MoMA, β = 1", "wanted", "found", ""), rows)


# --- the page ----------------------------------------------------------------------------------------


def _figure(path: Path, asked: Sequence[Asked], columns: Mapping[str, Tensor], cfg: ReportConfig) -> None:
    """Save the first references beside columns of images (N, 3, S, W) or masks (N, h, w)."""
    side = cfg.scale * cfg.world.size

    def cell(image: Tensor, *lines: str) -> Cell:
        own = mask_image(image[None]) if image.ndim == 2 else Image.fromarray(image.permute(1, 2, 0).numpy())
        size = round(side * own.width / own.height), side
        return Cell(own.resize(size, Image.Resampling.NEAREST), lines)

    rows = [
        [
            *(cell(image, "reference") for image in draw_all(one.shown, cfg.world)[0]),
            *(cell(images[i], name, one.prompt) for name, images in columns.items()),
        ]
        for i, one in enumerate(asked[: cfg.rows])
    ]
    width = max(cell.image.width for row in rows for cell in row)
    save_png(path, contact_sheet(rows, SheetConfig(cell=width, gap=6, caption=28, font=11)))


def _figures(
    folder: Path,
    drawings: Mapping[str, Mapping[str, Drawn]],
    asked: Mapping[str, list[Asked]],
    cfg: ReportConfig,
) -> str:
    """Save the images; returns the Markdown that shows them."""
    sheets = {
        "methods": ("scenes", [TEXT, *OTHERS, MAIN]),
        "duos": ("duos", [TEXT, *OTHERS, MAIN]),
        "strength": ("scenes", [_moma(beta) for beta in cfg.strengths]),
        "textures": ("textures", [_moma(beta) for beta in cfg.texture_strengths]),
        "masking": ("scenes", [NONE, MAIN, "half", "off"]),
    }
    for name, (kind, settings) in sheets.items():
        of = drawings[kind]
        columns = {setting: of[setting].images for setting in settings if setting in of}
        last = {"M_gen": of[MAIN].m_gen} if name == "masking" else {}
        _figure(folder / f"{name}.png", asked[kind], columns | last, cfg)
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
) -> Parser:
    """The parser of a command of MoMA-mini.

    Args:
        name: of the module.
        about: its docstring.
        paths: option -> default and help.
        numbers: option -> default.
    """
    parser = Parser(f"python -m {name}", description=about.split("\n\n")[1])
    for option, (path, text) in paths.items():
        text = f"{text} (default: {short_path(path)})" if path else text
        parser.add_argument(option, type=Path, default=path and Path(path), help=text)
    for option, number in numbers.items():
        parser.add_argument(option, type=int, default=number, help=f"(default: {number})")
    for option in ("--device", "--dtype"):
        parser.add_argument(option, default="auto", help="(default: %(default)s)")
    return parser


# Options of what is measured, and who judges it.
SHIPPED = {
    "--bundle": (str(MINI), "MoMA-mini"),
    "--probes": (str(MINI / "probes.safetensors"), "the classifiers"),
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cfg, page = ReportConfig(), "page to rewrite between its marks; images and numbers.json go beside it"
    work = "folder of the drawings, reused by the next run"
    paths = SHIPPED | {"--work": ("out/report", work), "--page": ("docs/mini.md", page)}
    numbers = {f"--{name}": getattr(cfg, name) for name in ("pairs", "textures", "duos")}
    parser = parser_of("moma.mini.report", __doc__, paths, numbers | {"--steps": cfg.sample.steps})
    about = "drawn in scenes and with two subjects, too: NAME=BUNDLE[@METHOD][,FIELD=VALUE...]"
    parser.add_argument("--variant", action="append", default=[], metavar="SETTING", help=about)
    parser.add_argument("--split", choices=("val", "test"), default=cfg.split, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.pairs, args.textures, args.duos) < 1:
        raise ValueError("--pairs, --textures and --duos: expected 1 or more")
    args.variant = dict(map(variant, args.variant))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report; under torchrun the ranks share the drawing. ValueError for wrong arguments."""
    set_precision()
    args = _parse(argv)
    with start_ranks(args.device) as ranks:
        _report(args, ranks)


def _report(args: argparse.Namespace, ranks: Ranks) -> None:
    cfg = ReportConfig(args.split, args.pairs, textures=args.textures, duos=args.duos)
    cfg = replace(cfg, sample=replace(cfg.sample, steps=args.steps))
    probes, folder = classifiers.load_probes(args.probes), args.page.with_suffix("")
    asked = {
        "scenes": singles(cfg.pairs, [None], cfg),
        "textures": singles(cfg.textures, MATERIALS, cfg),
        "duos": duos(cfg.duos, cfg),
    }
    for path in (args.work, folder):
        path.mkdir(parents=True, exist_ok=True)
    runtime = Runtime.choose(Bundle.open(args.bundle), str(ranks.device), args.dtype, stream="off")
    planned = {}
    for kind, settings in plan(args.bundle, args.variant, cfg).items():
        rest = asked[kind], args.work, cfg, runtime
        planned[kind] = {name: _batches(name, setting, *rest) for name, setting in settings.items()}
    every = [batch for settings in planned.values() for batches in settings.values() for batch in batches]
    _draw(every[ranks.rank :: ranks.world], cfg, runtime)
    ranks.gather(None)  # until all have drawn
    if not ranks.main:
        return
    drawings = {}
    for kind, settings in planned.items():
        true = {REAL: real(asked[kind], cfg), OTHER: real(asked[kind], cfg, cfg.distractors + 1)}
        drawings[kind] = {name: _read(batches) for name, batches in settings.items()} | true
    values = _measured(drawings, asked, probes, cfg)
    wanted = [one.wanted[0] for one in asked["scenes"]]
    new = torch.tensor([world.held_out(what.label, what.scene, None, cfg.world) for what in wanted])
    tables, targets = _tables(values, new, list(args.variant), cfg), _targets(values, new, cfg)
    numbers = {"targets": targets, **{table.title: table.numbers() for table in tables}}
    write_text(folder / "numbers.json", json.dumps(numbers, indent=1, ensure_ascii=False))
    verdict, intro = _verdicts(targets, cfg), INTRO.format(**vars(cfg), of=cfg.distractors + 1)
    images = _figures(folder, drawings, asked, cfg)
    rewrite(args.page, "\n".join([intro, verdict, images, *(table.markdown() for table in tables)]))
    print(verdict)


def _measured(
    drawings: Mapping[str, Mapping[str, Drawn]],
    asked: Mapping[str, list[Asked]],
    probes: classifiers.Probes,
    cfg: ReportConfig,
) -> Measured:
    seen = {kind: classified(drawings[kind], probes) for kind in ("scenes", "textures")}
    values = {kind: measure(drawings[kind], seen[kind], asked[kind], probes, cfg) for kind in seen}
    values["duos"] = measure_duos(drawings["duos"], asked["duos"], probes, cfg)
    masked = [name for name in (MAIN, *MASKS, RELEASE) if name in drawings["scenes"]]
    changed = backgrounds(drawings["scenes"], seen["scenes"], NONE, masked, asked["scenes"], cfg)
    for name, found in changed.items():
        values["scenes"][name] |= found
    return values


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("report", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
