"""Public checkpoints -> one bundle folder (see moma/weights/bundle.py).

    python convert_weights.py SOURCE [SOURCE ...] --out weights/moma
    python convert_weights.py community.safetensors --base-bundle weights/moma --out weights/new
    python convert_weights.py --download --out weights/moma
    python convert_weights.py --with scorers --base-bundle weights/moma --out weights/judged
    python convert_weights.py --base-bundle weights/moma --llm-bits 8 --out weights/moma8
    python convert_weights.py --base-bundle weights/moma --dtype bf16 --out weights/moma16
    python convert_weights.py sam_vit_b_01ec64.pth --base-bundle weights/moma --out weights/with_sam
    python convert_weights.py --export-ip-adapter weights/moma --out moma_context.safetensors
    python convert_weights.py --base-bundle weights/moma --lora style.safetensors:0.8 --out weights/styled

The content of a source tells what it is: a Stable Diffusion 1.5 folder (diffusers) or single file (LDM, as on
Civitai), SDXL likewise, a VAE folder or file, a CLIP folder, a LLaVA-1.5 folder (original or llava-hf),
MoMA's attn_adapters_projectors.th, an IP-Adapter, Segment Anything (a file or a folder), MM-Diff's folder,
the export folder of a training; for evaluation DINO (a file or a folder) and CLIP B/32 and L/14. Where two
sources have the same network, a source of this network alone (a VAE folder) wins over a larger one (a Stable
Diffusion folder), otherwise the later source wins; a note says so. --base-bundle supplies what no source has.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isqrt, prod
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor
from tqdm import tqdm

from models.clip import CLIPConfig, CLIPVisionConfig
from models.llava import LlavaConfig
from models.tokenizers import ClipTokenizer, LlamaTokenizer
from models.unet import UNetConfig
from models.weights.files import SYSTEM, read_object
from models.weights.loading import (
    LazyTensor,
    does_not_fit,
    finite,
    sized_by,
    some_names,
    state_dict_mismatch,
    stored_bytes,
)
from models.weights.public_configs import llava_config
from models.weights.quant import PRESETS, UNSAFE, QuantConfig, quantise
from moma.app.files import Parser, check_writable, exit_status, given_text
from moma.methods import find_method
from moma.sampling.base import SIZES
from moma.sampling.device import DTYPES
from moma.sampling.interface import text_networks
from moma.weights.bundle import (
    LM_HEAD,
    SAMPLING,
    SCORERS,
    TOKENIZERS,
    Bundle,
    BundleWriter,
    build_network,
    check_target,
    expected_shapes,
    expected_tensors,
    network_kinds,
)
from moma.weights.download import EXTRAS, DownloadConfig, download
from moma.weights.export import check_export, export_ip_adapter
from moma.weights.lora import NETWORKS as LORA_NETWORKS
from moma.weights.lora import merge_loras, parse_lora
from moma.weights.mm_diff import PUBLIC, WORDS, encoders
from moma.weights.refusals import side
from moma.weights.sources import (
    DefaultConfigs,
    Network,
    Source,
    Tensors,
    content,
    read_config,
    read_source,
)

CHOICES = {"keep": None, **DTYPES}  # of --dtype
LLM = ("llava", "vision")  # what --no-llm leaves out
ADAPTERS = ("adapter", "ip_adapter")  # whose files hold more than is used

Say = Callable[[str], Any]


def convert(
    paths: Sequence[Path],
    out: Path,
    base: Bundle | None = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    llm: bool = True,
    llm_bits: int | None = None,
    overwrite: bool = False,
    defaults: DefaultConfigs | None = None,
    say: Say = print,
    fetch: Callable[[], Sequence[Path]] | None = None,
    loras: Sequence[tuple[Path, float]] = (),
) -> None:
    """Write a bundle from public checkpoints.

    Args:
        paths: sources.
        out: folder of the new bundle.
        base: bundle that supplies what the sources lack.
        dtype: of all networks but scorers; None = unchanged.
        ema: take a single file's averaged UNet.
        llm: False leaves out LLaVA and its tower.
        llm_bits: 8 or 4 to store the matrices of LLaVA (a source's or the base's) quantised.
        overwrite: replace a bundle at `out`.
        defaults: configs for networks that come without one.
        say: receives notes and the summary.
        fetch: gives more sources; called once the folder is this run's.
        loras: files and weights of LoRAs to merge into the UNet and the text encoders.

    Raises: ValueError, with nothing written, for sources that cannot be used.
    """
    defaults = (defaults or DefaultConfigs()).with_base(base)
    with BundleWriter(out, defaults.image_size, overwrite) as writer:
        sources = _read([*(fetch() if fetch else []), *paths], defaults, ema, say)
        left_out = () if llm else LLM
        networks = _choose(sources, left_out, say)
        plain = [s.name for s in sources if s.is_plain_llava and s.networks["llava"] is networks.get("llava")]
        if WORDS in networks and networks[WORDS].config is None:
            networks |= mm_diff_encoders(networks, base)
        if llm_bits and "llava" not in networks:
            networks["llava"] = llava_of(base if llm else None)
        if not networks and not loras and not (base and (dtype or left_out)):
            raise ValueError(
                "nothing to convert: give at least one source, or a --base-bundle and what to change of it"
                " (--dtype, --llm-bits, --no-llm or --lora)"
            )
        kept = {n: base.configs[n] for n in base.networks if n not in (*networks, *left_out)} if base else {}
        tokenizers = _choose_tokenizers(networks, kept, sources, base)
        if "llava" in networks:
            networks["llava"] = _with_tower(networks["llava"], networks.get("vision"), kept.get("vision"))

        unet = networks["unet"].config if "unet" in networks else kept.get("unet", defaults.unet)
        defaults = defaults.of(bool(unet.added_cond_dim))
        writer.image_size = defaults.image_size
        for source in (source for source in sources if source.bare_vae):
            if source.networks["vae"] is networks.get("vae"):
                networks["vae"] = replace(networks["vae"], config=defaults.vae)
                say(
                    f"note: {source.name}: a VAE without a config: its latents are taken to be scaled by "
                    f"{defaults.vae.scaling}, as the UNet's; that of another model would draw wrong colours"
                )
        configs = kept | {name: network.config for name, network in networks.items()}
        methods = kept_methods(base, networks) if base else {}
        for source in sources:
            methods |= source.methods
        check_together(configs, methods)
        check_latents(networks, kept, defaults)
        check_tokenizers(tokenizers, configs)
        if plain and "adapter" in configs:
            unsaid = f"llava: {plain[0]} does not say that it is MoMA's own, which the adapter"
            if "adapter" in kept and "llava" in base.networks:
                raise ValueError(
                    f"{unsaid} of {base.folder} needs: leave it out, or give its adapter as well"
                )
            say(f"note: {unsaid} needs")
        networks = {
            name: check(name, network, configs.get("unet"), say) for name, network in networks.items()
        }
        for name in ADAPTERS:
            if name in kept and "unet" in networks:
                check(name, Network(kept[name], base.tensors(name), str(base.folder)), configs["unet"], say)
        # scorers are not rounded, as scores are compared with published ones
        dtypes = {name: None if name in SCORERS else dtype for name in configs}
        for name, network in networks.items():
            check_kinds(name, network, configs.get("unet"), dtypes[name])
        record = {}
        if loras:
            networks, record = with_loras(loras, networks, kept, base, dtypes)
        if llm_bits:
            networks["llava"] = quantised(networks["llava"], llm_bits)
        if llm_bits in UNSAFE:
            say(f"note: {llm_bits} bits are unsafe: a real language model loses much of its prompt; use 8")
        _compare_towers(networks, sources, say)
        for name in (name for name in kept if name not in networks):
            if cast := recast(base, name, dtypes[name]):
                networks[name], record[name] = cast, base.networks[name].get("loras", ())
        sizes = {name: stored_bytes(network.tensors, dtypes.get(name)) for name, network in networks.items()}
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="writing") as bar:
            writer.check_space(sum(sizes.values()))
            for name in network_kinds():  # in one order, whatever that of the sources
                if network := networks.get(name):
                    bar.set_postfix_str(name)
                    part = network.config, network.tensors, network.source, dtypes.get(name), bar.update
                    writer.add(name, *part, record.get(name, ()))
                elif name in kept:
                    writer.take(base, name)
        if base:
            writer.take_companions(base, {*kept})
        for name, path in tokenizers.items():
            writer.add_tokenizer(name, path)
        writer.method |= base.method if base else {}
        writer.methods |= methods
        for source in sources:
            writer.method |= source.method
    summarise(Bundle.open(out), say)


def _read(paths: Sequence[Path], defaults: DefaultConfigs, ema: bool, say: Say) -> list[Source]:
    """The sources, with their notes said; arguments as `convert`."""
    for path in (path for path in paths if SYSTEM.fullmatch(path.name)):
        say(f"note: {path}: of an operating system, not a source")
    sources = [read_source(path, defaults, ema) for path in paths if not SYSTEM.fullmatch(path.name)]
    for source in sources:
        for note in source.notes:
            say(f"note: {source.name}: {note}")
    return sources


def mm_diff_encoders(networks: Mapping[str, Network], base: Bundle | None) -> dict[str, Network]:
    """Both image encoders of the released MM-Diff, with those of a source's or the base's CLIP."""
    clip = networks.get(PUBLIC)
    if clip is None and base and PUBLIC in base.networks:
        clip = Network(base.config(PUBLIC), base.tensors(PUBLIC), str(base.folder))
    tensors = encoders(networks[WORDS].tensors, clip and (clip.config, clip.tensors))
    return {name: Network(clip.config.vision, own, networks[WORDS].source) for name, own in tensors.items()}


def with_loras(
    loras: Sequence[tuple[Path, float]],
    networks: Mapping[str, Network],
    kept: Mapping[str, Any],
    base: Bundle | None,
    dtypes: Mapping[str, torch.dtype | None],
) -> tuple[dict[str, Network], dict[str, list[dict[str, Any]]]]:
    """The networks and those of the base that LoRAs change, with the LoRAs in them, and a record for each.

    Args:
        loras: files and weights.
        networks: of the sources, checked.
        kept: configs of the base's networks that stay.
        base: bundle with those.
        dtypes: that networks are converted to.
    """
    there, before = {name: networks[name] for name in LORA_NETWORKS if name in networks}, {}
    for name in (name for name in LORA_NETWORKS if name in kept):
        there[name] = Network(kept[name], base.tensors(name), base.networks[name]["source"])
        before[name] = base.networks[name].get("loras", [])
    if "unet" not in there:
        raise ValueError("--lora: no base to merge into; give its source or --base-bundle")
    tensors = {name: network.tensors for name, network in there.items()}
    changed, record = merge_loras(loras, tensors, there["unet"].config, dtypes)
    result = {name: replace(there[name], tensors=own) for name, own in changed.items()}
    return {**networks, **result}, {name: [*before.get(name, []), *own] for name, own in record.items()}


def recast(base: Bundle, name: str, dtype: torch.dtype | None) -> Network | None:
    """A network of the base to be written in another dtype; None if it is stored in that.

    Args:
        base: the bundle.
        name: of the network.
        dtype: of its parameters; buffers, such as codes and scales, keep theirs. None = as they are.
    """
    if dtype is None:
        return None
    config, tensors = base.config(name), base.tensors(name)
    with sized_by(len(tensors)):
        buffers = dict(build_network(name, config, base.configs.get("unet")).named_buffers())
    tensors = {key: replace(tensor, castable=key not in buffers) for key, tensor in tensors.items()}
    kinds = {
        tensor.dtype for tensor in tensors.values() if tensor.castable and tensor.dtype.is_floating_point
    }
    return None if kinds <= {dtype} else Network(config, tensors, base.networks[name]["source"])


def kept_methods(base: Bundle, networks: Mapping[str, Network]) -> dict[str, dict[str, Any]]:
    """What the base says of methods whose own networks are not replaced."""
    return {
        name: dict(own)
        for name, own in base.methods.items()
        if not set(find_method(name).method.own_networks) & set(networks)
    }


def _choose(sources: Sequence[Source], left_out: Sequence[str], say: Say) -> dict[str, Network]:
    """Choose one network of each kind: the last of the dedicated sources, else of all sources."""
    chosen = {}
    for name in (name for name in network_kinds() if name not in left_out):
        having = sorted((s for s in sources if name in s.networks), key=lambda s: s.rank(name))
        for network in (source.networks[name] for source in having):
            if name in chosen:
                say(f"note: {name}: {network.source} replaces that of {chosen[name].source}")
            chosen[name] = network
    return chosen


def llava_of(base: Bundle | None) -> Network:
    """The base's LLaVA, to be rewritten; ValueError if there is none."""
    if base is None or "llava" not in base.networks:
        raise ValueError("--llm-bits: no LLaVA to quantise; give its source or a bundle that has it")
    return Network(base.config("llava"), base.tensors("llava"), base.networks["llava"]["source"])


