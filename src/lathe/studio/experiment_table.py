"""Table of the overview: the runs of `lathe results`, filtered, sorted, and with the changed parameters as columns.

What the experiments hold never changes under their references, so that they are read once for each state of these.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InputError
from lathe.common.git import try_git
from lathe.experiments.results import RunResult, read_experiments, read_present
from lathe.experiments.results_table import SORTS

COLUMNS = ("score", "file", "gates", "size", "seconds", "date")
MOST_PARAMETERS = 5  # columns for changed parameters, unless others are chosen
MOST_COLUMNS = 40

_lock = threading.Lock()
_kept: tuple[bytes, list[RunResult]] | None = None


@dataclass(frozen=True)
class OverviewTable:
    """The rows that are shown, of `total`; `parameters` are the changed keys shown, of all that are `known`."""

    rows: list[RunResult]
    total: int
    columns: list[str]
    parameters: list[str]
    known: list[str]
    metrics: list[str]
    sort: str
    text: str


def is_warm() -> bool:
    """Tell whether the experiments have been read in their present state."""
    return _kept is not None and _kept[0] == _list_references()


def read_runs() -> list[RunResult]:
    """Return the runs as `lathe results` lists them."""
    global _kept
    references = _list_references()
    with _lock:
        if _kept is None or _kept[0] != references:
            _kept = references, read_experiments()
        experiments = _kept[1]
    return [*read_present(), *experiments]


def build_table(
    runs: Sequence[RunResult],
    *,
    text: str = "",
    sort: str = "",
    gates: str = "",
    columns: Sequence[str] = (),
    parameters: Sequence[str] = (),
) -> OverviewTable:
    """Choose rows and columns. `text` is looked for in names and changed parameters; '' sorts the newest first.

    Raises InputError for a sort or column that does not exist.
    """
    if sort and sort.removeprefix("-") not in SORTS:
        raise InputError(f"sort {sort[:40]!r}: must be one of {', '.join(SORTS)}", code="no-such-column")
    if unknown := [column for column in columns if column not in COLUMNS]:
        raise InputError(f"column {unknown[0][:40]!r}: must be one of {', '.join(COLUMNS)}", code="no-such-column")
    wanted = text.casefold().split()
    rows = [run for run in runs if all(word in _write_searched(run) for word in wanted)]
    if gates:
        rows = [run for run in rows if run.gates_passed is (gates == "passed")]
    if sort:
        rows.sort(key=SORTS[sort.removeprefix("-")], reverse=sort.startswith("-"))
    counts = Counter(key for run in runs for key in run.changed)
    known = sorted(counts)
    shown = [key for key, _ in counts.most_common(MOST_PARAMETERS)]
    chosen = [key for key in parameters if key in counts][:MOST_COLUMNS] if parameters else sorted(shown)
    metrics = sorted({run.metric for run in rows if run.metric and run.score is not None})
    return OverviewTable(rows, len(runs), list(columns or COLUMNS), chosen, known, metrics, sort, text)


def _write_searched(run: RunResult) -> str:
    changes = " ".join(f"{key}={_show(value)}" for key, (_, value) in run.changed.items())
    return f"{run.name} {(run.commit or '')[:12]} {changes}".casefold()


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def _list_references() -> bytes:
    return try_git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps") or b""
