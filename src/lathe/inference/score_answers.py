"""Likelihood of given token ids under a GGUF: what the model that was trained is compared with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lathe.gguf.llama_model import LlamaModel
from lathe.inference.kv_cache import KVCache
from lathe.models.loss_mask import Encoded
from lathe.models.measured_answers import AnswerLikelihood


def score_answers(file: Path, sequences: Sequence[Encoded], *, threads: int) -> AnswerLikelihood:
    """Return the likelihood of the supervised tokens, each given all before it; no text is tokenized again."""
    longest = max(len(sequence.input_ids) for sequence in sequences)
    nll, tokens = 0.0, 0
    with (
        LlamaModel(file) as model,
        KVCache(model, slots=1, length=longest, max_outputs=longest, threads=threads, min_rows=1) as cache,
    ):
        for sequence in sequences:
            cache.cut(0, 0)
            ids = sequence.input_ids
            expected = [at for at, is_supervised in enumerate(sequence.supervised) if is_supervised and at]
            first, logits = expected[0] - 1, []
            while cache.length(0) < len(ids) - 1:
                logits.append(cache.feed(0, ids[:-1], first_output=first).astype(np.float64))
            rows = np.concatenate(logits)[[at - 1 - first for at in expected]]
            highest = rows.max(axis=1)
            log_sums = np.log(np.exp(rows - highest[:, None]).sum(axis=1)) + highest
            nll += float((log_sums - rows[np.arange(len(rows)), [ids[at] for at in expected]]).sum())
            tokens += len(expected)
    return AnswerLikelihood(nll, tokens, len(sequences))
