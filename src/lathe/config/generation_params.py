"""Parameters of generation: how every artifact answers, what answers for it, and how answers are drawn."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lathe.config.base import (
    Auto,
    Name,
    NonNegative,
    OptionName,
    OptionValue,
    Positive,
    PositiveFloat,
    Section,
    check_plain_address,
    entry,
)


class ServedArtifact(Section):
    """A server that answers for an artifact, with generate.engine: server."""

    artifact: Name = entry(
        "what it serves: base, merged, or a type of quantize.types; base_few_shot is answered by base's"
    )
    url: Name = entry("its address, with the path before /completions, such as http://127.0.0.1:8001/v1")
    model: Name = entry("the name of the model there")

    @field_validator("url")
    @classmethod
    def _check_address(cls, value: str) -> str:
        return check_plain_address(value)


# Options of vllm.LLM that are no choice of the user's: Lathe sets them, or they would run code of the model's.
VLLM_OPTIONS_SET = {
    "generation_config",
    "max_model_len",
    "model",
    "seed",
    "skip_tokenizer_init",
    "tokenizer",
    "trust_remote_code",
}


class Generate(Section):
    """Generation: greedy answers of every artifact to the held-out prompts."""

    max_new_tokens: Positive | Auto = entry(
        "longest answer; auto: a quarter more than the longest held-out reference", "tokens"
    )
    n_ctx: Annotated[int, Field(ge=16)] | Auto = entry(
        "context size: prompt and answer of a row together; auto: as much as the held-out rows need", "tokens"
    )
    n_parallel: Positive | Auto = entry(
        "rows decoded in one batch; auto: 32, or as many as fit into a quarter of the memory", "rows"
    )
    n_gpu_layers: NonNegative | Auto = entry(
        "layers that a llama.cpp built for a GPU computes there; auto: all; without one it has no effect", "layers"
    )
    max_rows: Positive | None = entry("generate for only the first rows of each split; null: for all of them", "rows")
    few_shot: Positive = entry("training examples in the base model's few-shot prompt, as a baseline", "rows")
    engine: Literal["llama.cpp", "server", "vllm"] = entry(
        "what answers: llama.cpp, in process; server: the servers below; vllm: vLLM, for base and merged"
    )
    servers: list[ServedArtifact] = entry("servers of OpenAI's protocol, for the engine server; []: none")
    concurrency: Positive = entry("requests to a server in flight at a time", "requests")
    timeout_seconds: PositiveFloat = entry("longest wait for a server's answer", "seconds")
    max_retries: Annotated[int, Field(ge=0)] = entry(
        "further attempts at a failed request to a server, after increasing pauses", "attempts"
    )
    vllm_python: Name = entry("Python of the environment that vLLM is installed in, for the engine vllm")
    vllm_options: dict[OptionName, OptionValue] = entry(
        "options of vLLM's class LLM, such as `tensor_parallel_size: 2`; {}: none"
    )

    @field_validator("vllm_options")
    @classmethod
    def _check_options(cls, options: dict[str, OptionValue]) -> dict[str, OptionValue]:
        if chosen := sorted(VLLM_OPTIONS_SET & set(options)):
            raise ValueError(f"has {', '.join(chosen)}, which Lathe sets itself; remove it")
        return options

    @field_validator("servers")
    @classmethod
    def _check_servers(cls, servers: list[ServedArtifact]) -> list[ServedArtifact]:
        names = [entry.artifact for entry in servers]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"lists {', '.join(repeated)} twice; name each artifact once")
        return servers


class Sampling(Section):
    """Sampling: several drawn answers to each held-out row, beside the greedy one, for the files that are listed."""

    files: list[Name] = entry("files in models/gguf that are sampled, such as [merged-f16, Q4_K_M]; []: none")
    samples: Annotated[int, Field(ge=2)] = entry("answers to each row", "answers")
    temperature: PositiveFloat = entry("divides the logits: above 1 rarer tokens are drawn more often")
    top_p: Annotated[float, Field(gt=0, le=1)] = entry(
        "draw from the likeliest tokens that together have this probability"
    )
