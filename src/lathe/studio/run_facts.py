"""What the page of a run shows, from Git and DVC's cache: scores, gates, stages, curves, changes, worst answers."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lathe.common import git, paths
from lathe.common.dvc_api import open_repository
from lathe.common.jsonl import read_jsonl
from lathe.common.metric_files import list_timing_stems
from lathe.experiments.paired_answers import read_answers
from lathe.experiments.results import RunResult
from lathe.experiments.tracking.run_files import CURVES, read_curves
from lathe.provenance.revisions import Revision, find_revision
from lathe.reports.split_scores import list_metrics
from lathe.reports.text_diff import Piece, split_text
from lathe.studio import experiment_table

MOST_ANSWERS = 20
LONGEST_PROMPT = 2000

CurvePoints = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class ScoreCell:
    """A score with its interval; None where it has none."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ShownAnswer:
    """One held-out row: what was asked, the reference, and answers with their differences marked."""

    row: int
    prompt: str
    reference: list[Piece]
    answers: list[list[Piece]]
    scores: list[float | None]


@dataclass
class RunFacts:
    """What is known of a run; empty where a stage has not run."""

    name: str
    commit: str | None
    result: RunResult | None
    metric: str | None
    splits: dict[str, dict[str, dict[str, ScoreCell]]] = field(default_factory=dict)  # split, metric, artifact
    artifacts: list[str] = field(default_factory=list)
    sizes: dict[str, int | None] = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    timings: list[tuple[str, Any]] = field(default_factory=list)
    rows: Any = None


def read_run(name: str) -> RunFacts:
    """Read a run by the name of an experiment, commit or branch, or `workspace`. Raises InputError if there is none."""
    revision = find_revision(name)
    result = next((run for run in experiment_table.read_runs() if _is_same(run, revision)), None)
    metric = revision.parameters["evaluate"]["primary_metric"]
    facts = RunFacts(name, revision.commit, result, metric)
    for split in ("validation", "test"):
        if report := revision.read_json(f"metrics/evaluate/{split}.json"):
            facts.splits[split] = _arrange_scores(report, metric)
            facts.artifacts = facts.artifacts or list(report)
            facts.sizes = facts.sizes or {artifact: scores.get("bytes") for artifact, scores in report.items()}
    facts.gates = (revision.read_json("metrics/evaluate/gates.json") or {}).get("gates", {})
    timings = [(stem, revision.read_json(f"metrics/timings/{stem}.json")) for stem in list_timing_stems()]
    facts.timings = [(stem, timing) for stem, timing in timings if timing]
    report = revision.read_json("metrics/preprocess/report.json")
    facts.rows = report.get("rows") if isinstance(report, Mapping) else None
    return facts


def read_run_curves(name: str) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a run's training, as its commit or the workspace has them."""
    revision = find_revision(name)
    if revision.commit is None:
        return read_curves(paths.ROOT)
    curves: dict[str, list[tuple[int, float]]] = {}
    for folder, prefix in CURVES.items():
        listed = git.try_git("ls-tree", "-r", "--name-only", "-z", revision.commit, "--", folder) or b""
        names = [path for path in listed.decode().split("\0") if path.endswith(".tsv")]
        for path, content in zip(names, git.read_blobs([f"{revision.commit}:./{path}" for path in names]), strict=True):
            if content is not None:
                curves[prefix + path.removeprefix(f"{folder}/").removesuffix(".tsv")] = _parse_points(content.decode())
    return curves


def read_worst_answers(name: str, split: str = "validation") -> tuple[str | None, list[ShownAnswer]]:
    """Return the best file of a run, and its answers, those that scored worst first; none if the cache lacks them."""
    revision = find_revision(name)
    result = next((run for run in experiment_table.read_runs() if _is_same(run, revision)), None)
    if result is None or result.artifact is None or result.metric is None:
        return None, []
    with open_repository(paths.ROOT) as repo:
        file = revision.find_cached_file(repo, "data/scored", f"{result.artifact}/{split}.jsonl")
    if file is None:
        return result.artifact, []
    # The stage evaluate has written them the worst first.
    rows = [row for row in read_jsonl(file) if row["completion"] != row["reference"]]
    return result.artifact, [
        _show_answer(
            row["row"], row["prompt"], row["reference"], [row["completion"]], [row["scores"].get(result.metric)]
        )
        for row in rows[:MOST_ANSWERS]
    ]


def read_different_answers(
    first: str, other: str, artifacts: Sequence[str], split: str
) -> tuple[int, int, list[ShownAnswer]]:
    """Return how many rows both answered, how many differently, and the first of these; 0 without DVC's cache."""
    revisions = [find_revision(first), find_revision(other)]
    with open_repository(paths.ROOT) as repo:
        both = [
            read_answers(repo, revision, artifact, split)
            for revision, artifact in zip(revisions, artifacts, strict=True)
        ]
    ours, theirs = both
    if ours is None or theirs is None:
        return 0, 0, []
    keys = [key for key in ours if key in theirs]
    differing = [key for key in keys if ours[key]["completion"] != theirs[key]["completion"]]
    shown = [
        _show_answer(
            keys.index(key),
            ours[key]["prompt"],
            ours[key]["reference"],
            [ours[key]["completion"], theirs[key]["completion"]],
            [None, None],
        )
        for key in differing[:MOST_ANSWERS]
    ]
    return len(keys), len(differing), shown


def _show_answer(
    row: int, prompt: str, reference: str | None, answers: Sequence[str], scores: Sequence[float | None]
) -> ShownAnswer:
    return ShownAnswer(
        row + 1,
        prompt[:LONGEST_PROMPT],
        split_text(reference or ""),
        [split_text(answer, reference) for answer in answers],
        list(scores),
    )


def _is_same(run: RunResult, revision: Revision) -> bool:
    return run.commit == revision.commit


def _arrange_scores(report: Mapping[str, Any], metric: str) -> dict[str, dict[str, ScoreCell]]:
    """Return the cells by metric and artifact, the primary metric first."""
    names = list_metrics(report)
    names.sort(key=lambda name: name != metric)
    arranged: dict[str, dict[str, ScoreCell]] = {}
    for name in names:
        for artifact, scores in report.items():
            of_metric = (entry for entry in scores.get("intervals", ()) if entry["metric"] == name)
            ends: Mapping[str, Any] = next(of_metric, {})
            cell = ScoreCell(scores.get(name), ends.get("low"), ends.get("high"))
            arranged.setdefault(name, {})[artifact] = cell
    return arranged


def _parse_points(text: str) -> list[tuple[int, float]]:
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    points = []
    for row in rows:
        step, value = row.get("step"), next((value for key, value in row.items() if key != "step"), None)
        try:
            points.append((int(step or ""), float(value or "")))
        except ValueError:  # an incomplete last line
            continue
    return points
