"""Sizes and training settings of MoMA-mini: networks of the same classes as the full model's."""

# ruff: noqa: RUF009 (defaults are frozen)

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from models.clip import CLIPTextConfig, CLIPVisionConfig
from models.llama import LlamaConfig
from models.llava import LlavaConfig
from models.sam_config import SAMConfig
from models.unet import UNetConfig
from models.vae import VAEConfig
from moma.methods.moma.adapter import AdapterConfig
from moma.methods.moma.feature_decoder import INSTRUCTIONS
from moma.sampling.config import SampleConfig
from moma.training.config import TrainConfig
from moma.world.classifiers import ProbeConfig
from moma.world.world import WorldConfig


def networks() -> dict[str, Any]:
    """Sizes of every network; vocabularies follow from the tokenizers, the VAE's scaling from its latents."""
    vision = CLIPVisionConfig(width=128, layers=4, heads=4, mlp=512, act="gelu", image_size=64, patch=8)
    llama = LlamaConfig(width=192, layers=4, heads=6, mlp=512, positions=256)
    return {
        # f = 4 and 8 channels: f = 8, or SD's 4 channels, would lose faces of 30 pixels
        "vae": VAEConfig(channels=(32, 48, 64), latent_channels=8, resnets=1, norm_groups=8),
        "text": CLIPTextConfig(width=128, layers=3, heads=4, mlp=512, act="gelu", positions=40),
        "vision": vision,
        # attention at all three levels of the 16x16 latents: patterns need Eq. 3 at the finest
        "unet": UNetConfig(
            in_channels=8, out_channels=8, channels=(64, 128, 160), depth=(1, 1, 1), heads=(2, 4, 5),
            context_dim=(128, 128, 128), resnets=1, norm_groups=16,
        ),
        "llava": LlavaConfig(llama=llama, vision=vision),
        # patches of 4 pixels give masks the images' own resolution
        "sam": SAMConfig(
            width=128, layers=4, heads=4, mlp=256, global_blocks=(1, 3), window=8, image_size=64, patch=4,
            out_channels=64, decoder_heads=4, decoder_mlp=128, iou_width=64,
        ),
        "adapter": AdapterConfig(mllm_dim=llama.width, embed_dim=vision.width, learnable_token=True),
    }  # fmt: skip


def _train(warmup: int = 100, **options: Any) -> TrainConfig:
    """Training of one network, with the settings that all share."""
    shared = {"warmup": warmup, "schedule": "cosine", "save_every": 500, "validate_every": 500}
    return TrainConfig(**shared, **options)


@dataclass(frozen=True)
class AdapterRun:
    """A training of `train.py` on top of a bundle."""

    training: str
    options: tuple[str, ...] = ()
    start: str = "decoder"  # the bundle that it starts from, of stage 1 or of another run
    data: str = "mixed"  # folder of the shards
    share: float = 1.0  # of `MiniConfig.adapter_steps`
    cache: str | None = None  # of its own, where an option changes what is cached


def _set(*fields: str) -> tuple[str, ...]:
    return tuple(part for one in fields for part in ("--set", one))


# Without a shift the adapter copies from the same place of the reference, whatever the image shows there.
_MOMA = _set("attention=explicit", "reference_shift=4", "drop_reference=0.15")
# Of the released sizes a fraction, as the UNet is.
_MM_DIFF = _set("rank=16", "text_rank=16", "refiner_blocks=2")
_PART = 0.25  # of the steps: ablations, and images of two subjects


def adapter_runs() -> dict[str, AdapterRun]:
    """The adapters; each bundle holds those of the bundle that it starts from."""
    again = _set("init=adapter")
    return {
        "moma": AdapterRun("moma:stage2", _MOMA),
        "moma_pairs": AdapterRun("moma:several", (*_MOMA, *again), "moma", "pairs", _PART),
        "ip_adapter": AdapterRun("ip-adapter", start="moma_pairs", share=1 + _PART),
        "mm_diff": AdapterRun("mm-diff", _MM_DIFF, "ip_adapter"),
        "mm_diff_pairs": AdapterRun("mm-diff", (*_MM_DIFF, *_set("init=mm_diff")), "mm_diff", "pairs", _PART),
    }


