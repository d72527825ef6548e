"""Gates: comparisons of scores in params.yaml that must hold on validation before files ship.

    Q4_K_M.exact_match >= merged.exact_match - 0.03
    0.5 * quantized.rouge_l + 0.5 * quantized.chrf > 0.4
    merged.mmlu.acc >= base.mmlu.acc - 0.02

A side is a sum of numbers, ARTIFACT.SCORE and NUMBER * ARTIFACT.SCORE; ARTIFACT.TASK.SCORE is the score of a task of
`benchmark.tasks`. `quantized` means every quantization type: all of them must pass. `lathe.evaluation.gate_results`
evaluates gates on a report.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lathe.common.text import did_you_mean
from lathe.config.artifacts import FEW_SHOT, UNQUANTIZED
from lathe.config.scores import suggest_remedy

QUANTIZED = "quantized"

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,12}\.?\d{0,12}|\.\d{1,12})(?:[eE][-+]?\d{1,2})?)(?![\w.])"
    r"|(?P<score>[A-Za-z_]\w*(?:\.\w+)?\.[A-Za-z_]\w*)(?![\w.])"
    r"|(?P<sign><=|>=|==|<|>|[-+*]))",
    re.ASCII,
)
COMPARISONS = ("<", "<=", ">", ">=", "==")
EXAMPLE = "'Q4_K_M.exact_match >= merged.exact_match - 0.03'"

Report = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Term:
    """A number, or an artifact's score times a number; that of a task is named `TASK.SCORE`."""

    factor: Decimal
    artifact: str | None = None
    score: str | None = None


@dataclass(frozen=True)
class Gate:
    """A comparison of two sums."""

    expression: str
    left: tuple[Term, ...]
    comparison: str
    right: tuple[Term, ...]

    @property
    def scores(self) -> list[tuple[str, str]]:
        """The (artifact, score) pairs that it names."""
        return [(term.artifact, term.score) for term in (*self.left, *self.right) if term.artifact and term.score]


def parse_gate(expression: str) -> Gate:
    """Return the gate that the expression describes; raises ValueError with the value, the rule and a remedy."""
    tokens, position = [], 0
    while expression[position:].strip():
        match = _TOKEN.match(expression, position)
        if match is None:
            raise _make_error(expression, f"cannot read {expression[position:].strip()[:20]!r}")
        tokens.append((str(match.lastgroup), match[match.lastgroup or 0]))
        position = match.end()
    signs = [index for index, (_, text) in enumerate(tokens) if text in COMPARISONS]
    if len(signs) != 1:
        raise _make_error(expression, f"it has {len(signs)} of {', '.join(COMPARISONS)}; must have one")
    [middle] = signs
    left, right = _parse_sum(tokens[:middle], expression), _parse_sum(tokens[middle + 1 :], expression)
    gate = Gate(expression, left, tokens[middle][1], right)
    if not gate.scores:
        raise _make_error(expression, "it names no score")
    return gate


def check_names(gate: Gate, *, types: Sequence[str], scores: Sequence[str], tasks: bool = False) -> None:
    """Raise ValueError if a gate names an artifact or a score that the run does not have.

    `tasks` says whether tasks are measured; which there are, and their scores, is known when they are loaded.
    """
    artifacts = [*UNQUANTIZED, QUANTIZED, *types]
    for artifact, score in gate.scores:
        if artifact not in artifacts:
            raise ValueError(
                f"{gate.expression!r} names {artifact}, which is no artifact; {did_you_mean(artifact, artifacts)}"
            )
        if "." in score:
            if not tasks:
                raise ValueError(f"{gate.expression!r} names {score} of a task; list the task in benchmark.tasks")
            if artifact == FEW_SHOT:
                raise ValueError(f"{gate.expression!r}: tasks have examples of their own; take base.{score}")
            continue
        if score not in scores:
            raise ValueError(
                f"{gate.expression!r} names {score}, which is not computed; {suggest_remedy(score, list(scores))}"
            )
        if score == "kl" and artifact in UNQUANTIZED:
            raise ValueError(f"{gate.expression!r} names {artifact}.kl; only quantized files have a kl")
        if score == "general_perplexity" and artifact == FEW_SHOT:
            raise ValueError(f"{gate.expression!r}: general text has no few-shot prompt; take base.general_perplexity")


def _make_error(expression: str, problem: str) -> ValueError:
    shown = expression if len(expression) <= 80 else expression[:77] + "..."
    return ValueError(
        f"{shown!r} is not a comparison of scores: {problem}; write sums of numbers, ARTIFACT.SCORE and NUMBER * "
        f"ARTIFACT.SCORE on both sides, such as {EXAMPLE}"
    )


def _parse_sum(tokens: list[tuple[str, str]], expression: str) -> tuple[Term, ...]:
    terms: list[Term] = []
    rest = list(tokens)
    while rest or not terms:
        sign = Decimal(1)
        if rest and rest[0][1] in ("+", "-"):
            sign = Decimal(-1) if rest.pop(0)[1] == "-" else sign
        elif terms:
            raise _make_error(expression, f"a + or - is missing before {rest[0][1]!r}")
        kinds = [kind for kind, _ in rest[:3]]
        if kinds == ["number", "sign", "score"] and rest[1][1] == "*":
            terms.append(_parse_score(sign * Decimal(rest[0][1]), rest[2][1]))
            del rest[:3]
        elif kinds[:1] == ["number"]:
            terms.append(Term(sign * Decimal(rest.pop(0)[1])))
        elif kinds[:1] == ["score"]:
            terms.append(_parse_score(sign, rest.pop(0)[1]))
        else:
            where = f"before {rest[0][1]!r}" if rest else "at an end"
            raise _make_error(expression, f"a number or a score is missing {where}")
    return tuple(terms)


def _parse_score(factor: Decimal, text: str) -> Term:
    artifact, _, score = text.partition(".")
    return Term(factor, artifact, score)
