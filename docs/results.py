"""Record what recipes scored, and write the page of results from the records.

reads   an experiment's metrics and parameters (record); docs/results/*.json (page)
writes  docs/results/NAME.json (record); docs/results.md (page)
run     python docs/results.py record NAME …    # experiments that have run on this machine, or `workspace`
        python docs/results.py                  # the page
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import machine

from lathe.common import entry_point
from lathe.common.errors import InputError
from lathe.provenance.revisions import WORKSPACE, Revision, find_revision

RECORDS, PAGE = ROOT / "docs/results", ROOT / "docs/results.md"
SPLIT = "test"
MEASURED = ("perplexity", "kl", "general_perplexity", "stop_rate")
SHARES = (
    "exact_match",
    "json_valid",
    "json_fields",
    "tool_calls",
    "tool_calls_f1",
    "token_f1",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "bert_score",
    "stop_rate",
)
TITLES = {
    "exact_match": "exact match",
    "json_valid": "valid JSON",
    "json_fields": "JSON fields",
    "tool_calls": "tool calls",
    "tool_calls_f1": "tool calls F1",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "bert_score": "BERTScore",
    "kl": "KL to f16",
    "general_perplexity": "general text",
    "stop_rate": "stops by itself",
}
HEAD = """# Results

What recipes that have been run scored on held-out **test** rows; 95 % intervals in brackets. What the columns mean:
[Evaluation](evaluation.md). `python docs/results.py record NAME` puts the metrics of an experiment into
`docs/results/`, and this page is written from there; nothing on it is written by hand.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["record"], help="record the metrics of experiments")
    parser.add_argument("names", nargs="*", help="experiments, or `workspace`")
    arguments = parser.parse_args()
    entry_point.guard(lambda: run(arguments.names))


def run(names: list[str]) -> None:
    for name in names:
        record = make_record(find_revision(name))
        target = RECORDS / f"{record['name']}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(render_page(), encoding="utf-8")


def make_record(revision: Revision) -> dict[str, Any]:
    """Return what the page shows of a run. Raises InputError if the revision has no scores."""
    scores = revision.read_json(f"metrics/evaluate/{SPLIT}.json")
    if scores is None:
        raise InputError(
            f"{revision.name}: holds no scores; run it first: `lathe run {revision.name}`", code="no-scores"
        )
    parameters = revision.parameters
    method = parameters["training"]["method"]
    metrics = [*parameters["evaluate"]["metrics"], *MEASURED]
    timings = read_timings(revision)
    return {
        "name": parameters["model"] if revision.name == WORKSPACE else revision.name,
        "model": parameters["model"],
        "dataset": parameters["dataset"],
        "parameters": {
            "method": method,
            "tuning": parameters["training"]["tuning"],
            "4-bit base": parameters["quantization"]["load_in_4bit"],
            "rank": parameters["lora"]["r"],
            "blocks": parameters["lora"].get("num_layers") or "all",
            # That of the method; before it dpo and grpo train a supervised phase at that of the section training.
            "learning rate": parameters["training" if method == "sft" else method]["learning_rate"],
            "steps": revision.read_json("metrics/train/metrics.json")["step"],
        },
        "rows": count_rows(revision),
        "primary_metric": parameters["evaluate"]["primary_metric"],
        "artifacts": {name: select_scores(entry, metrics) for name, entry in scores.items()},
        "gates": count_gates(revision),
        "seconds": {stage: timing["seconds"] for stage, timing in timings.items()},
        "tokens_per_second": timings.get("train", {}).get("tokens_per_second"),
        "peak_memory_bytes": timings.get("train", {}).get("peak_memory_bytes"),
        "machine": machine.describe().partition(", load")[0],
    }


def count_rows(revision: Revision) -> dict[str, int]:
    """Return the rows of training, and the held-out ones that were answered."""
    report = revision.read_json("metrics/preprocess/report.json")
    rows = {entry["split"]: entry["kept"] for entry in report["splits"]}
    most = revision.parameters["generate"]["max_rows"]
    return {split: count if split == "train" or most is None else min(most, count) for split, count in rows.items()}


def select_scores(entry: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
    """Return the wanted scores of an artifact as [value, low, high], and its size."""
    ends = {interval["metric"]: [interval["low"], interval["high"]] for interval in entry.get("intervals", [])}
    values = {metric: [entry[metric], *ends.get(metric, [])] for metric in metrics if entry.get(metric) is not None}
    return {**values, "bytes": entry["bytes"]}


def count_gates(revision: Revision) -> dict[str, int] | None:
    gates = revision.read_json("metrics/evaluate/gates.json")
    return None if gates is None else {key: gates[key] for key in ("passed", "failed") if key in gates}


def read_timings(revision: Revision) -> dict[str, dict[str, Any]]:
    """Return what was measured of each stage that has run."""
    stages = (
        "fetch",
        "preprocess",
        "train",
        "merge",
        "convert",
        "check_converted",
        "imatrix",
        "quantize",
        "generate",
        "judge",
        "evaluate",
    )
    timings = {stage: revision.read_json(f"metrics/timings/{stage}.json") for stage in stages}
    return {stage: timing for stage, timing in timings.items() if timing}


def render_page() -> str:
    """Return the page of all records."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RECORDS.glob("*.json"))]
    return "\n".join([HEAD, *(render_record(record) for record in records)])


def render_record(record: dict[str, Any]) -> str:
    """Return the section of one run."""
    rows, settings = record["rows"], record["parameters"]
    metrics = list(dict.fromkeys(key for scores in record["artifacts"].values() for key in scores if key != "bytes"))
    header = ["artifact", *(TITLES.get(metric, metric) for metric in metrics), "size"]
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    for name, scores in record["artifacts"].items():
        cells = [f"`{name}`", *(format_score(metric, scores.get(metric)) for metric in metrics)]
        lines.append(f"| {' | '.join([*cells, format_bytes(scores['bytes'])])} |")
    shown = ", ".join(f"{key} {value}" for key, value in settings.items())
    seconds = record["seconds"]
    parts = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items() if value >= 1)
    memory = f", {record['peak_memory_bytes'] / 1e9:.1f} GB at most in training" if record["peak_memory_bytes"] else ""
    speed = f", {record['tokens_per_second']:,.0f} tokens/s" if record["tokens_per_second"] else ""
    return "\n".join(
        [
            f"## {record['name']}",
            "",
            f"Model `{record['model']}`, dataset `{record['dataset']}`: {rows['train']:,} rows of training, "
            f"{rows.get(SPLIT, 0):,} of test. {shown}.",
            "",
            *lines,
            "",
            f"{sum(seconds.values()):,.0f} s on {record['machine']}: {parts}{speed}{memory}.",
            "",
        ]
    )


def format_score(metric: str, score: list[float] | None) -> str:
    """Return a value with its interval as a cell: a share in percent, other numbers with four digits."""
    if score is None:
        return ""
    value, *ends = (f"{100 * part:.1f}" if metric in SHARES else format_number(part) for part in score)
    unit = " %" if metric in SHARES else ""
    return f"{value}{unit}" + (f" [{ends[0]}, {ends[1]}]" if ends and metric != "stop_rate" else "")


def format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1e}" if 0 < value < 0.01 else f"{value:.4g}"


def format_bytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


if __name__ == "__main__":
    main()