def ablation_runs() -> dict[str, AdapterRun]:
    """Trainings that differ in one thing from the first of their method."""
    undropped = _set("drop_text=0", "drop_both=0")
    found = {
        "moma_part": AdapterRun("moma:stage2", _MOMA),
        "moma_white": AdapterRun("moma:stage2", (*_MOMA, *_set("reference_background=white")), cache="white"),
        "moma_selves": AdapterRun("moma:stage2", _MOMA, data="selves"),
        "moma_twins": AdapterRun("moma:stage2", _MOMA, data="twins"),
        "moma_undropped": AdapterRun("moma:stage2", (*_MOMA, *undropped)),
        "moma_shown": AdapterRun("moma:stage2", (*_MOMA, *_set("drop_reference=0"))),
    }
    constraint = _set("map_weight=0", "image_map_weight=0")
    without = {part: _set(f"without={part}") for part in ("words", "refiner", "loras")}
    for name, options in {"part": (), "maps": constraint, **without}.items():
        # Both kinds of images, as the constraint on the tokens' maps needs two subjects.
        found[f"mm_diff_{name}_single"] = AdapterRun("mm-diff", (*_MM_DIFF, *options))
        more = (*_MM_DIFF, *options, *_set("init=mm_diff"))
        found[f"mm_diff_{name}"] = AdapterRun("mm-diff", more, f"mm_diff_{name}_single", "pairs", _PART)
    return {name: replace(run, share=_PART * run.share) for name, run in found.items()}


@dataclass(frozen=True)
class VAETrainingConfig:
    """The autoencoder."""

    held_out: int = 256  # images of the validation loss
    crop: int = 32  # pixels: a quarter of an image, so four times as many images in the same time
    subject_weight: float = 2.0  # of errors on the subject, since everything else needs its identity
    absolute_weight: float = 0.1  # of |error| beside its square, for crisp outlines
    kl_weight: float = 5e-5  # so small that it only keeps the latents near unit size
    train: TrainConfig = _train(steps=5000, batch_size=64, lr=2e-3, weight_decay=0.0, ema=0.995)


@dataclass(frozen=True)
class ClipConfig:
    """Text and image encoder."""

    held_out: int = 256
    projection: int = 96  # width of the joint space, which only this training uses
    initial_scale: float = 14.3  # of the logits, CLIP's own (1 / 0.07)
    cut_out: float = 0.4  # share of images with the subject alone on white, as the feature decoder sees it
    paired: float = 0.2  # share of images of two subjects
    train: TrainConfig = _train(steps=1200, batch_size=96, lr=1e-3, weight_decay=0.05)


@dataclass(frozen=True)
class SegmentTrainingConfig:
    """SAM, which finds the subject without a mask."""

    held_out: int = 256
    paired: float = 0.4  # share of images of two subjects
    asked: int = 256  # held-out images in which the gate looks for the subject, without a click
    asked_pairs: int = 96  # and of two subjects, with a box around each
    box_jitter: float = 0.05  # standard deviation of box edges, of a side: users' boxes are not tight
    frame_margin: float = 0.15  # largest margin of a box around nearly everything, of the side
    focal_weight: float = 20.0  # SAM's own: the focal loss is small beside the dice loss
    focal_gamma: float = 2.0  # SAM's own: correct pixels hardly count
    iou_weight: float = 1.0  # SAM's own
    train: TrainConfig = _train(steps=1500, batch_size=32, lr=1e-3, weight_decay=0.01, ema=0.995)


@dataclass(frozen=True)
class TextToImageConfig:
    """The base UNet."""

    held_out: int = 128
    attention: str = "explicit"  # faster than SDPA in training on CPUs
    # P2's weights over t, (k + SNR)^-gamma: nearly equal losses at all t, since colours settle at high noise.
    p2_k: float = 0.01
    p2_gamma: float = 0.5
    subject_weight: float = 3.0  # of errors on subjects, against 1 elsewhere: adapters need them drawn well
    wide_t: float = 0.5  # t of wide images is 1000 u^this: high noise decides which subject stands where
    map_layers: tuple[int, ...] = (0, 1, 6, 7, 8, 9)  # of the map loss: those of M_gen
    map_weight: float = 0.05  # of the map loss, 0 to 1, beside the noise's, near 0.1
    rich: float = 0.5  # share of texts that also name colours and patterns
    label_only: float = 0.08  # share of samples with the label as their text, as in the reference pass
    empty: float = 0.1  # share without text, for classifier-free guidance
    # Steps of a wide image and two single ones per item.
    train: TrainConfig = _train(
        steps=15300, batch_size=12, lr=1e-3, warmup=200, weight_decay=0.01, ema=0.999,
    )  # fmt: skip


@dataclass(frozen=True)
class BaseNumbersConfig:
    """How many held-out images each number is measured on."""

    split: str = "val"
    images: int = 200  # of one subject
    pairs: int = 200  # of two of different classes
    same: int = 100  # of two of one class
    distractors: int = 10  # identities beside the own one
    present: float = 0.08  # least share of its view that a subject fills
    noised: int = 96  # renders for the paired errors and the maps
    timesteps: tuple[int, ...] = (200, 600, 900)  # of the paired errors
    shown: int = 64  # images of the sheet
    columns: int = 8
    map_timesteps: tuple[int, ...] = (100, 300, 500, 700)


