"""Every choice of the method in one place.

`MethodConfig` holds the points where the paper (arXiv 2404.05674) and the released code
(bytedance/MoMA) differ or are silent. Its defaults keep what the released weights were adapted to and
mend what is plainly a bug; `RELEASE` switches every mended point back, `PAPER` follows the text.
"""

from dataclasses import dataclass
from typing import Literal

from moma.inputs.preprocess import ReferenceConfig
from moma.sampling.config import LARGEST, TIMESTEPS, check_types

LARGEST_BLUR = 255  # latents a side: about all that the largest image has


@dataclass(frozen=True)
class MethodConfig(ReferenceConfig):
    """What MoMA computes. Each field: what it decides, then why the default is what it is."""

    # --- the reference (Sec. 3.3; how its square is made: ReferenceConfig) ---
    # Noise on the reference latent: "seeded" = posterior sample + add_noise(t=0), both from the subject's
    # own generator; "global" = the same from torch's global RNG (the release: the same seed gives another
    # image each time); "none" = posterior mean, no noise (the paper's "clear reference image").
    reference_noise: Literal["seeded", "global", "none"] = "seeded"
    # Text tokens cut off the end of the label's 77 in the reference pass. The release's processor always
    # drops 4 (it takes them for context tokens), and the weights have adapted to it.
    reference_text_cut: int = 4
    # Keep the best-covered key of a layer where nearest sampling leaves none of a small subject.
    keep_one_key: bool = True

    # --- the generative image-feature decoder (Sec. 3.2) ---
    # "release": its instruction, ending in the token `*`; "paper": the paper's, ending in a new learnable
    # token (Adapter.token).
    template: Literal["release", "paper"] = "release"
    # LLaMA blocks used; None = all. The paper speaks of 15, no public LLaVA-7B has so few.
    mllm_layers: int | None = None

    # --- Eq. 3 and the decoupled cross-attention ---
    # "fused" never materialises attention probabilities, drops background keys and asks only the queries
    # inside M_gen; "explicit" is Eq. 3 as written. Both give the same result.
    attention: Literal["fused", "explicit"] = "fused"
    # The subject term of Eq. 3 acts at timesteps below this (of 1000); the release's t_range.
    subject_below_t: int = 950
    # Share of β in the unconditional row of guidance. At 1 (release) guidance strengthens text and context
    # alone; below, the subject term too, at the cost of prompt and class (the paper's remark on guidance).
    unconditional_beta: float = 1.0
    # M_gen also gates the context tokens (release); in the paper only Eq. 3 is masked.
    context_masked: bool = True

    # --- M_gen, iterative masking (Sec. 3.3) ---
    # Label tokens: "phrase" = all tokens of every occurrence of the subject's words; "first_piece" (release)
    # = first BPE piece of each word, wherever it stands.
    label_tokens: Literal["phrase", "first_piece"] = "phrase"
    # A prompt without the subject's word: "error", since its maps would be those of the template's "photo of
    # a SUBJECT" alone; or "ignore" (release), which goes on with them.
    absent_label: Literal["error", "ignore"] = "error"
    # Min-max of the averaged maps: "image" = over an image's own two CFG rows (equals the release for one
    # image), "batch" = over all rows (release: images of a batch change each other), "none" = the average of
    # the layers' maps as it is (paper), each layer's having been scaled to 0..1.
    m_gen_norm: Literal["image", "batch", "none"] = "image"
    # Smallest range a map is divided by; 0 (release) gives NaN for a constant map.
    m_gen_eps: float = 1e-8
    # Values of M_gen up to this become 0; the release's constant.
    m_gen_threshold: float = 0.2
    # What the values above the threshold become: "soft" = themselves (release), "one" = 1, as M_gen has been
    # in training, where it is M_ref.
    m_gen_inside: Literal["soft", "one"] = "soft"
    # Attention layers (execution order) whose maps are averaged; None = all.
    m_gen_layers: tuple[int, ...] | None = None
    # How much of M_gen acts, the rest being 1: the ablation of Table 3; 1 = the method.
    m_gen_share: float = 1.0

    # --- several subjects in one image ---
    # Whose a cell of the foreground is, where words get attention: "reference" = the subject's whose keys its
    # queries match best (words alone hardly say which of two subjects they mean); "word" = that one's whose
    # words get most attention; "regions" = as the job's regions say, which every subject then needs. Under
    # the others, too, a region limits its subject.
    ownership: Literal["reference", "word", "regions"] = "reference"
    # Self-attention layers (execution order) in which keys compete; None = those of the finest grid, which
    # tell subjects apart best (docs/several-subjects.md).
    ownership_layers: tuple[int, ...] | None = None
    # Side of the square of latents, an odd number, over which a cell's match is averaged.
    ownership_blur: int = 5
    # Cells of one subject do not attend to those of another: their palettes mix less, and so do their shapes.
    subjects_apart: bool = False

    # --- initialisation for training (Sec. 3.4) ---
    # λ of every layer. The release starts at 0 (`scale_learnable`): the first step is the base model's.
    lambda_init: float = 0.0
    # K', V' on top of the frozen K, V: "identity" reads the base's own features, so that gradients are
    # useful as soon as λ moves; "zero" is the paper's zero-initialised path (then λ must not be 0).
    subject_init: Literal["identity", "zero"] = "identity"
    # Context K, V without an IP-Adapter checkpoint: copies of the base's text K, V.
    context_init: Literal["base", "ip_adapter"] = "base"

    def __post_init__(self) -> None:
        """ValueError for a value that the field cannot have (configurations come from JSON and options)."""
        for name in ("m_gen_layers", "ownership_layers"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_types(self)
        shares = ("m_gen_threshold", "mask_binarise_above", "m_gen_eps", "m_gen_share", "unconditional_beta")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to 1")
        if not 0 <= self.subject_below_t <= TIMESTEPS:
            raise ValueError(f"subject_below_t {self.subject_below_t}: expected 0 to {TIMESTEPS}")
        if not 1 <= self.ownership_blur <= LARGEST_BLUR or self.ownership_blur % 2 == 0:
            raise ValueError(
                f"ownership_blur {self.ownership_blur}: expected an odd number, 1 to {LARGEST_BLUR}"
            )
        if not abs(self.lambda_init) <= LARGEST:
            raise ValueError(f"lambda_init {self.lambda_init}: expected a finite number")

    def check(
        self, attention_layers: int, mllm_layers: int | None, text_tokens: int, learnable_token: bool
    ) -> None:
        """ValueError for a choice that these networks cannot follow.

        Args:
            attention_layers: of the UNet.
            mllm_layers: blocks of the language model; None = there is none to check.
            text_tokens: the text encoder's length.
            learnable_token: whether the adapter has one.
        """
        if self.template == "paper" and not learnable_token:
            raise ValueError("template 'paper' needs an adapter with a learnable token: this one has none")
        if None not in (self.mllm_layers, mllm_layers) and not 1 <= self.mllm_layers <= mllm_layers:
            raise ValueError(f"mllm_layers {self.mllm_layers}: expected 1 to {mllm_layers}, or none for all")
        if not 0 <= self.reference_text_cut < text_tokens:
            raise ValueError(f"reference_text_cut {self.reference_text_cut}: expected 0 to {text_tokens - 1}")
        for name in ("m_gen_layers", "ownership_layers"):
            layers = getattr(self, name)
            if layers is not None and not (layers and all(0 <= i < attention_layers for i in layers)):
                raise ValueError(f"{name} {list(layers)}: expected some of 0 to {attention_layers - 1}")


DEFAULT = MethodConfig()
RELEASE = MethodConfig(
    reference_noise="global",
    mask_binarise_above=0.0,
    keep_one_key=False,
    empty_mask="mean",
    geometry="squash",
    label_tokens="first_piece",
    absent_label="ignore",
    m_gen_norm="batch",
    m_gen_eps=0.0,
)
PAPER = MethodConfig(
    reference_background="white",
    reference_noise="none",
    reference_text_cut=0,
    template="paper",
    context_masked=False,
    m_gen_norm="none",
    subject_init="zero",
    lambda_init=1.0,
    context_init="ip_adapter",
)
PRESETS = {"default": DEFAULT, "release": RELEASE, "paper": PAPER}
