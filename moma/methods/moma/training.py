"""MoMA's trainings (Sec. 3.4): stage 1, the feature decoder (Eq. 4), and stage 2, the adapter (Eq. 1).

Letters: B samples, Z latent channels, h w latents, S side of the references, H W sides of the targets, s side
of the image tower's images, N patches, C width of the MLLM, T text tokens, E embedding.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip_image import clip_image
from models.llava import Llava
from models.lora import LoRALinear, add_lora, merged_tensors
from moma.inputs.preprocess import Reference
from moma.methods.map_loss import Form, map_loss
from moma.methods.moma.adapter import Adapter, AdapterConfig
from moma.methods.moma.attention import ReferenceLayer
from moma.methods.moma.conditioning import MoMAHook, condition_rows, reference_features
from moma.methods.moma.config import DEFAULT, MethodConfig
from moma.methods.moma.feature_decoder import FeatureDecoder, instruction
from moma.methods.moma.method import MoMA, MoMASubject, reference_latent
from moma.sampling.config import LARGEST, check_types
from moma.sampling.interface import Batch, DenoisingTraining, Export, FeatureTraining, Runtime, StepInputs

# What LoRA updates: every linear layer of LLaMA's blocks.
LORA_LAYERS = r"llama\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
DECODER = ("mapping.", "token")  # the adapter's parameters that stage 1 trains
ADAPTER = ("projector.", "context.", "subject.")  # and those of stage 2


# --- stage 1: the feature decoder -----------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderConfig:
    """Options of stage 1."""

    # "mllm": LLaMA, LLaVA's projector, mapping and token (Sec. 3.4; 7B parameters need FSDP); "lora":
    # low-rank updates in their place; "new": mapping and token alone. The image tower is always frozen.
    train: Literal["mllm", "lora", "new"] = field(
        default="mllm", metadata={"help": "train the whole MLLM, LoRA on it, or only the new layers"}
    )
    # "new": a fresh mapping (PyTorch's own start), and as token the mean of the word embeddings: the frozen
    # blocks know that place, and it favours no word. "adapter": continue with the bundle's.
    init: Literal["new", "adapter"] = field(
        default="new", metadata={"help": "start from a new mapping or from the bundle's"}
    )
    lora_rank: int = 64  # far above what a style needs: the model learns a new kind of output
    lora_alpha: float = 64.0  # α; equal to the rank, the update has the size of its factors' product

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have."""
        check_types(self)
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank {self.lora_rank}: expected 1 or more")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha {self.lora_alpha}: expected a number above 0")


@dataclass(frozen=True)
class DecoderReader:
    """A sample as stage 1 sees it."""

    tower_size: int  # s
    template: str

    def __call__(self, target: Reference, reference: Reference, word: str, prompt: str) -> dict[str, Any]:
        return {
            "white": clip_image(reference.white, self.tower_size),  # (3, s, s)
            "full": clip_image(target.photo, self.tower_size),  # (3, s, s)
            "instruction": instruction(word, prompt, self.template),
        }


