"""Trial load of a GGUF file by llama.cpp in a process of its own: an assertion of its C++ would end the caller.

llama.cpp checks what it reads, but a file that lies may still come upon an assertion, which ends the process.
"""

import faulthandler
import os
import selectors
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.operating_system import disable_core_dumps

LONGEST_SECONDS = 120.0
_KEPT_BYTES = 1 << 16  # of what the process says at its end

_SCRIPT = """
import sys, llama_cpp
params = llama_cpp.llama_model_default_params()
params.vocab_only, params.use_extra_bufts, params.n_gpu_layers = sys.argv[2] == "True", False, 0
llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
"""


def try_to_load(path: Path, library: Any, *, vocab_only: bool) -> None:
    """Raise InputError if llama.cpp, the module `library`, ends its process, or does not end, as it loads the file."""
    found = path.stat()
    _try_once(path.absolute(), library, vocab_only, (found.st_mtime_ns, found.st_size))


@cache
def _try_once(path: Path, library: Any, vocab_only: bool, _: tuple[int, int]) -> None:
    # A llama.cpp for GPUs cannot be used after a fork.
    if library.llama_supports_gpu_offload():
        code, said = _load_in_new_process(path, vocab_only)
    else:
        code, said = _load_in_fork(path, library, vocab_only)
    if code == 0:
        return
    reason = next((line for line in said.splitlines() if "ASSERT" in line or "what()" in line), "").strip()
    why = f" ({reason.rpartition('/')[2][:200]})" if reason else ""
    how = "does not end" if code == -signal.SIGALRM else "ends the process"
    raise InputError(f"{path}: llama.cpp {how} as it reads it{why}; make the file again", code="unreadable-gguf")


def _load_in_fork(path: Path, library: Any, vocab_only: bool) -> tuple[int, str]:
    """Load the file in a copy of this process, which takes milliseconds; return its exit code and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(LONGEST_SECONDS))
            faulthandler.disable()
            disable_core_dumps()
            os.dup2(writing, 2)
            os.dup2(writing, 1)
            os.environ["GGML_NO_BACKTRACE"] = "1"
            params = library.llama_model_default_params()
            params.vocab_only, params.use_extra_bufts, params.n_gpu_layers = vocab_only, False, 0
            library.llama_model_load_from_file(str(path).encode(), params)
        finally:
            os._exit(0)
    os.close(writing)
    said, end = bytearray(), time.monotonic() + LONGEST_SECONDS + 5
    with os.fdopen(reading, "rb", buffering=0) as output, selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0 and selector.select(left):
            if not (part := output.read(_KEPT_BYTES)):
                break
            said += part[: _KEPT_BYTES - len(said)]
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.decode(errors="replace")


def _load_in_new_process(path: Path, vocab_only: bool) -> tuple[int, str]:
    command = [sys.executable, "-c", _SCRIPT, str(path), str(vocab_only)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, timeout=LONGEST_SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return -signal.SIGALRM, ""
    return done.returncode, done.stderr
