"""An exported model measured as a GGUF is: its logits come from its own runtime, all else is the same code.

Prompts are rendered and tokenized by the merged GGUF, whose vocabulary the exported model has; answers are greedy, and
likelihoods and KL divergence are computed here. Rows are decoded one after another.
"""

import json
import logging
import os
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from lathe.common import paths
from lathe.common.code_closure import SOURCE
from lathe.common.errors import InputError
from lathe.common.jsonl import iterate_jsonl, write_jsonl
from lathe.common.operating_system import start_command
from lathe.config.engine_marks import MARK
from lathe.export.environments import choose_environment, read_last_line
from lathe.gguf.llama_library import FloatRows
from lathe.inference.generate import Generator
from lathe.inference.kv_cache import N_BATCH, KVCache
from lathe.inference.shared_prefix import MAX_LOGITS

logger = logging.getLogger(__name__)

PROGRAM = "lathe.export.runtime_process"
SECONDS_TO_END = 10.0
FLOAT_BYTES = 4


class RuntimeProcess:
    """The process that holds an exported model; a context manager. `log` gets what its libraries print.

    Raises InputError with the last line of the log if it ends, and if it answers what cannot be read.
    """

    def __init__(self, name: str, python: Path, folder: Path, *, n_ctx: int, log: Path) -> None:
        self.name, self.log, self._folder = name, log, folder.absolute()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._written = log.open("wb")
        self._process = start_command(
            [str(python), "-m", PROGRAM, name, str(self._folder), str(n_ctx)],
            env={**choose_environment(os.environ), "PYTHONPATH": str(SOURCE)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._written,
            cwd=log.parent,
        )
        self._questions, self._answers = _get_pipe(self._process.stdin), _get_pipe(self._process.stdout)
        try:
            self.can_forget_a_part = bool(json.loads(self._read_line())["can_forget_a_part"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        for pipe in (self._questions, self._answers):
            with suppress(BrokenPipeError):  # what it was to read is of no use to anybody now
                pipe.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._written.close()

    def read(self, keep: int, tokens: Sequence[int], outputs: int) -> FloatRows:
        """Let the model keep the first tokens, and read others; return logits after the last, (outputs, n_vocab)."""
        self._ask({"keep": keep, "tokens": list(tokens), "outputs": outputs})
        rows, columns = json.loads(self._read_line())
        content = self._answers.read(rows * columns * FLOAT_BYTES)
        if len(content) < rows * columns * FLOAT_BYTES:
            raise self._describe_end()
        return np.frombuffer(content, np.float32).reshape(rows, columns)

    def tokenize(self, text: str) -> list[int] | str:
        """Return the token ids that the runtime's own tokenizer has of a text, or why it has none."""
        self._ask({"text": text})
        found: list[int] | str = json.loads(self._read_line())
        # Without the path, which is of this machine alone.
        return found.replace(f"{self._folder}/", "") if isinstance(found, str) else found

    def _ask(self, question: dict[str, Any]) -> None:
        try:
            self._questions.write(json.dumps(question).encode() + b"\n")
            self._questions.flush()
        except BrokenPipeError:
            raise self._describe_end() from None

    def _read_line(self) -> bytes:
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            raise self._describe_end()
        return line

    def _describe_end(self) -> InputError:
        code = self._process.wait()
        return InputError(
            f"the runtime of {self.name} has ended with exit code {code}: {read_last_line(self.log)}; see {self.log}, "
            f"and run again: finished rows are kept; or take {self.name} off export.formats",
            code="runtime-fails",
        )


class ExportedGenerator(Generator):
    """A generator of an exported model: that of the merged GGUF, with logits of the exported model's runtime.

    It is closed with the merged one. Rows are decoded one at a time.
    """

    def __init__(self, merged: Generator, process: RuntimeProcess) -> None:
        # The file's own, opened once: vocabulary, template and context.
        vars(self).update(vars(merged))
        self.n_parallel = 1
        self.process = process

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the model to the merged GGUF's generator."""

    def make_cache(self, *, slots: int, length: int, min_rows: int) -> KVCache:
        """Return the one sequence that the runtime holds."""
        assert slots == 1
        return RuntimeCache(self.process, self.model.n_vocab, max_outputs=MAX_LOGITS // self.model.n_vocab)


class RuntimeCache(KVCache):
    """The keys and values of one sequence in a runtime's process, with the methods of llama.cpp's cache.

    Pieces are those of llama.cpp's: both models give the logits of the same tokens at a time.
    """

    def __init__(self, process: RuntimeProcess, n_vocab: int, *, max_outputs: int) -> None:
        self._process, self._n_vocab = process, n_vocab
        self._lengths, self._min_rows = [0], 1
        self._max_outputs = min(max(2, max_outputs), N_BATCH)

    def close(self) -> None:
        """Leave the process as it is: the next cache begins with nothing kept."""

    @property
    def can_forget_a_part(self) -> bool:
        """Whether the end of the sequence can be cut off."""
        return self._process.can_forget_a_part

    def feed(self, slot: int, tokens: Sequence[int], *, first_output: int) -> FloatRows:
        """Read the rest of a sequence, as much of it as one call takes; see `KVCache`."""
        begin = self._lengths[slot]
        end = min(len(tokens), begin + N_BATCH, max(begin, first_output) + self._max_outputs)
        return self._read(slot, tokens[begin:end], outputs=max(0, end - max(begin, first_output)))

    def step(self, tokens: Sequence[int]) -> FloatRows:
        """Read one more token; return the logits after it."""
        return self._read(0, tokens, outputs=1)

    def cut(self, slot: int, length: int) -> None:
        """Keep at most the first `length` tokens, or none if the model cannot forget a part."""
        if length < self._lengths[slot]:
            self._lengths[slot] = length if self.can_forget_a_part else 0

    def _read(self, slot: int, tokens: Sequence[int], *, outputs: int) -> FloatRows:
        logits = self._process.read(self._lengths[slot], tokens, outputs)
        if logits.shape[1] != self._n_vocab:
            raise InputError(
                f"the runtime of {self._process.name} gives logits of {logits.shape[1]} tokens, and the vocabulary of "
                f"the merged GGUF has {self._n_vocab}; they cannot be compared: take it off export.formats",
                code="other-vocabulary",
            )
        self._lengths[slot] += len(tokens)
        return logits


def _get_pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def mark_answers(file: Path, engine: str) -> None:
    """Write the engine into each answered row of a file of answers; a document is not answered."""
    with paths.replace_file(file) as partial:
        write_jsonl(
            (row if row["finish_reason"] is None else {**row, MARK: engine} for row in iterate_jsonl(file)), partial
        )


def compare_token_ids(generator: ExportedGenerator, texts: Iterable[str]) -> dict[str, Any]:
    """Compare the token ids of texts by the runtime's own tokenizer with llama.cpp's, which all is measured with.

    Returns how many texts were compared, how many are read otherwise, and the reason if none could be. What differs is
    logged: a user of the runtime would give the model other tokens than in training.
    """
    compared = differing = 0
    example = None
    name, bos = generator.process.name, generator.model.bos
    for text in texts:
        found, wanted = generator.process.tokenize(text), generator.tokenize(text)
        if isinstance(found, str):
            logger.warning(
                "%s: its runtime cannot tokenize with the files in models/exported/%s (%s)", name, name, found
            )
            return {"rows": 0, "differing": 0, "reason": found}
        compared += 1
        if wanted[:1] == [bos] != found[:1]:
            wanted = wanted[1:]  # which the vocabulary asks for, and whoever calls the runtime adds
        if found != wanted:
            differing += 1
            example = example or text
    if example is not None:
        logger.warning(
            "%s: its runtime's own tokenizer reads %d of %d held-out rows as other tokens than in training; give it "
            "token ids, or tokenize with transformers; one of them: %.200r",
            name, differing, compared, example,
        )  # fmt: skip
    return {"rows": compared, "differing": differing}
