"""The recipe of MoMA-mini from renders to a bundle that draws, with every number as small as it can be."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.clip import CLIPTextConfig, CLIPVisionConfig
from models.llama import LlamaConfig
from models.llava import LlavaConfig
from models.unet import UNetConfig
from models.vae import VAEConfig
from models.weights.loading import read_checkpoint
from moma import load
from moma.evaluate.world import mini_scorers
from moma.methods.moma.adapter import AdapterConfig
from moma.mini.config import BaseNumbersConfig, MiniConfig
from moma.mini.pretrain import STAGES, finish, main, recipe
from moma.mini.workspace import KEEPABLE, Workspace, with_positions
from moma.sampling.config import SampleConfig
from moma.training.parallel import Ranks, start_ranks
from moma.weights.bundle import Bundle
from moma.world.words import colour_name, words_of
from moma.world.world import Spec, render
from tests.fake_sam import SMALL
from tests.helpers import MINI, ROOT

ONE = Ranks(0, 1, torch.device("cpu"))


def smallest() -> MiniConfig:
    cfg = MiniConfig()
    vision = CLIPVisionConfig(width=16, layers=3, heads=2, mlp=16, image_size=64, patch=32)
    llama = LlamaConfig(width=16, layers=1, heads=2, mlp=16, positions=256)
    networks = {
        "vae": VAEConfig(channels=(8, 8, 8), latent_channels=8, resnets=1, norm_groups=4),
        "text": CLIPTextConfig(width=16, layers=1, heads=2, mlp=16, positions=64),
        "vision": vision,
        "unet": UNetConfig(
            in_channels=8, out_channels=8, channels=(8, 8), depth=(1, 1), heads=(1, 1), context_dim=(16, 16),
            resnets=1, norm_groups=4,
        ),
        "llava": LlavaConfig(llama=llama, vision=vision),
        "sam": SMALL,
        "adapter": AdapterConfig(mllm_dim=16, embed_dim=16, learnable_token=True),
    }  # fmt: skip
    few = {"steps": 2, "batch_size": 4, "save_every": 1, "validate_every": 2}

    def short(part: object) -> object:
        return replace(part, held_out=2, train=replace(part.train, **few))

    options = ("--set", "validation_samples=2")
    probes = replace(short(cfg.probes), pairs=8, wide=2, group=1)
    captioner = replace(short(cfg.captioner), asked=1, answer_tokens=2)
    return replace(
        cfg, networks=networks, images=12, unseen_images=40, pairs=6, unseen_pairs=8, tokenizer_captions=12,
        singles=6, twos=6, adapter_batch=2, gates={},
        vae=short(cfg.vae), clip=short(cfg.clip), captioner=captioner, probes=probes,
        segmenting=replace(short(cfg.segmenting), asked=2, asked_pairs=2),
        text_to_image=replace(short(cfg.text_to_image), map_layers=(0, 1)),
        base_numbers=BaseNumbersConfig(
            images=2, pairs=2, same=2, noised=2, shown=4, columns=2, timesteps=(600,), map_timesteps=(300,)
        ),
        sample=SampleConfig(steps=1, batch_size=2),
        adapters={name: replace(run, share=1.0) for name, run in cfg.adapters.items()},
        method={"template": "paper"},
        decoder_steps=2, decoder_options=(*options, "--workers", "0", "--set", "lanes=2"),
        adapter_steps=2, adapter_options=(*options, "--set", "grid_samples=0"),
    )  # fmt: skip


def work(out: Path) -> None:
    """What each of the two ranks does."""
    with start_ranks("cpu") as ranks:
        recipe(Workspace(smallest(), out, ranks), "adapters")
        (out / f"rank-{ranks.rank}").touch()


@pytest.mark.slow  # two processes, every stage
def test_the_recipe_on_two_ranks_makes_a_bundle_and_never_does_a_stage_twice(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "tests.test_mini_recipe", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank-0").exists() and (tmp_path / "rank-1").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*")}
    recipe(Workspace(smallest(), tmp_path, ONE), "adapters")
    assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert all((tmp_path / f"{name}.json").exists() for name in STAGES)

    folder = tmp_path / "finished"
    finish(Workspace(smallest(), tmp_path, ONE), folder)
    bundle, sample = Bundle.open(folder), render(0, "test")
    assert bundle.method["template"] == "paper" and bundle.method_config("ip-adapter").encoder == "vision"
    image, mask = Image.fromarray(sample.image), Image.fromarray(sample.mask)
    for method in ("moma", "ip-adapter", "mm-diff"):
        pipe = load(folder, method)
        subject = pipe.encode_subject(image, mask, sample.label)
        prompt, config = f"a {sample.label} in the snow", SampleConfig(steps=2)
        (drawn,) = pipe.sample(subject, prompt, seeds=[0], config=config)
        assert drawn.size == (64, 64)
    judge, clip = mini_scorers(bundle)
    assert judge.embed_images([image]).shape == (1, smallest().probes.embedding)
    assert clip.embed_images([image]).shape == clip.embed_texts(["a cat"]).shape == (1, 96)


def test_a_missed_gate_stops_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = replace(smallest(), gates={"vae": {"psnr": (99.0, 200.0)}})
    with pytest.raises(ValueError, match=r"psnr .* 99"):
        recipe(Workspace(cfg, tmp_path, ONE), "clip")
    assert not (tmp_path / "vae.json").exists() and not (tmp_path / "clip").exists()
    recipe(Workspace(cfg, tmp_path, ONE), "vae", past_gates=True)
    assert "psnr" in capsys.readouterr().err and (tmp_path / "vae.json").exists()


def test_a_kept_stage_takes_the_networks_of_the_start_as_they_are(tmp_path: Path) -> None:
    start = Bundle.open(MINI)
    cfg = replace(smallest(), networks=MiniConfig().networks)
    work = Workspace(cfg, tmp_path, ONE, start, tuple(KEEPABLE))
    recipe(work, "captioner")
    for name in ("vae", "vision", "unet", "sam"):
        stage = next(stage for stage, networks in KEEPABLE.items() if name in networks)
        kept = read_checkpoint(tmp_path / stage / "export" / f"{name}.safetensors")
        for key, tensor in start.build(name, "cpu", torch.float32).state_dict().items():
            assert torch.equal(kept[key].read(), tensor)
    for stage, name, file in (("clip", "heads", "clip_heads"), ("judges", "probes", "probes")):
        kept = read_checkpoint(tmp_path / stage / "export" / f"{name}.safetensors")
        for key, tensor in read_checkpoint(MINI / f"{file}.safetensors").items():
            assert torch.equal(kept[key].read(), tensor.read().float())


@pytest.mark.parametrize(
    ("kept", "missing", "message"),
    [
        (["unet", "vae"], "", "expected clip"),
        (["judges"], "probes.safetensors", "no probes.safetensors"),
        (["clip"], "clip_heads.safetensors", "no clip_heads.safetensors"),
        (["sam"], "sam.safetensors", "no sam"),
    ],
)
def test_what_cannot_be_kept_is_refused_first(
    kept: list[str], missing: str, message: str, tmp_path: Path
) -> None:
    start, work = tmp_path / "start", tmp_path / "work"
    shutil.copytree(MINI, start)
    if missing:
        (start / missing).unlink()
        config = json.loads((start / "config.json").read_text())
        config["networks"].pop(Path(missing).stem, None)
        (start / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        main(["--work", str(work), "--start", str(start), "--keep", *kept])
    assert not work.exists()


def test_a_kept_captioner_need_not_write(tmp_path: Path) -> None:
    """The shipped one lacks the layer that it would write with."""
    start = Bundle.open(MINI)
    llava = Workspace(MiniConfig(), tmp_path, ONE, start, ("captioner",)).new("llava")
    assert not hasattr(llava.llama, "lm_head")
    with pytest.raises(ValueError, match="lm_head"):
        Workspace(MiniConfig(), tmp_path, ONE, start).new("llava")


def test_a_longer_text_encoder_reads_short_texts_alike() -> None:
    text = Bundle.open(MINI).build("text", "cpu", torch.float32)
    longer, ids = with_positions(text, 40), torch.arange(10)[None]
    assert longer.cfg.positions == 40 and torch.equal(longer(ids)[0], text(ids)[0])
    assert longer(torch.arange(40)[None])[0].isfinite().all()


def test_networks_to_keep_need_a_bundle_to_take_them_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--start"):
        main(["--work", str(tmp_path / "new"), "--keep", "vae"])
    assert not (tmp_path / "new").exists()


def test_rich_captions_name_colours_and_the_worlds_do_not() -> None:
    cfg = MiniConfig().world
    words = words_of(Spec("cat", 7, "beach", None, 0, 0), "a cat on the beach", cfg)
    assert words.rich.endswith("cat on the beach") and words.rich == words.subject + " on the beach"
    assert words_of(Spec("cat", 7, "beach", "icy", 0, 0), "", cfg).subject == "an icy cat"
    assert colour_name((0.8, 0.2, 0.2)) == "red" and colour_name((1, 1, 1)) == "white"


def test_every_adapter_starts_from_a_bundle_that_is_made_before() -> None:
    made, cfg = {"decoder"}, MiniConfig()
    for name, run in (cfg.adapters | cfg.ablations).items():
        assert run.start in made and run.data in cfg.twins, name
        made.add(name)
    assert all(run.share < 1 for run in cfg.ablations.values())


def test_a_shortened_recipe_has_that_share_of_renders_and_steps() -> None:
    cfg, less = MiniConfig(), MiniConfig().shortened(0.1)
    assert less.text_to_image.train.steps == cfg.text_to_image.train.steps // 10
    assert (less.images, less.adapter_steps, less.gates) == (cfg.images // 10, cfg.adapter_steps // 10, {})
    assert less.probes.pairs % less.probes.group == 0 and less.networks.keys() == cfg.networks.keys()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
