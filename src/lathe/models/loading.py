"""Base model loaded for training, in its precision or in 4 bits."""

from pathlib import Path
from typing import Any

import torch

from lathe.config.training_params import Quantization
from lathe.models.model_class import choose_model_class, read_model_config
from lathe.models.precision import DTYPES


def load_base(folder: Path, quantization: Quantization, *, precision: str, sharded: bool = False) -> Any:
    """Load the base: linear layers in 4 bits if configured, all else in the type of `precision`.

    Where weights are to be `sharded`, 4-bit ones are stored as if they were bf16: only floats are shared out. For full
    tuning `precision` is fp32: updates are smaller than the rounding of bf16.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    model = choose_model_class(read_model_config(folder)).from_pretrained(
        folder,
        dtype=DTYPES[precision],
        quantization_config=_make_quantization_config(quantization, precision, sharded=sharded),
        device_map={"": device},
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    _keep_4bit_weights_trainable(model)
    return model


def _make_quantization_config(quantization: Quantization, precision: str, *, sharded: bool) -> Any:
    if not quantization.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    compute = quantization.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
        bnb_4bit_compute_dtype=DTYPES[precision] if compute == "auto" else getattr(torch, compute),
    )


def _keep_4bit_weights_trainable(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference at the first evaluation.

    On a CPU with AVX-512 bf16 it does so in place, and the repacked product has no gradient: training would go on with
    wrong gradients after the first evaluation, with one warning only (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
