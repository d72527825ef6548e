"""Logits of a GGUF model for one text, from llama.cpp."""

from pathlib import Path

import numpy as np

from lathe.common.errors import InputError
from lathe.gguf.llama_library import FloatRows, collect_llama_log, load_library
from lathe.gguf.llama_model import LlamaModel


def compute_logits(path: Path, tokens: list[int]) -> FloatRows:
    """Return the logits after each of the token ids, (len(tokens), n_vocab).

    Raises InputError if llama.cpp cannot load the file, or cannot decode with it.
    """
    library = load_library()
    with LlamaModel(path) as model, collect_llama_log() as log:
        params = library.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
        context = library.llama_init_from_model(model.handle, params)
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index], batch.logits[index] = token, index, True
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            if not context or library.llama_decode(context, batch):
                raise InputError(f"{path}: llama.cpp cannot run it ({log.reason}); make the file again", code="not-run")
            flat = np.ctypeslib.as_array(library.llama_get_logits(context), (len(tokens) * model.n_vocab,))
            return flat.reshape(len(tokens), model.n_vocab).copy()
        finally:
            library.llama_batch_free(batch)
            if context:
                library.llama_free(context)
