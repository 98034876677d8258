"""Sizes and training settings of MoMA-mini: networks of the same classes as the full model's."""

from dataclasses import dataclass, field
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
    """Every network's sizes; vocabularies follow from the tokenizers, the VAE's scaling from its latents."""
    vision = CLIPVisionConfig(width=128, layers=4, heads=4, mlp=512, act="gelu", image_size=64, patch=8)
    llama = LlamaConfig(width=192, layers=4, heads=6, mlp=512, positions=256)
    return {
        # f = 4 and 8 channels: at f = 8, or with SD's 4 channels, faces of 30 pixels are lost
        "vae": VAEConfig(channels=(32, 48, 64), latent_channels=8, resnets=1, norm_groups=8),
        "text": CLIPTextConfig(width=128, layers=3, heads=4, mlp=512, act="gelu", positions=32),
        "vision": vision,
        # attention at all three levels of the 16x16 latents: patterns need Eq. 3 at the finest
        "unet": UNetConfig(
            in_channels=8, out_channels=8, channels=(64, 128, 160), depth=(1, 1, 1), heads=(2, 4, 5),
            context_dim=(128, 128, 128), resnets=1, norm_groups=16,
        ),
        "llava": LlavaConfig(llama=llama, vision=vision),
        # patches of 4 pixels, so that masks have the images' own resolution
        "sam": SAMConfig(
            width=128, layers=4, heads=4, mlp=256, global_blocks=(1, 3), window=8, image_size=64, patch=4,
            out_channels=64, decoder_heads=4, decoder_mlp=128, iou_width=64,
        ),
        "adapter": AdapterConfig(mllm_dim=llama.width, embed_dim=vision.width, learnable_token=True),
    }  # fmt: skip


@dataclass(frozen=True)
class VAETrainingConfig:
    """The autoencoder."""

    held_out: int = 256  # images of the validation loss
    crop: int = 32  # pixels: four times as many images in the same time as whole ones
    subject_weight: float = 2.0  # of errors on the subject: identity is what everything else needs
    absolute_weight: float = 0.1  # of |error| beside its square: keeps outlines crisp
    kl_weight: float = 5e-5  # so small that reconstruction decides; it only keeps the latents near unit size
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=5000, batch_size=64, lr=2e-3, warmup=100, schedule="cosine", weight_decay=0.0, ema=0.995,
            save_every=500, validate_every=500,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class ClipConfig:
    """Text and image encoder."""

    held_out: int = 256
    projection: int = 96  # of the joint space, which only this training uses
    initial_scale: float = 14.3  # of the logits, CLIP's own (1 / 0.07)
    cut_out: float = 0.4  # share of images with the subject alone on white: what the decoder will be shown
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1200, batch_size=96, lr=1e-3, warmup=100, schedule="cosine", weight_decay=0.05,
            save_every=500, validate_every=500,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class SegmentTrainingConfig:
    """SAM, which finds the subject where no mask is given."""

    held_out: int = 256
    asked: int = 256  # held-out images whose subject is looked for, without a click, for the gate
    box_jitter: float = 0.05  # deviation of a box's edges, of its side: users' boxes are not tight
    frame_margin: float = 0.15  # at most, of the side, that a box around nearly everything leaves
    focal_weight: float = 20.0  # SAM's own: the focal loss is small beside the dice loss
    focal_gamma: float = 2.0  # SAM's own: pixels that are right already hardly count
    iou_weight: float = 1.0  # SAM's own
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500, batch_size=32, lr=1e-3, warmup=100, schedule="cosine", weight_decay=0.01, ema=0.995,
            save_every=500, validate_every=500,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class TextToImageConfig:
    """The base UNet."""

    held_out: int = 512
    drawn: int = 128  # images that the judges see for the gate
    shown: int = 16  # of them, as a sheet to look at
    attention: str = "explicit"  # with gradients on CPUs faster than SDPA, whose backward is slow there
    snr_limit: float = 5.0  # min-SNR's gamma, its paper's value: the nearly clean steps do not dominate
    rich: float = 0.45  # share of texts that also name colours and pattern
    label_only: float = 0.08  # share of samples with the label as their text: that of the reference pass
    empty: float = 0.1  # share without text, for classifier-free guidance
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=11000, batch_size=32, lr=1e-3, warmup=200, schedule="cosine", weight_decay=0.01, ema=0.995,
            save_every=500, validate_every=500,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class CaptionerConfig:
    """LLaVA."""

    held_out: int = 256
    asked: int = 128  # images that it describes for the gate
    answer_tokens: int = 24  # of a description, at most
    eos: int = 2  # ends an answer
    # (question, answer): of the whole image, of the subject alone, and MoMA's own task in words.
    dialogues: tuple[tuple[str, str], ...] = (
        ("USER: <image>\n Describe the image. ASSISTANT:", "{rich}"),
        ("USER: <image>\n Describe the image. ASSISTANT:", "{subject}"),
        (INSTRUCTIONS["paper"].replace("{subject}", "{label}").replace("{prompt}", "{caption}"), "{rich}"),
    )
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1400, batch_size=32, lr=1e-3, warmup=100, schedule="cosine", weight_decay=0.05,
            save_every=500, validate_every=500,
        )
    )  # fmt: skip


