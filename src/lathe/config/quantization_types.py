"""Which type each tensor of a quantized file gets where the user names one, and which need an importance matrix.

A file's type (`Q4_K_M`) is a mixture; a tensor's type (`Q4_K`) is how its values are stored.
"""

import re

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean

# Every type of a file and of a tensor that llama.cpp names; a test holds both equal to the installed library.
# fmt: off
FILE_TYPES = (
    "F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M",
    "IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16", "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0", "Q2_0",
)
TENSOR_TYPES = (
    "F32", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K",
    "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64",
    "IQ1_M", "BF16", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0",
)
# fmt: on

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
    known = [known for known in TENSOR_TYPES if known not in _NOT_OF_WEIGHTS]
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