@dataclass(frozen=True)
class CaptionerConfig:
    """LLaVA."""

    held_out: int = 256
    asked: int = 128  # images that it describes for the gate
    answer_tokens: int = 24  # longest description
    eos: int = 2  # ends an answer
    # (question, answer) on the whole image, on the subject alone, and MoMA's own task in words.
    dialogues: tuple[tuple[str, str], ...] = (
        ("USER: <image>\n Describe the image. ASSISTANT:", "{rich}"),
        ("USER: <image>\n Describe the image. ASSISTANT:", "{subject}"),
        (INSTRUCTIONS["paper"].replace("{subject}", "{label}").replace("{prompt}", "{caption}"), "{rich}"),
    )
    train: TrainConfig = _train(steps=1400, batch_size=32, lr=1e-3, weight_decay=0.05)


@dataclass(frozen=True)
class FamiliarTraining:
    """What images of the world are like (`moma.inputs.familiar`)."""

    renders: int = 500
    large: int = 60  # renders at another size
    large_side: int = 512  # pixels
    enlarged: int = 256  # pixels of a render that is enlarged
    quality: int = 85  # of JPEG files


def report_gates() -> dict[str, tuple[float, float]]:
    """Least and largest averages of the report, by the names of its targets."""
    any_ = math.inf
    ahead = {f"{name}, less IP-Adapter's": (0.0, any_) for name in ("class", "scene", "material at β = 0.4")}
    two = {"both present": (0.85, 1), "identity of each": (0.6, 1), "other's colours": (0, 0.1)}
    two |= {f"{name}, less IP-Adapter's": (0.0, any_) for name in ("both present", "identity of each")}
    who = ("MoMA", "MM-Diff")
    two = {f"two subjects, {one}: {name}": bounds for one in who for name, bounds in two.items()}
    return {
        "identity": (0.8, 1), "pattern": (0.7, 1), "colour error": (0, 27),
        "identity in combinations never trained": (0.65, 1), "identity, less IP-Adapter's": (0.1, any_),
        "class": (0.97, 1), "scene": (0.98, 1), "material at β = 0.4": (0.97, 1), **ahead,
        "M_gen IoU": (0.75, 1), "sharpness, less the base's": (0, any_), **two,
    }  # fmt: skip


@dataclass(frozen=True)
class ReportConfig:
    """What the report draws and measures."""

    split: str = "test"
    pairs: int = 200  # of identity and scene: a share of 90% is then known to about 4 points
    new: float = 0.5  # share of them in combinations that were never trained
    textures: int = 60  # of identity and material, 15 of each
    duos: int = 120  # of two subjects of different classes
    present: float = 0.08  # least share of its view that a subject of two fills
    distractors: int = 10  # K: other identities of the same class, so chance is 1 in 11
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.2)  # Table 4's β; 0 and 1 are always needed
    texture_strengths: tuple[float, ...] = (0.0, 0.4, 0.7, 1.0)
    texture_strength: float = 0.4  # the paper's for textures, used where MoMA has a single row
    unconditional: tuple[float, ...] = (0.0, 0.5)  # shares of β in the unconditional row
    margin: int = 2  # mask cells around a subject that are not background yet: outline, shadow
    rows: int = 4  # of a figure: the first ones, not the best
    scale: int = 2  # of the figures' images
    sample: SampleConfig = SampleConfig(batch_size=16)
    world: WorldConfig = WorldConfig()
    wanted: dict[str, tuple[float, float]] = field(default_factory=report_gates)


def gates() -> dict[str, dict[str, tuple[float, float]]]:
    """Least and largest values of a stage on held-out images; later stages cannot repair a miss."""
    any_ = math.inf
    return {
        "vae": {"psnr": (28.0, any_)},  # dB; below it, faces are lost
        "clip": {"retrieval": (0.5, any_)},  # among captions that differ in colours, too, most nearly alike
        # Classifiers that err more would blur the report's measures; patterns of small marks are hard.
        "judges": {
            "class": (0.97, 1), "scene": (0.98, 1), "material": (0.97, 1), "pattern": (0.75, 1),
            "identity": (0.95, 1), "mask": (0.85, 1), "pair class": (0.97, 1), "pair identity": (0.9, 1),
        },
        "sam": {"iou": (0.9, 1), "pair iou": (0.85, 1), "pair iou of a click": (0.8, 1)},
        "unet": {
            "class": (0.98, 1), "scene": (0.98, 1), "told identity": (0.55, 1), "told pattern": (0.65, 1),
            "told colour": (0, 40), "told gain 600": (0.1, 1), "told gain 900": (0.1, 1), "both": (0.9, 1),
            "same": (0.8, 1), "map AUC": (0.9, 1), "map IoU": (0.75, 1), "sharpness": (0.9, any_),
        },
        "captioner": {"right": (0.5, 1)},
    }  # fmt: skip


