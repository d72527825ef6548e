"""What must hold before files ship: comparisons of scores, read from params.yaml and judged by the validation report.

    Q4_K_M.exact_match >= merged.exact_match - 0.03
    0.5 * quantized.rouge_l + 0.5 * quantized.chrf > 0.4

A side is a sum of numbers, ARTIFACT.SCORE and NUMBER * ARTIFACT.SCORE. `quantized` stands for each quantization type in
turn: all of them must pass. Pure: texts and a report in, outcomes out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lathe.artifacts import FEW_SHOT, UNQUANTIZED
from lathe.params import did_you_mean, to_compute

QUANTIZED = "quantized"

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,12}\.?\d{0,12}|\.\d{1,12})(?:[eE][-+]?\d{1,2})?)(?![\w.])"
    r"|(?P<score>[A-Za-z_]\w*\.[A-Za-z_]\w*)(?![\w.])"
    r"|(?P<sign><=|>=|==|<|>|[-+*]))",
    re.ASCII,
)
COMPARISONS = ("<", "<=", ">", ">=", "==")
EXAMPLE = "'Q4_K_M.exact_match >= merged.exact_match - 0.03'"

Report = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Term:
    """A number, or a number of times an artifact's score."""

    factor: Decimal
    artifact: str | None = None
    score: str | None = None


@dataclass(frozen=True)
class Gate:
    """One comparison of two sums."""

    expression: str
    left: tuple[Term, ...]
    comparison: str
    right: tuple[Term, ...]

    @property
    def scores(self) -> list[tuple[str, str]]:
        """The (artifact, score) that it names."""
        return [(term.artifact, term.score) for term in (*self.left, *self.right) if term.artifact and term.score]


@dataclass(frozen=True)
class Outcome:
    """How a gate went: for `quantized` the type with the smallest margin.

    `margin` is by how much it holds, negative where it does not; it and a side are None where a score is missing.
    """

    gate: Gate
    artifact: str | None
    left: Decimal | None
    right: Decimal | None
    margin: Decimal | None
    passed: bool


def parse(expression: str) -> Gate:
    """Read one comparison; raises ValueError with the value, the rule and a remedy."""
    tokens, position = [], 0
    while expression[position:].strip():
        match = _TOKEN.match(expression, position)
        if match is None:
            raise _unreadable(expression, f"cannot read {expression[position:].strip()[:20]!r}")
        tokens.append((str(match.lastgroup), match[match.lastgroup or 0]))
        position = match.end()
    signs = [index for index, (_, text) in enumerate(tokens) if text in COMPARISONS]
    if len(signs) != 1:
        raise _unreadable(expression, f"it has {len(signs)} of {', '.join(COMPARISONS)}; must have one")
    [middle] = signs
    left, right = _sum(tokens[:middle], expression), _sum(tokens[middle + 1 :], expression)
    gate = Gate(expression, left, tokens[middle][1], right)
    if not gate.scores:
        raise _unreadable(expression, "it names no score")
    return gate


def check(gate: Gate, *, types: Sequence[str], scores: Sequence[str]) -> None:
    """Raise ValueError where a gate names an artifact or a score that a run does not have."""
    artifacts = [*UNQUANTIZED, QUANTIZED, *types]
    for artifact, score in gate.scores:
        if artifact not in artifacts:
            raise ValueError(f"{gate.expression!r} names {artifact}, no artifact; {did_you_mean(artifact, artifacts)}")
        if score not in scores:
            raise ValueError(
                f"{gate.expression!r} names {score}, which is not computed; {to_compute(score, list(scores))}"
            )
        if score == "kl" and artifact in UNQUANTIZED:
            raise ValueError(f"{gate.expression!r} asks for the kl of {artifact}; only quantized files have one")
        if score == "general_perplexity" and artifact == FEW_SHOT:
            raise ValueError(f"{gate.expression!r}: general text has no few-shot prompt; take base.general_perplexity")


