"""llama.cpp, the library: its logs in ours, its failures as one line, and a GGUF opened for reading."""

import ctypes
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from lathe.errors import InputError

logger = logging.getLogger(__name__)

FloatRows = NDArray[np.float32]

# Tokens in one call of llama_decode, and in one pass through the layers: more brought nothing on the CPU.
N_BATCH = 2048
N_UBATCH = 512

_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level in ggml.h; everything below an error is our debug level
_MAX_TEXT_BYTES = 1 << 16


@cache
def library() -> ModuleType:
    """Import llama_cpp (0.15 s) and lead its C logs into `logging`: errors as errors, all else at debug level."""
    # OpenMP's threads wait for each other by spinning, for so long that where another process wants the same cores
    # decoding takes ten times its time; after a short spin they sleep. Read when the library is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "100")
    import llama_cpp

    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


class GgmlType(NamedTuple):
    """How the values of a tensor are stored: ggml's number for it, values in a block, and the bytes of a block."""

    number: int
    block_values: int
    block_bytes: int


@cache
def ggml_types() -> dict[str, GgmlType]:
    """Every type that a tensor may have in the installed llama.cpp, by its name in capitals: `Q4_K`, `F16`, `I32`.

    Asked of the library, because gguf-py's own table is of another day.
    """
    llama_cpp = library()
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


@dataclass
class Log:
    """What llama.cpp said meanwhile, a line each, without the name of the C function that said it."""

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The first error: the later ones only tell who passed it on."""
        return self.errors[0] if self.errors else "llama.cpp gives no reason"


@contextmanager
def listening() -> Iterator[Log]:
    """Collect what llama.cpp says inside the block, so that a failure can be given its reason.

    Errors that go into an exception are not logged as well: said twice, they would hide its one line.
    """
    library()
    log = Log()
    _listeners.append(log)
    try:
        yield log
    finally:
        _listeners.remove(log)


class Model:
    """A GGUF file opened with llama.cpp; a context manager.

    With `vocab_only` the weights stay on disk: metadata, template and tokenizer are there in milliseconds.
    Raises InputError if there is no such file or llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        if not path.is_file():
            raise InputError(f"{path}: no such GGUF file; the path must name one that the pipeline or you have made")
        self.path = path
        self._library = library()
        params = self._library.llama_model_default_params()
        params.vocab_only = vocab_only
        # Repacked weights are multiplied by other kernels for one row than for four, which batches would
        # show.
        params.use_extra_bufts = False
        with listening() as log:
            self.handle = self._library.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise InputError(f"{path}: llama.cpp cannot load it ({log.reason}); make the file again")
        self.vocab = self._library.llama_model_get_vocab(self.handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; every context made from it must be freed before."""
        if self.handle:
            self._library.llama_model_free(self.handle)
            self.handle = None

    @cached_property
    def metadata(self) -> dict[str, str]:
        """All metadata as text, in file order; llama.cpp writes arrays as `[a, b, …]`."""
        count = self._library.llama_model_meta_count(self.handle)
        keys = (self._text(self._library.llama_model_meta_key_by_index, index) for index in range(count))
        values = (self._text(self._library.llama_model_meta_val_str_by_index, index) for index in range(count))
        return dict(zip(keys, values, strict=True))

    @property
    def template(self) -> str:
        """The chat template (Jinja) inside the file. Raises InputError if there is none."""
        template = self.metadata.get("tokenizer.chat_template")
        if not template:
            raise InputError(f"{self.path}: the GGUF holds no chat template; convert a model whose tokenizer has one")
        return template

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._library.llama_vocab_n_tokens(self.vocab)

    @property
    def n_ctx_train(self) -> int:
        """The longest context of training, in tokens."""
        return self._library.llama_model_n_ctx_train(self.handle)

    @property
    def bos(self) -> int | None:
        """Id of the token that begins a text; None if the vocabulary has none."""
        return self._id(self._library.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> int | None:
        """Id of the token that the vocabulary names as its end; None if it has none."""
        return self._id(self._library.llama_vocab_eos(self.vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether the vocabulary asks for its BOS in front of every text."""
        return self._library.llama_vocab_get_add_bos(self.vocab)

    def is_end(self, token: int) -> bool:
        """Whether a token ends a generation."""
        return self._library.llama_vocab_is_eog(self.vocab, token)

    def text_of(self, token: int | None) -> str:
        """How a token is written in the vocabulary, `<|im_end|>`; empty for None."""
        return "" if token is None else self._library.llama_vocab_get_text(self.vocab, token).decode()

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised.

        `add_special` puts in front and behind what the vocabulary asks for (BOS, EOS).
        """
        raw = text.encode()
        room = len(raw) + 2
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(self.vocab, raw, len(raw), ids, room, add_special, True)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt that a chat template has rendered, with exactly one BOS where the vocabulary
        wants one.

        A template that writes the BOS itself and a vocabulary that adds it do not make two.
        """
        ids = self.tokenize(prompt)
        if self.adds_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def piece(self, token: int) -> bytes:
        """Bytes of one generated token, possibly part of a character; empty for control tokens."""
        buffer = ctypes.create_string_buffer(64)
        size = self._library.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = self._library.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:size]

    def _id(self, token: int) -> int | None:
        return None if token == self._library.LLAMA_TOKEN_NULL else token

    def _text(self, call: Any, index: int) -> str:
        size = _MAX_TEXT_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = call(self.handle, index, buffer, size)
            if needed < size:
                return buffer.value.decode("utf-8", "replace")
            size = needed + 1