@dataclass(frozen=True)
class MiniConfig:
    """The whole recipe."""

    world: WorldConfig = field(default_factory=WorldConfig)
    networks: dict[str, Any] = field(default_factory=networks)
    # One seed per network, so that a change of one does not affect the others.
    seeds: dict[str, int] = field(
        default_factory=lambda: {"vae": 0, "text": 1, "vision": 2, "unet": 3, "llava": 4, "sam": 5}
    )
    images: int = 40_000  # training renders; each is seen a few times
    unseen_images: int = 1024  # renders of held-out identities, for the gates
    pairs: int = 20_000  # training renders of two subjects
    unseen_pairs: int = 256  # the same of held-out identities
    tokenizer_captions: int = 6000  # images whose captions the tokenizers learn
    clip_merges: int = 300
    llama_pieces: int = 420
    encode_batch: int = 250  # images per call of the VAE when all images are encoded
    vae: VAETrainingConfig = field(default_factory=VAETrainingConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    segmenting: SegmentTrainingConfig = field(default_factory=SegmentTrainingConfig)
    text_to_image: TextToImageConfig = field(default_factory=TextToImageConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    familiar: FamiliarTraining = field(default_factory=FamiliarTraining)
    base_numbers: BaseNumbersConfig = field(default_factory=BaseNumbersConfig)
    gates: dict[str, dict[str, tuple[float, float]]] = field(default_factory=gates)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(steps=25, guidance=5.0, batch_size=32))
    dtype: torch.dtype = torch.float16  # of the bundle: finer steps than bf16 in 2 bytes
    # Where these networks differ from the released weights (moma/methods/moma/config.py).
    method: dict[str, Any] = field(
        default_factory=lambda: {
            "template": "paper",  # the feature decoder has a learnable token
            "lambda_init": 0.3,  # at 0, K' and V' get no gradient before λ has moved
            # The 8x8 and 16x16 levels: of a 16x16 latent, a 4x4 map is too coarse to be a mask.
            "m_gen_layers": (0, 1, 6, 7, 8, 9),
            "m_gen_threshold": 0.5,  # fits the subject's outline best on validation pairs
            "m_gen_inside": "one",  # as in training; soft values would weaken β
            "ownership": "word",  # the base's words tell two subjects apart
            # More guidance on the subject than the paper's, which finds more of it and keeps class and scene.
            "unconditional_beta": 0.5,
            # Few of the 256 latents determine a subject's colours, so they are settled before t = 950.
            "subject_below_t": 1000,
        }
    )
    adapter_batch: int = 32  # samples per step of the decoder and the adapters, over all ranks
    singles: int = 20_000  # images that they see of one subject; each is seen a few times
    twos: int = 10_000  # and of two
    # Folder of shards -> share of samples whose reference is another render; the others' is the image itself.
    twins: dict[str, float] = field(
        default_factory=lambda: {"mixed": 0.5, "pairs": 0.5, "selves": 0.0, "twins": 1.0}
    )
    decoder_steps: int = 600
    decoder_options: tuple[str, ...] = (
        "--lr", "5e-4", "--workers", "0",
        "--set", "schedule=cosine", "--set", "warmup=50", "--set", "lanes=16",
    )  # fmt: skip
    adapter_steps: int = 3000
    # Fine detail has the largest errors; weighted by it, colours stay wrong, and without it, outlines blur.
    adapter_options: tuple[str, ...] = (
        "--lr", "2e-3", "--ema", "0.999",
        *_set("schedule=cosine", "warmup=50", "snr_gamma=1", "save_every=250", "validate_every=250"),
        *_set("sample_every=1000", "subject_weight=3"),  # what has to be carried over lies inside the mask
    )  # fmt: skip
    adapters: dict[str, AdapterRun] = field(default_factory=adapter_runs)
    ablations: dict[str, AdapterRun] = field(default_factory=ablation_runs)

    def trainings(self) -> dict[str, Any]:
        """The settings of all networks but the adapters, by their fields; each has a `train`."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "train")}

    def shortened(self, share: float) -> "MiniConfig":
        """The recipe with that share of its renders and steps, and without gates, which it would miss."""

        def less(number: int) -> int:
            return max(1, round(share * number))

        trained = {}
        for name, part in self.trainings().items():
            train = replace(part.train, steps=less(part.train.steps), warmup=less(part.train.warmup))
            trained[name] = replace(part, train=train)
        group = self.probes.group
        sizes = {name: group * less(getattr(self.probes, name) // group) for name in ("pairs", "wide")}
        trained["probes"] = replace(trained["probes"], **sizes)
        renders = ("images", "pairs", "tokenizer_captions", "singles", "twos")
        numbers = {name: less(getattr(self, name)) for name in (*renders, "decoder_steps", "adapter_steps")}
        return replace(self, gates={}, **trained, **numbers)
