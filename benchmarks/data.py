"""Speed of preprocess against a plain `datasets.map` loop, and its memory on a million rows.

python benchmarks/data.py [--rows FOLDER] [--pairs 5] [--before CHECKOUT] [--million] [--folder DIR]

Speed: the rows of FOLDER (JSONL files with `question` and `answer`; default: data/local/gsm8k where it exists, else
made-up ones in the number and size of GSM8K's), with the vocabulary of the tiny model at 512 pieces, go in turn through
`lathe.data.prepare` (validation, duplicates, splits, prompt and answer tokenized apart, report, output) and through a
loop that does nothing but `apply_chat_template` on every row. Each run is a fresh process; imports, loading the
tokenizer and a first pass over few rows are not counted. Where other work shares the processor, only the processor time
of the two, all processes together, can be compared. With --before, that of an older commit goes third.

Memory, with --million alone: a million made-up rows. The peak is that of all processes together, pages they share
counted once (PSS, sampled from /proc), and the largest single one's (ru_maxrss). Prints Markdown tables.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parents[1]
PIECES = 512
GSM8K_ROWS = 8792
MILLION = 1_000_000
SECONDS_BETWEEN_SAMPLES = 0.5
MIB = 1 << 20


def main() -> None:
    """Make tokenizer and rows, run the cases, print the tables."""
    arguments = _arguments()
    if arguments.child:
        _run_child(arguments.child, arguments.tokenizer, arguments.raw, arguments.work)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-data-") as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer")
        if arguments.million:
            write_problems(folder / "raw", MILLION, words=16)
            sys.stdout.write(_memory_report(run_apart("lathe", folder, folder / "raw", sample_memory=True)))
        else:
            raw = arguments.rows or ROOT / "data/local/gsm8k"
            if not raw.is_dir():
                raw = folder / "raw"
                write_problems(raw, GSM8K_ROWS, words=100)
            names = ["lathe", "plain", *(["before"] if arguments.before else [])]
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for pair in range(arguments.pairs):
                for name in names if pair % 2 == 0 else names[::-1]:
                    checkout = arguments.before if name == "before" else None
                    child = "plain" if name == "plain" else "lathe"
                    runs[name].append(run_apart(child, folder, raw, checkout=checkout))
            sys.stdout.write(_speed_report(runs, "made-up rows" if raw.is_relative_to(folder) else raw.name))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="folder of JSONL files with question and answer")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument(
        "--before", type=Path, metavar="CHECKOUT", help="a checkout of an older commit, run in turn too"
    )
    parser.add_argument("--million", action="store_true", help="the memory of a million rows instead")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--child", choices=("lathe", "plain"), help=argparse.SUPPRESS)
    for name in ("tokenizer", "raw", "work"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_tokenizer(folder: Path) -> None:
    """Make the tokenizer of the tiny model without the model."""
    from lathe.sources.builtin import household_commands, tiny_model

    folder.mkdir()
    recipe = replace(tiny_model.RECIPE, vocab_size=PIECES)
    vocabulary = tiny_model._train_vocabulary(household_commands.make_documents(42, recipe.documents), 42, PIECES)
    tiny_model._save_tokenizer(folder, vocabulary, recipe)


def write_problems(folder: Path, rows: int, *, words: int) -> None:
    """Write made-up word problems of so many words each, the answer half of them, all different."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    known = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(8000)]
    weights = [1 / (rank + 3) for rank in range(len(known))]  # as words are distributed in a language
    folder.mkdir()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(rows):
            text = generator.choices(known, weights, k=words)
            middle = words // 2
            question = f"Problem {number}: {' '.join(text[:middle])}?"
            answer = f"{' '.join(text[middle:])} <<{number}+1={number + 1}>>\n#### {number + 1}"
            lines.write(json.dumps({"question": question, "answer": answer}) + "\n")


def run_apart(
    child: str, folder: Path, raw: Path, *, sample_memory: bool = False, checkout: Path | None = None
) -> dict[str, Any]:
    """Run one case in a fresh process; return what it measured, with the peak memory of all its processes if asked."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    command = [sys.executable, __file__, "--child", child, "--tokenizer", str(folder / "tokenizer")]
    command += ["--raw", str(raw), "--work", str(work)]
    source = (checkout or ROOT) / "src"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "PYTHONPATH": str(source)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    peak = _Peak(process.pid) if sample_memory else None
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {**measured, "peak_bytes": peak.bytes()} if peak else measured


class _Peak:
    """The largest memory that a process and its descendants held together, sampled while they run."""

    def __init__(self, pid: int) -> None:
        self.pid, self.largest = pid, 0
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def bytes(self) -> int:
        self.thread.join()
        return self.largest

    def _sample(self) -> None:
        while held := sum(map(_held_bytes, _with_descendants(self.pid))):
            self.largest = max(self.largest, held)
            time.sleep(SECONDS_BETWEEN_SAMPLES)


def _with_descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        below = [int(child) for child in children.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []
    return [pid, *(each for child in below for each in _with_descendants(child))]


def _held_bytes(pid: int) -> int:
    """Return the process's share of the memory that it holds, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _run_child(child: str, tokenizer_folder: Path, raw: Path, work: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    run = _lathe if child == "lathe" else _plain
    few = work / "few"
    write_problems(few, 200, words=20)
    run(tokenizer, few, work / "first")
    started, busy = time.perf_counter(), _processor_seconds()
    rows = run(tokenizer, raw, work / "out")
    measured = {
        "rows": rows,
        "seconds": time.perf_counter() - started,
        "processor_seconds": _processor_seconds() - busy,
        "largest_process_bytes": max(usage.ru_maxrss for usage in _usages()) * 1024,
    }
    sys.stdout.write(json.dumps(measured) + "\n")