def _choose_tokenizers(
    networks: Mapping[str, Network], kept: Mapping[str, Any], sources: Sequence[Source], base: Bundle | None
) -> dict[str, Path]:
    """Choose files: of the network's own source, else one with such a network, else any, else the base."""
    chosen = {}
    for name, files in TOKENIZERS.items():
        own = networks.get(name)
        having: dict[str, Path] = {}
        for source in sorted(sources, key=lambda s: (name in s.networks, s.networks.get(name) is own)):
            having |= source.tokenizers
        for file in files:
            if own and file in having:
                path = having[file]
            elif base and name in base.networks and (own or name in kept):
                path = base.tokenizer(file)
            elif own:
                raise ValueError(f"{name}: no source has its {file}; put it beside the weights")
            else:
                continue
            first = chosen.setdefault(file, path)
            if first != path and content(first) != content(path):
                raise ValueError(
                    f"{path}: the {file} of {name} differs from {first}, and a bundle holds one; "
                    "convert the two networks to separate bundles"
                )
    return chosen


def _with_tower(llava: Network, tower: Network | None, kept: CLIPVisionConfig | None) -> Network:
    """Complete LLaVA's config by that of its tower, from a source or the base."""
    if isinstance(llava.config, LlavaConfig):  # complete, from a training
        return llava
    folder = llava.config.parent
    vision = tower.config if tower else kept
    if vision is None and tower:
        positions, width = (side(tower.tensors, "embeddings.position_embedding.weight", i) for i in (0, 1))
        raise ValueError(
            f"{folder}: the image tower inside ({width} wide, {isqrt(max(positions - 1, 0))} patches a side) "
            "is no known CLIP model; give its CLIP folder as a source too"
        )
    if vision is None:
        model = str(read_object(llava.config).get("mm_vision_tower", "openai/clip-vit-large-patch14-336"))
        raise ValueError(f"{folder}: without an image tower; give the CLIP folder of {model} as a source too")
    config = read_config(llava.config, llava_config, vision)
    has_head = any(name.startswith(LM_HEAD) for name in llava.tensors)
    return replace(llava, config=replace(config, llama=replace(config.llama, lm_head=has_head)))


