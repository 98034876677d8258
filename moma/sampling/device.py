"""Devices, dtypes and the precision of a process."""

import torch


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is the accelerator or else the CPU. ValueError if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise ValueError(f"device {name!r} is not available here: use --device {accelerator or 'cpu'}")
    if device.type == "cpu":
        if device.index:
            raise ValueError(f"device {name!r}: there is one CPU, expected cpu")
        return torch.device("cpu")  # readers of .safetensors know no "cpu:0"
    if (device.index or 0) >= (there := torch.accelerator.device_count()):
        raise ValueError(f"device {name!r}: expected a number from 0 to {there - 1}")
    return device


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype and why. "auto": bf16 where the hardware has it, else fp16 (GPU) or fp32 (CPU)."""
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[name], "asked for"
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        if abilities.get("amx_bf16") or abilities.get("avx512_bf16") or abilities.get("bf16"):
            return torch.bfloat16, "this CPU multiplies bf16"
        return torch.float32, "this CPU has no bf16 instructions"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "this GPU has no bf16"
    return torch.bfloat16, f"the default on {device.type}"


def set_precision() -> None:
    """How products of matrices and convolutions are computed; each command that computes sets it first.

    | dtype | products | sums |
    |---|---|---|
    | fp32 | IEEE float32 | float32 |
    | bf16, fp16 | exact | float32, partial sums too |

    torch's defaults differ on CUDA devices: convolutions of float32 read 10 of its 23 bits (TF32), and a
    product of 16 bits that is split may be added up in 16 bits. On CPUs they are the table's. This is a
    setting of the process, so nothing changes it at import: programs that use the Python API call this
    function, or choose for themselves. There is no TF32 here: who gives up fp32's digits has bf16.
    """
    torch.backends.cudnn.allow_tf32 = False
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # names on the command line


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bf16'"""
    return next(name for name, kind in DTYPES.items() if kind == dtype)
