"""Key-value cache of llama.cpp: sequences decoded side by side, each independent of its neighbours."""

import ctypes
from collections.abc import Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lathe.common.errors import InputError
from lathe.gguf.llama_library import FloatRows, collect_llama_log, load_library
from lathe.gguf.llama_model import LlamaModel

# Tokens in one call of llama_decode, and in one pass through the layers: more brought nothing on the CPU.
N_BATCH = 2048
N_UBATCH = 512
MAX_POSITION = 2**31 - 1


class KVCache:
    """The key-value cache of a model, a context manager: `slots` sequences of up to `length` tokens each.

    The logits of a sequence do not depend on the other slots, nor on how many are decoded together. To that end
    a prompt is decoded alone (`feed`), and `step` decodes at least `min_rows` rows together: on the CPU,
    llama.cpp multiplies one row by other kernels than two, with results up to 1e-3 apart (F16), and from 8 rows
    on the K and I types by others again. One call returns at most `max_outputs` rows of logits. Raises
    InputError if there is no memory for the cache.
    """

    def __init__(
        self, model: LlamaModel, *, slots: int, length: int, max_outputs: int, threads: int, min_rows: int
    ) -> None:
        self._library = load_library()
        self._model = model
        self._min_rows = min_rows
        self._lengths = [0] * max(slots, min_rows)
        self._max_outputs = min(max(len(self._lengths), max_outputs), N_BATCH)
        params = self._library.llama_context_default_params()
        params.n_ctx = len(self._lengths) * length
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_seq_max = len(self._lengths)
        params.n_outputs_max, params.n_outputs_max_per_seq = self._max_outputs, 0
        params.n_threads = params.n_threads_batch = threads
        # Each slot then attends to its own tokens only; in a shared buffer it would also multiply, and mask, those of
        # all others.
        params.kv_unified = False
        # On a CPU llama.cpp's FlashAttention takes queries one by one: three to seven times slower after 1,000 tokens.
        if not self._library.llama_supports_gpu_offload():
            params.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with collect_llama_log() as log:
            self._context = self._library.llama_init_from_model(model.handle, params)
        if not self._context:
            raise InputError(
                f"{model.path}: no cache for {slots} rows of {length} tokens ({log.reason}); "
                f"lower generate.n_parallel or generate.n_ctx",
                code="no-memory",
            )
        self._memory = self._library.llama_get_memory(self._context)
        self._batch = _Batch(self._library)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache."""
        if self._context:
            self._library.llama_free(self._context)
            self._context = None

    def length(self, slot: int) -> int:
        """Return the number of tokens in a slot."""
        return self._lengths[slot]

    def feed(self, slot: int, tokens: Sequence[int], *, first_output: int) -> FloatRows:
        """Decode the rest of a sequence that begins with what is in the slot, as much of it as one call takes.

        Returns the logits after each token fed from index `first_output` on, (outputs, n_vocab).
        """
        begin = self._lengths[slot]
        end = min(len(tokens), begin + N_BATCH, max(begin, first_output) + self._max_outputs)
        self._batch.clear()
        self._batch.add(slot, tokens[begin:end], begin, first_output)
        return self._decode(outputs=max(0, end - max(begin, first_output)))

    @property
    def can_forget_a_part(self) -> bool:
        """Whether the end of a sequence can be cut off: not where layers keep a state in place of tokens."""
        model = self._model.handle
        return not (self._library.llama_model_is_recurrent(model) or self._library.llama_model_is_hybrid(model))

    def feed_to_end(self, rows: Mapping[int, Sequence[int]]) -> FloatRows:
        """Decode the rest of each sequence, by its slot; return logits after the last token of each, (rows, n_vocab).

        llama.cpp decodes sequences in one pass where each has as many tokens: several are filled up to the longest with
        tokens that no other attends to, and which are then forgotten. So filled they take at most N_UBATCH tokens, in a
        cache that `can_forget_a_part`. At least `min_rows` rows of logits are computed: the numbers do not depend on
        how many sequences are decoded together.
        """
        outputs = -(-self._min_rows // len(rows))  # of each sequence, its last one the one that is returned
        if len(rows) == 1:
            [(slot, tokens)] = rows.items()
            while self._lengths[slot] < len(tokens):
                logits = self.feed(slot, tokens, first_output=len(tokens) - outputs)
            return logits[-1:]
        longest = max(len(tokens) - self._lengths[slot] for slot, tokens in rows.items())
        self._batch.clear()
        for slot, tokens in rows.items():
            begin = self._lengths[slot]
            rest = list(tokens[begin:])
            filled = rest + rest[-1:] * (longest - len(rest))
            self._batch.add(slot, filled, begin, len(tokens) - outputs, len(tokens) - 1)
        counts = [min(outputs, len(tokens) - self._lengths[slot]) for slot, tokens in rows.items()]
        logits = self._decode(outputs=sum(counts))
        for slot, tokens in rows.items():
            self.cut(slot, len(tokens))
        return logits[np.cumsum(counts) - 1]

    def step(self, tokens: Sequence[int]) -> FloatRows:
        """Decode one more token in each of the first `len(tokens)` slots; return the logits after each."""
        companions = range(len(tokens), self._min_rows)
        self._batch.clear()
        for slot, token in enumerate([*tokens, *(tokens[0] for _ in companions)]):
            self._batch.add(slot, [token], self._lengths[slot], 0)
        logits = self._decode(outputs=len(tokens) + len(companions))[: len(tokens)]
        for slot in companions:
            self.cut(slot, self._lengths[slot] - 1)
        return logits

    def copy(self, source: int, target: int) -> None:
        """Copy the tokens of one slot into another."""
        self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._lengths[target] = self._lengths[source]

    def cut(self, slot: int, length: int) -> None:
        """Keep at most the first `length` tokens of a slot, or none if the model cannot forget a part (recurrent)."""
        self._lengths[slot] = min(length, self._lengths[slot])
        if not self._library.llama_memory_seq_rm(self._memory, slot, self._lengths[slot], -1):
            self._library.llama_memory_seq_rm(self._memory, slot, -1, -1)
            self._lengths[slot] = 0

    def _decode(self, *, outputs: int) -> FloatRows:
        # The logits are in llama.cpp's memory: the next call overwrites them.
        batch, added = self._batch.take()
        with collect_llama_log() as log:
            status = self._library.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"{self._model.path}: llama_decode failed with status {status}: {log.reason}")
        for slot, end in added.items():
            self._lengths[slot] = end
        if outputs == 0:
            return np.empty((0, self._model.n_vocab), np.float32)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (outputs, self._model.n_vocab))


def count_bytes_per_token(model: LlamaModel) -> int:
    """Return the size of a token's keys and values in a cache of 16-bit floats, if all layers attend to all tokens."""
    library = load_library()
    width = library.llama_model_n_embd(model.handle) // library.llama_model_n_head(model.handle)
    return 2 * 2 * library.llama_model_n_layer(model.handle) * library.llama_model_n_head_kv(model.handle) * width


