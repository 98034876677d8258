"""The architecture: imports only go down, nothing runs at import, and runtime needs no test reference."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each floor may import the floors above it in this list, never those below it. One entry per module.
FLOORS = [
    {
        "models.attention",
        "models.weights.loading",
        "models.weights.keymaps",
        "models.tokenizers",
        "models.clip_image",
    }
    | {"models.weights.quant", "models.weights.packed", "models.sam_image", "models.sam_config"},
    {"models.unet", "models.vae", "models.clip", "models.llama", "models.sam", "models.dino"}
    | {"models.dino_image"},
    {"models.llava"},
    {"models.weights.stream"},
    {"moma.methods.moma.config", "moma.sampling.diffusion", "moma.sampling.memory", "moma.inputs.regions"},
    {
        "moma.methods.moma.masks",
        "moma.methods.prompts",
        "moma.inputs.preprocess",
        "moma.sampling.cuda_graphs",
        "moma.sampling.tiles",
    },
    {"moma.app.chart", "moma.evaluate.estimates"},
    {"moma.methods.moma.attention", "moma.app.record"},
    {"moma.methods.moma.adapter"},
    {"moma.methods.moma.feature_decoder", "moma.sampling.sampler", "moma.weights.bundle"},
    {"moma.weights.download", "moma.app.feature_cache", "moma.weights.tiny"},
    {"moma.weights.sources"},
    {"moma.sampling.pipeline"},
    {"moma.inputs.segment"},
    {"moma.app.options"},
    {"moma"},
    # training data
    {"moma.data", "moma.data.words", "moma.data.shards", "moma.training", "moma.training.task"},
    {"moma.data.tables", "moma.data.triplets"},
    {"moma.data.stream", "moma.data.captions"},
    {"moma.data.openimages"},
    # training
    {"moma.training.config", "moma.training.order", "models.lora", "moma.training.log"},
    {"moma.training.parallel", "moma.training.common"},
    {"moma.training.checkpoint", "moma.training.cache"},
    {"moma.training.loop", "moma.training.stage1", "moma.training.stage2"},
    {"moma.bench.training_memory"},
    # the benchmark
    {"moma.bench", "moma.bench.measure"},
    {"moma.bench.step"},
    {"moma.bench.flow", "moma.bench.training", "moma.bench.curves"},
    {"moma.bench.__main__"},
    # evaluation
    {"moma.evaluate", "moma.evaluate.scores", "moma.methods.ip_adapter", "moma.evaluate.published"}
    | {"moma.evaluate.protocol", "moma.evaluate.references"},
    {"moma.evaluate.scorers", "moma.evaluate.methods", "moma.evaluate.tables"},
    {"moma.evaluate.rate", "moma.evaluate.page", "moma.evaluate.draw", "moma.evaluate.options"}
    | {"moma.evaluate.figures"},
    # MoMA-mini
    {"moma.mini", "moma.world.drawing", "moma.world.measures"},
    {"moma.world.scenes", "moma.world.subjects"},
    {"moma.world.world"},
    {"moma.world.words", "moma.training.pretraining"},
    {"moma.world.classifiers"},
    {"moma.mini.config", "moma.mini.report", "moma.evaluate.world"},
    {"moma.mini.tasks", "moma.mini.approximations"},
    {"moma.mini.segmenting"},
    {"moma.evaluate.plan"},
    {"moma.evaluate.__main__"},
    {"sample", "convert_weights", "train"},
    {"moma.mini.pretrain", "moma.bench.rounding"},
]
# What a module of its own floor may import all the same.
SAME_FLOOR: set[tuple[str, str]] = set()
RUNTIME = {"torch", "einops", "safetensors", "sentencepiece", "tokenizers", "numpy", "PIL", "tqdm"} | {
    "huggingface_hub"
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("moma/**/*.py")]
    return {name_of(path): path for path in files if name_of(path) != "models"}


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            parent = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules() else node.module for name in parent}
    return found


def floor(name: str) -> int:
    floors = [i for i, names in enumerate(FLOORS) if name in names]
    assert floors, f"{name} stands on no floor: add it to FLOORS"
    return floors[0]


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_only_go_down(name: str) -> None:
    for other in imports(modules()[name]) & set(modules()):
        below = floor(other) < floor(name) or (name, other) in SAME_FLOOR
        assert below, f"{name} imports {other}, which is not on a lower floor"


@pytest.mark.parametrize("name", sorted(modules()))
def test_runtime_packages_only(name: str) -> None:
    tops = {other.split(".")[0] for other in imports(modules()[name])}
    foreign = tops - RUNTIME - set(sys.stdlib_module_names) - {n.split(".")[0] for n in modules()}
    assert not foreign, f"{name} imports {foreign}"


def test_imports_have_no_side_effects(tmp_path: Path) -> None:
    """Importing everything prints and writes nothing and leaves torch's random state and settings alone."""
    names = ", ".join(sorted(modules()))
    code = (
        "import torch\n"
        "def settings():\n"
        "    precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()\n"
        "    return torch.get_default_dtype(), torch.get_num_threads(), precision\n"
        "before = torch.get_rng_state(), settings()\n"
        f"import {names}\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == settings()"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