def gates() -> dict[str, dict[str, float]]:
    """Least values of what a stage measures on held-out images; later stages cannot repair a miss."""
    return {
        "vae": {"psnr": 28.0},  # dB; below it, faces are lost
        "clip": {"retrieval": 0.5},  # of captions that differ in colours too, most of them nearly alike
        # A judge that errs more would blur what the report measures; patterns of small marks are hard.
        "judges": {
            "class": 0.97, "scene": 0.98, "material": 0.97, "pattern": 0.75, "identity": 0.95, "mask": 0.85
        },
        "sam": {"iou": 0.9},
        "unet": {"class": 0.9, "scene": 0.9},
        "captioner": {"right": 0.5},
    }  # fmt: skip


@dataclass(frozen=True)
class MiniConfig:
    """The whole recipe."""

    world: WorldConfig = field(default_factory=WorldConfig)
    networks: dict[str, Any] = field(default_factory=networks)
    # One seed per network: a change of one does not move the others.
    seeds: dict[str, int] = field(
        default_factory=lambda: {"vae": 0, "text": 1, "vision": 2, "unet": 3, "llava": 4, "sam": 5}
    )
    images: int = 40_000  # renders to train on: each is seen a few times
    unseen_images: int = 1024  # renders of identities kept apart, for the gates
    tokenizer_captions: int = 6000  # images whose captions the vocabularies are learned from
    clip_merges: int = 300
    llama_pieces: int = 420
    encode_batch: int = 250  # images per call of the VAE when all are encoded
    vae: VAETrainingConfig = field(default_factory=VAETrainingConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    segmenting: SegmentTrainingConfig = field(default_factory=SegmentTrainingConfig)
    text_to_image: TextToImageConfig = field(default_factory=TextToImageConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    gates: dict[str, dict[str, float]] = field(default_factory=gates)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(steps=25, guidance=5.0, batch_size=32))
    dtype: torch.dtype = torch.float16  # of the bundle: 2 bytes, and finer steps than bf16's
    # What these networks need otherwise than the released weights (moma/methods/moma/config.py).
    method: dict[str, Any] = field(
        default_factory=lambda: {
            "template": "paper",  # the decoder has a learnable token
            "lambda_init": 0.3,  # at 0, K' and V' get no gradient before λ has moved
            # The 8x8 and 16x16 levels: of a 16x16 latent, a 4x4 map is too coarse to be a mask.
            "m_gen_layers": (0, 1, 6, 7, 8, 9),
            "m_gen_threshold": 0.4,  # where it meets the subject's outline best, on 32 validation pairs
            "m_gen_inside": "one",  # as in training; soft values average 0.6 here, and weaken β as much
            # Of 256 latents few are needed to give a subject's colours away: they are settled before 950.
            "subject_below_t": 1000,
        }
    )
    stage_batch: int = 32  # samples of a step of the two stages, over all ranks
    triplets: int = 20_000  # images of the two stages: each is seen a few times
    stage1_options: tuple[str, ...] = (
        "--steps", "600", "--lr", "5e-4", "--workers", "0",
        "--set", "schedule=cosine", "--set", "warmup=50", "--set", "lanes=16",
    )  # fmt: skip
    # Without snr_gamma most of what is learned is fine detail, and colours stay wrong; without
    # reference_shift it is copied from the same place of the reference, whatever is there in the image.
    stage2_options: tuple[str, ...] = (
        "--steps", "1200", "--lr", "8e-3", "--ema", "0.99", "--set", "weight_decay=0",
        "--set", "schedule=cosine", "--set", "warmup=20", "--set", "attention=explicit",
        "--set", "snr_gamma=0.01", "--set", "reference_shift=4",
    )  # fmt: skip
    # Trained beside MoMA for the report: name -> options of train.py stage2.
    variants: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "ip_adapter": ("--set", "parts=ip_adapter", "--set", "embedding=clip"),
            "white": ("--set", "reference_background=white"),
            "pairs": ("--data", "{work}/pairs"),  # the target is another render of the reference's subject
            "still": ("--set", "reference_shift=0"),  # the target is the reference itself, at the same place
        }
    )
