"""Answers by vLLM, which runs in an environment of its own: it pins another torch than Lathe does.

A script that imports nothing of Lathe is given token ids and gives token ids back, in files of a folder.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.code_closure import module_file
from lathe.common.errors import InputError
from lathe.common.operating_system import start_command
from lathe.common.progress import Progress
from lathe.common.scratch import temporary_folder
from lathe.config import engines
from lathe.inference.answer_engines import AnswerKeeper, iterate_asked, list_end_tokens, read_tokens
from lathe.inference.generate import Completion, Generator

if TYPE_CHECKING:
    from lathe.config.params import Generate

SCRIPT = module_file("lathe.inference.vllm_script")
POLL_SECONDS = 0.2
SECONDS_TO_END = 10.0
MOST_SHOWN = 300  # characters of vLLM's last line

# What vLLM needs of the environment: no key of a provider or remote.
PASSED_ON = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CC", "CXX")
PASSED_ON_PREFIXES = ("LC_", "XDG_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "NCCL_", "VLLM_", "TORCH", "TRITON_", "OMP_")


class VllmEngine:
    """vLLM on the 16-bit weights of an artifact. Raises InputError if it is not installed, or without the weights."""

    name = engines.VLLM
    mark = engines.VLLM

    def __init__(
        self, artifact: str, weights: Path, settings: "Generate", scratch: Path, environment: Mapping[str, str]
    ) -> None:
        self.artifact, self.weights, self.options, self.scratch = artifact, weights, settings.vllm_options, scratch
        self.python = find_python(settings)
        self.version = read_version(self.python)
        self.tokens, self.seconds = 0, 0.0
        self._environment = _choose_environment(environment)
        if not (weights / "config.json").is_file():
            raise InputError(
                f"{weights}: holds no model, and generate.engine vllm answers with the weights there; `dvc pull "
                f"{weights.name}` or `dvc repro` brings them",
                code="no-weights",
            )

    def describe(self) -> dict[str, Any]:
        """Return what is known of vLLM here."""
        return {"name": self.mark, "version": self.version, "options": self.options}

    def answer(
        self,
        generator: Generator,
        prompts: Callable[[], Iterable[tuple[int, str]]],
        *,
        max_new_tokens: int,
        finished: Container[int],
        keep: AnswerKeeper,
    ) -> None:
        """Answer the prompts, as many at a time as vLLM chooses; see `AnswerEngine`."""
        began = time.perf_counter()
        numbers = [number for number, _ in prompts()]
        waiting = {number for number in numbers if number not in finished}
        if not waiting:
            return
        with (
            temporary_folder(self.scratch, "vllm") as folder,
            Progress("answers of vLLM", len(numbers), done=len(numbers) - len(waiting)) as progress,
        ):
            rows = iterate_asked(generator, prompts(), max_new_tokens=max_new_tokens, finished=finished)
            with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps([row.number, row.tokens, row.max_tokens]) + "\n" for row in rows)
            request = {
                "model": str(self.weights.absolute()),
                "max_model_len": generator.n_ctx,
                "stop_token_ids": list_end_tokens(generator),
                "options": self.options,
            }
            (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
            for number, completion in self._run(folder, generator):
                waiting.discard(number)
                self.tokens += completion.tokens
                keep(number, completion)
                progress.add()
        self.seconds += time.perf_counter() - began
        if waiting:
            raise InputError(
                f"{self.python}: vLLM has ended without an answer to row {min(waiting)} and {len(waiting) - 1} others; "
                f"see {self._log}, and run again: finished answers are kept",
                code="vllm-fails",
            )

    @property
    def _log(self) -> Path:
        return self.scratch / f"{self.artifact}.log"

    def _run(self, folder: Path, generator: Generator) -> Iterator[tuple[int, Completion]]:
        """Run the script, and yield the answers as it writes them. Raises InputError if it fails."""
        answers = folder / "answers.jsonl"
        answers.touch()
        with self._log.open("wb") as log, answers.open("rb") as written:
            process = start_command(
                [str(self.python), str(SCRIPT), str(folder)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )
            try:
                left, is_running = b"", True
                while is_running:
                    is_running = process.poll() is None  # what it wrote before it ended is read after this
                    *lines, left = (left + written.read()).split(b"\n")
                    for line in lines:
                        yield self._read_answer(line, generator)
                    if is_running and not lines:
                        time.sleep(POLL_SECONDS)
            finally:
                _end(process)
        if process.returncode:
            raise InputError(
                f"{self.python}: vLLM has ended with exit code {process.returncode}: {_read_last_line(self._log)}; see "
                f"{self._log}, and run again: finished answers are kept",
                code="vllm-fails",
            )

    def _read_answer(self, line: bytes, generator: Generator) -> tuple[int, Completion]:
        try:
            number, tokens, reason = json.loads(line)
            in_vocabulary = all(0 <= token < generator.model.n_vocab for token in tokens)
        except (ValueError, TypeError):
            in_vocabulary, reason = False, None
        if not in_vocabulary or reason not in ("stop", "length"):
            raise InputError(
                f"{self.python}: vLLM gives an answer that cannot be read ({line[:80]!r}): token ids of the "
                "vocabulary, and stop or length, are expected; install another version of vLLM",
                code="malformed-answer",
            )
        return number, read_tokens(generator, tokens, ended=reason == "stop")


def find_python(settings: "Generate") -> Path:
    """Return the program that `generate.vllm_python` names. Raises InputError if it is not there."""
    python = paths.MAIN / settings.vllm_python  # of a temporary experiment too
    if not python.is_file() or not os.access(python, os.X_OK):
        raise InputError(
            f"generate.vllm_python is {settings.vllm_python}: no program is there; `make vllm` makes it, or name the "
            "Python of an environment with vLLM",
            code="no-vllm",
        )
    return python


def read_version(python: Path) -> str:
    """Return the version of vLLM in an environment; it is not imported. Raises InputError if there is none."""
    program = "from importlib.metadata import version; print(version('vllm'))"
    environment = _choose_environment(os.environ)
    done = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"generate.vllm_python is {python}: vLLM is not installed there; `make vllm`, or name another environment",
            code="no-vllm",
        )
    return done.stdout.strip()


def _choose_environment(environment: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name: value for name, value in environment.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    }
    # It has all that it needs on this disk, and tells nobody that it runs.
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read_last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    shown = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return "".join(character if character.isprintable() else " " for character in shown)[:MOST_SHOWN]