def _usages() -> list[resource.struct_rusage]:
    return [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]


def _processor_seconds() -> float:
    return sum(usage.ru_utime + usage.ru_stime for usage in _usages())


def _lathe(tokenizer: Any, raw: Path, work: Path) -> int:
    from lathe.config.params import Preprocess
    from lathe.config.presets import LocalDataset
    from lathe.data.prepare import prepare

    work.mkdir()
    values: dict[str, Any] = {
        "validation_fraction": 0.1,
        "test_fraction": 0.1,
        "max_dropped_fraction": 0.0,
        "normalize_unicode": False,
        "too_long": "drop",
        "max_truncated_fraction": 0.0,
        "max_overlap_fraction": 1.0,
        "added_tokens": [],
        "supervise": "all",
        "chat_template_kwargs": {},
    }
    # An older commit may not have all of them.
    settings = Preprocess(**{name: value for name, value in values.items() if name in Preprocess.model_fields})
    preset = LocalDataset(source="local", path=str(raw), prompt="question", completion="answer")
    prepared = prepare(raw, preset, work, tokenizer=tokenizer, seed=42, max_length=2048, settings=settings)
    rows: int = prepared.report["rows"]["read"]
    return rows


def _plain(tokenizer: Any, raw: Path, work: Path) -> int:
    import datasets

    datasets.disable_progress_bars()

    def encode(row: dict[str, str]) -> Any:
        chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        return tokenizer.apply_chat_template(chat, return_dict=True)

    files = {file.stem: str(file) for file in sorted(raw.glob("*.jsonl"))}
    encoded = datasets.load_dataset("json", data_files=files, cache_dir=str(work)).map(encode)
    return sum(split.num_rows for split in encoded.values())


def _speed_report(runs: dict[str, list[dict[str, Any]]], what: str) -> str:
    speeds = {name: [run["rows"] / run["seconds"] for run in found] for name, found in runs.items()}
    costs = {name: [run["processor_seconds"] / run["rows"] * 1e6 for run in found] for name, found in runs.items()}
    others = {"plain": "datasets.map", "before": "before"}
    headings = [f"{shown} | ratio (range)" for name, shown in others.items() if name in runs]
    lines = [
        f"{runs['lathe'][0]['rows']:,} rows ({what}), {PIECES} pieces, medians of {len(runs['lathe'])} runs of each.",
        f"Machine: {machine.describe()}.",
        "",
        f"| | lathe | {' | '.join(headings)} |",
        f"| --- | ---: |{' ---: | ---: |' * len(headings)}",
        _row("rows/s", speeds, ratio=lambda ours, theirs: ours / theirs),
        _row("processor, µs/row", costs, ratio=lambda ours, theirs: theirs / ours),
        "",
        f"lathe's range is {min(speeds['lathe']):,.0f} to {max(speeds['lathe']):,.0f} rows/s.",
    ]
    return "\n".join(lines) + "\n"


def _row(label: str, values: dict[str, list[float]], ratio: Callable[[float, float], float]) -> str:
    ours, *others = values.values()
    cells = [f"{statistics.median(ours):,.0f}"]
    for theirs in others:
        ratios = [ratio(*pair) for pair in zip(ours, theirs, strict=True)]
        cells.append(f"{statistics.median(theirs):,.0f}")
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return f"| {label} | {' | '.join(cells)} |"


def _memory_report(run: dict[str, Any]) -> str:
    lines = [
        f"{run['rows']:,} made-up rows, {PIECES} pieces, one run.",
        f"Machine: {machine.describe()}.",
        "",
        "| seconds | rows/s | peak of all processes, MiB | largest process, MiB |",
        "| ---: | ---: | ---: | ---: |",
        f"| {run['seconds']:.0f} | {run['rows'] / run['seconds']:,.0f} | {run['peak_bytes'] / MIB:,.0f} "
        f"| {run['largest_process_bytes'] / MIB:,.0f} |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
