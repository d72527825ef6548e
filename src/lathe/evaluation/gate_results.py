"""Gate results: each gate held against the validation report, as metrics and as lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lathe.config.gates import QUANTIZED, Gate, Report, Term


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
