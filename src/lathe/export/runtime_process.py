"""An exported model that is asked for logits, in a process of its own: `python -m lathe.export.runtime_process`.

It is run by the Python that has the runtime, and imports nothing of Lathe.

    runtime_process FORMAT FOLDER N_CTX

A line of standard input is a question: `{"keep": n, "tokens": [...], "outputs": k}`. The model keeps the first n of the
tokens that it has read, reads these after them, and answers with a line `[k, n_vocab]` and the logits after the last k
of them, as 32-bit floats in the machine's order. `{"text": ...}` is answered with a line of the token ids that the
runtime's own tokenizer has of a text, or of the reason why it has none. Before the first question it says in a line
whether it can forget the last tokens alone. What libraries print goes to standard error.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class Runtime(Protocol):
    """A model with the keys and values of the tokens that it has read."""

    can_forget_a_part: bool

    def read(self, keep: int, tokens: Sequence[int], outputs: int) -> Logits:
        """Keep so many tokens, read others after them; return the logits after the last ones, (outputs, n_vocab)."""

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text whose special tokens are written out, by the tokenizer that users have."""


class OnnxRuntime:
    """ONNX Runtime, by onnxruntime-genai."""

    can_forget_a_part = True

    def __init__(self, folder: str, n_ctx: int) -> None:
        import onnxruntime_genai

        self.tokenizer: Any = None
        self.model = onnxruntime_genai.Model(folder)
        self.params = onnxruntime_genai.GeneratorParams(self.model)
        self.params.set_search_options(do_sample=False, max_length=n_ctx, min_length=0, batch_size=1)
        self.generator = onnxruntime_genai.Generator(self.model, self.params)

    def read(self, keep: int, tokens: Sequence[int], outputs: int) -> Logits:
        """See `Runtime`."""
        if keep < self.generator.token_count():
            self.generator.rewind_to(keep)
        self.generator.append_tokens(np.array([tokens], np.int32))
        logits = self.generator.get_output("logits")[0]
        return np.asarray(logits[len(logits) - outputs :], np.float32)

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime`."""
        if self.tokenizer is None:
            import onnxruntime_genai

            self.tokenizer = onnxruntime_genai.Tokenizer(self.model)
        return [int(token) for token in self.tokenizer.encode(text)]


class _TransformersTokenizer:
    """The tokenizer of a folder as transformers loads it, in the version that the runtime has."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._loaded: Any = None

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime`."""
        if self._loaded is None:
            from transformers import AutoTokenizer

            self._loaded = AutoTokenizer.from_pretrained(self._folder)
        return list(self._loaded.encode(text, add_special_tokens=False))


class MlxRuntime(_TransformersTokenizer):
    """MLX, by mlx-lm."""

    def __init__(self, folder: str, n_ctx: int) -> None:
        super().__init__(folder)
        from pathlib import Path

        import mlx.core as mx
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache
        from mlx_lm.utils import load_model

        self.model, config = load_model(Path(folder))
        if "quantization" in config and not mx.metal.is_available():
            self.model.set_dtype(mx.float32)  # in 16 bits MLX multiplies such weights ten times slower on a CPU
        self.make_cache = make_prompt_cache
        self.cache = make_prompt_cache(self.model)
        self.can_forget_a_part = can_trim_prompt_cache(self.cache)
        self.length = 0

    def read(self, keep: int, tokens: Sequence[int], outputs: int) -> Logits:
        """See `Runtime`."""
        import mlx.core as mx
        from mlx_lm.models.cache import trim_prompt_cache

        if keep == 0:
            self.cache = self.make_cache(self.model)
        elif keep < self.length:
            trim_prompt_cache(self.cache, self.length - keep)
        logits = self.model(mx.array([list(tokens)]), cache=self.cache)[0, len(tokens) - outputs :]
        self.length = keep + len(tokens)
        mx.eval(logits, [each.state for each in self.cache])
        return np.array(logits.astype(mx.float32), dtype=np.float32)


class TransformersRuntime(_TransformersTokenizer):
    """Compressed tensors as transformers reads them: on a GPU where torch sees one."""

    can_forget_a_part = True

    def __init__(self, folder: str, n_ctx: int) -> None:
        super().__init__(folder)
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
        for module in self.model.modules():
            if hasattr(module, "quantization_status"):
                from compressed_tensors.quantization import QuantizationStatus

                # The weights have been read as they were rounded; only what they are multiplied with is rounded anew.
                module.quantization_status = QuantizationStatus.COMPRESSED
        self.new_cache = DynamicCache
        self.cache: Any = DynamicCache()

    def read(self, keep: int, tokens: Sequence[int], outputs: int) -> Logits:
        """See `Runtime`."""
        import torch

        if keep == 0:
            self.cache = self.new_cache()
        elif keep < self.cache.get_seq_length():
            self.cache.crop(keep - self.cache.get_seq_length())
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)], device=self.model.device)
            made = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=max(1, outputs))
        logits = made.logits[0].float().cpu().numpy()
        return logits[len(logits) - outputs :]


def open_runtime(name: str, folder: str, n_ctx: int) -> Runtime:
    """Load an exported model."""
    if name.startswith("onnx"):
        return OnnxRuntime(folder, n_ctx)
    return MlxRuntime(folder, n_ctx) if name.startswith("mlx") else TransformersRuntime(folder, n_ctx)


def _tokenize(runtime: Runtime, text: str) -> list[int] | str:
    try:
        return runtime.tokenize(text)
    except Exception as error:  # whatever a tokenizer that does not know this kind raises
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def main(name: str, folder: str, n_ctx: str) -> None:
    """Answer questions until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    runtime = open_runtime(name, folder, int(n_ctx))
    answers.write(json.dumps({"can_forget_a_part": bool(runtime.can_forget_a_part)}).encode() + b"\n")
    answers.flush()
    for line in sys.stdin:
        question = json.loads(line)
        if "text" in question:
            answers.write(json.dumps(_tokenize(runtime, question["text"])).encode() + b"\n")
            answers.flush()
            continue
        logits = np.ascontiguousarray(runtime.read(question["keep"], question["tokens"], question["outputs"]))
        answers.write(json.dumps(logits.shape).encode() + b"\n")
        answers.write(logits.tobytes())
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
