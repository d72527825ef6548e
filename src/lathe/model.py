"""Loading a base model for training: precision, 4-bit weights, the adapter on top."""

import platform
import re
from pathlib import Path
from typing import Any

import torch

from lathe.errors import InputError
from lathe.params import Lora, Quantization

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(name: str) -> str:
    """Return bf16, fp16 or fp32 for `training.precision`, which may be auto.

    Raises InputError for fp16 without a GPU: its gradients need a scaler that only CUDA has.
    """
    if name == "auto":
        return "bf16" if has_native_bf16() else "fp32"
    if name == "fp16" and not torch.cuda.is_available():
        raise InputError("training.precision is 'fp16'; needs a CUDA device; use auto, bf16 or fp32 on this machine")
    return name


def has_native_bf16() -> bool:
    """Tell whether the device that will train multiplies bf16 matrices in hardware, not by emulation."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in {"aarch64", "arm64"}:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_tokenizer(folder: Path) -> Any:
    """Load a model folder's tokenizer; its chat template is the one of training, evaluation and the GGUF."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise InputError(
            f"{folder.name}: the model has no chat template; choose an instruction-tuned model, or give its preset one "
            "(template: chatml)"
        )
    return tokenizer


def check_adapter(folder: Path, lora: Lora) -> None:
    """Raise InputError where a name or expression of `lora` matches no layer; asks the model without its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        _check_targets(AutoModelForCausalLM.from_config(config, trust_remote_code=False), lora)


def load_base(folder: Path, quantization: Quantization, *, precision: str) -> Any:
    """Load the frozen base: 4-bit linear layers if asked for, all else in the type of `precision`."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
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


def add_adapter(model: Any, lora: Lora) -> Any:
    """Freeze the base and put a fresh float32 adapter on the layers that `lora.target_modules` names.

    Raises InputError where no layer, or no layer of one of the names, matches.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    # bitsandbytes' 4-bit layers hold bytes, which cannot require gradients anyway; the rest of the base is frozen here.
    model.requires_grad_(False)
    return get_peft_model(model, config)


def unwrapped(model: Any) -> Any:
    """Return the model itself, without what PEFT puts around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


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


def _check_targets(model: Any, lora: Lora) -> None:
    names = [name for name, _ in model.named_modules() if name]
    leaves = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "weight")})
    remedy = f"this model's layers: {', '.join(leaves)}"
    if isinstance(lora.target_modules, list):
        for target in lora.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise InputError(f"lora.target_modules: {target!r} matches no layer; {remedy}")
    elif lora.target_modules != "all-linear":
        try:
            pattern = re.compile(lora.target_modules)
        except re.error as error:
            raise InputError(
                f"lora.target_modules is {lora.target_modules!r}; not a regular expression: {error}"
            ) from None
        if not any(pattern.fullmatch(name) for name in names):
            raise InputError(f"lora.target_modules: the expression {lora.target_modules!r} matches no layer; {remedy}")
    for target in lora.modules_to_save or []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(f"lora.modules_to_save: {target!r} matches no layer; {remedy}")
