"""From jobs to images: the Python API behind sample.py.

    pipe = moma.load("weights/moma")
    subject = pipe.encode_subject(image, mask, "cat")
    images = pipe.sample(subject, "a cat on the beach", seeds=[0, 1])

The pipeline draws with any method (`moma.sampling.interface.Method`) and knows none.

Letters: B images, Z latent channels, h w latents, H W pixels.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models.vae import VAE
from moma.sampling.base import Base
from moma.sampling.config import SampleConfig, check_seed
from moma.sampling.cuda_graphs import GraphedUNet, Recorder, choose_recorder
from moma.sampling.diffusion import SolverStep, predict_x0, solver_steps
from moma.sampling.finite import Autoencoder, check_finite
from moma.sampling.interface import Job, Method, Region, Result, ResumeState, Runtime
from moma.sampling.memory import Toggle, max_batch
from moma.sampling.sampler import Step, denoise
from moma.sampling.tiles import decode

Images = Image.Image | Sequence[Image.Image]


@dataclass(frozen=True, eq=False)
class Progress:
    """What is there after a step of a batch."""

    done: int  # steps
    total: int  # steps of all batches
    step: Step
    clean: Tensor  # float32 (B, Z, h, w), the clean latents as this step predicts them
    decode: Callable[[Tensor], Image.Image]  # (1, Z, h, w) -> an image

    @property
    def m_gen(self) -> Tensor | None:
        """MoMA's mask after the step, float32 (B, 1, h, w); None where a method makes none."""
        return self.step.state.get("m_gen")

    def previews(self) -> list[Image.Image]:
        """The batch's images as this step predicts them; each takes a call of the VAE's decoder."""
        with torch.no_grad():
            return [self.decode(one) for one in self.clean.split(1)]


