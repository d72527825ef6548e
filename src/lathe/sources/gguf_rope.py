"""Scaling of rotary positions in a GGUF file, which transformers does not read: without it long texts go wrong.

Up to some thousand tokens the frequencies of Llama 3.1 differ so little from unscaled ones that no comparison of
probabilities on a short text shows it.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from lathe.common.errors import InputError

FACTORS = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
# What every Llama since 3.1 has; the file holds the factors that come of it, not these numbers.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Of these architectures transformers reads or builds the factors itself.
READ_BY_TRANSFORMERS = {"gpt-oss", "gemma4"}


def set_rope_scaling(config: Any, file: Path, metadata: dict[str, Any]) -> None:
    """Put the scaling of positions that the file names into the model's configuration.

    Raises InputError if there is one that cannot be written there.
    """
    architecture = metadata.get("general.architecture")
    if architecture in READ_BY_TRANSFORMERS:
        return
    scaling = _read_metadata(file, metadata, f"{architecture}.rope")
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == FACTORS and not np.all(tensor.data == 1):
            scaling = _find_llama3(file, tensor.data, float(config.rope_parameters["rope_theta"]))
        elif tensor.name == LONG_FACTORS:
            raise _refuse(file, f"the factors of {LONG_FACTORS}")
    if scaling:
        config.rope_parameters = {**config.rope_parameters, **scaling}


def _read_metadata(file: Path, metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return what the keys below `prefix` say, as llama.cpp reads them."""
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    factor = metadata.get(f"{prefix}.scaling.factor") or metadata.get(f"{prefix}.scale_linear") or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    yarn = {name: metadata.get(f"{prefix}.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    others = {
        name: metadata.get(f"{prefix}.scaling.{name}", 1.0)
        for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")
    }
    original = metadata.get(f"{prefix}.scaling.original_context_length")
    if kind != "yarn" or original is None or any(value != 1 for value in others.values()):
        raise _refuse(file, repr(kind))
    known = {name: value for name, value in yarn.items() if value is not None}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **known}


def _find_llama3(file: Path, factors: NDArray[np.float32], theta: float) -> dict[str, Any]:
    """Return the parameters that the converter made the factors from."""
    factor = float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise _refuse(file, f"the factors of {FACTORS}")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _refuse(file: Path, what: str) -> InputError:
    return InputError(
        f"{file.name}: positions are scaled by {what}, which transformers would not read from the file; give the "
        "model's Hugging Face folder instead",
        code="rope-not-read",
    )
