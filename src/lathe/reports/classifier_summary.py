"""Summary of the classifier's pipeline: its scores beside the baselines', what they cost, and what to look at."""

import json
from collections.abc import Iterator
from typing import Any

from lathe.common import paths
from lathe.common.text import format_table, readable_bytes
from lathe.provenance.revisions import ClassifierRevision

METRICS = "classify/metrics"
CLASSIFIER = "classifier"
TITLES = {
    "classifier": "classifier",
    "majority": "majority class",
    "tfidf": "TF-IDF + logistic regression",
    "features": "frozen features + logistic regression",
}
COLUMNS = ("accuracy", "macro_f1", "in_scope_accuracy", "none_recall", "calibration_error")
# The file of the language model that is shown, by its quantization type.
SHOWN_TYPE = "Q4_K_M"


def summarize_classifier(revision: ClassifierRevision) -> Iterator[str]:
    """Yield the lines; none if nothing has been evaluated."""
    test = revision.read_json(f"{METRICS}/evaluate/test.json")
    if not test:
        return
    columns = [name for name in COLUMNS if name in test[CLASSIFIER]]
    costs = _read_costs(revision)
    rows = [["on test", *columns, "s per 1,000", "size"]]
    for name, scores in test.items():
        seconds, size = costs.get(name, (None, None))
        cells = [_format_score(scores, column) for column in columns]
        rows.append([TITLES[name], *cells, _format_seconds(seconds), readable_bytes(size) if size else ""])
    rows += [
        [name, score, *("" for _ in columns[1:]), seconds, size]
        for name, score, seconds, size in _list_models(revision)
    ]
    yield from format_table(rows)
    details = (revision.read_json(f"{METRICS}/metrics.json") or {})["details"][0]
    trained = revision.read_json(f"{METRICS}/trained.json") or {}
    threshold = "" if details["threshold"] is None else f", threshold {details['threshold']:.3f}"
    yield (
        f"best epoch {details['best_epoch']} of {details['epochs']}; {trained['trained_weights']:,} weights trained; "
        f"temperature {details['temperature']:.3f}{threshold}"
    )
    if export := revision.read_json(f"{METRICS}/export.json"):
        same = f"{export['same_labels']} of {export['rows']} test texts"
        yield f"ONNX: torch's label for {same}, {readable_bytes(export['bytes'])}"


def _read_costs(revision: ClassifierRevision) -> dict[str, tuple[float | None, int | None]]:
    """Return seconds for 1,000 texts, and bytes, of each classifier."""
    sizes = (revision.read_json(f"{METRICS}/baselines.json") or {"bytes": {}})["bytes"]
    timings = revision.read_json(f"{METRICS}/timings/baselines.json") or {}
    export = revision.read_json(f"{METRICS}/timings/export.json") or {}
    size = (revision.read_json(f"{METRICS}/export.json") or {}).get("bytes")
    costs: dict[str, tuple[float | None, int | None]] = {
        name: (timings.get(f"{name}_seconds_per_1000"), sizes[name]) for name in sizes
    }
    # The logistic regression needs the backbone before it.
    if "features" in costs and size:
        costs["features"] = (None, costs["features"][1])
    return {**costs, CLASSIFIER: (export.get("onnx_seconds_per_1000"), size)}


def _list_models(revision: ClassifierRevision) -> Iterator[tuple[str, str, str, str]]:
    """Yield the recorded runs of the main pipeline on the same dataset: a language model that names the label."""
    for file in sorted((paths.ROOT / "docs/results").glob("*.json")):
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        artifact = record["artifacts"].get(SHOWN_TYPE, {})
        if record["dataset"] != revision.parameters["dataset"] or "exact_match" not in artifact:
            continue
        value, low, high = artifact["exact_match"]
        answers = len(record["artifacts"]) * (record["rows"]["validation"] + record["rows"]["test"])
        seconds = 1000 * record["seconds"]["generate"] / answers
        yield (
            f"{record['name']} {SHOWN_TYPE}, {record['rows']['test']} texts",
            f"{value:.4f} [{low:.4f}, {high:.4f}]",
            _format_seconds(seconds),
            readable_bytes(artifact["bytes"]),
        )


def _format_score(scores: dict[str, Any], name: str) -> str:
    if name not in scores:
        return ""
    ends = next((one for one in scores["intervals"] if one["metric"] == name and one["low"] is not None), None)
    interval = "" if ends is None else f" [{ends['low']:.4f}, {ends['high']:.4f}]"
    return f"{scores[name]:.4f}{interval}"


def _format_seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g}"
