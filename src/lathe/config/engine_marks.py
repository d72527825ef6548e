"""Engine marks: which engine answered, as rows of answers and scores of artifacts say it."""

from collections.abc import Iterable, Mapping
from typing import Any

LLAMA_CPP = "llama.cpp"  # in this process

# Key of a row of data/generated, and of an artifact's scores; answers without it are llama.cpp's, of this machine.
MARK = "engine"
SEVERAL = " and "  # between the engines of one artifact


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
