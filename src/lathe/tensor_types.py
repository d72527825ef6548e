"""Which type each tensor of a quantized file gets where the user names one, and which need an importance matrix.

A file's type (`Q4_K_M`) is a mixture; a tensor's type (`Q4_K`) is how its values are stored.
"""

import re
from collections.abc import Sequence

from lathe.errors import InputError
from lathe.llama import ggml_types
from lathe.params import did_you_mean

# Files that llama.cpp refuses to make without an importance matrix, because they hold tensors of the types below
# (llama-quant.cpp, tensor_requires_imatrix).
FILES_THAT_NEED_IMATRIX = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
)
TENSORS_THAT_NEED_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})

# Files that llama.cpp names but cannot make (llama_ftype_get_default_type knows no tensor type for them).
FILES_THAT_CANNOT_BE_MADE = frozenset({"NVFP4"})

# Types that ggml ends the process over where there is no importance, as for embeddings and output head.
_NEVER_OF_EMBEDDINGS = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
# Integers and the forms in which activations are multiplied: ggml quantizes no weights to them.
_NOT_OF_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})


def check_type(name: str, *, of_embeddings: bool = False) -> str:
    """Return the name of a type that weights can be quantized to; raise InputError for any other.

    `of_embeddings` is for the output head and the token embeddings, which have no importance.
    """
    known = [known for known in ggml_types() if known not in _NOT_OF_WEIGHTS]
    if name not in known:
        raise InputError(f"{name!r} is no type of a tensor; {did_you_mean(name, known)}")
    if of_embeddings and name in _NEVER_OF_EMBEDDINGS:
        raise InputError(
            f"{name} needs the importance of every column, and none is collected for embeddings and output head; "
            "take a larger type, such as IQ2_S or Q2_K"
        )
    return name


def parse(entry: str) -> tuple[re.Pattern[str], str]:
    """Split `PATTERN=TYPE` into the regular expression and the type; raise InputError where it is neither."""
    pattern, equals, name = entry.rpartition("=")
    if not equals or not pattern or not name:
        raise InputError(f"{entry!r} does not read PATTERN=TYPE; write one such as 'attn_v=Q8_0'")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"{entry!r}: {pattern!r} is not a regular expression: {error}; escape what is meant as it is"
        ) from None
    try:
        return compiled, check_type(name)
    except InputError as error:
        raise InputError(f"{entry!r}: {error}") from None


def assign(entries: Sequence[str], tensors: Sequence[str]) -> dict[str, str]:
    """The type of each tensor that an entry `PATTERN=TYPE` matches anywhere in its name; the first that does counts.

    `tensors` are the names that can be quantized. Raises InputError for an entry that matches none of them.
    """
    assigned: dict[str, str] = {}
    for entry in entries:
        pattern, name = parse(entry)
        matched = [tensor for tensor in tensors if pattern.search(tensor)]
        if not matched:
            kinds = list(
                dict.fromkeys(re.sub(r"^blk\.\d+\.", "", tensor).removesuffix(".weight") for tensor in tensors)
            )
            raise InputError(
                f"quantize.tensor_types: {entry!r} matches no tensor that can be quantized; "
                f"{did_you_mean(pattern.pattern, kinds)}; they are named such as {tensors[len(tensors) // 2]!r}"
            )
        for tensor in matched:
            assigned.setdefault(tensor, name)
    return assigned
