"""Types of tensors that the installed llama.cpp knows."""

import ctypes
from functools import cache
from typing import NamedTuple

from lathe.gguf.llama_library import load_library


class GgmlType(NamedTuple):
    """How the values of a tensor are stored: ggml's number for it, values in a block, and the bytes of a block."""

    number: int
    block_values: int
    block_bytes: int


@cache
def read_ggml_types() -> dict[str, GgmlType]:
    """Every type that a tensor may have in the installed llama.cpp, by its name in capitals: `Q4_K`, `F16`, `I32`.

    From the library, because gguf-py's own table is of another version.
    """
    llama_cpp = load_library()
    from llama_cpp._ggml import libggml

    libggml.ggml_type_name.restype = ctypes.c_char_p
    libggml.ggml_blck_size.restype = ctypes.c_int64
    libggml.ggml_type_size.restype = ctypes.c_size_t
    types = {}
    for number in range(llama_cpp.GGML_TYPE_COUNT):
        block_values = libggml.ggml_blck_size(number)
        if block_values > 0:  # a number may be out of use
            name = libggml.ggml_type_name(number).decode().upper()
            types[name] = GgmlType(number, block_values, libggml.ggml_type_size(number))
    return types