def outcome(gate: Gate, report: Report, types: Sequence[str]) -> Outcome:
    """Judge a gate by a report of `evaluate`: {artifact: {score: value or None}}."""
    of_types = any(artifact == QUANTIZED for artifact, _ in gate.scores)
    outcomes = [_outcome(gate, report, name) for name in types] if of_types else [_outcome(gate, report, None)]
    return min(outcomes, key=lambda one: (one.passed, one.margin is not None, one.margin or Decimal(0)))


def metrics(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what `metrics/evaluate/gates.json` holds."""
    return {
        "passed": all(one.passed for one in outcomes),
        "gates": {
            one.gate.expression: {
                "passed": one.passed,
                "margin": None if one.margin is None else float(one.margin),
            }
            for one in outcomes
        },
    }


def line(outcome: Outcome) -> str:
    """Return one gate's outcome in words."""
    sides = " ".join(
        [_shown(outcome.left), outcome.gate.comparison, _shown(outcome.right)]
        + ([f"for {outcome.artifact}"] if outcome.artifact else [])
    )
    margin = "a score is missing" if outcome.margin is None else f"margin {outcome.margin:+f}"
    return f"{'passed' if outcome.passed else 'failed'}  {outcome.gate.expression}  ({sides}, {margin})"


def _unreadable(expression: str, problem: str) -> ValueError:
    shown = expression if len(expression) <= 80 else expression[:77] + "..."
    return ValueError(
        f"{shown!r} is no comparison of scores: {problem}; write sums of numbers, ARTIFACT.SCORE and NUMBER * "
        f"ARTIFACT.SCORE on both sides, such as {EXAMPLE}"
    )


def _sum(tokens: list[tuple[str, str]], expression: str) -> tuple[Term, ...]:
    terms: list[Term] = []
    rest = list(tokens)
    while rest or not terms:
        sign = Decimal(1)
        if rest and rest[0][1] in ("+", "-"):
            sign = Decimal(-1) if rest.pop(0)[1] == "-" else sign
        elif terms:
            raise _unreadable(expression, f"a + or - is missing before {rest[0][1]!r}")
        kinds = [kind for kind, _ in rest[:3]]
        if kinds == ["number", "sign", "score"] and rest[1][1] == "*":
            terms.append(_score(sign * Decimal(rest[0][1]), rest[2][1]))
            del rest[:3]
        elif kinds[:1] == ["number"]:
            terms.append(Term(sign * Decimal(rest.pop(0)[1])))
        elif kinds[:1] == ["score"]:
            terms.append(_score(sign, rest.pop(0)[1]))
        else:
            where = f"before {rest[0][1]!r}" if rest else "at an end"
            raise _unreadable(expression, f"a number or a score is missing {where}")
    return tuple(terms)


def _score(factor: Decimal, text: str) -> Term:
    artifact, _, score = text.partition(".")
    return Term(factor, artifact, score)


def _outcome(gate: Gate, report: Report, quantized: str | None) -> Outcome:
    left, right = (_value(side, report, quantized) for side in (gate.left, gate.right))
    if left is None or right is None:
        return Outcome(gate, quantized, left, right, None, passed=False)
    match gate.comparison:
        case "<":
            passed, margin = left < right, right - left
        case "<=":
            passed, margin = left <= right, right - left
        case ">":
            passed, margin = left > right, left - right
        case ">=":
            passed, margin = left >= right, left - right
        case _:
            passed, margin = left == right, -abs(left - right)
    return Outcome(gate, quantized, left, right, margin, passed)


def _value(side: tuple[Term, ...], report: Report, quantized: str | None) -> Decimal | None:
    total = Decimal(0)
    for term in side:
        if term.artifact is None or term.score is None:
            total += term.factor
            continue
        artifact = quantized if term.artifact == QUANTIZED and quantized else term.artifact
        value = report[artifact][term.score]
        # As the report writes it: 0.93 - 0.03 is 0.9 here, which it is not among binary fractions.
        exact = None if value is None else Decimal(str(value))
        if exact is None or not exact.is_finite():
            return None
        total += term.factor * exact
    return total


def _shown(value: Decimal | None) -> str:
    return "nothing" if value is None else f"{value:f}"
