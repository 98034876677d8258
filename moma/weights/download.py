"""Fetch the released weights from the Hugging Face hub, for convert_weights.py --download.

The repositories are those of the public code (bytedance/MoMA: run_evaluate_MoMA.py takes the adapter file
from the MLLM's repository) and of the model cards. `pick_weights` chooses among the files that a repository
lists.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile

from models.weights.files import Hashes
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
    revision: str | None = None  # a commit, branch or tag; None = the newest
    mirror: str | None = None  # another repository with the same files, asked if this one does not answer

    @property
    def folder(self) -> str:
        """Name in the cache; revisions do not mix."""
        return self.id.replace("/", "--") + (f"@{self.revision}" if self.revision else "")


EXTRAS = {  # of --with: name -> repositories
    "sam": (Repo("facebook/sam-vit-base", (("", TRANSFORMERS_STEMS),), ("config.json",)),),  # 0.4 GB
    "scorers": (  # 0.1 + 0.6 + 1.7 GB
        Repo("facebook/dino-vits16", (("", TRANSFORMERS_STEMS),), ("config.json",)),
        Repo("openai/clip-vit-base-patch32", (("", TRANSFORMERS_STEMS),), CLIP_FILES),
        Repo("openai/clip-vit-large-patch14", (("", TRANSFORMERS_STEMS),), CLIP_FILES),
    ),
}


# Beginning and end of the sha256 of files that are known, by repository and name.
MOMA = "KunpengSong/MoMA_llava_7b"
KNOWN = {
    (MOMA, MOMA_FILE): ("0b432a39e46f01cd9cdb4794b8ef13b9", "bb0aff2ad6da6800d67fd2ca4af21fa6"),
    (MOMA, "pytorch_model-00001-of-00002.bin"): ("8f9de2fd", "f52"),
    (MOMA, "pytorch_model-00002-of-00002.bin"): ("2cfdbbec", "99a"),
}


Found = Mapping[Repo, tuple[str, list[RepoFile]]]  # repository -> the one that answers, the files to fetch


@dataclass(frozen=True)
class DownloadConfig:
    """What to fetch; the released set has 3.9 + 0.3 + 14.3 + 1.7 GB."""

    # The release's choice of SD1.5 in diffusers folders; any fine-tune works. The release replaces its VAE.
    base_id: str = "SG161222/Realistic_Vision_V4.0_noVAE"
    vae_id: str = "stabilityai/sd-vae-ft-mse"
    llava_id: str = MOMA  # LLaVA-1.5-7B tuned for MoMA, and the adapter file
    clip_id: str = "openai/clip-vit-large-patch14-336"  # LLaVA's image tower
    released: bool = True  # False: only the extras
    extras: tuple[str, ...] = ()  # of EXTRAS
    revisions: Mapping[str, str] = field(default_factory=dict)  # repository -> commit, branch or tag
    mirrors: Mapping[str, str] = field(default_factory=dict)  # repository -> another one with the same files

    def repos(self, llm: bool = True) -> list[Repo]:
        """Repositories in the order of their conversion; llm: with LLaVA and its tower."""
        repos = self._released(llm) if self.released else []
        repos += [repo for name in dict.fromkeys(self.extras) for repo in EXTRAS[name]]
        if unknown := {*self.revisions, *self.mirrors} - {repo.id for repo in repos}:
            known = ", ".join(repo.id for repo in repos)
            raise ValueError(f"{unknown.pop()}: is not fetched, only {known}")
        pinned, mirrors = self.revisions.get, self.mirrors.get
        return [replace(repo, revision=pinned(repo.id), mirror=mirrors(repo.id)) for repo in repos]

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
    repos = config.repos(llm)
    found: dict[Repo, tuple[str, list[RepoFile]]] = {}
    for repo in repos:
        if not ((cache / repo.folder).is_dir() and present(cache / repo.folder, repo)):
            try:
                found[repo] = _listing(repo, endpoint)
            except ValueError:
                raise
            except Exception as error:  # the client raises its HTTP library's errors, too
                raise _unreachable(error, repo, config, cache, llm, say) from error
    _check_space(found, cache, say)
    for repo, (name, files) in found.items():
        folder = cache / repo.folder
        say(f"fetching {name} to {folder}")
        options = {"allow_patterns": [file.path for file in files], "revision": repo.revision}
        try:
            snapshot_download(name, local_dir=folder, endpoint=endpoint, **options)
        except Exception as error:
            raise _unreachable(error, repo, config, cache, llm, say) from error
    for repo in repos:
        _, files = found.get(repo, (None, []))
        check_hashes(repo, cache, {file.path: file.lfs.sha256 for file in files if file.lfs})
    return [cache / repo.folder for repo in repos]


def _listing(repo: Repo, endpoint: str | None) -> tuple[str, list[RepoFile]]:
    """The repository or its mirror, whichever answers first, and the files to fetch of it."""
    try:
        tree = HfApi(endpoint=endpoint).list_repo_tree(repo.id, recursive=True, revision=repo.revision)
        files = [file for file in tree if isinstance(file, RepoFile)]
    except Exception:
        if repo.mirror is None:
            raise
        return _listing(replace(repo, id=repo.mirror, mirror=None), endpoint)
    wanted = patterns([file.path for file in files], repo)
    return repo.id, [file for file in files if any(fnmatchcase(file.path, pattern) for pattern in wanted)]


def _check_space(found: Found, cache: Path, say: Callable[[str], Any]) -> None:
    """Tell what the disk must hold; ValueError if there is less.

    Args:
        found: what to fetch.
        cache: where to.
        say: receives the sizes.
    """
    pairs = ((cache / repo.folder / file.path, file) for repo, (_, files) in found.items() for file in files)
    needed = sum(file.size for path, file in pairs if not path.is_file())
    place = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    sizes = f"{needed / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free"
    if needed > free:
        raise ValueError(f"{cache}: {sizes}; choose another --cache")
    if needed:
        say(f"{sizes}; the bundle takes up to as much again, until the sources are deleted (--clean-cache)")


def check_hashes(repo: Repo, cache: Path, told: Mapping[str, str]) -> None:
    """ValueError for a file that is not the one that is known or that the hub tells of.

    Args:
        repo: the repository.
        cache: where it was fetched to.
        told: the hub's sha256 of files.
    """
    known = {} if repo.revision else {file: ends for (name, file), ends in KNOWN.items() if name == repo.id}
    wanted = known | {file: (digest, "") for file, digest in told.items()}
    paths = {file: cache / repo.folder / file for file in wanted}
    there = {file: path for file, path in paths.items() if path.is_file()}
    for (file, path), digest in zip(there.items(), Hashes.below(cache).of([*there.values()]), strict=True):
        start, end = wanted[file]
        if not (digest.startswith(start) and digest.endswith(end)):
            raise ValueError(
                f"{path}: its sha256 is {digest}, expected {start}...{end}; delete it and fetch it again, or "
                f"name another release with --revision {repo.id}=COMMIT"
            )


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
        at = f"/tree/{repo.revision}" if repo.revision else ""
        lines.append(f"  https://huggingface.co/{repo.id}{at}  ->  {cache / repo.folder}/")
        for inside, stems in repo.weights:
            prefix = f"{inside}/" if inside else ""
            either = " or ".join(f"{prefix}{stem}.safetensors" for stem in stems)
            lines.append(f"    {either} (or .bin; of a sharded one the .index.json and all its shards)")
        lines += [f"    {file}" for file in repo.files]
    return lines
