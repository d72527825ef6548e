"""An importance matrix collected by llama.cpp itself, as its program `llama-imatrix` does: ours must equal it.

tools/imatrix/imatrix.cpp watches every matrix product of the graph; so does this, through the same callback.
"""

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lathe.gguf.imatrix_file import Importance
from lathe.gguf.llama_library import load_library
from lathe.gguf.llama_model import LlamaModel


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def collect(file: Path, rows: Sequence[Sequence[int]]) -> dict[str, Importance]:
    """The importance of every weight of the layers, over rows of token ids."""
    from llama_cpp._ggml import libggml

    libggml.ggml_op_name.restype = ctypes.c_char_p
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1))
    failures: list[Exception] = []

    def watch(address: int, ask: bool, _: object) -> bool:
        try:
            tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
            operation = libggml.ggml_op_name(tensor.op)
            if operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
                return not ask
            weight, inputs = tensor.src[0].contents, tensor.src[1].contents
            name = weight.name.decode()
            if not name.startswith("blk.") or ask:
                return name.startswith("blk.") or not ask
            columns, experts = weight.ne[0], weight.ne[2]
            if name not in sums:
                sums[name], counts[name] = np.zeros((experts, columns)), np.zeros(experts)
            values = _array(inputs, np.float32)  # (1, tokens, experts used or 1, columns), or (1, 1, tokens, columns)
            if operation == b"MUL_MAT":
                sums[name][0] += np.square(values, dtype=np.float64).reshape(-1, columns).sum(0)
                counts[name][0] += values.size // columns
                return True
            chosen = _array(tensor.src[2].contents, np.int32)[0, 0]  # (tokens, experts used)
            for token, ids in enumerate(chosen):
                for place, expert in enumerate(ids):
                    row = values[0, token, place % values.shape[2]]
                    sums[name][expert] += np.square(row, dtype=np.float64)
                    counts[name][expert] += 1
        except Exception as error:  # ctypes would print it and go on
            failures.append(error)
        return True

    llama_cpp = load_library()
    callback = llama_cpp.ggml_backend_sched_eval_callback(watch)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(map(len, rows))
    params.cb_eval = callback
    with LlamaModel(file) as model:
        context = llama_cpp.llama_init_from_model(model.handle, params)
        for row in rows:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            tokens = (ctypes.c_int32 * len(row))(*row)
            # The callback sees every layer for every token only where all logits are wanted.
            batch = llama_cpp.llama_batch_init(len(row), 0, 1)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.n_tokens = len(row)
            assert llama_cpp.llama_decode(context, batch) == 0
            llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    if failures:
        raise failures[0]
    return {name: Importance(sums[name].astype(np.float32), counts[name].astype(np.float32)) for name in sums}


def _array(tensor: _Tensor, kind: type) -> np.ndarray:
    """The values of a tensor, extents in numpy's order, whatever the strides."""
    size = sum((extent - 1) * stride for extent, stride in zip(tensor.ne, tensor.nb, strict=True)) + tensor.nb[0]
    raw = (ctypes.c_byte * size).from_address(tensor.data)
    shape, strides = tuple(reversed(tensor.ne)), tuple(reversed(tensor.nb))
    return np.ndarray(shape, kind, raw, strides=strides)