class _Batch:
    """The arrays of a `llama_batch`, filled by numpy: ctypes would take a Python assignment per token and field."""

    def __init__(self, library: ModuleType) -> None:
        self._tokens, self._positions, self._slots = np.zeros((3, N_BATCH), np.int32)
        self._outputs = np.zeros(N_BATCH, np.int8)
        self._counts = np.ones(N_BATCH, np.int32)
        self._slot_pointers = self._slots.ctypes.data + self._slots.itemsize * np.arange(N_BATCH, dtype=np.uint64)
        self.clear()
        self._batch = library.llama_batch(
            token=_get_pointer(self._tokens, ctypes.c_int32),
            pos=_get_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_get_pointer(self._counts, ctypes.c_int32),
            seq_id=_get_pointer(self._slot_pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_get_pointer(self._outputs, ctypes.c_int8),
        )

    def clear(self) -> None:
        self._size, self._added = 0, dict[int, int]()

    def add(
        self, slot: int, tokens: Sequence[int], position: int, first_output: int, last_output: int = MAX_POSITION
    ) -> None:
        """Add tokens from a position on; logits are wanted after those from `first_output` to `last_output`."""
        begin, end = self._size, self._size + len(tokens)
        self._tokens[begin:end] = tokens
        self._positions[begin:end] = range(position, position + len(tokens))
        self._slots[begin:end] = slot
        positions = self._positions[begin:end]
        self._outputs[begin:end] = (positions >= first_output) & (positions <= last_output)
        self._size = end
        self._added[slot] = position + len(tokens)

    def take(self) -> tuple[Any, dict[int, int]]:
        """Return the batch, and the length of each of its slots once it is decoded."""
        self._batch.n_tokens = self._size
        return self._batch, self._added


def _get_pointer(values: NDArray[Any], kind: Any) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(kind))
