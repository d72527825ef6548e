"""Precision: bf16, fp16 or fp32, resolved by what the device supports in hardware."""

import platform

import torch

from lathe.common.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(name: str) -> str:
    """Return bf16, fp16 or fp32 for `training.precision`, which may be auto.

    Raises InputError for fp16 without a GPU: its gradients need a scaler that only CUDA has.
    """
    if name == "auto":
        return "bf16" if has_native_bf16() else "fp32"
    if name == "fp16" and not torch.cuda.is_available():
        raise InputError(
            "training.precision is 'fp16'; needs a CUDA device; use auto, bf16 or fp32 on this machine",
            code="precision-needs-gpu",
        )
    return name


def has_native_bf16() -> bool:
    """Tell whether the device that will train multiplies bf16 matrices in hardware, not by emulation."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in {"aarch64", "arm64"}:
        # macOS' torch is built without mkldnn.
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# The safetensors types that a change can be added to; tensors of other types are only copied.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
