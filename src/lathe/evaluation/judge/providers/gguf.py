"""A GGUF file on this machine: no network, no key, and a grammar that lets nothing but a verdict be written."""

import asyncio
import logging
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.evaluation.judge.failures import RefusedError
from lathe.evaluation.judge.prompt import Question
from lathe.evaluation.judge.verdict import GRAMMAR_SCHEMA, Answer
from lathe.gguf import llama_library
from lathe.gguf.llama_model import LlamaModel

logger = logging.getLogger(__name__)

_TOKENS_OF_THE_TEMPLATE = 128  # most that a chat template puts around a system and a user message


class Gguf:
    """The model, loaded at once; one question at a time, for which llama.cpp takes all cores."""

    most_at_once: int | None = 1

    def __init__(self, file: Path, questions: Collection[Question], *, max_tokens: int) -> None:
        self.file, self.max_tokens = file, max_tokens
        with LlamaModel(file, vocab_only=True) as model:
            model.chat_template  # noqa: B018 - refuses a file without one, for which llama.cpp would take another
            longest = max(len(model.tokenize(question.system + question.user)) for question in questions)
            # As the file says: without its weights, llama.cpp does not know.
            trained = int(model.metadata[f"{model.metadata['general.architecture']}.context_length"])
            self._n_ctx = min(trained, longest + _TOKENS_OF_THE_TEMPLATE + max_tokens)
        self._stopping = threading.Event()
        # A C function: kept here as long as llama.cpp may call it.
        self._is_stopping = llama_library.load_library().ggml_abort_callback(lambda _: self._stopping.is_set())
        self._model = self._loaded()

    async def ask(self, question: Question) -> Answer:
        """Put one question; where nobody waits for it any more (Ctrl-C, a timeout) llama.cpp stops in the middle."""
        self._stopping.clear()
        answering = asyncio.ensure_future(asyncio.to_thread(self._ask, question))
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            self._stopping.set()
            await asyncio.wait([answering])
            logger.debug("stopped: %s", answering.exception())
            raise

    async def models(self) -> list[str]:
        """Return the one model."""
        return [self.file.name]

    async def close(self) -> None:
        """Free the model."""
        self._model.close()

    def _loaded(self) -> Any:
        library = llama_library.load_library()
        with llama_library.collect_llama_log() as log:
            try:
                model = library.Llama(str(self.file), n_ctx=self._n_ctx, n_gpu_layers=-1, seed=0, verbose=False)
            except ValueError as error:
                raise InputError(
                    f"{self.file}: llama.cpp cannot load it ({log.errors[0] if log.errors else error})"
                ) from None
        library.llama_set_abort_callback(model.ctx, self._is_stopping, None)
        return model

    def _ask(self, question: Question) -> Answer:
        try:
            content = self._model.create_chat_completion(
                messages=question.messages,
                response_format={"type": "json_object", "schema": GRAMMAR_SCHEMA},
                temperature=0.0,
                max_tokens=self.max_tokens,
            )
        except ValueError as error:  # longer than the context
            raise RefusedError(f"{self.file.name}: {error}") from None
        choice, usage = content["choices"][0], content["usage"]
        return Answer(
            choice["message"]["content"],
            model=self.file.name,
            input_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
            cut_off=choice["finish_reason"] == "length",
        )
