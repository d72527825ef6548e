"""A GGUF model opened with llama.cpp: metadata, chat template, vocabulary and tokenizer."""

import ctypes
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lathe.common.errors import InputError
from lathe.common.trial_load import try_to_load
from lathe.gguf.llama_library import collect_llama_log, load_library
from lathe.models.chat_template import ChatTemplate


class LlamaModel:
    """A GGUF file opened with llama.cpp; a context manager.

    Without weights (`vocab_only`) it takes milliseconds; a llama.cpp for GPUs puts `n_gpu_layers` there, None: all.
    Raises InputError if there is no such file or llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False, n_gpu_layers: int | None = None) -> None:
        if not path.is_file():
            raise InputError(
                f"{path}: no such GGUF file; the path must name one that the pipeline or you have made",
                code="missing-file",
            )
        self.path = path
        self._library = load_library()
        params = self._library.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = params.n_gpu_layers if n_gpu_layers is None else n_gpu_layers
        # Repacked weights are multiplied by other kernels for one row than for four: results would depend on batches.
        params.use_extra_bufts = False
        try_to_load(path, self._library, vocab_only=vocab_only)
        with collect_llama_log() as log:
            self.handle = self._library.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise InputError(
                f"{path}: llama.cpp cannot load it ({log.reason}); make the file again", code="unreadable-gguf"
            )
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

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template of the file with its special tokens. Raises InputError if there is none."""
        text = self.metadata.get("tokenizer.chat_template")
        if not text:
            raise InputError(
                f"{self.path}: the GGUF holds no chat template; convert a model whose tokenizer has one",
                code="no-chat-template",
            )
        return ChatTemplate(text, self.get_token_text(self.bos), self.get_token_text(self.eos), self.adds_bos)

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
        """Whether the vocabulary asks for its BOS before every text."""
        return self._library.llama_vocab_get_add_bos(self.vocab)

    def is_end(self, token: int) -> bool:
        """Return whether a token ends a generation."""
        return self._library.llama_vocab_is_eog(self.vocab, token)

    def get_token_text(self, token: int | None) -> str:
        """Return a token as the vocabulary writes it, `<|im_end|>`; empty for None."""
        return "" if token is None else self._library.llama_vocab_get_text(self.vocab, token).decode()

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the token ids of `text`; special tokens written in it are recognised.

        With `add_special`, the tokens that the vocabulary asks for before and after every text (BOS, EOS) are added.
        """
        raw = text.encode()
        room = len(raw) + 2
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(self.vocab, raw, len(raw), ids, room, add_special, True)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def tokenize_prompt(self, prompt: str) -> list[int]:
        """Return the token ids of a rendered prompt, with exactly one BOS if the vocabulary asks for one.

        A template that writes the BOS itself and a vocabulary that adds it do not make two.
        """
        ids = self.tokenize(prompt)
        if self.adds_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def get_token_bytes(self, token: int) -> bytes:
        """Return the bytes of a generated token, possibly part of a character; empty for control tokens."""
        size = -64
        while size < 0:  # the room that it needs
            buffer = ctypes.create_string_buffer(-size)
            size = self._library.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:size]

    def _id(self, token: int) -> int | None:
        return None if token == self._library.LLAMA_TOKEN_NULL else token

    def _text(self, call: Any, index: int) -> str:
        size = 1 << 16
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = call(self.handle, index, buffer, size)
            if needed < size:
                return buffer.value.decode("utf-8", "replace")
            size = needed + 1
