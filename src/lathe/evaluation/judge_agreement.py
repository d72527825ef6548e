"""Agreement of the judge with people: kappa and correlation on the rows that both marked, with intervals.

The file of marks has a line for each answer that a person marked: artifact, row, perhaps split (validation), and
`mark`: a score from 0 to 100 for single answers, or `own`, `other` or `tie` for pairs, whichever answer is better.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lathe.common.errors import InputError
from lathe.common.json_files import read_json
from lathe.common.jsonl import read_jsonl
from lathe.common.text import did_you_mean
from lathe.evaluation import bootstrap
from lathe.evaluation.judge.judged_rows import JUDGE_FILE, SPLITS, AnswerPlace
from lathe.evaluation.pairwise import read_pairs

Array = NDArray[np.float64]

WINNERS = ("other", "tie", "own")
BANDS = (0, 25, 50, 75, 100)  # the levels of the rubric, which scores are rounded to for kappa
SAMPLES = 2000
CLOSE = 10  # points


@dataclass(frozen=True)
class Agreement:
    """What was compared, and each measure as (value, low, high); the ends are None where there is no interval."""

    rows: int
    without_verdict: int
    measures: dict[str, tuple[float, float | None, float | None]]

    def describe(self) -> Iterator[str]:
        """Yield lines of text."""
        missing = (
            f"; {self.without_verdict} more marks are of answers without a verdict" if self.without_verdict else ""
        )
        yield f"{self.rows} marks of a person beside a verdict{missing}"
        for name, (value, low, high) in self.measures.items():
            interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
            yield f"{name.replace('_', ' ')}  {value:.3f}{interval}"


def compare_with_marks(file: Path, judged: Path, *, seed: int) -> Agreement:
    """Compare the marks of a file with the verdicts in `judged`, of single answers or of pairs as these are.

    Raises InputError for a file that cannot be read, and if no mark is of a judged answer.
    """
    if not (judged / JUDGE_FILE).exists():
        raise InputError(
            f"{judged}: holds no verdicts; set judge.enabled to true and run the pipeline", code="nothing-judged"
        )
    pairwise = read_json(judged / JUDGE_FILE).get("mode") == "pairwise"
    marks = dict(_read_marks(file, pairwise=pairwise))
    verdicts = _read_verdicts(judged, marks, pairwise=pairwise)
    common = [place for place in marks if place in verdicts]
    if not common:
        raise InputError(
            f"{file}: none of its {len(marks)} marks is of an answer with a verdict; {judged} says which have one",
            code="no-common-rows",
        )
    ours, theirs = (np.array([values[place] for place in common], dtype=float) for values in (marks, verdicts))
    measures = _PAIR_MEASURES if pairwise else _SCORE_MEASURES
    return Agreement(
        len(common),
        len(marks) - len(common),
        {name: _measure(measure, ours, theirs, seed) for name, measure in measures.items()},
    )


def compute_kappa(one: Array, other: Array, categories: int, *, quadratic: bool = False) -> float:
    """Return Cohen's kappa of two raters with categories from 0, weighted by the square of the distance or not at all.

    NaN if both always give one and the same category: nothing is known of their agreement beyond chance.
    """
    table = np.zeros((categories, categories))
    np.add.at(table, (one.astype(int), other.astype(int)), 1)
    distance = np.subtract.outer(np.arange(categories), np.arange(categories)).astype(float)
    weights = distance**2 if quadratic else (distance != 0).astype(float)
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / len(one)
    chance = float((weights * expected).sum())
    return 1 - float((weights * table).sum()) / chance if chance else float("nan")


def _to_bands(scores: Array) -> Array:
    return np.abs(scores[:, None] - np.array(BANDS)).argmin(axis=1).astype(float)


def _compute_spearman(one: Array, other: Array) -> float:
    from scipy.stats import spearmanr

    return float("nan") if len({*one}) < 2 or len({*other}) < 2 else float(spearmanr(one, other).statistic)


_PAIR_MEASURES: dict[str, Callable[[Array, Array], float]] = {
    "kappa": lambda one, other: compute_kappa(one, other, len(WINNERS)),
    "same_winner": lambda one, other: float((one == other).mean()),
}
_SCORE_MEASURES: dict[str, Callable[[Array, Array], float]] = {
    "kappa": lambda one, other: compute_kappa(_to_bands(one), _to_bands(other), len(BANDS), quadratic=True),
    "spearman": _compute_spearman,
    f"within_{CLOSE}_points": lambda one, other: float((np.abs(one - other) <= CLOSE).mean()),
    "judge_less_person": lambda one, other: float((other - one).mean()),
}


def _measure(
    measure: Callable[[Array, Array], float], ours: Array, theirs: Array, seed: int
) -> tuple[float, float | None, float | None]:
    """Return the measure with its 95 % interval over resamples of the rows."""
    rows = len(ours)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, rows, (SAMPLES, rows))
    resampled = np.array([measure(ours[index], theirs[index]) for index in drawn])
    left_out = np.array(
        [measure(np.delete(ours, row), np.delete(theirs, row)) for row in range(rows if rows > 2 else 0)]
    )
    value = measure(ours, theirs)
    ends = bootstrap.compute_interval(value, resampled, left_out) if np.isfinite(value) else None
    return (value, *(ends or (None, None)))


def _read_marks(file: Path, *, pairwise: bool) -> Iterator[tuple[AnswerPlace, float]]:
    """Yield place and mark of each line; of pairs the mark is the number of its name in WINNERS."""
    seen: set[AnswerPlace] = set()
    for number, line in enumerate(_read_lines(file), start=2 if file.suffix == ".csv" else 1):
        where = f"{file}:{number}"
        if missing := [key for key in ("artifact", "row", "mark") if line.get(key) in (None, "")]:
            raise InputError(f"{where}: has no {missing[0]}; a mark has artifact, row and mark", code="missing-key")
        split = str(line.get("split") or "validation")
        if split not in SPLITS:
            raise InputError(f"{where}: split is {split!r}; {did_you_mean(split, list(SPLITS))}", code="unknown-split")
        try:
            place = AnswerPlace(str(line["artifact"]), split, int(line["row"]))
        except ValueError:
            raise InputError(
                f"{where}: row is {line['row']!r}; expected its number, from 0", code="invalid-row"
            ) from None
        if place in seen:
            raise InputError(f"{where}: {place} is marked twice; leave one mark of it", code="marked-twice")
        seen.add(place)
        yield place, _parse_mark(line["mark"], where, pairwise=pairwise)


def _parse_mark(mark: Any, where: str, *, pairwise: bool) -> float:
    if pairwise:
        if mark not in WINNERS:
            raise InputError(
                f"{where}: mark is {mark!r}; these verdicts are of pairs: expected own, other or tie",
                code="invalid-mark",
            )
        return float(WINNERS.index(mark))
    try:
        score = float("nan") if isinstance(mark, bool) else float(mark)
    except (TypeError, ValueError):
        score = float("nan")
    if not 0 <= score <= 100:
        raise InputError(f"{where}: mark is {mark!r}; expected a number from 0 to 100", code="invalid-mark")
    return score


def _read_lines(file: Path) -> Sequence[Mapping[str, Any]]:
    try:
        if file.suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as stream:
                return list(csv.DictReader(stream))
        lines = []
        for number, text in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if not text.strip():
                continue
            line = json.loads(text)
            if not isinstance(line, dict):
                raise InputError(
                    f"{file}:{number}: is no object; a mark has artifact, row and mark", code="not-an-object"
                )
            lines.append(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}:{number}: is no JSON ({error.msg}); a mark is one object a line", code="not-json"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); name a CSV or JSONL file in UTF-8", code="unreadable"
        ) from None
    return lines


def _read_verdicts(judged: Path, marks: Mapping[AnswerPlace, float], *, pairwise: bool) -> dict[AnswerPlace, float]:
    verdicts: dict[AnswerPlace, float] = {}
    for artifact, split in sorted({(place.artifact, place.split) for place in marks}):
        file = judged / artifact / f"{split}.jsonl"
        if pairwise:
            for row, pair in read_pairs(file).items():
                verdicts[AnswerPlace(artifact, split, row)] = float(np.sign(pair["preference"] - 0.5)) + 1
        elif file.exists():
            verdicts |= {AnswerPlace(artifact, split, line["row"]): line["score"] for line in read_jsonl(file)}
    return verdicts