class Cache:
    """The key-value cache of a model, a context manager: `slots` sequences of up to `length` tokens each.

    What a sequence gets does not depend on what lies in the other slots, nor on how many are decoded along
    with it. For that a prompt goes in by itself (`feed`), and `step` decodes at least `fewest` rows together:
    on the CPU, llama.cpp multiplies one row by other kernels than two, with results up to 1e-3 apart (F16),
    and from 8 rows on the K and I types by others again. At most `max_outputs` rows of logits are asked for
    at once. Raises InputError if there is no memory for the cache.
    """

    def __init__(self, model: Model, *, slots: int, length: int, max_outputs: int, threads: int, fewest: int) -> None:
        self._library = library()
        self._model = model
        self._fewest = fewest
        self._lengths = [0] * max(slots, fewest)
        self._max_outputs = min(max(len(self._lengths), max_outputs), N_BATCH)
        params = self._library.llama_context_default_params()
        params.n_ctx = len(self._lengths) * length
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_seq_max = len(self._lengths)
        params.n_outputs_max, params.n_outputs_max_per_seq = self._max_outputs, 0
        params.n_threads = params.n_threads_batch = threads
        # A slot then attends to its own tokens only; in one shared buffer it would also multiply, and mask,
        # all others'.
        params.kv_unified = False
        # Where the model allows it; a third faster, and as independent of neighbours and threads.
        params.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_AUTO
        with listening() as log:
            self._context = self._library.llama_init_from_model(model.handle, params)
        if not self._context:
            raise InputError(
                f"{model.path}: no cache for {slots} rows of {length} tokens ({log.reason}); "
                f"lower generate.n_parallel or generate.n_ctx"
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
        """How many tokens lie in a slot."""
        return self._lengths[slot]

    def feed(self, slot: int, tokens: Sequence[int], *, first_output: int) -> FloatRows:
        """Decode what follows of a sequence that begins with what lies in the slot, as much as one call takes.

        Returns the logits after each token fed from index `first_output` on, (outputs, n_vocab).
        """
        begin = self._lengths[slot]
        end = min(len(tokens), begin + N_BATCH, max(begin, first_output) + self._max_outputs)
        self._batch.clear()
        self._batch.add(slot, tokens[begin:end], begin, first_output)
        return self._decode(outputs=max(0, end - max(begin, first_output)))

    def step(self, tokens: Sequence[int]) -> FloatRows:
        """Decode one more token in each of the first `len(tokens)` slots; return the logits after each."""
        companions = range(len(tokens), self._fewest)
        self._batch.clear()
        for slot, token in enumerate([*tokens, *(tokens[0] for _ in companions)]):
            self._batch.add(slot, [token], self._lengths[slot], 0)
        logits = self._decode(outputs=len(tokens) + len(companions))[: len(tokens)]
        for slot in companions:
            self.cut(slot, self._lengths[slot] - 1)
        return logits

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds."""
        self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._lengths[target] = self._lengths[source]

    def cut(self, slot: int, length: int) -> None:
        """Keep at most the first `length` tokens of a slot, or none if the model cannot forget a part (recurrent)."""
        self._lengths[slot] = min(length, self._lengths[slot])
        if not self._library.llama_memory_seq_rm(self._memory, slot, self._lengths[slot], -1):
            self._library.llama_memory_seq_rm(self._memory, slot, -1, -1)
            self._lengths[slot] = 0

    def _decode(self, *, outputs: int) -> FloatRows:
        # The logits are llama.cpp's own memory: the next call overwrites them.
        batch, added = self._batch.take()
        with listening() as log:
            status = self._library.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"{self._model.path}: llama_decode failed with status {status}: {log.reason}")
        for slot, end in added.items():
            self._lengths[slot] = end
        if outputs == 0:
            return np.empty((0, self._model.n_vocab), np.float32)
        return np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (outputs, self._model.n_vocab))


class _Batch:
    """The arrays of a `llama_batch`, filled by numpy: ctypes would take a Python assignment per token and field."""

    def __init__(self, library: ModuleType) -> None:
        self._tokens, self._positions, self._slots = np.zeros((3, N_BATCH), np.int32)
        self._wanted = np.zeros(N_BATCH, np.int8)
        self._counts = np.ones(N_BATCH, np.int32)
        self._slot_pointers = self._slots.ctypes.data + self._slots.itemsize * np.arange(N_BATCH, dtype=np.uint64)
        self.clear()
        self._batch = library.llama_batch(
            token=_pointer(self._tokens, ctypes.c_int32),
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._counts, ctypes.c_int32),
            seq_id=_pointer(self._slot_pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def clear(self) -> None:
        self._size, self._added = 0, dict[int, int]()

    def add(self, slot: int, tokens: Sequence[int], position: int, first_output: int) -> None:
        begin, end = self._size, self._size + len(tokens)
        self._tokens[begin:end] = tokens
        self._positions[begin:end] = range(position, position + len(tokens))
        self._slots[begin:end] = slot
        self._wanted[begin:end] = self._positions[begin:end] >= first_output
        self._size = end
        self._added[slot] = position + len(tokens)

    def take(self) -> tuple[Any, dict[int, int]]:
        """The batch, and how long each slot in it will be."""
        self._batch.n_tokens = self._size
        return self._batch, self._added


def _pointer(values: NDArray[Any], kind: Any) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(kind))


_listeners: list[Log] = []


@cache
def _log_callback(llama_cpp: ModuleType) -> Any:
    # Cached, because C keeps the pointer: Python must not collect what it points to.
    pending: list[str] = []
    level = 0

    def receive(new_level: int, text: bytes, _: Any) -> None:
        nonlocal level
        if new_level != _CONTINUED:
            level = new_level
        pending.append(text.decode("utf-8", "replace"))
        if not text.endswith(b"\n"):
            return  # a line may come in several pieces
        said = [re.sub(r"^(\w+: )?(ERROR: )?", "", line.strip()) for line in "".join(pending).splitlines()]
        lines = [line for line in said if line.strip("=-")]  # not the rules that frame a message
        pending.clear()
        for log in _listeners:
            log.lines += lines
            log.errors += lines if level == _ERROR else []
        for line in lines:
            logger.log(logging.ERROR if level == _ERROR and not _listeners else logging.DEBUG, "%s", line)

    return llama_cpp.llama_log_callback(receive)
