"""Engines: what lets an artifact answer the held-out prompts, and the mark that its answers have of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lathe.config.artifacts import BASE, FEW_SHOT, UNQUANTIZED

if TYPE_CHECKING:
    from lathe.config.generation_params import Generate, ServedArtifact

LLAMA_CPP, SERVER, VLLM = "llama.cpp", "server", "vllm"

# Key of a row of data/generated, and of an artifact's scores; answers without it are llama.cpp's, of this machine.
MARK = "engine"
SEVERAL = " and "  # between the engines of one artifact

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


def read_mark(content: Mapping[str, Any]) -> str:
    """Return the engine that a row of answers, or an artifact's scores, are marked with."""
    return str(content.get(MARK, LLAMA_CPP))


def find_engine_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the engine of an artifact's answers; of several, all their names. Documents are not answered."""
    return SEVERAL.join(dict.fromkeys(read_mark(row) for row in rows if row.get("finish_reason", "stop"))) or LLAMA_CPP


def describe_engines(report: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return which engine answered for which artifact of a report; None if llama.cpp did for all, in process."""
    by_engine: dict[str, list[str]] = {}
    for artifact, scores in report.items():
        by_engine.setdefault(read_mark(scores), []).append(artifact)
    if set(by_engine) <= {LLAMA_CPP}:
        return None
    return "; ".join(f"{engine} for {', '.join(names)}" for engine, names in by_engine.items())
