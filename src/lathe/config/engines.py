"""Engines: what lets an artifact answer the held-out prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lathe.config.artifacts import BASE, FEW_SHOT, UNQUANTIZED
from lathe.config.engine_marks import LLAMA_CPP

if TYPE_CHECKING:
    from lathe.config.generation_params import Generate, ServedArtifact

SERVER, VLLM = "server", "vllm"

# Of generate: how patiently a server is asked, which decides no answer.
PATIENCE = {"concurrency", "timeout_seconds", "max_retries"}


def find_server(settings: "Generate", artifact: str) -> "ServedArtifact | None":
    """Return what serves an artifact; `base_few_shot` is served as `base` is, if it has no server of its own."""
    served = {entry.artifact: entry for entry in settings.servers}
    return served.get(artifact) or (served.get(BASE) if artifact == FEW_SHOT else None)


def choose_engine(settings: "Generate", artifact: str) -> str:
    """Return the engine that answers for an artifact: vLLM has none but 16-bit weights, a server what it serves."""
    if settings.engine == SERVER and find_server(settings, artifact):
        return SERVER
    if settings.engine == VLLM and artifact in UNQUANTIZED:
        return VLLM
    return LLAMA_CPP


def list_in_process(settings: "Generate", artifacts: Sequence[str]) -> list[str]:
    """Return the artifacts that llama.cpp answers for, in this process."""
    return [name for name in artifacts if choose_engine(settings, name) == LLAMA_CPP]
