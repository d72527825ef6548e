"""Gate results: whether each gate holds on the validation report, as metrics and as lines of text."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lathe.config.gates import QUANTIZED, Gate, Report, Term


@dataclass(frozen=True)
class GateOutcome:
    """Whether a gate holds; a gate on `quantized` reports the type with the smallest margin, as `artifact`.

    `margin` is by how much it holds, negative if it does not. A side with a missing score is None, and so is `margin`.
    """

    gate: Gate
    artifact: str | None
    left: Decimal | None
    right: Decimal | None
    margin: Decimal | None
    passed: bool


def evaluate_gate(gate: Gate, report: Report, types: Sequence[str]) -> GateOutcome:
    """Evaluate a gate on a report of the stage evaluate: {artifact: {score: value or None}}."""
    of_types = any(artifact == QUANTIZED for artifact, _ in gate.scores)
    outcomes = (
        [_evaluate_gate(gate, report, name) for name in types] if of_types else [_evaluate_gate(gate, report, None)]
    )
    return min(outcomes, key=lambda outcome: (outcome.passed, outcome.margin is not None, outcome.margin or Decimal(0)))


def make_metrics(outcomes: Sequence[GateOutcome]) -> dict[str, Any]:
    """Return the content of `metrics/evaluate/gates.json`."""
    return {
        "passed": all(outcome.passed for outcome in outcomes),
        "gates": {
            outcome.gate.expression: {
                "passed": outcome.passed,
                "margin": None if outcome.margin is None else float(outcome.margin),
            }
            for outcome in outcomes
        },
    }


def format_outcome(outcome: GateOutcome) -> str:
    """Return a gate's outcome as a line of text."""
    sides = " ".join(
        [_format_value(outcome.left), outcome.gate.comparison, _format_value(outcome.right)]
        + ([f"for {outcome.artifact}"] if outcome.artifact else [])
    )
    margin = "a score is missing" if outcome.margin is None else f"margin {outcome.margin:+f}"
    return f"{'passed' if outcome.passed else 'failed'}  {outcome.gate.expression}  ({sides}, {margin})"


def _evaluate_gate(gate: Gate, report: Report, quantized: str | None) -> GateOutcome:
    left, right = (_compute_side(side, report, quantized) for side in (gate.left, gate.right))
    if left is None or right is None:
        return GateOutcome(gate, quantized, left, right, None, passed=False)
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
    return GateOutcome(gate, quantized, left, right, margin, passed)


def _compute_side(side: tuple[Term, ...], report: Report, quantized: str | None) -> Decimal | None:
    total = Decimal(0)
    for term in side:
        if term.artifact is None or term.score is None:
            total += term.factor
            continue
        artifact = quantized if term.artifact == QUANTIZED and quantized else term.artifact
        value = report[artifact][term.score]
        # Decimal, as the report is written: 0.93 - 0.03 is exactly 0.9, which it is not in binary floating point.
        exact = None if value is None else Decimal(str(value))
        if exact is None or not exact.is_finite():
            return None
        total += term.factor * exact
    return total


def _format_value(value: Decimal | None) -> str:
    return "nothing" if value is None else f"{value:f}"
