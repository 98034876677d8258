"""From an image of a subject to new images of it: the Python API behind sample.py.

    pipe = MoMA.load("weights/moma")
    subject = pipe.encode_subject(image, mask, "cat")
    images = pipe.sample(subject, "a cat on the beach", seeds=[0, 1])

Letters: B images, Z latent channels, S side of the reference, h w latents, L attention layers, T text tokens,
E embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor, nn

from models.clip import CLIPText
from models.llava import Llava
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.unet import UNet, attention_layers
from models.vae import VAE
from models.weights.packed import optimize_layout
from moma.inputs.preprocess import Reference, make_reference
from moma.methods.moma.adapter import Adapter, Conditioning, condition, reference_features
from moma.methods.moma.attention import ReferenceLayer
from moma.methods.moma.config import MethodConfig, method_config
from moma.methods.moma.feature_decoder import FeatureDecoder, MLLMInput
from moma.methods.prompts import check_prompt, label_positions, sd_prompt
from moma.sampling.config import SampleConfig
from moma.sampling.cuda_graphs import GraphedUNet, Recorder, choose_recorder
from moma.sampling.device import choose_device, choose_dtype
from moma.sampling.diffusion import ScheduleConfig, SolverStep, add_noise, alphas_cumprod, solver_steps
from moma.sampling.memory import Toggle, check_toggle, choose_stream, free_memory, max_batch
from moma.sampling.sampler import ResumeState, Step, denoise
from moma.sampling.tiles import decode
from moma.weights.bundle import Bundle

OnStep = Callable[[int, int], None]  # (steps done, steps in all)
# Turns a seed into another one for the reference's noise, so that it is not the start noise of an image with
# the same seed. Any pattern of 32 bits serves; torch's CPU generator ignores higher ones.
REFERENCE_STREAM = 0x9E3779B9
DRAWING = ("unet", "vae", "text", "adapter")  # the networks beside the MLLM


@dataclass(frozen=True, eq=False)
class Subject:
    """What is computed once per reference image (`MoMA.encode_subject`)."""

    word: str
    # What the MLLM looks at, and people; None where the layers come from elsewhere: jobs bring embeddings.
    reference: Reference | None
    layers: list[ReferenceLayer]  # L x K', V', M_ref, one row each


@dataclass(frozen=True, eq=False)
class Job:
    """One image to draw. The last two are drawn from the seed, or computed, unless given."""

    subject: Subject
    prompt: str
    seed: int
    negative: str = ""
    strength: float | None = None  # β; None = the SampleConfig's
    latents: Tensor | None = None  # float32 (1, Z, h, w), the start noise
    embedding: Tensor | None = None  # (1, E), the decoder's output


@dataclass(frozen=True, eq=False)
class Result:
    """One finished image."""

    image: Image.Image
    latents: Tensor  # float32 (1, Z, h, w), scaled as the UNet's
    m_gen: Tensor | None  # float32 (1, h, w), the last mask; None where a method makes none


class MoMA:
    """The networks of one bundle and what is done with them. Nothing changes after construction."""

    def __init__(
        self,
        *,
        unet: UNet,
        vae: VAE,
        text: CLIPText,
        llava: Llava | None,
        adapter: Adapter,
        clip_tokenizer: ClipTokenizer,
        llama_tokenizer: LlamaTokenizer | None,
        image_size: int,
        method: MethodConfig,
        dtype_reason: str = "given",
        make_recorder: Callable[[], Recorder] | None = None,
        tiles: Toggle = "auto",
    ) -> None:
        """image_size: side S of the reference in pixels. All networks on one device, in one dtype.

        llava and its tokenizer may be None where every job brings its embedding; make_recorder: of
        `moma.sampling.cuda_graphs.choose_recorder`; tiles: of `moma.sampling.tiles.decode`.
        """
        self.unet, self.vae, self.text, self.llava, self.adapter = unet, vae, text, llava, adapter
        self.clip_tokenizer, self.llama_tokenizer = clip_tokenizer, llama_tokenizer
        self.decoder = None if llava is None else FeatureDecoder(llava, adapter, llama_tokenizer, method)
        self.image_size, self.method, self.schedule = image_size, method, ScheduleConfig()
        self.device, self.dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
        self.dtype_reason, self.make_recorder, self.tiles = dtype_reason, make_recorder, tiles
        if llava is not None:
            method.check(
                len(adapter.layers), llava.cfg.llama.layers, text.cfg.positions, adapter.token is not None
            )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        method: MethodConfig | None = None,
        stream: Toggle = "auto",
        decoder: bool = True,
        pack: bool = True,
        cuda_graph: Toggle = "auto",
        tiles: Toggle = "auto",
    ) -> Self:
        """The bundle in `folder`, in evaluation mode; method None = the default with the bundle's overrides.

        device: "auto", "cpu", "cuda", "cuda:1", "mps"; dtype: "auto", "bf16", "fp16", "fp32"; stream: whether
        the MLLM stays on the disk and is read block by block, for many jobs of a `run` at once ("auto": if
        memory is short); decoder False: no MLLM, jobs bring the embeddings of `load_decoder`; pack: whether
        the UNet's weights are laid out for speed (models/weights/packed.py), on CPUs so that they can
        neither be looked at nor trained; cuda_graph: whether denoising steps are recorded and replayed
        (moma/sampling/cuda_graphs.py; "auto": on CUDA devices); tiles: whether images are decoded in tiles
        (moma/sampling/tiles.py; "auto": if memory is short). ValueError for a folder that is no complete
        bundle, or a device that is not there. A preset for these weights:
        `method_config("release", **Bundle.open(folder).method)`.
        """
        bundle, method, place, kind, reason = _choices(folder, device, dtype, method)
        make_recorder = choose_recorder(cuda_graph, place)
        check_toggle("tiles", tiles)
        llava = _load_llava(bundle, place, kind, stream, DRAWING)[0] if decoder else None
        return cls(
            **load_drawing(bundle, place, kind, DRAWING, pack),
            llava=llava,
            clip_tokenizer=bundle.clip_tokenizer(),
            llama_tokenizer=bundle.llama_tokenizer(),
            image_size=bundle.image_size,
            method=method,
            dtype_reason=reason,
            make_recorder=make_recorder,
            tiles=tiles,
        )

    @property
    def embed_dim(self) -> int:
        """E, the width of the embeddings that jobs bring."""
        return self.adapter.cfg.embed_dim

    def with_method(self, method: MethodConfig) -> Self:
        """The same networks under other choices. Subjects have to be encoded again."""
        return type(self)(
            unet=self.unet,
            vae=self.vae,
            text=self.text,
            llava=self.llava,
            adapter=self.adapter,
            clip_tokenizer=self.clip_tokenizer,
            llama_tokenizer=self.llama_tokenizer,
            image_size=self.image_size,
            method=method,
            dtype_reason=self.dtype_reason,
            make_recorder=self.make_recorder,
            tiles=self.tiles,
        )

    @torch.no_grad()
    def encode_subject(
        self,
        image: Image.Image,
        mask: Image.Image,
        word: str,
        *,
        seed: int = 0,
        posterior_noise: Tensor | None = None,
        reference_noise: Tensor | None = None,
    ) -> Subject:
        """The reference pass (Sec. 3.3) of one subject.

        image: RGB, or RGBA (transparent parts become white), as `moma.inputs.preprocess.open_image` gives
        it; mask:
        mode L, 255 = subject, of the same aspect ratio, as `find_mask` gives it; word: what it is, such as
        "cat"; seed and noises: as `reference_pass`. ValueError for an empty or a full mask.
        """
        reference = make_reference(image, mask, self.image_size, self.method)
        layers = self.reference_pass(
            reference.image, reference.mask, word, seed, posterior_noise, reference_noise
        )
        return Subject(word, reference, layers)

    @torch.no_grad()
    def reference_pass(
        self,
        image: Tensor,
        m_ref: Tensor,
        word: str,
        seed: int = 0,
        posterior_noise: Tensor | None = None,
        reference_noise: Tensor | None = None,
    ) -> list[ReferenceLayer]:
        """K', V' and M_ref of every self-attention layer: one UNet call at t = 0 with the label as text.

        image (1, 3, S, S) in [-1, 1]; m_ref (1, 1, any, any) in {0, 1}; the two noises, float32
        (1, Z, S/f, S/f), come from `seed` unless given (`method.reference_noise`).
        """
        moments = self.vae.encode(image.to(self.device, self.dtype))  # 2 x (1, Z, S/f, S/f)
        latent = self._reference_latent(*moments, seed, posterior_noise, reference_noise)
        label = self.text(self.clip_tokenizer.ids([word]).to(self.device))[0]  # (1, T, context_dim)
        latent, m_ref = latent.to(self.dtype), m_ref.to(self.device)
        return reference_features(self.unet, self.adapter, latent, label, m_ref, self.method)

    def _reference_latent(
        self,
        mean: Tensor,
        std: Tensor,
        seed: int,
        posterior_noise: Tensor | None,
        reference_noise: Tensor | None,
    ) -> Tensor:
        """The posterior's mean and std -> the latent that the UNet sees at t = 0, float32 (1, Z, h, w)."""
        if self.method.reference_noise == "none":
            return reference_latent(mean, std, None, self.vae.cfg.scaling, self.schedule)
        generator = None  # the release: torch's global one
        if self.method.reference_noise == "seeded":
            generator = torch.Generator().manual_seed(seed ^ REFERENCE_STREAM)
        for noise in (posterior_noise, reference_noise):
            if noise is not None and noise.shape != mean.shape:
                raise ValueError(f"reference noise {tuple(noise.shape)}: expected {tuple(mean.shape)}")
        drawn = [torch.randn(mean.shape, generator=generator) for _ in range(2)]
        given = (posterior_noise, reference_noise)
        first, second = ((d if g is None else g).to(mean.device) for d, g in zip(drawn, given, strict=True))
        return reference_latent(mean, std, (first, second), self.vae.cfg.scaling, self.schedule)

    def embed(self, subject: Subject, prompt: str) -> Tensor:
        """The decoder's image embedding (1, E) for one subject and prompt: one pass of the MLLM."""
        return self.embed_each([(subject, prompt)])[0]

    def embed_each(self, pairs: Sequence[tuple[Subject, str]]) -> list[Tensor]:
        """The same for many pairs, bit for bit; a streamed MLLM reads its weights once for many of them."""
        for subject, _ in pairs:
            self._check_decoder(subject)
        return self.decoder([MLLMInput(one.reference.white, one.word, prompt) for one, prompt in pairs])

    def _check_decoder(self, subject: Subject) -> None:
        if self.decoder is None or subject.reference is None:
            raise ValueError("without an MLLM or an image for it every job must bring its embedding")

    def sample(
        self,
        subject: Subject,
        prompt: str | Sequence[str],
        seeds: Sequence[int] = (0,),
        *,
        strength: float | None = None,
        negative: str = "",
        config: SampleConfig | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Images of `subject`, for each prompt for each seed. strength: β of Eq. 3, None = the config's."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        jobs = [Job(subject, text, seed, negative, strength) for text in prompts for seed in seeds]
        return [result.image for result in self.run(jobs, config, on_step)]

    def run(
        self,
        jobs: Sequence[Job],
        config: SampleConfig | None = None,
        on_step: OnStep | None = None,
        draft: ResumeState | None = None,
    ) -> Iterator[Result]:
        """Draw any mix of subjects, prompts and seeds, in order; each result comes as soon as it is there.

        Result i does not depend on the other jobs. draft: keeps the steps of jobs that are one batch
        (`at_once`), and has the drawing go on from the latest. ValueError, before anything is computed, for a
        prompt without the subject's word, a size that does not fit, unknown settings.
        """
        config = (config or SampleConfig()).sized(self.image_size)
        config.check(self.vae.cfg.factor)
        if draft is not None and len(jobs) > self.at_once(config):
            raise ValueError(f"{len(jobs)} images with a draft: expected a batch, {self.at_once(config)}")
        path = solver_steps(self.schedule, config.steps, config.solver)
        for job in jobs:
            check_prompt(job.subject.word, job.prompt, self.method.absent_label, self.clip_tokenizer)
            if job.strength is not None:
                replace(config, strength=job.strength).check(self.vae.cfg.factor)
            expected = (1, self.embed_dim)
            if job.embedding is None:
                self._check_decoder(job.subject)
            if job.embedding is not None and tuple(job.embedding.shape) != expected:
                raise ValueError(f"embedding {tuple(job.embedding.shape)}: expected {expected}")
        noise = [self._start_latents(job, config) for job in jobs]
        return self._draw(jobs, noise, path, config, on_step, draft)

    def at_once(self, config: SampleConfig) -> int:
        """How many images are a batch; config: with its sizes (`SampleConfig.sized`)."""
        if self.method.m_gen_norm == "batch":  # there the batch decides what its images are
            return config.batch_size
        latents = config.height * config.width // self.vae.cfg.factor**2
        return max_batch(config.batch_size, latents, self.device)

    @torch.no_grad()
    def _draw(
        self,
        jobs: Sequence[Job],
        noise: Sequence[Tensor],
        path: Sequence[SolverStep],
        config: SampleConfig,
        on_step: OnStep | None,
        draft: ResumeState | None,
    ) -> Iterator[Result]:
        embeddings = self._embed_once(jobs)
        size = self.at_once(config)
        starts = range(0, len(jobs), size)
        unet = GraphedUNet(self.unet, self.make_recorder)
        for n, start in enumerate(starts):
            batch = slice(start, start + size)
            guide = self.guide(jobs[batch], embeddings[batch], config)
            latents = torch.cat(noise[batch]).to(self.device)  # (B, Z, h, w)
            settings = config.guidance, config.solver, config.guidance_interval
            kept = draft.read() if draft else None
            step = after = kept and kept.to(self.device)
            for step in denoise(unet, guide, path, latents, *settings, after=after):
                if draft:
                    draft.keep(step)
                if on_step:
                    on_step(n * len(path) + step.index + 1, len(starts) * len(path))
            unet.forget()  # the VAE's decoder needs the memory
            yield from self._finish(step)

    def _embed_once(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Each job's embedding (1, E); the MLLM reads every pair of subject and prompt once, by itself."""
        pairs = list(dict.fromkeys((job.subject, job.prompt) for job in jobs if job.embedding is None))
        found = dict(zip(pairs, self.embed_each(pairs), strict=True)) if pairs else {}
        return [
            found[job.subject, job.prompt]
            if job.embedding is None
            else job.embedding.to(self.device, self.dtype)
            for job in jobs
        ]

    @torch.no_grad()
    def guide(self, jobs: Sequence[Job], embeddings: Sequence[Tensor], config: SampleConfig) -> Conditioning:
        """The conditioning of one batch: text, label positions, context tokens, reference features, β.

        embeddings: one (1, E) per job, of `embed` or given.
        """
        text, negative = self.read_texts(jobs)  # 2 x (B, T, context_dim)
        label = torch.zeros(len(jobs), text.shape[1])  # (B, T)
        for row, job in enumerate(jobs):
            full = sd_prompt(job.subject.word, job.prompt)
            label[row, self._label_positions(full, job.subject.word)] = 1
        beta = [config.strength if job.strength is None else job.strength for job in jobs]
        return condition(
            self.adapter,
            torch.cat(list(embeddings)),
            text,
            negative,
            label.to(self.device),
            [job.subject.layers for job in jobs],
            torch.tensor(beta, device=self.device),
            self.method,
        )

    def read_texts(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """States of the prompts and of the negative prompts, each (B, T, context_dim)."""
        texts = [sd_prompt(job.subject.word, job.prompt) for job in jobs]
        ids = self.clip_tokenizer.ids([*texts, *(job.negative for job in jobs)])  # (2B, T)
        return self.text(ids.to(self.device))[0].chunk(2)

    def _label_positions(self, text: str, word: str) -> list[int]:
        positions = label_positions(self.clip_tokenizer, text, word, self.method.label_tokens)
        if not positions and self.method.absent_label == "error":
            raise ValueError(f"no token of the subject {word!r} is in {text!r}: name it in the prompt")
        return positions

    def _start_latents(self, job: Job, config: SampleConfig) -> Tensor:
        """float32 (1, Z, h, w) on the CPU, so that a seed gives the same noise on every device."""
        factor = self.vae.cfg.factor
        shape = (1, self.vae.cfg.latent_channels, config.height // factor, config.width // factor)
        if job.latents is None:
            return torch.randn(shape, generator=torch.Generator().manual_seed(job.seed))
        if tuple(job.latents.shape) != shape:
            raise ValueError(f"start latents {tuple(job.latents.shape)}: expected {shape}")
        return job.latents.float().cpu()

    def _finish(self, step: Step) -> Iterator[Result]:
        """The last step's latents -> images, one by one."""
        if not step.latents.isfinite().all():
            raise ValueError(
                "the image is not finite: try a lower strength or guidance, or --dtype bf16 or fp32"
            )
        m_gens = [None] * len(step.latents) if step.m_gen is None else step.m_gen
        for latents, m_gen in zip(step.latents.split(1), m_gens, strict=True):  # (1, Z, h, w), (1, h, w)
            x = decode(self.vae, (latents / self.vae.cfg.scaling).to(self.dtype), self.tiles)  # (1, 3, H, W)
            yield Result(to_images(x)[0], latents, m_gen)


def reference_latent(
    mean: Tensor,
    std: Tensor,
    noises: tuple[Tensor, Tensor] | None,
    scaling: float,
    schedule: ScheduleConfig,
) -> Tensor:
    """The posterior of the reference -> the latent that the UNet sees at t = 0, float32 (B, Z, h, w).

    mean, std (B, Z, h, w), not scaled; noises: of the posterior and of `add_noise` at t = 0, each like mean;
    None = the posterior's mean alone (the paper's "clear reference image").
    """
    if noises is None:
        return mean.float() * scaling
    latent = (mean.float() + std.float() * noises[0]) * scaling
    return add_noise(latent, noises[1], alphas_cumprod(schedule)[0])


def to_images(x: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] as PIL images, bytes truncated as in the release."""
    pixels = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)  # (B, H, W, 3)
    return [Image.fromarray(array) for array in pixels.cpu().numpy()]


def load_drawing(
    bundle: Bundle,
    device: torch.device,
    dtype: torch.dtype,
    names: Sequence[str] = DRAWING,
    pack: bool = True,
) -> dict[str, nn.Module]:
    """Networks of a bundle, the UNet among them, ready to draw; pack: as in `MoMA.load`."""
    networks = {name: bundle.build(name, device, dtype).eval().requires_grad_(False) for name in names}
    # Not the VAE's: it would gain a sixth, and with channels last torch's GroupNorm is less exact on images
    # with flat parts.
    if pack:
        optimize_layout(networks["unet"], device, dtype)
    return networks


def load_decoder(
    folder: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    method: MethodConfig | None = None,
    stream: Toggle = "auto",
) -> FeatureDecoder:
    """The decoder by itself, arguments as `MoMA.load`: it can be gone before the drawing networks are loaded.

    embeddings = load_decoder(folder)([MLLMInput(reference.white, "cat", prompt)])
    pipe = MoMA.load(folder, decoder=False)
    """
    bundle, method, place, kind, _ = _choices(folder, device, dtype, method)
    llava, how = _load_llava(bundle, place, kind, stream, ("adapter",))
    adapter = bundle.build("adapter", place, kind).eval().requires_grad_(False)
    return FeatureDecoder(llava, adapter, bundle.llama_tokenizer(), method, how)


def _choices(
    folder: str | Path, device: str, dtype: str, method: MethodConfig | None
) -> tuple[Bundle, MethodConfig, torch.device, torch.dtype, str]:
    """What the arguments of `MoMA.load` mean; the text is the reason for the dtype. Reads no weights."""
    bundle = Bundle.open(folder)
    method = method_config(**bundle.method) if method is None else method
    check_method(method, bundle)
    place = choose_device(device)
    return bundle, method, place, *choose_dtype(dtype, place)


def _load_llava(
    bundle: Bundle, device: torch.device, dtype: torch.dtype, stream: Toggle, beside: Sequence[str]
) -> tuple[Llava, str]:
    """LLaVA, streamed or resident, and why; beside: the networks that will be in memory together with it."""
    needed = bundle.nbytes(("llava", *beside), dtype)
    streamed, reason = choose_stream(stream, needed, free_memory(device))
    llava = bundle.stream(device, dtype) if streamed else bundle.build("llava", device, dtype)
    return llava.eval().requires_grad_(False), f"{'streamed' if streamed else 'resident'}: {reason}"


def check_method(method: MethodConfig, bundle: Bundle) -> None:
    """ValueError for a choice that the bundle's networks cannot follow; reads no weights."""
    method.check(
        attention_layers=len(attention_layers(bundle.config("unet"))),
        mllm_layers=bundle.config("llava").llama.layers,
        text_tokens=bundle.config("text").positions,
        learnable_token=bundle.config("adapter").learnable_token,
    )
