"""Score methods by DreamBooth's protocol: `python -m moma.evaluate --dataset DIR --bundle DIR`.

Draws the protocol's images with the given methods, scores them and images drawn elsewhere
(`--images NAME=DIR`), and writes numbers, tables, the chart of the paper's Fig. 7 and a page of the images.
`--world` replaces the photos by MoMA-mini's drawn world. A run that was killed continues when it is started
again; under torchrun the ranks share the drawing.
"""

import sys
from collections.abc import Sequence

from moma.app.files import counted, exit_status
from moma.evaluate.draw import draw
from moma.evaluate.options import Options, parse
from moma.evaluate.page import write_outputs
from moma.evaluate.plan import prepare
from moma.evaluate.rate import embed_real, rate, rate_real
from moma.evaluate.scorers import FaceScorer, load_scorers
from moma.evaluate.world import mini_scorers
from moma.inputs.faces import load_detector
from moma.inputs.segment import Segmenter
from moma.sampling.device import set_precision
from moma.sampling.interface import Runtime
from moma.training.parallel import Ranks, start_ranks


def main(argv: Sequence[str] | None = None) -> None:
    """ValueError for a user's mistake."""
    set_precision()
    options = parse(argv, __doc__.split("\n\n")[1])
    with start_ranks(options.device) as ranks:
        evaluate(options, ranks)


def evaluate(options: Options, ranks: Ranks) -> None:
    """Draw on all ranks; score and write on the first."""
    runtime = Runtime.choose(None, str(ranks.device), options.dtype)
    plan = ranks.once(lambda: prepare(options, runtime))
    facts = dict(plan.facts)
    for run in plan.runs:
        if seconds := draw(run, ranks):
            facts[f"speed {run.name}"] = f"{seconds:.3g} s per image on {ranks.device}, all but loading"
    if not ranks.main:
        return
    scorers = load_scorers(plan.scorers, ranks.device) if options.dataset else mini_scorers(plan.scorers)
    if options.faces:
        scorers.append(FaceScorer(load_detector()))
    segmenter = plan.segmenter and Segmenter.load(plan.segmenter, ranks.device)
    real = embed_real(scorers, plan.subjects)
    scores = []
    for name, images in plan.images.items():
        print(f"{name}: scoring {counted(len(images), 'image')}", file=sys.stderr)
        scores += rate(name, images, real, scorers, options.out, segmenter)
    photos = {subject.name: subject.photos for subject in plan.subjects}
    write_outputs(
        options.out, scores, rate_real(real, scorers, plan.subjects), facts, photos, plan.dreambooth
    )
    print((options.out / "table.md").read_text(encoding="utf-8"))
    print(options.out / "index.html")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` with an exit status."""
    return exit_status("evaluate", lambda: main(argv))


if __name__ == "__main__":
    sys.exit(run())
