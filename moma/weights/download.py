"""Fetch the released weights from the Hugging Face hub, for convert_weights.py --download.

The repositories are those of the public code (bytedance/MoMA: run_evaluate_MoMA.py takes the adapter file
from the MLLM's repository) and of the model cards. `pick_weights` chooses among the files that a repository
lists.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from models.weights.loading import pick_weights, shard_files

DIFFUSERS_STEMS = ("diffusion_pytorch_model",)
TRANSFORMERS_STEMS = ("model", "pytorch_model")
MOMA_FILE = "attn_adapters_projectors.th"
CLIP_FILES = ("config.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Repo:
    """Files to fetch from one repository."""

    id: str
    weights: tuple[tuple[str, tuple[str, ...]], ...]  # (folder inside, stems its weight file may have)
    files: tuple[str, ...]  # by exact name

    @property
    def folder(self) -> str:
        """Name in the cache."""
        return self.id.replace("/", "--")


EXTRAS = {  # of --with: name -> repositories
    "sam": (Repo("facebook/sam-vit-base", (("", TRANSFORMERS_STEMS),), ("config.json",)),),  # 0.4 GB
    "scorers": (  # 0.1 + 0.6 + 1.7 GB
        Repo("facebook/dino-vits16", (("", TRANSFORMERS_STEMS),), ("config.json",)),
        Repo("openai/clip-vit-base-patch32", (("", TRANSFORMERS_STEMS),), CLIP_FILES),
        Repo("openai/clip-vit-large-patch14", (("", TRANSFORMERS_STEMS),), CLIP_FILES),
    ),
}


@dataclass(frozen=True)
class DownloadConfig:
    """What to fetch; the released set has 3.9 + 0.3 + 14.3 + 1.7 GB."""

    # The release's choice of SD1.5 in diffusers folders; any fine-tune works. The release replaces its VAE.
    base_id: str = "SG161222/Realistic_Vision_V4.0_noVAE"
    vae_id: str = "stabilityai/sd-vae-ft-mse"
    llava_id: str = "KunpengSong/MoMA_llava_7b"  # LLaVA-1.5-7B tuned for MoMA, and the adapter file
    clip_id: str = "openai/clip-vit-large-patch14-336"  # LLaVA's image tower
    released: bool = True  # False: only the extras
    extras: tuple[str, ...] = ()  # of EXTRAS

    def repos(self, llm: bool = True) -> list[Repo]:
        """Repositories in the order of their conversion; llm: with LLaVA and its tower."""
        released = self._released(llm) if self.released else []
        return released + [repo for name in self.extras for repo in EXTRAS[name]]

    def _released(self, llm: bool) -> list[Repo]:
        base = Repo(
            self.base_id,
            (("unet", DIFFUSERS_STEMS), ("text_encoder", TRANSFORMERS_STEMS)),
            (
                "unet/config.json",
                "text_encoder/config.json",
                "tokenizer/vocab.json",
                "tokenizer/merges.txt",
                "scheduler/scheduler_config.json",
            ),
        )
        vae = Repo(self.vae_id, (("", DIFFUSERS_STEMS),), ("config.json",))
        clip = Repo(self.clip_id, (("", TRANSFORMERS_STEMS),), ("config.json",))
        llava_files = ("config.json", "tokenizer.model", MOMA_FILE)
        llava = Repo(self.llava_id, (("", TRANSFORMERS_STEMS),), llava_files)
        adapter = Repo(self.llava_id, (), (MOMA_FILE,))
        return [base, vae, clip, llava] if llm else [base, vae, adapter]


def present(folder: Path, repo: Repo) -> bool:
    """Whether all files of the repository are there; the hub's client keeps incomplete ones elsewhere."""
    if not all((folder / file).is_file() for file in repo.files):
        return False
    for inside, stems in repo.weights:
        name = pick_weights({path.name for path in (folder / inside).iterdir()}, stems)
        if name is None:
            return False
        path = folder / inside / name
        if path.suffix == ".json" and not all(file.is_file() for file in shard_files(path)):
            return False
    return True


def patterns(names: list[str], repo: Repo) -> list[str]:
    """Patterns of the files to fetch from those that a repository has; ValueError if one is missing."""
    wanted = list(repo.files)
    for inside, stems in repo.weights:
        prefix = f"{inside}/" if inside else ""
        here = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
        name = pick_weights(here, stems)
        if name is None:
            raise ValueError(f"{repo.id}: no weights {prefix}{stems[0]}.* in the repository")
        wanted.append(prefix + name)
        if name.endswith(".json"):
            stem, kind = name.split(".")[:2]
            variant = ".fp16" if ".fp16" in name else ""
            wanted.append(f"{prefix}{stem}{variant}-*.{kind}")
    if lacking := [file for file in repo.files if file not in names]:
        raise ValueError(f"{repo.id}: has no {lacking[0]}; is it the right repository?")
    return wanted


def download(
    config: DownloadConfig,
    cache: Path,
    llm: bool = True,
    endpoint: str | None = None,
    say: Callable[[str], Any] = print,
) -> list[Path]:
    """Fetch what is missing in `cache`. A later run keeps complete files and repeats interrupted ones.

    Args:
        config: what to fetch.
        cache: folder with one folder per repository.
        llm: with LLaVA and its tower.
        endpoint: of the hub; None = huggingface_hub's own setting.
        say: receives messages, such as the files to place by hand if the hub cannot be reached.

    Returns: folders in the order of their conversion.
    Raises: ValueError if the hub cannot be reached.
    """
    folders = []
    for repo in config.repos(llm):
        folder = cache / repo.folder
        folders.append(folder)
        if folder.is_dir() and present(folder, repo):
            continue
        try:
            names = HfApi(endpoint=endpoint).list_repo_files(repo.id)
        except Exception as error:  # the client raises its HTTP library's errors, too
            raise _unreachable(error, repo, config, cache, llm, say) from error
        wanted = patterns(names, repo)
        say(f"fetching {repo.id} to {folder}")
        try:
            snapshot_download(repo.id, local_dir=folder, allow_patterns=wanted, endpoint=endpoint)
        except Exception as error:
            raise _unreachable(error, repo, config, cache, llm, say) from error
    return folders


def _unreachable(
    error: Exception, repo: Repo, config: DownloadConfig, cache: Path, llm: bool, say: Callable[[str], Any]
) -> ValueError:
    for line in by_hand(config, cache, llm):
        say(line)
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    return ValueError(
        f"{repo.id}: not fetched ({reason}); run again to continue, or place the files listed above"
    )


def by_hand(config: DownloadConfig, cache: Path, llm: bool = True) -> list[str]:
    """Instructions to place the files by hand."""
    lines = ["Without access to the hub, place these files and run the same command again:"]
    for repo in config.repos(llm):
        lines.append(f"  https://huggingface.co/{repo.id}  ->  {cache / repo.folder}/")
        for inside, stems in repo.weights:
            prefix = f"{inside}/" if inside else ""
            either = " or ".join(f"{prefix}{stem}.safetensors" for stem in stems)
            lines.append(f"    {either} (or .bin; of a sharded one the .index.json and all its shards)")
        lines += [f"    {file}" for file in repo.files]
    return lines