def check_together(configs: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError for networks that do not belong together.

    Args:
        configs: of the networks, by name.
        methods: what the bundle says of methods, by name.
    """
    unet, llava, vision = (configs.get(name) for name in ("unet", "llava", "vision"))
    texts = [configs[name] for name in text_networks(unet) if name in configs] if unet else []
    encoder = configs.get(methods.get("ip-adapter", {}).get("encoder", "ip_vision"))
    adapter, ip_adapter = configs.get("adapter"), configs.get("ip_adapter")
    if (adapter or ip_adapter) and not unet:
        raise ValueError("an adapter needs the UNet it belongs to; add its source or --base-bundle")
    if unet and len(texts) == len(text_networks(unet)):
        widths = [text.width for text in texts]
        if set(unet.context_dim) != {sum(widths)}:
            given = " + ".join(map(str, widths))
            raise ValueError(f"unet: reads texts of width {unet.context_dim[0]}, the encoders give {given}")
        pooled, added = texts[-1].projection or texts[-1].width, unet.added_cond_dim
        if added and (added <= pooled or (added - pooled) % (2 * SIZES)):
            raise ValueError(f"unet: adds a conditioning of width {added}, the pooled text has {pooled}")
        if len({text.positions for text in texts}) > 1:
            raise ValueError(f"text_2: reads {texts[1].positions} tokens, text {texts[0].positions}")
    if llava and llava.vision != vision:
        raise ValueError(f"vision: {vision} is not the image tower that LLaVA was made with, {llava.vision}")
    if llava and adapter and adapter.mllm_dim != llava.llama.width:
        width = llava.llama.width
        raise ValueError(
            f"adapter: made for an MLLM of width {adapter.mllm_dim}, but the LLaVA here has {width}"
        )
    if ip_adapter and encoder and ip_adapter.embed_dim != (encoder.projection or encoder.width):
        raise ValueError(
            f"ip_adapter: made for image embeddings of width {ip_adapter.embed_dim}, but the image encoder "
            f"gives {encoder.projection or encoder.width}; use the image_encoder folder that came with it"
        )


def check_latents(networks: Mapping[str, Network], kept: Mapping[str, Any], defaults: DefaultConfigs) -> None:
    """ValueError for a VAE whose latents are not what the UNet was trained on.

    Args:
        networks: of the sources, by name.
        kept: configs of the base's networks that stay.
        defaults: have the scaling of Stable Diffusion 1.5, or of the base.
    """
    unet, vae = (networks[name].config if name in networks else kept.get(name) for name in ("unet", "vae"))
    if not unet or not vae:
        return
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise ValueError(
            f"vae: its latents have {vae.latent_channels} channels, but the UNet takes {unet.in_channels} "
            f"and gives {unet.out_channels}"
        )
    expected = defaults.of(bool(unet.added_cond_dim)).vae.scaling
    together = "unet" in networks and "vae" in networks and networks["unet"].source == networks["vae"].source
    if "vae" in networks and not together and vae.scaling != expected:
        raise ValueError(
            f"{networks['vae'].source}: a VAE whose latents are scaled by {vae.scaling}, expected "
            f"{expected} as the UNet; that of another model"
        )


def check_tokenizers(files: Mapping[str, Path], configs: Mapping[str, Any]) -> None:
    """ValueError unless the files can be read and the networks have all their tokens."""
    for name in TOKENIZERS:
        if name not in configs:
            continue
        path, *more = (files[file] for file in TOKENIZERS[name])
        config = configs[name]
        if name == "llava":
            LlamaTokenizer(path)
            tokens = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
            known = config.llama.vocab
        else:
            text = config.text if isinstance(config, CLIPConfig) else config
            ClipTokenizer(path, *more, text.positions, text.pad)
            tokens, known = len(read_object(path)), text.vocab
        if tokens > known:
            raise ValueError(f"{path}: has {tokens} tokens, but the network it is for has {known}")


def check(name: str, network: Network, unet: UNetConfig | None, say: Say) -> Network:
    """Check names and shapes; of an adapter's file, drop unexpected tensors with a note.

    Args:
        name: in the bundle.
        network: to check.
        unet: sizes that adapters follow.
        say: receives the note.

    Raises: ValueError for missing, unexpected or mis-shaped tensors: a network with more computes more.
    """
    try:
        expected = expected_tensors(name, network.config, unet, len(network.tensors))
    except ValueError as error:
        raise ValueError(f"{network.source}: {name}: {error}") from error
    wanted = {key: tuple(value.shape) for key, value in expected.items()}
    problems = state_dict_mismatch(wanted, network.tensors)
    if set(problems) - ({"unexpected"} if name in ADAPTERS else set()):
        raise ValueError(does_not_fit(network.source, name, problems))
    if problems:
        say(f"note: {network.source}: {name}: unused: {some_names(problems['unexpected'])}")
    return replace(network, tensors={key: finite(network.tensors[key]) for key in wanted})


def check_kinds(name: str, network: Network, unet: UNetConfig | None, dtype: torch.dtype | None) -> None:
    """ValueError for integers where the network has numbers, or float8 that nothing is to be made of.

    Args:
        name: in the bundle.
        network: checked by `check`.
        unet: sizes that adapters follow.
        dtype: that it is converted to; None = as it is.
    """
    for key, like in expected_tensors(name, network.config, unet, len(network.tensors)).items():
        tensor = network.tensors[key]
        kind = str(tensor.dtype).removeprefix("torch.")
        if like.is_floating_point() != tensor.dtype.is_floating_point:
            wanted = "a float type" if like.is_floating_point() else str(like.dtype).removeprefix("torch.")
            raise ValueError(f"{tensor.file}: {tensor.name or key} is {kind}, expected {wanted}")
        if tensor.dtype.itemsize == 1 and like.is_floating_point() and dtype is None:
            raise ValueError(
                f"{tensor.file}: {tensor.name or key} is {kind}, in which nothing is computed; add --dtype "
                "bf16 or another (a scorer needs a file in 16 or 32 bits)"
            )


def quantised(llava: Network, bits: int) -> Network:
    """Quantise the matrices of LLaMA's blocks, each when it is written."""
    if before := llava.config.llama.quant:
        raise ValueError(
            f"{llava.source}: already stored in {before.bits} bits, and rounding twice adds up; start from "
            "the bundle it was made from"
        )
    quant = PRESETS[bits]
    config = replace(llava.config, llama=replace(llava.config.llama, quant=quant))
    with torch.device("meta"):
        buffers = dict(build_network("llava", config).named_buffers())
    tensors = dict(llava.tensors)
    for name, buffer in buffers.items():
        layer, _, part = name.rpartition(".")
        weight = llava.tensors[f"{layer}.weight"]
        read = partial(_part, weight, quant, ("codes", "scale").index(part))
        tensors[name] = LazyTensor(tuple(buffer.shape), buffer.dtype, weight.file, read, castable=False)
        tensors.pop(f"{layer}.weight", None)
    return replace(llava, config=config, tensors=tensors)


def _part(weight: LazyTensor, quant: QuantConfig, i: int) -> Tensor:
    """Codes (i = 0) or scale (1). Each repeats all the work, so that only one matrix is in memory."""
    return quantise(weight.read(), quant)[i]


def _compare_towers(networks: Mapping[str, Network], sources: Sequence[Source], say: Say) -> None:
    """Note how far the chosen image tower is from the one in LLaVA's source."""
    tower = networks.get("vision")
    for inside in (s.networks.get("vision") for s in sources if "llava" in s.networks):
        if tower and inside and inside.source != tower.source:
            worst, where = difference(inside.tensors, tower.tensors)
            at = f" ({where})" if where else ""
            say(f"note: vision: from {tower.source}; {inside.source} differs by at most {worst:.3g}{at}")


def difference(a: Tensors, b: Tensors) -> tuple[float, str]:
    """Largest absolute difference of common tensors, and its tensor's name."""
    worst, where = 0.0, ""
    for name in tqdm([name for name in a if name in b], desc="comparing towers", leave=False):
        if a[name].shape != b[name].shape:
            shapes = f"{list(a[name].shape)} and {list(b[name].shape)}"
            raise ValueError(f"{a[name].file} and {b[name].file}: {name} has the shapes {shapes}")
        largest = (a[name].read().float() - b[name].read().float()).abs().max().item()
        if not largest <= worst:  # also for NaN
            worst, where = largest, name
    return worst, where


def summarise(bundle: Bundle, say: Say) -> None:
    """Report size, dtypes and origin of every network, and what sampling still needs."""
    for name, entry in bundle.networks.items():
        tensors = bundle.tensors(name).values()
        dtypes = "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        millions = sum(map(prod, plain_shapes(bundle, name).values())) / 1e6
        size = sum(path.stat().st_size for path in bundle.files(name)) / 1e9
        say(f"{name:10} {millions:9.1f} M  {dtypes:16} {size:7.3f} GB  {entry['source']}")
    needed = dict.fromkeys((*SAMPLING, *text_networks(bundle.configs.get("unet", UNetConfig()))))
    if lacking := [name for name in needed if name not in bundle.networks]:
        say(f"{bundle.folder}: converted; sampling also needs {', '.join(lacking)}")
    else:
        say(f"{bundle.folder}: ready")


def plain_shapes(bundle: Bundle, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's parameters before quantisation."""
    config = bundle.config(name)
    if name == "llava":
        config = replace(config, llama=replace(config.llama, quant=None))
    return expected_shapes(name, config, bundle.configs.get("unet"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("sources", nargs="*", type=Path, metavar="SOURCE", help="file or folder")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new bundle")
    add("--base-bundle", type=Path, metavar="DIR", help="bundle that supplies what no source has")
    add(
        "--download",
        action="store_true",
        help="fetch the released weights and Segment Anything first (~21 GB)",
    )
    add("--with", action="append", choices=EXTRAS, default=[], dest="extras", help="also fetch scorers for"
        " evaluation (2.4 GB), or without --download sam for masks (0.4 GB) alone")  # fmt: skip
    add("--lora", action="append", type=given_text, default=[], metavar="FILE[:WEIGHT]", help="merge a LoRA"
        " into UNet and text encoders (weight: 1); may be repeated")  # fmt: skip
    add("--llm-bits", type=int, choices=sorted(PRESETS), help="bits per weight of LLaVA's language model:"
        " 8 halve its size and are recommended; 4 are unsafe")  # fmt: skip
    add = parser.add_argument_group("advanced").add_argument
    add("--dtype", choices=CHOICES, default="keep", help="dtype of all weights but scorers, the base's too"
        " (default: keep)")  # fmt: skip
    add("--ema", action="store_true", help="use the averaged UNet of a single-file checkpoint")
    add("--no-llm", action="store_true", help="leave out LLaVA")
    add("--overwrite", action="store_true", help="replace the bundle at --out")
    add("--base-id", metavar="ID", default=DownloadConfig.base_id,
        help="Stable Diffusion 1.5 model on the hub for --download (default: %(default)s)")  # fmt: skip
    add("--cache", type=Path, metavar="DIR", default=Path("weights/cache"),
        help="folder for downloads (default: %(default)s)")  # fmt: skip
    add("--clean-cache", action="store_true", help="delete what was fetched once the bundle is complete")
    add("--revision", action="append", type=pair, default=[], metavar="ID=COMMIT",
        help="fetch this commit, branch or tag of a repository")  # fmt: skip
    add("--mirror", action="append", type=pair, default=[], metavar="ID=OTHER",
        help="fetch from another repository where the first does not answer")  # fmt: skip
    add("--export-ip-adapter", type=Path, metavar="BUNDLE", help="write the context branch of a bundle's"
        " adapter as an IP-Adapter file for other programs to --out FILE.safetensors instead")  # fmt: skip
    args = parser.parse_args(arguments)
    defaults = {"out": args.out, "export_ip_adapter": args.export_ip_adapter, "sources": []}
    given = [
        name for name in vars(args) if getattr(args, name) != defaults.get(name, parser.get_default(name))
    ]
    if args.export_ip_adapter and given:
        raise ValueError(f"--export-ip-adapter takes a bundle and --out alone: leave out {', '.join(given)}")
    return args


def pair(text: str) -> tuple[str, str]:
    """An option's 'ID=VALUE'."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}, expected ID=VALUE")
    return name, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status."""
    return exit_status("convert_weights", lambda: _run(parse(arguments)))


def _run(args: argparse.Namespace) -> None:
    if args.export_ip_adapter:
        check_export(args.export_ip_adapter, args.out)
        check_writable("--out", args.out.parent)
        export_ip_adapter(args.export_ip_adapter, args.out)
        return print(args.out)
    check_target(args.out, args.overwrite)
    if args.llm_bits and args.no_llm:
        raise ValueError("--llm-bits quantises LLaVA, which --no-llm leaves out; give one of them")
    base = Bundle.open(args.base_bundle) if args.base_bundle else None
    dtype, llm, fetched = CHOICES[args.dtype], not args.no_llm, []
    extras = ("sam",) * args.download + tuple(args.extras)
    wanted = DownloadConfig(args.base_id, released=args.download, extras=extras)
    if not extras and (args.revision or args.mirror or args.clean_cache):
        raise ValueError("--revision, --mirror and --clean-cache are for what --download or --with fetches")
    wanted = replace(wanted, revisions=dict(args.revision), mirrors=dict(args.mirror))

    def fetch() -> list[Path]:
        fetched.extend(download(wanted, args.cache, llm) if extras else [])
        return fetched

    loras = [parse_lora(text) for text in args.lora]
    check_writable("--out", args.out.resolve().parent)
    if extras:
        check_writable("--cache", args.cache)
    convert(args.sources, args.out, base, dtype, args.ema, llm, args.llm_bits, args.overwrite,
        fetch=fetch, loras=loras)  # fmt: skip
    for folder in fetched if args.clean_cache else ():
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
