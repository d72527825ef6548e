"""Description of a GGUF file: its size, parameters, types of tensors and metadata, from its header alone."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.gguf.ggml_types import read_ggml_types
from lathe.gguf.header import open_header
from lathe.gguf.tensor_list import read_tensors


def describe_gguf(path: Path) -> dict[str, Any]:
    """Describe a GGUF file from its header alone.

    `bytes`; `parameters`; `bits_per_weight` (of the tensors); `tensor_types`, type name -> number of tensors;
    `metadata` without arrays; `chat_template` or None. Raises InputError if the file is not GGUF, damaged or cut short.
    """
    names = {kind.number: name for name, kind in read_ggml_types().items()}
    with open_header(path) as header:
        metadata, tensors = header.metadata, read_tensors(header)
    parameters = tensor_bytes = 0
    for tensor in tensors:
        if tensor.kind not in names:
            raise InputError(
                f"{path}: its GGUF header is damaged (tensor type {tensor.kind}); make the file again",
                code="damaged-gguf",
            )
        count, stored = math.prod(tensor.extents), read_ggml_types()[names[tensor.kind]]
        parameters += count
        tensor_bytes += count // stored.block_values * stored.block_bytes
    if tensor_bytes > path.stat().st_size:
        raise InputError(
            f"{path}: cut short: {path.stat().st_size:,} bytes, and its tensors alone take {tensor_bytes:,}; "
            "copy the file again",
            code="truncated-gguf",
        )
    return {
        "bytes": path.stat().st_size,
        "parameters": parameters,
        "bits_per_weight": round(8 * tensor_bytes / parameters, 4) if parameters else 0.0,
        "tensor_types": dict(sorted(Counter(names[tensor.kind] for tensor in tensors).items())),
        "chat_template": metadata.pop("tokenizer.chat_template", None),
        "metadata": metadata,
    }
