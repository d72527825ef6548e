"""llama-server of llama.cpp as a child of this process: started, watched, and started again when it dies.

It listens on a socket in a folder that only this user can enter, asks for a key that only this process knows, and is
killed when this process ends, however that ends.
"""

import logging
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from lathe.common.errors import InputError
from lathe.common.operating_system import get_total_memory_bytes, start_command
from lathe.config.base import Auto
from lathe.gguf.build_llama_server import find_libraries
from lathe.gguf.header import read_metadata

logger = logging.getLogger(__name__)

MOST_ROWS, LEAST_ROWS, MEMORY_SHARE = 32, 4, 4  # at once; their cache takes at most this part of the memory
SECONDS_TO_END = 5.0
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 30.0  # before it is started again; twice as long each time
GOOD_SECONDS = 60.0  # of life after which a death is the first again
POLL_SECONDS = 0.1
# What the child needs of the environment: no key, and no LLAMA_ARG_… of another server's.
PASSED_ON = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
PASSED_ON_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "GGML_", "GOMP_", "OMP_", "KMP_")

Metadata = Mapping[str, Any]


class LlamaServer:
    """A running llama-server; a context manager. `socket` and `key` are how to reach the present process.

    `parallel` requests are answered at once (auto: 32, or as many as fit into a quarter of the memory), each with its
    answer in `n_ctx` tokens; up to `connections` wait. Raises InputError on entry if it does not come up.
    """

    def __init__(
        self,
        program: Path,
        gguf: Path,
        *,
        n_ctx: int,
        parallel: int | Auto,
        threads: int,
        connections: int,
        on_gpu: bool = False,
        options: tuple[str, ...] = (),
    ) -> None:
        self.program, self.gguf, self.key = program, gguf, secrets.token_urlsafe(32)
        self.parallel = choose_rows(read_metadata(gguf), n_ctx) if parallel == "auto" else parallel
        self._command = [str(program), *build_options(gguf, n_ctx, self.parallel, threads, connections, on_gpu=on_gpu)]
        self._command += options
        self._folder = tempfile.TemporaryDirectory(prefix="lathe-serve-")
        self._process: subprocess.Popen[bytes] | None = None
        self._starts, self._last_words = 0, ""
        self._closing, self._failed = Event(), Event()
        self._watcher = Thread(target=self._watch, name="llama-server", daemon=True)

    def __enter__(self) -> Self:
        self._watcher.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def socket(self) -> Path:
        """The socket of the process that was started last."""
        return Path(self._folder.name) / f"{self._starts}.sock"

    @property
    def pid(self) -> int | None:
        """The number of the process that was started last."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End the process, and do not start it again."""
        self._closing.set()
        self._end_process()
        self._watcher.join(SECONDS_TO_END)
        self._folder.cleanup()

    def _end_process(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()

    def _watch(self) -> None:
        """Start the process, and start it again when it ends; the thread that starts it must outlive it."""
        pause = SHORTEST_PAUSE_SECONDS
        while not self._closing.is_set():
            began = time.monotonic()
            code = self._run_once()
            if self._closing.is_set():
                return
            pause = SHORTEST_PAUSE_SECONDS if time.monotonic() - began > GOOD_SECONDS else pause
            self._failed.set()
            logger.warning(
                "%s has ended (%s)%s; it is started again", self.program.name, describe_exit(code), self._last_words
            )
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _run_once(self) -> int:
        self.socket.unlink(missing_ok=True)
        self._starts += 1
        try:
            process = start_command(
                [*self._command, "--host", str(self.socket)],
                env=build_environment(os.environ, self.key),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=self._folder.name,
            )
        except OSError as error:
            self._last_words = f": {error.strerror}"
            return 127
        self._process = process
        if self._closing.is_set():
            process.kill()
        assert process.stderr
        for line in process.stderr:
            if text := line.decode("utf-8", "replace").strip():
                logger.debug("%s: %s", self.program.name, text)
                if " E " in f" {text} " or "error" in text.lower():
                    self._last_words = f": {text[-200:]}"
        return process.wait()

    def _wait_until_ready(self) -> None:
        import httpx2

        while not self._failed.wait(POLL_SECONDS):
            if not self.socket.exists():
                continue
            with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(self.socket)), timeout=5) as client:
                try:
                    if client.get("http://engine/health").status_code == 200:
                        return
                except httpx2.HTTPError:
                    continue
        raise InputError(
            f"{self.gguf}: {self.program} does not serve it{self._last_words}; "
            "serve it with --engine llama-cpp-python, or build llama-server again",
            code="llama-server-fails",
        )


def build_options(
    gguf: Path, n_ctx: int, parallel: int, threads: int, connections: int, *, on_gpu: bool = False
) -> list[str]:
    """Return the command line of llama-server, without the address: what it may do, how much it may keep, defaults."""
    return [
        *("--model", str(gguf.absolute()), "--alias", gguf.stem.replace(",", " "), "--offline"),
        *("--ctx-size", str(n_ctx * parallel), "--parallel", str(parallel), "--no-kv-unified"),
        *("--threads", str(threads), "--threads-batch", str(threads), "--threads-http", str(connections + 4)),
        # On a CPU llama.cpp's FlashAttention takes queries one by one; the layers go to the GPU where there is one.
        *("--flash-attn", "auto" if on_gpu else "off", "--fit", "off"),
        # Prompts of earlier requests are kept in their slots alone, not beside them, up to 8 GiB.
        *("--cache-ram", "0", "--ctx-checkpoints", "0", "--no-context-shift"),
        *("--no-ui", "--no-slots", "--log-verbosity", "2"),
        # As the model was measured: the template of the file, no thought taken out of an answer, greedy, no penalty.
        *("--jinja", "--reasoning-format", "none", "--no-prefill-assistant"),
        *("--temp", "0", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.05", "--typical-p", "1"),
        *("--repeat-penalty", "1", "--presence-penalty", "0", "--frequency-penalty", "0"),
    ]


def build_environment(environment: Mapping[str, str], key: str) -> dict[str, str]:
    """Return what llama-server is given of the environment, with its key, and the libraries that it is linked with."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in PASSED_ON or any(name.startswith(prefix) for prefix in PASSED_ON_PREFIXES)
    }
    places = [str(find_libraries()), *filter(None, [kept.get("LD_LIBRARY_PATH")])]
    return {"GOMP_SPINCOUNT": "100", **kept, "LD_LIBRARY_PATH": os.pathsep.join(places), "LLAMA_API_KEY": key}


def choose_rows(metadata: Metadata, n_ctx: int) -> int:
    """Return how many requests of `n_ctx` tokens to answer at once: 32, or as many as fit into a quarter of memory."""
    budget = get_total_memory_bytes() // MEMORY_SHARE
    return max(LEAST_ROWS, min(MOST_ROWS, budget // (n_ctx * count_bytes_per_token(metadata))))


def count_bytes_per_token(metadata: Metadata) -> int:
    """Return the size of a token's keys and values in a cache of 16-bit floats, if all layers attend to all tokens."""
    kind = metadata.get("general.architecture", "")
    heads = metadata.get(f"{kind}.attention.head_count") or 1  # an array, one number a layer, is not read
    width = int(metadata.get(f"{kind}.embedding_length", 4096)) // heads
    width = metadata.get(f"{kind}.attention.key_length", width)
    kept = metadata.get(f"{kind}.attention.head_count_kv") or heads
    return max(1, 2 * 2 * int(metadata.get(f"{kind}.block_count", 32)) * int(kept) * int(width))


def describe_exit(code: int) -> str:
    """Say how a process ended."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
