"""Quantization types: those of files and of tensors, which of them can be made, and which need an importance matrix.

A file's type (`Q4_K_M`) is a mixture; a tensor's type (`Q4_K`) is how its values are stored.
"""

import re

from lathe.common.bounded_regex import compile_pattern
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean

# All types of files and of tensors in llama.cpp; a test compares both with the installed library.
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

# Types for which ggml aborts the process without importance, which embeddings and output head do not have.
_NEVER_OF_EMBEDDINGS = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
# Integers, and the types of quantized activations: ggml does not quantize weights to them.
_NOT_OF_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})


def check_type(name: str, *, of_embeddings: bool = False) -> str:
    """Return the name if weights can be quantized to this type; raise InputError otherwise.

    `of_embeddings` is for the output head and the token embeddings, which have no importance matrix.
    """
    known = [type_ for type_ in TENSOR_TYPES if type_ not in _NOT_OF_WEIGHTS]
    if name not in known:
        raise InputError(f"{name!r} is no tensor type; {did_you_mean(name, known)}", code="unknown-tensor-type")
    if of_embeddings and name in _NEVER_OF_EMBEDDINGS:
        raise InputError(
            f"{name} needs an importance matrix, and none is collected for embeddings and output head; "
            "take a larger type, such as IQ2_S or Q2_K",
            code="importance-needed",
        )
    return name


def parse_tensor_type(entry: str) -> tuple[re.Pattern[str], str]:
    """Return the regular expression and the type of `PATTERN=TYPE`; raise InputError if it has another form."""
    pattern, equals, name = entry.rpartition("=")
    if not equals or not pattern or not name:
        raise InputError(
            f"{entry!r} is not of the form PATTERN=TYPE; write one such as 'attn_v=Q8_0'", code="invalid-tensor-type"
        )
    try:
        return compile_pattern(pattern, texts="names"), check_type(name)
    except InputError as error:
        raise InputError(f"{entry!r}: {error}", code=error.code) from None
