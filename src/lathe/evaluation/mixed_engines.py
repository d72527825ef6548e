"""Mixed engines: scores of answers that different engines gave, which are set side by side only if that was asked for.

An engine decides ties and rounds otherwise than another one: the same weights give other answers to some prompts, and a
difference of scores would be of engines as well as of weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lathe.common.errors import InputError
from lathe.config.engine_marks import LLAMA_CPP, MARK, SEVERAL, find_engine_of

IN_A_RUN = (
    "let one engine answer for all of them (generate.engine, generate.servers), or set evaluate.allow_mixed_engines to "
    "true"
)


def check_engines(engine_of: Mapping[str, str], *, allowed: bool, remedy: str = IN_A_RUN) -> str | None:
    """Return a warning if what is compared was not answered by one engine; raises InputError if that is not `allowed`.

    `engine_of` has the engine of each by its name, and `remedy` says what else could be done.
    """
    by_engine: dict[str, list[str]] = {}
    for name, engine in engine_of.items():
        by_engine.setdefault(engine, []).append(name)
    if len(by_engine) < 2 and not any(SEVERAL in engine for engine in by_engine):
        return None
    named = "; ".join(f"{engine} for {', '.join(names)}" for engine, names in by_engine.items())
    text = f"different engines answered ({named})"
    if not allowed:
        raise InputError(f"{text}; scores are not set side by side: {remedy}", code="mixed-engines")
    return f"{text}: differences are of engines as well as of weights"


def find_engines(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return the engine of each artifact's answers."""
    return {artifact: find_engine_of(rows) for artifact, rows in answers.items()}


def mark_engines(report: Mapping[str, dict[str, Any]], engine_of: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return a report in which an artifact has its engine beside its scores, if that is not llama.cpp in process."""
    return {
        artifact: scores if engine_of[artifact] == LLAMA_CPP else {**scores, MARK: engine_of[artifact]}
        for artifact, scores in report.items()
    }
