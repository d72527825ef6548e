"""Types of single tensors in a quantized GGUF, by the patterns of `quantize.tensor_types`."""

import re
from collections.abc import Sequence
from functools import cache

from lathe.common.bounded_regex import limit_matching
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config.quantization_types import parse_tensor_type
from lathe.gguf.llama_library import load_library


@cache
def list_file_types() -> dict[str, int]:
    """Return every type that the installed llama.cpp can quantize to, by name: `Q4_K_M` -> its llama_ftype."""
    prefix = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)")
    library_types = vars(load_library()).items()
    return {match[1]: value for name, value in library_types if (match := prefix.fullmatch(name))}


def assign_types(entries: Sequence[str], tensors: Sequence[str]) -> dict[str, str]:
    """Return the type of each tensor whose name an entry `PATTERN=TYPE` matches; the first that matches counts.

    `tensors` are the names that can be quantized. Raises InputError for an entry that matches none of them.
    """
    assigned: dict[str, str] = {}
    for entry in entries:
        pattern, name = parse_tensor_type(entry)
        with limit_matching("quantize.tensor_types", pattern.pattern):
            matched = [tensor for tensor in tensors if pattern.search(tensor)]
        if not matched:
            kinds = list(
                dict.fromkeys(re.sub(r"^blk\.\d+\.", "", tensor).removesuffix(".weight") for tensor in tensors)
            )
            raise InputError(
                f"quantize.tensor_types: {entry!r} matches no tensor that can be quantized; "
                f"{did_you_mean(pattern.pattern, kinds)}; they are named such as {tensors[len(tensors) // 2]!r}",
                code="no-such-tensor",
            )
        for tensor in matched:
            assigned.setdefault(tensor, name)
    return assigned
