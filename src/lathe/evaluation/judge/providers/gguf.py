"""GGUF judge: a file on this machine, without network or key; a grammar allows nothing but a verdict."""

import asyncio
import json
import logging
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.trial_load import try_to_load
from lathe.evaluation.judge.failures import RowRefusedError
from lathe.evaluation.judge.prompt import JudgePrompt
from lathe.evaluation.judge.verdict import GRAMMAR_SCHEMA, JudgeAnswer
from lathe.gguf import llama_library
from lathe.gguf.file_templates import ignore_file_templates
from lathe.gguf.llama_model import LlamaModel

logger = logging.getLogger(__name__)


class Gguf:
    """The loaded model; it answers one prompt at a time, for which llama.cpp uses all cores."""

    max_concurrency: int | None = 1

    def __init__(self, file: Path, prompts: Collection[JudgePrompt], *, max_tokens: int) -> None:
        self.file, self.max_tokens = file, max_tokens
        with LlamaModel(file, vocab_only=True) as model:
            self._template = model.chat_template
            longest = max(len(model.tokenize_prompt(self._render(prompt))) for prompt in prompts)
            # From the metadata: llama.cpp does not know it before the weights are loaded.
            trained = int(model.metadata[f"{model.metadata['general.architecture']}.context_length"])
            self._n_ctx = min(trained, longest + max_tokens + 1)
        self._stopping = threading.Event()
        # A C function, referenced here as long as llama.cpp may call it.
        self._is_stopping = llama_library.load_library().ggml_abort_callback(lambda _: self._stopping.is_set())
        self._model = self._load_model()

    async def request_answer(self, prompt: JudgePrompt) -> JudgeAnswer:
        """Send one prompt once; if it is cancelled (Ctrl-C, a timeout), llama.cpp stops in the middle."""
        self._stopping.clear()
        answering = asyncio.ensure_future(asyncio.to_thread(self._complete, prompt))
        try:
            return await asyncio.shield(answering)
        except asyncio.CancelledError:
            self._stopping.set()
            await asyncio.wait([answering])
            logger.debug("stopped: %s", answering.exception())
            raise

    async def list_models(self) -> list[str]:
        """Return the one model."""
        return [self.file.name]

    async def close(self) -> None:
        """Free the model."""
        self._model.close()

    def _render(self, prompt: JudgePrompt) -> str:
        return self._template.render(prompt.messages, add_generation_prompt=True)

    def _load_model(self) -> Any:
        library = llama_library.load_library()
        ignore_file_templates()
        try_to_load(self.file, library, vocab_only=False)
        with llama_library.collect_llama_log() as log:
            try:
                model = library.Llama(str(self.file), n_ctx=self._n_ctx, n_gpu_layers=-1, seed=0, verbose=False)
                self._grammar = library.LlamaGrammar.from_json_schema(json.dumps(GRAMMAR_SCHEMA), verbose=False)
            except ValueError as error:
                raise InputError(
                    f"{self.file}: llama.cpp cannot load it ({log.errors[0] if log.errors else error}); name another "
                    "file in judge.model",
                    code="invalid-gguf",
                ) from None
        library.llama_set_abort_callback(model.ctx, self._is_stopping, None)
        return model

    def _complete(self, prompt: JudgePrompt) -> JudgeAnswer:
        text, template = self._render(prompt), self._template
        # As in training, there is exactly one BOS.
        add_bos = template.adds_bos and not text.startswith(template.bos_token)
        try:
            content = self._model.create_completion(
                self._model.tokenize(text.encode(), add_bos=add_bos, special=True),
                grammar=self._grammar,
                temperature=0.0,
                max_tokens=self.max_tokens,
            )
        except ValueError as error:  # longer than the context
            raise RowRefusedError(f"{self.file.name}: {error}") from None
        choice, usage = content["choices"][0], content["usage"]
        return JudgeAnswer(
            choice["text"],
            model=self.file.name,
            input_tokens=usage["prompt_tokens"],
            output_tokens=usage["completion_tokens"],
            cut_off=choice["finish_reason"] == "length",
        )