class DecoderTraining(FeatureTraining):
    """Eq. 4: the MLLM predicts the CLIP embedding of the target from the reference and the prompt.

    It reads the reference on white and the instruction; its state at the last token, through the mapping, is
    regressed on the embedding of the image with its background.
    """

    Config = DecoderConfig
    about = "the MLLM and its mapping to image embeddings (Eq. 4)"

    def __init__(self, runtime: Runtime, config: DecoderConfig, method: MethodConfig, seed: int) -> None:
        super().__init__(runtime, config, method, seed)
        weights, whole = runtime.weights, config.train == "mllm"
        llava = weights.build("llava", runtime.device, torch.float32 if whole else runtime.dtype)
        llava.tower.to(runtime.dtype)
        self.llava, self.adapter = llava, _decoder_start(weights, config, method, llava, seed)
        self.adapter.to(runtime.device)
        self.lora: dict[str, LoRALinear] = {}  # by name in llava
        if config.train == "lora":
            self.lora = add_lora(llava, LORA_LAYERS, config.lora_rank, config.lora_alpha, seed)
        self.decoder = FeatureDecoder(llava, self.adapter, weights.llama_tokenizer(), method)
        self.trained = _decoder_names(config, method, llava, self.lora)
        self.decayed = (
            "adapter.mapping.",
            *(name for name in self.trained if name.endswith((".down", ".up"))),
        )
        self.shards = list(llava.llama.layers)

    @classmethod
    def check(cls, weights: Any, config: DecoderConfig, method: MethodConfig) -> None:
        refuse_quantised(weights)
        weights.config("llava")
        if config.init == "adapter":
            weights.config("adapter")
        check_embeddings(weights, "adapter")

    @classmethod
    def learning_rate(cls, config: DecoderConfig) -> float:
        """LLaVA-1.5's for its MLLM and for LoRA on it, and that of its new projector."""
        return {"mllm": 2e-5, "lora": 2e-4, "new": 1e-3}[config.train]

    @classmethod
    def reader(cls, weights: Any, config: DecoderConfig, method: MethodConfig) -> DecoderReader:
        return DecoderReader(weights.config("vision").image_size, method.template)

    def forward(self, batch: Batch) -> Tensor:
        """Eq. 4: the mean of (embedding - CLIP(image))², float32 (B,)."""
        dtype = self.llava.tower.embeddings.class_embedding.dtype
        features = self.llava.encode_images(batch["white"].to(dtype))  # (B, N, C)
        embedding = self.decoder.embed(features, batch["instruction"])  # (B, E)
        target = self.llava.tower(batch["full"].to(dtype))[1]  # (B, E), no gradient: frozen
        return (embedding.float() - target.float()).square().mean(dim=1)  # (B,)

    def export(self) -> Export:
        networks = {"adapter": (self.adapter.cfg, dict(self.adapter.named_parameters()))}
        if self.config.train != "new":
            cfg = self.llava.cfg
            cfg = replace(cfg, llama=replace(cfg.llama, gradient_checkpointing=False))
            tensors = merged_tensors(self.llava, self.lora)
            own = {name: tensor for name, tensor in tensors.items() if not name.startswith("tower.")}
            networks["llava"] = (cfg, own)
        return Export(networks, _changed(self.method))


def _decoder_names(
    config: DecoderConfig, method: MethodConfig, llava: Llava, lora: Mapping[str, LoRALinear]
) -> tuple[str, ...]:
    """Beginnings of the names of what stage 1 trains, without blocks that are not used."""
    new = ("adapter.mapping.",) + (("adapter.token",) if method.template == "paper" else ())
    blocks = range(llava.cfg.llama.layers if method.mllm_layers is None else method.mllm_layers)
    used = tuple(f"llava.llama.layers.{i}." for i in blocks)
    if config.train == "mllm":
        return (*new, *used, "llava.llama.embed_tokens.", "llava.llama.norm.", "llava.projector.")
    names = (f"llava.{name}.{part}" for name in lora for part in ("down", "up"))
    return (*new, *(name for name in names if name.startswith(used)))


@torch.no_grad()
def _decoder_start(
    weights: Any, config: DecoderConfig, method: MethodConfig, llava: Llava, seed: int
) -> Adapter:
    """The adapter with the mapping and the token that stage 1 starts from."""
    keep = ("",) if config.init == "adapter" else ADAPTER
    adapter = start_adapter(weights, keep, method.template == "paper", seed)
    before = weights.configs.get("adapter")
    if before is None:  # the export is complete all the same: stage 2's start
        adapter.init_from_base(weights.build("unet"), method)
    had = before is not None and before.learnable_token
    if adapter.token is not None and not (had and config.init == "adapter"):
        adapter.token.copy_(llava.llama.embed_tokens.weight.float().mean(dim=0))
    return adapter