OnStep = Callable[[Progress], object]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A method on a base model, and how the machine draws with it. Nothing changes after construction."""

    method: Method
    make_recorder: Callable[[], Recorder] | None = None  # of `choose_recorder`; None = no CUDA graphs
    tiles: Toggle = "auto"  # of `moma.sampling.tiles.decode`
    dtype_reason: str = "given"
    knows: Callable[[Image.Image], bool] | None = None  # whether an image is of the one kind the weights know

    @classmethod
    def of(cls, method: Method, runtime: Runtime) -> "Pipeline":
        """The pipeline of a loaded method."""
        recorder = choose_recorder(runtime.cuda_graph, runtime.device)
        return cls(method, recorder, runtime.tiles, runtime.dtype_reason)

    @property
    def base(self) -> Base:
        return self.method.base

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def image_size(self) -> int:
        return self.base.image_size

    def with_config(self, config: Any) -> "Pipeline":
        """The same networks under another config of the method.

        Subjects whose making it changes are refused until they are encoded again (`run`).
        """
        return replace(self, method=self.method.with_config(config))

    @torch.no_grad()
    def encode_subject(self, image: Images, mask: Images, word: str, **options: Any) -> Any:
        """What the method keeps of one subject (`Method.encode_subject`, `Method.join_images`).

        Args:
            image: RGB, RGBA or another mode of 8 or 16 bits; one, or several of the same subject.
            mask: of each image, of its aspect ratio: mode L, 255 = subject, or of any mode that --mask takes.
            word: what the subject is.
            options: of `Method.encode_reference`, such as seed and prompts.

        Raises:
            ValueError: for an empty or a full mask, or more images than the method can use.
            TypeError: for images that are not PIL's, or a word that is no text.

        Warns for a mask that may be the background's.
        """
        check_seed("seed", options.get("seed", 0))
        images, masks = _listed("image", image), _listed("mask", mask)
        if not isinstance(word, str):
            raise TypeError(f"the word is of type {type(word).__name__}: expected text such as 'cat'")
        if len(images) not in self.method.images or len(masks) != len(images):
            raise ValueError(
                f"{len(images)} images and {len(masks)} masks of {word!r}: expected"
                f" {self.method.images[0]} to {self.method.images[-1]} images, with a mask for each"
            )
        if self.knows and not all(map(self.knows, images)):
            text = f"the image of {word!r} is not of the kind these weights know: no image will resemble it"
            warnings.warn(text, stacklevel=2)
        pairs = zip(images, masks, strict=True)
        return self.method.join_images(
            [self.method.encode_subject(one, its, word, **options) for one, its in pairs]
        )

    def sample(
        self,
        subjects: Any,
        prompt: str | Sequence[str],
        seeds: Sequence[int] = (0,),
        *,
        strength: float | tuple[float | None, ...] | None = None,
        regions: tuple[Region | None, ...] = (),
        negative: str = "",
        config: SampleConfig | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Images for each prompt for each seed.

        Args:
            subjects: of `encode_subject` with this config, one or a tuple of several or none.
            prompt: one or several; each must name the subjects.
            seeds: of the start noise, 0 to 2**32 - 1.
            strength: of the subjects, β of Eq. 3: one for all, or one for each; None = the config's.
            regions: of each subject, where it should be: left, top, right, bottom in shares of the image.
            negative: what the images should not show.
            config: how they are drawn.
            on_step: called after each step; what it raises ends the drawing.

        Raises:
            ValueError: as `run`.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        jobs = [
            Job(subjects, text, seed, negative, strength, regions=regions)
            for text in prompts
            for seed in seeds
        ]
        return [result.image for result in self.run(jobs, config, on_step)]

    def run(
        self,
        jobs: Sequence[Job],
        config: SampleConfig | None = None,
        on_step: OnStep | None = None,
        resume: ResumeState | None = None,
    ) -> Iterator[Result]:
        """Draw any mix of subjects, prompts and seeds, in order; each result comes as soon as it is there.

        Args:
            jobs: result i depends on job i alone (unless the method is `batch_dependent`).
            config: how they are drawn.
            on_step: called after each step; what it raises ends the drawing.
            resume: keeps the steps of jobs that are one batch (`max_batch`), and has the drawing go on from
                the latest.

        Raises:
            ValueError: before anything is computed, for a prompt without the subject's word, a size that
                does not fit, unknown settings, a subject of another method or config.
            TypeError: for what is no subject.
        """
        config = (config or SampleConfig()).sized(self.image_size)
        config.check(self.base.vae.cfg.factor)
        if resume is not None and len(jobs) > (most := self.max_batch(config)):
            raise ValueError(f"{len(jobs)} images to resume: expected one batch, at most {most}")
        schedule = solver_steps(self.base.schedule, config.steps, config.solver, config.grid)
        for job in jobs:
            self.method.check_regions(self.method.config, job.regions)
            for strength in job.strengths(config.strength):
                replace(config, strength=strength).check(self.base.vae.cfg.factor)
        noise = [self._start_latents(job, config) for job in jobs]
        with torch.no_grad():
            prepared = self.method.prepare(jobs)
        return self._draw(prepared, noise, schedule, config, on_step, resume)

    def max_batch(self, config: SampleConfig) -> int:
        """How many images are one batch; config: with its sizes (`SampleConfig.sized`)."""
        if self.method.batch_dependent(self.method.config):  # there the batch decides what its images are
            return config.batch_size
        latents = config.height * config.width // self.base.vae.cfg.factor**2
        return max_batch(config.batch_size, latents, self.device)

    @torch.no_grad()
    def _draw(
        self,
        prepared: Sequence[Any],
        noise: Sequence[Tensor],
        schedule: Sequence[SolverStep],
        config: SampleConfig,
        on_step: OnStep | None,
        resume: ResumeState | None,
    ) -> Iterator[Result]:
        size = self.max_batch(config)
        starts = range(0, len(prepared), size)
        unet, vae = GraphedUNet(self.base.unet, self.make_recorder), Autoencoder(self.base.vae)
        for n, start in enumerate(starts):
            batch = slice(start, start + size)
            conditioning = self.method.condition(prepared[batch], config)
            latents = torch.cat(noise[batch]).to(self.device)  # (B, Z, h, w)
            kept = None if resume is None else resume.read()
            step = after = kept and kept.to(self.device)
            settings = config.guidance, config.solver, config.guidance_interval
            x = latents if after is None else after.latents
            for step in denoise(unet, conditioning, schedule, latents, *settings, after, self.dtype):
                if resume is not None:
                    resume.keep(step)
                if on_step:
                    done, total = n * len(schedule) + step.index + 1, len(starts) * len(schedule)
                    clean = predict_x0(x, step.noise_pred, schedule[step.index].alpha)  # (B, Z, h, w)
                    on_step(Progress(done, total, step, clean, partial(self._image, vae)))
                x = step.latents
            unet.reset()  # the VAE's decoder needs the memory
            yield from self._finish(step, vae)

    def _start_latents(self, job: Job, config: SampleConfig) -> Tensor:
        """float32 (1, Z, h, w) on the CPU, so that a seed gives the same noise on every device."""
        cfg = self.base.vae.cfg
        shape = (1, cfg.latent_channels, config.height // cfg.factor, config.width // cfg.factor)
        if job.latents is None:
            return torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
        if tuple(job.latents.shape) != shape:
            raise ValueError(f"start latents {tuple(job.latents.shape)}: expected {shape}")
        return job.latents.float().cpu()

    def _finish(self, step: Step, vae: Autoencoder) -> Iterator[Result]:
        """Decode the last step's latents, image by image."""
        for i in range(len(step.latents)):
            one = step.rows(slice(i, i + 1))
            check_finite("UNet", one.latents)  # whatever was not finite in any step is not finite here
            image = self._image(vae, one.latents)
            if all(low == high for low, high in image.getextrema()):
                raise ValueError("the image is one plain colour: try --dtype fp32, or a lower guidance")
            yield Result(image, one.latents, one.state)

    def _image(self, vae: Autoencoder, latents: Tensor) -> Image.Image:
        (image,) = to_images(vae(partial(self._decode, latents)))
        return image

    def _decode(self, latents: Tensor, vae: VAE) -> Tensor:
        """(1, Z, h, w), scaled -> (1, 3, H, W)."""
        return decode(vae, (latents / vae.cfg.scaling).to(vae.dtype), self.tiles)


def _listed(what: str, given: Images) -> Sequence[Image.Image]:
    """One image or several as several; TypeError for anything else."""
    listed = given if isinstance(given, Sequence) else [given]
    for one in listed:
        if not isinstance(one, Image.Image):
            found, gives = type(one).__name__, {"image": "open_image(FILE)", "mask": "find_mask(image).mask"}
            raise TypeError(
                f"the {what} is of type {found}: expected a PIL image as moma.{gives[what]} gives"
            )
    return listed


def to_images(x: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] as PIL images, bytes truncated as in the release."""
    pixels = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)  # (B, H, W, 3)
    return [Image.fromarray(array) for array in pixels.cpu().numpy()]
