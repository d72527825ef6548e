"""A double of vLLM for the tests, where no GPU is: the part of its API that Lathe uses, over transformers.

`tests/stage/test_generate_vllm.py` puts this file as the package `vllm` into an environment. The variable VLLM_DOUBLE
makes it misbehave.
"""

import os
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SamplingParams:
    """As vLLM's, with the keys that are used."""

    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    detokenize: bool


@dataclass
class CompletionOutput:
    """As vLLM's."""

    token_ids: list[int]
    finish_reason: str | None


@dataclass
class RequestOutput:
    """As vLLM's."""

    outputs: list[CompletionOutput] = field(default_factory=list)


class LLM:
    """Decodes the token ids of one prompt after another, greedily."""

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int,
        seed: int,
        trust_remote_code: bool,
        generation_config: str,
        enforce_eager: bool = False,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        assert not trust_remote_code
        assert generation_config == "vllm"
        assert seed == 0
        assert enforce_eager
        assert not [name for name in os.environ if name.endswith("_API_KEY")]
        if os.environ.get("VLLM_DOUBLE") == "broken":
            raise RuntimeError("CUDA out of memory: \x1b[31mtried to allocate 9 GiB")
        print("INFO loading weights")
        torch.set_num_threads(1)
        self.max_model_len = max_model_len
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        """Answer prompts given as token ids."""
        assert not use_tqdm
        return [
            self._answer(prompt["prompt_token_ids"], params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        import torch

        assert params.temperature == 0
        assert not params.detokenize
        assert len(prompt) + params.max_tokens <= self.max_model_len
        if os.environ.get("VLLM_DOUBLE") == "garbage":
            return RequestOutput([CompletionOutput([10**9], "stop")])
        answer: list[int] = []
        with torch.inference_mode():
            while len(answer) < params.max_tokens:
                logits = self.model(torch.tensor([prompt + answer])).logits[0, -1]
                answer.append(int(logits.argmax()))
                if answer[-1] in params.stop_token_ids:
                    return RequestOutput([CompletionOutput(answer, "stop")])
        return RequestOutput([CompletionOutput(answer, "length")])
