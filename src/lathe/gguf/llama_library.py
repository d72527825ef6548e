"""llama.cpp, the library: loaded once, its log led into `logging`."""

import ctypes
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

FloatRows = NDArray[np.float32]

_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level in ggml.h; everything below an error is our debug level


@cache
def load_library() -> ModuleType:
    """Import llama_cpp (0.15 s) and lead its C log into `logging`: errors as errors, all else at debug level."""
    # OpenMP's threads wait for each other by spinning, for so long that where another process wants the same cores
    # decoding takes ten times its time; after a short spin they sleep. Read when the library is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "100")
    import llama_cpp

    llama_cpp.llama_log_set(_make_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@dataclass
class LlamaLog:
    """Lines that llama.cpp logged, without the names of the C functions that logged them."""

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The first error: the later ones only name the callers that passed it on."""
        return self.errors[0] if self.errors else "llama.cpp gives no reason"


@contextmanager
def collect_llama_log() -> Iterator[LlamaLog]:
    """Collect what llama.cpp logs inside the block, so that a failure can be given its reason.

    Errors that are collected are not logged as errors too: they go into an exception, whose one line they would hide.
    """
    load_library()
    log = LlamaLog()
    _collecting.append(log)
    try:
        yield log
    finally:
        _collecting.remove(log)


_collecting: list[LlamaLog] = []


@cache
def _make_log_callback(llama_cpp: ModuleType) -> Any:
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
        printed = [re.sub(r"^(\w+: )?(ERROR: )?", "", line.strip()) for line in "".join(pending).splitlines()]
        lines = [line for line in printed if line.strip("=-")]  # not the rules that frame a message
        pending.clear()
        for log in _collecting:
            log.lines += lines
            log.errors += lines if level == _ERROR else []
        for line in lines:
            logger.log(logging.ERROR if level == _ERROR and not _collecting else logging.DEBUG, "%s", line)

    return llama_cpp.llama_log_callback(receive)