# --- stage 2: the adapter -------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterTrainingConfig:
    """Options of stage 2."""

    # "base": a new projector, context K, V and subject K', V', λ as `MethodConfig` starts them, on top of the
    # bundle's mapping and token; "adapter": continue with the bundle's adapter.
    init: Literal["base", "adapter"] = field(
        default="base", metadata={"help": "start from the base's K, V or from the bundle's adapter"}
    )
    # The subject term acts at timesteps below this while training: at all of the 1000. The sampler's own
    # limit (MethodConfig) can then be chosen afterwards, and λ sees every timestep.
    subject_below_t: int = 1000
    # Share of samples without the subject term, so that the context tokens also learn to do without it, as at
    # a low β; 0 = the paper, which has none.
    drop_reference: float = 0.0
    # The reference is moved by up to this many latents each way against the target, so that K', V' are found
    # by what is there, not by where it is; 0 = the paper's text, which does not mention it.
    reference_shift: int = 0
    # Weight of a constraint that keeps the label's attention, of which M_gen is made, to the target's mask
    # (MM-Diff's, FastComposer's), so that words bind to their subjects; 0 = the paper, which has none.
    map_weight: float = 0.0
    map_form: Form = "balanced"  # FastComposer's, or Subject-Diffusion's "distance"

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have."""
        check_types(self)
        if not 0 <= self.map_weight <= LARGEST:
            raise ValueError(f"map_weight {self.map_weight}: expected a finite number, 0 or more")
        if not 0 <= self.drop_reference < 1:
            raise ValueError(f"drop_reference {self.drop_reference}: expected 0 or more, below 1")
        if self.subject_below_t < 1:
            raise ValueError(f"subject_below_t {self.subject_below_t}: expected 1 or more")
        if self.reference_shift < 0:
            raise ValueError(f"reference_shift {self.reference_shift}: expected 0 or more")


class AdapterTraining(DenoisingTraining):
    """Eq. 1: the adapter learns to denoise images of a subject that it is shown."""

    Config = AdapterTrainingConfig
    about = "the adapter: projector, context K, V, subject K', V' and λ (Eq. 1)"
    embedding, embedding_networks = "decoder", ("vision", "llava")
    trained = tuple(f"adapter.{name}" for name in ADAPTER)
    decayed = ("adapter.projector.",)  # K, V start as the base's, K', V' as identities

    def __init__(
        self, base: Any, weights: Any, config: AdapterTrainingConfig, method: MethodConfig, seed: int
    ) -> None:
        super().__init__(base, weights, config, method, seed)
        keep = ("",) if config.init == "adapter" else DECODER
        self.adapter = start_adapter(weights, keep, token=False, seed=seed).to(base.device)
        if config.init == "base":
            ip_adapter = weights.state("ip_adapter") if method.context_init == "ip_adapter" else None
            if ip_adapter and weights.config("ip_adapter").embed_dim != self.adapter.cfg.embed_dim:
                ip_adapter = {k: t for k, t in ip_adapter.items() if k.startswith("context.")}
            self.adapter.init_from_base(base.unet, method, ip_adapter)

    @classmethod
    def check(cls, weights: Any, config: AdapterTrainingConfig, method: MethodConfig) -> None:
        MoMA.check(weights, method)
        if config.init == "base" and method.context_init == "ip_adapter":
            width, own = weights.config("ip_adapter").embed_dim, weights.config("adapter").embed_dim
            if width == own:
                check_embeddings(weights, "ip_adapter")
            else:
                warnings.warn(
                    f"{weights.folder}: its IP-Adapter reads embeddings {width} wide, the adapter {own}: its"
                    " K, V are taken, and the projector starts anew",
                    stacklevel=2,
                )
        side = weights.image_size // weights.config("vae").factor
        if config.reference_shift >= side // 2:
            raise ValueError(
                f"reference_shift {config.reference_shift}: expected below half of {side} latents"
            )

    @classmethod
    def embedding_identity(cls, weights: Any, method: MethodConfig) -> dict[str, Any]:
        digest = sha256()  # of what the decoder uses of the adapter: stage 2 changes the rest
        for name, tensor in sorted(weights.tensors("adapter").items()):
            if name.startswith(DECODER):
                digest.update(name.encode())
                digest.update(tensor.read().contiguous().reshape(-1).view(torch.uint8).numpy())
        return {
            "adapter's mapping and token": digest.hexdigest(),
            "template": method.template,
            "mllm_layers": method.mllm_layers,
        }

    @classmethod
    def load_embedder(
        cls, runtime: Runtime, method: MethodConfig
    ) -> Callable[[Tensor, Sequence[str], Sequence[str]], Tensor]:
        weights = runtime.weights
        llava, adapter = (
            weights.build(name, runtime.device, runtime.dtype).eval().requires_grad_(False)
            for name in ("llava", "adapter")
        )
        decoder = FeatureDecoder(llava, adapter, weights.llama_tokenizer(), method)

        def embed(white: Tensor, words: Sequence[str], prompts: Sequence[str]) -> Tensor:
            texts = [instruction(*pair, method.template) for pair in zip(words, prompts, strict=True)]
            return decoder.embed(llava.encode_images(white), texts)  # (B, E)

        return embed

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        far, drop = self.config.reference_shift, self.config.drop_reference
        drawn = {"shift": torch.randint(-far, far + 1, (2,), generator=generator)}  # latents down and right
        return drawn | ({"shown": torch.rand((), generator=generator) >= drop} if drop else {})

    def inputs(self, batch: Batch) -> StepInputs:
        """The sampler's conditioning of its conditional rows, with the target's mask as M_gen.

        Its label makes no M_gen; it has tokens where their attention is constrained.
        """
        text = batch["text"]
        cond = condition_rows(
            self.adapter,
            batch["embedding"],
            text,
            batch.get("added"),
            self._label(batch) if self.config.map_weight else text.new_zeros(text.shape[:2]),  # (B, T)
            self._reference(batch),
            self._beta(batch),
            self.method,
        )
        hook = MoMAHook(cond, subject_on=True, m_gen=batch["m_gen"].to(text.dtype))
        return StepInputs(text, cond.added, hook)

    def _beta(self, batch: Batch) -> Tensor:
        """β (B,): 1 where the subject term acts."""
        return ((batch["t"] < self.config.subject_below_t) & batch.get("shown", True)).float()

    def _label(self, batch: Batch) -> Tensor:
        """1 at the label's tokens (B, T), as the first tokenizer has them."""
        tokenizers = self.base.tokenizers
        parts = (batch[name].chunk(len(tokenizers), dim=1)[0] for name in ("text_ids", "label_ids"))
        return label_places(*parts, tokenizers[0].end_id).to(batch["text"])  # (B, T)

    def constraint(self, maps: Sequence[Tensor], batch: Batch) -> Tensor | float:
        """The mean over all layers but the finest grid's, as MM-Diff has it."""
        finest = batch["mean"].shape[-2:]
        losses = []
        for one in maps if self.config.map_weight else ():  # (B, 1, h_l, w_l)
            if one.shape[-2:] != finest:
                masks = F.interpolate(batch["m_gen"], one.shape[-2:], mode="bilinear", antialias=True)
                present = one.detach().flatten(2).any(dim=2)  # (B, 1), False where the text was left out
                losses.append(map_loss(one.flatten(2).mT[:, None], masks, present, form=self.config.map_form))
        return self.config.map_weight * torch.stack(losses).mean(dim=0) if losses else 0.0

    def _reference(self, batch: Batch) -> list[ReferenceLayer]:
        """The reference pass (Sec. 3.3): K', V' and M_ref of every self-attention layer, B rows."""
        noises = (batch["ref_posterior_noise"], batch["ref_noise"])
        noises = None if self.method.reference_noise == "none" else noises
        mean, std, m_ref = (batch[name] for name in ("ref_mean", "ref_std", "m_ref"))  # (B, Z, h, w) twice
        if self.config.reference_shift:
            mean, std = (move(x, batch["shift"]) for x in (mean, std))  # (B, Z, h, w)
            m_ref = move(m_ref, batch["shift"] * (m_ref.shape[-1] // mean.shape[-1]))  # (B, 1, S, S)
        unet, vae, label = self.base.unet, self.base.vae, batch["label"]  # (B, T, ·)
        latent = reference_latent(mean, std, noises, vae.cfg.scaling, self.base.schedule).to(label.dtype)
        added = batch.get("label_added")
        return reference_features(unet, self.adapter, latent, label, m_ref, self.method, added)

    def subjects(self, batch: Batch, words: Sequence[str], prompts: Sequence[str]) -> list[MoMASubject]:
        """The reference is shown where it is."""
        layers = self._reference(batch | {"shift": torch.zeros_like(batch["shift"])})
        return [
            MoMASubject(
                word,
                None,
                [layer.rows(slice(i, i + 1)) for layer in layers],
                {prompt: batch["embedding"][i : i + 1]},
            )
            for i, (word, prompt) in enumerate(zip(words, prompts, strict=True))
        ]

    def drawing(self) -> MoMA:
        return MoMA(self.base, self.adapter, None, self.method)

    def export(self) -> Export:
        return Export(
            {"adapter": (self.adapter.cfg, dict(self.adapter.named_parameters()))}, _changed(self.method)
        )


def label_places(ids: Tensor, labels: Tensor, end: int) -> Tensor:
    """1 at the tokens of every place where a text has its label, int64 (B, T).

    Args:
        ids: of texts, (B, T).
        labels: of the labels alone, (B, T).
        end: the token that ends a text.
    """
    found = torch.zeros_like(ids, device="cpu")
    for row, text, label in zip(found, ids.tolist(), labels.tolist(), strict=True):
        word = label[1 : label.index(end, 1)]  # 0 is BOS
        for i in range(1, len(text) - len(word) + 1):
            if text[i : i + len(word)] == word:
                row[i : i + len(word)] = 1
    return found.to(ids.device)


def move(x: Tensor, shift: Tensor) -> Tensor:
    """x (B, C, h, w), each moved down and right by shift (B, 2) cells; its edges repeat."""
    b, _, h, w = x.shape
    down, right = shift.unbind(1)  # 2 x (B,)
    rows = (torch.arange(h, device=x.device) - down[:, None]).clamp(0, h - 1)  # (B, h)
    columns = (torch.arange(w, device=x.device) - right[:, None]).clamp(0, w - 1)  # (B, w)
    sample = torch.arange(b, device=x.device)[:, None, None]  # (B, 1, 1)
    moved = x.movedim(1, -1)[sample, rows[:, :, None], columns[:, None, :]]  # (B, h, w, C)
    return moved.movedim(-1, 1).contiguous()  # (B, C, h, w)


# --- both -----------------------------------------------------------------------------------------------


def start_adapter(weights: Any, keep: tuple[str, ...], token: bool, seed: int) -> Adapter:
    """An adapter in float32 on the CPU.

    Args:
        weights: the bundle.
        keep: beginnings of the names that come from the bundle's adapter; the rest is new, PyTorch's own
            start.
        token: whether it must have a learnable token.
        seed: of new weights.
    """
    cfg, llava = weights.configs.get("adapter"), weights.configs.get("llava")
    state = {} if cfg is None else weights.state("adapter")
    if cfg is None:
        mllm = AdapterConfig().mllm_dim if llava is None else llava.llama.width
        cfg = AdapterConfig(mllm_dim=mllm, embed_dim=weights.config("vision").width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(replace(cfg, learnable_token=cfg.learnable_token or token), weights.config("unet"))
    kept = {name: tensor.float() for name, tensor in state.items() if name.startswith(keep)}
    adapter.load_state_dict(adapter.state_dict() | kept)
    return adapter


def check_embeddings(weights: Any, name: str) -> None:
    """ValueError if a network's image embeddings cannot be those of LLaVA's tower. It may be absent.

    An IP-Adapter that was trained on another image encoder gets a warning: its projector reads another space.
    """
    width = weights.config("vision").width
    if name in weights.configs and (embed := weights.configs[name].embed_dim) != width:
        raise ValueError(
            f"{weights.folder}: the {name}'s embeddings are {embed} wide, the image tower's {width}"
        )
    if name == "ip_adapter" and (encoder := weights.method_config("ip-adapter").encoder) != "vision":
        warnings.warn(
            f"{weights.folder}: its IP-Adapter reads the embeddings of {encoder!r}, this training makes those"
            " of LLaVA's image tower: as wide, but another space, which its projector has to learn anew",
            stacklevel=2,
        )


def refuse_quantised(weights: Any) -> None:
    """ValueError for a bundle with a quantised LLaVA, whose steps are larger than a training's updates."""
    llava = weights.configs.get("llava")
    if llava is not None and (quant := llava.llama.quant):
        raise ValueError(
            f"{weights.folder}: its LLaVA is stored in {quant.bits} bits and cannot be trained; start from"
            " the bundle that it was made of"
        )


def _changed(method: MethodConfig) -> dict[str, Any]:
    """What the weights need otherwise than the default; not how it is computed."""
    changed = {name: value for name, value in asdict(method).items() if value != getattr(DEFAULT, name)}
    changed.pop("attention", None)
    return changed
