"""Loading a base model for training: precision, 4-bit weights, the adapter on top."""

from pathlib import Path
from typing import Any

import torch

from lathe.config.training_params import Quantization
from lathe.models.precision import DTYPES


def load_base(folder: Path, quantization: Quantization, *, precision: str) -> Any:
    """Load the base: 4-bit linear layers if asked for, all else in the type of `precision`.

    What is to be trained whole is loaded in fp32: an update is smaller than what bf16 rounds to.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[precision],
        quantization_config=_quantization_config(quantization, precision),
        device_map={"": device},
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    _keep_weights_trainable_through(model)
    return model


def _quantization_config(quantization: Quantization, precision: str) -> Any:
    if not quantization.load_in_4bit:
        return None
    from transformers import BitsAndBytesConfig

    compute = quantization.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=DTYPES[precision] if compute == "auto" else getattr(torch, compute),
    )


def _keep_weights_trainable_through(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference at the first evaluation.

    On a CPU with AVX-512 bf16 it does so in place, and the packed product has no gradient: training would go on after
    the first evaluation with the wrong gradients, and say so in one warning only (bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
