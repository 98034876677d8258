"""Plant mistakes in a copy of the repository, one at a time, and see whether the tests catch them.

python -m tests.mutations --list
python -m tests.mutations [--quick] [--only NAME ...] [--command "python -m pytest -x"]

Each mistake is one small edit of the method, the sampler, the converter, masks, training, bundles or of what
people use. `--list` also checks that every edit still applies; the exit status is 1 if one does not, or if a
mistake goes unseen.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COMMAND = "python -m pytest -x"  # the README's, stopping at the first failure
LIMIT = 1800  # seconds; a mistake that keeps the tests from ending counts as caught
FAILED = (1, 2)  # pytest's exit statuses for a failed test: by itself, and under xdist's -x


class Mutation(NamedTuple):
    """One mistake.

    name: for --only.
    where: a file, or a folder in which exactly one Python file holds `old`.
    old: text that occurs exactly once in that file.
    new: what replaces it.
    tests: stems of the test files that should notice, for --quick.
    """

    name: str
    where: str
    old: str
    new: str
    tests: str


METHOD, SAMPLING, INPUTS = "moma/methods", "moma/sampling", "moma/inputs"
TRAINING, MAPS = "moma/training", "models/weights/keymaps.py"
MUTATIONS = (
    # Eq. 3 and the two attention blocks
    Mutation("eq3-without-beta", METHOD, "(lam * gate.m_gen * beta)", "(lam * gate.m_gen)",
             "test_moma_attention test_golden"),
    Mutation("eq3-without-lambda", METHOD, "(lam * gate.m_gen * beta)", "(gate.m_gen * beta)",
             "test_moma_attention test_golden"),
    Mutation("eq3-without-m-gen", METHOD, "(lam * gate.m_gen * beta)", "(lam * beta)",
             "test_moma_attention test_golden"),
    Mutation("eq3-without-m-ref", METHOD, "reference.v, reference.mask, impl", "reference.v, None, impl",
             "test_moma_attention test_golden"),
    Mutation("context-without-m-gen", METHOD, "z_context * gate.m_gen", "z_context",
             "test_moma_attention test_golden"),
    Mutation("label-map-of-one-head", METHOD, "z[..., d : d + s].mean(dim=1)", "z[..., d : d + s][:, 0]",
             "test_moma_attention test_golden"),
    Mutation("queries-left-out", METHOD, "-(-inside // bucket) * bucket", "inside // bucket * bucket",
             "test_moma_attention test_graphs"),
    Mutation("context-of-one-subject-for-all", "moma/methods/moma/several.py",
             "z = add_context(z, q, *one.context[layer], gate, impl)",
             "z = add_context(z, q, *cond.subjects[0].context[layer], gate, impl)", "test_moma_several"),
    Mutation("cells-owned-by-all-subjects", "moma/methods/moma/several.py",
             "torch.where(mine, foreground, 0.0)", "torch.where(allowed, foreground, 0.0)",
             "test_moma_several"),
    Mutation("several-subjects-everywhere-at-first", "moma/methods/moma/several.py",
             "(self.allowed & (self.allowed.sum(dim=1, keepdim=True) == 1)).float()", "self.allowed.float()",
             "test_moma_several"),
    # M_gen, M_ref
    Mutation("m-gen-of-the-unconditional-rows", METHOD, "conditional = rows[-1]", "conditional = rows[0]",
             "test_masks test_golden"),
    Mutation("m-gen-scaled-by-row", METHOD, "dims=(0, 2, 3, 4)", "dims=(2, 3, 4)", "test_masks test_golden"),
    Mutation("m-gen-without-threshold", METHOD, "conditional <= method.m_gen_threshold", "conditional < 0",
             "test_masks test_golden"),
    Mutation("m-ref-loses-small-subjects", METHOD, "keep | (best & ~keep", "keep | (best & keep",
             "test_masks"),
    # steps, reference pass, conditioning
    Mutation("subject-at-the-wrong-timesteps", "moma/methods/moma/conditioning.py",
             "t < self.method.subject_below_t", "t > self.method.subject_below_t",
             "test_golden test_pipeline"),
    Mutation("reference-text-uncut", METHOD, "label.shape[1] - method.reference_text_cut", "label.shape[1]",
             "test_golden test_pipeline"),
    Mutation("reference-pass-not-at-0", METHOD, "t = torch.zeros(len(latent)", "t = torch.ones(len(latent)",
             "test_golden test_pipeline"),
    Mutation("context-in-the-unconditional-row", "moma/methods/moma/method.py",
             "torch.zeros_like(embedding), embedding", "embedding, embedding", "test_golden test_pipeline"),
    Mutation("strength-of-a-job-ignored", SAMPLING, "default if strength is None else strength", "default",
             "test_pipeline"),
    Mutation("negative-prompt-in-the-wrong-row", METHOD, "torch.cat(x.chunk(2)[::-1])",
             "torch.cat(x.chunk(2))", "test_golden test_pipeline"),
    Mutation("reference-noised-too-much", METHOD, "noises[1], alphas_cumprod(schedule)[0]",
             "noises[1], alphas_cumprod(schedule)[1]", "test_golden test_pipeline"),
    Mutation("mapping-gates-swapped", "models/llama.py", "F.silu(self.gate_proj(x)) * self.up_proj(x)",
             "F.silu(self.up_proj(x)) * self.gate_proj(x)", "test_golden test_llava"),
    Mutation("label-positions-off-by-one", METHOD, "[i for i, token in enumerate(encoding.ids) if",
             "[i + 1 for i, token in enumerate(encoding.ids) if", "test_prompts"),
    Mutation("label-inside-other-words", METHOD,
             "[span for span in spans if not any(inside_word(text, place) for place in span)]",
             "spans", "test_prompts"),
    # several subjects
    Mutation("options-all-of-the-first-subject", "moma/app", "{name: column[i] for name",
             "{name: column[0] for name", "test_sample_several"),
    Mutation("strengths-of-subjects-alike", "moma/methods/mm_diff", "s / (max(each) or 1)", "1.0",
             "test_mm_diff_drawing"),
    Mutation("ip-adapter-reads-the-last-subject-alone", METHOD, "attention(q, *context[layer]) * strength",
             "attention(q, *self.subjects[-1][0][layer]) * strength", "test_methods"),
    Mutation("likeness-of-the-first-of-a-pair", "moma/evaluate", "prompts) for one in subject.each]",
             "prompts) for one in subject.each[:1]]", "test_evaluate"),
    Mutation("a-part-is-another-object", "moma/evaluate", "within = segmenter.cfg.inside * found.mask.sum()",
             "within = 2 * found.mask.sum()", "test_scorers"),
    # sampler and solvers
    Mutation("guidance-from-the-wrong-row", SAMPLING,
             "unconditional + guidance * (conditional - unconditional)",
             "conditional + guidance * (conditional - unconditional)", "test_golden test_pipeline"),
    Mutation("guidance-interval-without-its-end", SAMPLING, "low <= t < high", "low <= t", "test_pipeline"),
    Mutation("ddim-ends-at-the-wrong-noise", SAMPLING, 'alphas[0] if solver == "ddim"',
             'alphas[1] if solver == "ddim"', "test_diffusion test_golden"),
    Mutation("ddim-without-the-offset", SAMPLING, "i * cfg.train_steps // steps + cfg.steps_offset",
             "i * cfg.train_steps // steps", "test_diffusion"),
    Mutation("dpm-second-order-term", SAMPLING, "(x0 - history.x0) / (2 * r)", "(x0 - history.x0) / r",
             "test_diffusion"),
    Mutation("state-not-handed-on", SAMPLING, "state = steering.next_state(maps, (x.shape[-2], x.shape[-1]))",
             "state = {}", "test_golden test_pipeline"),
    Mutation("resumes-a-step-early", SAMPLING, "after.index + 1", "after.index", "test_evaluate_draw"),
    Mutation("seed-of-the-noise-ignored", SAMPLING, "manual_seed(job.seed)", "manual_seed(0)",
             "test_pipeline"),
    Mutation("tiles-blended-with-a-seam", SAMPLING, "image[place] += weight * tile", "image[place] += tile",
             "test_tiles"),
    # conversion
    Mutation("vae-query-and-key-swapped", MAPS, '("query", "key", "value", "proj_attn")',
             '("key", "query", "value", "proj_attn")', "test_keymaps test_convert"),
    Mutation("vae-levels-not-reversed", MAPS, "levels - 1 - level", "level", "test_keymaps test_convert"),
    Mutation("adapter-layers-in-the-files-order", MAPS, "yield layer, layer + mid", "yield layer, layer",
             "test_keymaps test_convert"),
    Mutation("ip-adapter-from-the-self-attentions", MAPS, '{body}.{2 * layer + 1}"', '{body}.{2 * layer}"',
             "test_keymaps test_convert"),
    Mutation("quantised-to-the-wrong-extreme", "models/weights/quant.py", "high > -low, high, low",
             "high < -low, high, low", "test_quant"),
    # images and masks
    Mutation("subject-on-black", INPUTS, "np.asarray(photo), np.uint8(255)", "np.asarray(photo), np.uint8(0)",
             "test_preprocess test_golden"),
    Mutation("mask-threshold-ignored", INPUTS, "np.asarray(soft) > threshold", "np.asarray(soft) > 0",
             "test_preprocess"),
    Mutation("full-masks-accepted", INPUTS, "np.asarray(mask).min() > threshold and",
             "np.asarray(mask).min() > 255 and", "test_preprocess"),
    # training
    Mutation("stage1-target-is-the-reference", METHOD, 'self.llava.tower(batch["full"]',
             'self.llava.tower(batch["white"]', "test_stages test_training_loop"),
    Mutation("stage2-drops-the-wrong-samples", TRAINING, 'batch["drop"][:, None]', '~batch["drop"][:, None]',
             "test_stages"),
    Mutation("stage2-latents-without-variance", TRAINING,
             'batch["std"].float() * batch["posterior_noise"]', '0 * batch["posterior_noise"]',
             "test_stages"),
    Mutation("stage2-timestep-weights-ignored", TRAINING, "loss * self.weights[t]", "loss", "test_stages"),
    Mutation("every-rank-takes-the-same-samples", TRAINING, "torch.arange(number + rank,",
             "torch.arange(number,", "test_training_ranks test_training_loop test_stages"),
    Mutation("the-same-order-in-every-epoch", TRAINING, "generator_for(seed, -1 - epoch)",
             "generator_for(seed, -1)", "test_order"),
    Mutation("accumulated-gradients-not-averaged", TRAINING, "losses.mean() / cfg.accumulate",
             "losses.mean()", "test_training_loop test_training_ranks"),
    Mutation("resumes-at-the-data's-beginning", TRAINING, "return saved.step, saved.position",
             "return saved.step, {}", "test_training_loop test_stages"),
    Mutation("optimizer-forgets-its-second-moment", TRAINING, 'if f"{name}.{key}" in known]',
             'if f"{name}.{key}" in known and key != "exp_avg_sq"]', "test_training_loop"),
    Mutation("average-of-the-wrong-share", TRAINING, "1 - average_decay(run.cfg, step))",
             "average_decay(run.cfg, step))", "test_training_loop"),
    # MM-Diff
    Mutation("absent-subjects-are-attended", METHOD, "self.layers[layer], self.keep) * self.scale",
             "self.layers[layer], None) * self.scale", "test_mm_diff"),
    Mutation("merged-without-the-word", METHOD, "torch.cat([word, image], dim=-1)",
             "torch.cat([image, image], dim=-1)", "test_mm_diff"),
    Mutation("smallest-face-first", INPUTS, "key=_area, reverse=True", "key=_area", "test_faces"),
    Mutation("missing-subjects-undo-a-merge", METHOD, "places = [place * here for", "places = [place for",
             "test_mm_diff_training"),
    Mutation("subjects-that-are-left-out-stay", METHOD, ' & ~batch["absent"][:, :n]', "",
             "test_mm_diff_training"),
    Mutation("map-constraint-inside-out", METHOD, "means[0] - means[1]", "means[1] - means[0]",
             "test_mm_diff_training"),
    Mutation("every-subject-has-the-first-mask", "moma/data/triplets.py", "_mask(image, pairs[0][1], who",
             "_mask(image, files.subjects[0][0][1], who", "test_data"),
    # for people: the study, batches of references, files that hold settings, exports, captions, the page
    Mutation("votes-for-none-are-lost", "moma/evaluate", "1 / len(vote.trial.methods) if vote.method is None",
             "0.0 if vote.method is None", "test_study"),
    Mutation("agreement-by-another-count", "moma/evaluate", "1 - (n - 1) * observed / expected",
             "1 - n * observed / expected", "test_study"),
    Mutation("raters-see-one-method-first", "moma/evaluate",
             "rng.sample(groups[i // len(kinds) % len(groups)], group)",
             "groups[i // len(kinds) % len(groups)]", "test_study"),
    Mutation("batches-begun-are-drawn-in-part", "moma/app",
             "if any(j not in self.there for j in batch) for i in batch]",
             "for i in batch if i not in self.there]", "test_sample_batch"),
    Mutation("every-format-counts-as-there", "moma/app", 'f"*-seed*{OUTPUTS[kind].suffix}"', '"*-seed*"',
             "test_sample_batch"),
    Mutation("lossy-files-compared-as-drawn", "moma/app", "image = _compressed(image, other.format)", "pass",
             "test_output"),
    Mutation("exported-layers-counted-wrong", "moma/weights/export.py", "* (unet.resnets + 1)",
             "* unet.resnets", "test_export"),
    Mutation("captions-of-the-image-before", "moma/data",
             "zip(opened, captioner(list(opened.values())), strict=True)",
             "zip(batch, captioner(list(opened.values())), strict=False)", "test_blip2"),
    Mutation("the-page-draws-one-seed", "moma/demo", "images=((prompt, seed),)",
             "images=((prompt, form.seed),)", "test_demo"),
    # bundles
    Mutation("bundle-files-may-lie-elsewhere", "moma/weights/bundle.py", "Path(file).name != file",
             "not file", "test_loading test_convert test_tiny"),
    Mutation("bundle-version-unchecked", "moma/weights/bundle.py", 'data.get("version") != VERSION',
             'data.get("version") is None', "test_loading test_convert test_tiny"),
    # MoMA-mini and what its adapters are compared by
    Mutation("unconditional-row-with-all-of-beta", METHOD, "[self.config.unconditional_beta * beta, beta]",
             "[beta, beta]", "test_pipeline"),
    Mutation("ablated-words-are-merged", METHOD, 'change if self.config.without != "words" else None',
             "change", "test_mm_diff_training"),
    Mutation("wide-targets-are-square", TRAINING, "triplet.mask, shape or size,", "triplet.mask, size,",
             "test_training_shape"),
    Mutation("own-colours-count-as-swapped", "moma/mini/rated.py", "error[0] > error[1]",
             "error[0] < error[1]", "test_mini_report"),
    Mutation("other-box-around-the-same", "moma/mini/segmenting.py", "other = _box(last,",
             "other = _box(first,", "test_mini_segmenting"),
    Mutation("noise-of-the-batch", "moma/mini/adapter_numbers.py", "TIMESTEPS * i + t",
             "TIMESTEPS * (i - start) + t", "test_mini_report"),
)  # fmt: skip


def locate(mutation: Mutation, root: Path) -> Path:
    """The file that the mistake is made in; ValueError unless it applies exactly once."""
    where = root / mutation.where
    files = [where] if where.suffix else sorted(where.rglob("*.py"))
    counts = {path: path.read_text(encoding="utf-8").count(mutation.old) for path in files}
    found = {path.relative_to(root).as_posix(): count for path, count in counts.items() if count}
    if sum(found.values()) != 1:
        places = ", ".join(f"{count} times in {path}" for path, count in found.items())
        raise ValueError(f"{mutation.name}: {mutation.old!r} occurs {places or 'nowhere'}")
    return root / next(iter(found))


def copy_tree(target: Path) -> None:
    """Every file that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, command: str, stems: Sequence[str]) -> tuple[bool, str]:
    """Run the tests, or those of some files, in a copy.

    Args:
        tree: the copy.
        command: what runs pytest.
        stems: of test files; files that do not exist are left out; () = all tests.

    Returns:
        Whether all passed, and the first failure or an empty text.

    Raises:
        RuntimeError: pytest did not run.
    """
    files = [f"tests/{stem}.py" for stem in stems if (tree / f"tests/{stem}.py").is_file()]
    if stems and not files:
        raise RuntimeError(f"no test file of {', '.join(stems)} exists")
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # an edit within a second would go unseen
    try:
        done = subprocess.run(
            [*shlex.split(command), *files],
            cwd=tree, env=env, capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"no end within {LIMIT} s"
    if done.returncode not in (0, *FAILED):
        raise RuntimeError(f"{command}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, lines[0] if lines else ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.mutations", description=__doc__.split("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="print the mistakes and check that each applies")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant these alone")
    parser.add_argument("--quick", action="store_true", help="run only the test files named for a mistake")
    parser.add_argument("--command", default=COMMAND, help=f"runs the tests (default: {COMMAND})")
    args = parser.parse_args(argv)
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := set(args.only or ()) - known.keys():
        parser.error(f"no mistake is called {', '.join(sorted(unknown))}; see --list")
    chosen = [known[name] for name in args.only] if args.only else list(MUTATIONS)

    stale = False
    for mutation in chosen:
        try:
            path = locate(mutation, ROOT).relative_to(ROOT)
        except ValueError as error:
            stale = True
            print(error)
        else:
            if args.list:
                print(f"{mutation.name:<40}{path}")
    if args.list or stale:
        return int(stale)

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        stems = sorted({stem for mutation in chosen for stem in mutation.tests.split()}) if args.quick else ()
        passed, failure = run_tests(tree, args.command, stems)
        if not passed:
            print(f"the tests fail without any mistake: {failure}")
            return 1
        missed = []
        for mutation in chosen:
            start, path = time.monotonic(), locate(mutation, tree)
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            passed, failure = run_tests(tree, args.command, mutation.tests.split() if args.quick else ())
            path.write_text(text, encoding="utf-8")
            missed += [mutation.name] if passed else []
            seconds = f"{time.monotonic() - start:.0f} s"
            print(
                f"{mutation.name:<40}{'MISSED' if passed else 'caught':<8}{seconds:>6}  {failure}", flush=True
            )
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught" + "".join(f"; missed: {m}" for m in missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
