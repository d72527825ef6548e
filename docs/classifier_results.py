"""Record what recipes of the classifier scored, and write the tables of the guide for learners from the records.

reads   an experiment's metrics and parameters (record); docs/classifier_results/*.json (tables)
writes  docs/classifier_results/NAME.json (record); the tables between the marks of docs/experiments-guide.md
run     python docs/classifier_results.py record NAME … [--against NAME]    # experiments of this machine
        python docs/classifier_results.py                                   # the tables
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import machine

from lathe.common import entry_point
from lathe.common.errors import InputError
from lathe.experiments.classifier_comparison import compare_classifiers
from lathe.provenance.revisions import ClassifierRevision, find_revision

RECORDS, PAGE = ROOT / "docs/classifier_results", ROOT / "docs/experiments-guide.md"
METRICS = "classify/metrics"
CLASSIFIER = "classifier"
SHOWN = ("accuracy", "macro_f1", "calibration_error", "in_scope_accuracy", "none_recall")
SERIES = {
    "A": "classify-baseline",
    "B": "classify-more-context",
    "C": "classify-head",
    "C, with dropout": "classify-dropout",
    "D": "classify-full",
    "weak PC": "classify-weak-pc",
}
# The tables of the page, by the name in their marks: records of one dataset, which the baselines are of too.
DATASETS = {
    "banking77": ("banking77-head", "banking77-lora", "banking77-full"),
    "clinc150": ("clinc150-head",),
    "tickets": ("tickets-head", "tickets-weighted"),
}
TITLES = {
    "majority": "majority class",
    "tfidf": "TF-IDF + logistic regression",
    "features": "frozen features + logistic regression",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["record"], help="record the metrics of experiments")
    parser.add_argument("names", nargs="*", help="experiments, or `workspace`")
    parser.add_argument("--against", metavar="NAME", help="an experiment whose scores theirs are compared with")
    parser.add_argument("--as", dest="title", metavar="NAME", help="name of the record (default: the experiment's)")
    arguments = parser.parse_args()
    entry_point.guard(lambda: run(arguments.names, arguments.against, arguments.title))


def run(names: list[str], against: str | None, title: str | None) -> None:
    for name in names:
        record = make_record(name, against, title or name)
        RECORDS.mkdir(exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (RECORDS / f"{record['name']}.json").write_text(text, encoding="utf-8")
    PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def make_record(name: str, against: str | None, title: str) -> dict[str, Any]:
    """Return what the page shows of a run. Raises InputError if the revision has no scores."""
    found = find_revision(name)
    revision = ClassifierRevision(found.name, found.commit)
    report = revision.read_json(f"{METRICS}/evaluate/test.json")
    if not report:
        raise InputError(f"{name}: holds no scores of the classifier; run it: `lathe run {name}`", code="no-scores")
    stages = ("features", "baselines", "train", "evaluate", "export")
    timings = {stage: revision.read_json(f"{METRICS}/timings/{stage}.json") for stage in stages}
    parameters, trained = revision.parameters, revision.read_json(f"{METRICS}/trained.json")
    return {
        "name": title,
        "dataset": parameters["dataset"],
        "backbone": parameters["model"]["backbone"],
        "tuning": parameters["training"]["tuning"],
        "rows": {
            part["split"]: part["rows"] for part in revision.read_json(f"{METRICS}/prepare/report.json")["splits"]
        },
        "scores": {who: select_scores(scores) for who, scores in report.items()},
        "trained": {
            key: trained[key] for key in ("best_val_score", "best_epoch", "epochs", "trained_weights", "metric")
        },
        "cut": [part["cut"] for part in revision.read_json(f"{METRICS}/features.json")["splits"]],
        "seconds": {stage: timing["seconds"] for stage, timing in timings.items() if timing},
        "peak_memory_bytes": {stage: timing["peak_memory_bytes"] for stage, timing in timings.items() if timing},
        "differences": compare_with(against, name) if against else [],
        "against": against,
        "machine": machine.describe().partition(", load")[0],
    }


def select_scores(scores: dict[str, Any]) -> dict[str, list[float]]:
    """Return the shown scores as [value, low, high]."""
    ends = {one["metric"]: [one["low"], one["high"]] for one in scores["intervals"] if one["low"] is not None}
    return {name: [scores[name], *ends.get(name, [])] for name in SHOWN if name in scores}


def compare_with(first: str, other: str) -> list[dict[str, Any]]:
    """Return the differences of accuracy on validation and test, paired on the same rows."""
    found = []
    for split in ("validation", "test"):
        comparison = compare_classifiers([find_revision(first), find_revision(other)], split=split)
        found += [
            {"split": split, "delta": one.delta, "low": one.low, "high": one.high, "p": one.p, "rows": one.rows}
            for one in comparison.differences
            if one.metric == "accuracy"
        ]
    return found


def fill_page(text: str) -> str:
    """Return the page with its tables made from the records; one without a record is left as it is."""
    tables = {"series": make_series_table, **dict.fromkeys(DATASETS, make_dataset_table)}
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if table := make(name):
            text = pattern.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)  # type: ignore[misc]
    return text


def read_record(name: str) -> dict[str, Any] | None:
    """Return a record; None if there is none."""
    file = RECORDS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def make_series_table(_: str) -> str | None:
    """Return the table of experiments A to D and of the profile for a weak computer; memory is of the largest stage."""
    lines = [
        "| | recipe | test accuracy | macro-F1 | against A on validation | weights trained | training | peak memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    records = []
    for letter, name in SERIES.items():
        if (record := read_record(name)) is None:
            continue
        records.append(record)
        scores = record["scores"][CLASSIFIER]
        steering = next((one for one in record["differences"] if one["split"] == "validation"), None)
        difference = "" if steering is None else f"{100 * steering['delta']:+.1f}, p {steering['p']:.2g}"
        seconds, memory = record["seconds"]["train"], max(record["peak_memory_bytes"].values())
        cells = [letter, f"`{name}`", format_score(scores["accuracy"]), format_score(scores["macro_f1"]), difference]
        cells += [f"{record['trained']['trained_weights']:,}", f"{seconds:.0f} s", f"{memory / 1e9:.2f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    if not records:
        return None
    for who, title in TITLES.items():
        scores = records[0]["scores"][who]
        lines.append(f"| | {title} | {format_score(scores['accuracy'])} | {format_score(scores['macro_f1'])} | | | | |")
    return "\n".join([*lines, "", describe_runs(records)])


def make_dataset_table(name: str) -> str | None:
    """Return the table of a dataset: the recorded recipes, then the baselines."""
    records = [record for recipe in DATASETS[name] if (record := read_record(recipe))]
    if not records:
        return None
    columns = [score for score in SHOWN if score in records[0]["scores"][CLASSIFIER]]
    titles = {"macro_f1": "macro-F1", "calibration_error": "calibration error", "none_recall": "none found"}
    header = ["", *(titles.get(column, column.replace("_", " ")) for column in columns), "weights trained", "training"]
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    for record in records:
        scores = [format_score(record["scores"][CLASSIFIER].get(column)) for column in columns]
        cost = [f"{record['trained']['trained_weights']:,}", f"{record['seconds']['train']:.0f} s"]
        lines.append(f"| {' | '.join(['`' + record['name'] + '`', *scores, *cost])} |")
    for who, title in TITLES.items():
        scores = [format_score(records[0]["scores"][who].get(column)) for column in columns]
        lines.append(f"| {' | '.join([title, *scores, '', ''])} |")
    return "\n".join([*lines, "", describe_runs(records)])


def describe_runs(records: list[dict[str, Any]]) -> str:
    record, rows = records[-1], records[-1]["rows"]
    by_machine: dict[str, list[str]] = {}
    for one in records:
        by_machine.setdefault(one["machine"], []).append(f"`{one['name']}`")
    named = len(by_machine) > 1
    machines = "; ".join(name + (f" ({', '.join(runs)})" if named else "") for name, runs in by_machine.items())
    return (
        f"{rows['train']:,} texts of training, {rows['validation']:,} of validation, {rows['test']:,} of test; "
        f"backbone `{record['backbone']}`; one run each on {machines}."
    )


def format_score(score: list[float] | None) -> str:
    if score is None:
        return ""
    value, *ends = (f"{100 * part:.1f}" for part in score)
    return f"{value} %" + (f" [{ends[0]}, {ends[1]}]" if ends else "")


if __name__ == "__main__":
    main()
