"""What each part takes as rows, weights and experiments grow: python benchmarks/growth.py [--plot FILE] [--folder DIR].

Rows: made-up rows of 16 words through `preprocess`, 10,000 to 1,000,000. Weights: random Llamas of 0.1 to 3 B with the
tokenizer of this checkout's base model; of each, a step of LoRA (4 rows of 128 tokens), the merge, the conversion to
f16 and the quantization to Q4_K_M, each in a fresh process (14 GB of disk in the temporary folder). Experiments: 1 to
500 in a clone, listed by `dvc exp show`, for the first time and again. Prints Markdown tables with the exponent b of
seconds ~ size^b between the last two sizes, where 1 is linear and less is better than linear, and draws them.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
from random_models import Shape, make_adapter, make_base
from trainers.work import Settings, Work

import data
import experiments
from lathe.common import paths

ROWS = (10_000, 100_000, 1_000_000)
EXPERIMENTS = (1, 10, 100, 500)
VOCABULARY = 49_152
SHAPES = {
    "0.1": Shape("llama", 576, 30, 1536, 9, 3, 64, VOCABULARY),  # SmolLM2's three sizes, and one with more layers
    "0.4": Shape("llama", 960, 32, 2560, 15, 5, 64, VOCABULARY),
    "1.7": Shape("llama", 2048, 24, 8192, 32, 32, 64, VOCABULARY),
    "3.0": Shape("llama", 2048, 43, 8192, 32, 32, 64, VOCABULARY),
}
STEP_ROWS, STEP_LENGTH = 4, 128
LINEAR = 1.1  # goal: no exponent above
GIB = 1 << 30

# Of each part: size, seconds and bytes at the peak (None where that is not measured).
Points = dict[str, list[tuple[float, float, int | None]]]


def main() -> None:
    """Measure, print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="SVG file to draw, such as docs/growth.svg (default: none)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows, by commas")
    parser.add_argument("--models", default=",".join(SHAPES), help=f"which, by commas, of {', '.join(SHAPES)}")
    parser.add_argument("--experiments", default=",".join(map(str, EXPERIMENTS)), help="how many, by commas")
    parser.add_argument("--child", choices=("make", "train", "merge", "convert", "quantize"))
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _run_child(arguments.child, *arguments.rest)
        return
    print(f"{machine.describe()}; one run\n", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-growth-") as name:
        folder = Path(name)
        chosen = list(filter(None, arguments.models.split(",")))
        tables = {
            "rows": _measure_rows(folder, list(_read_numbers(arguments.rows))),
            "weights": _measure_models(folder, chosen),
            "experiments": _measure_experiments(folder, list(_read_numbers(arguments.experiments))),
        }
    goals = [line for what, points in tables.items() for line in _print(what, points)]
    print("\n".join(goals))
    if arguments.plot:
        _draw(tables, arguments.plot)


def _read_numbers(text: str) -> Iterator[int]:
    yield from (int(number) for number in text.split(",") if number)


def _measure_rows(folder: Path, counts: list[int]) -> Points:
    points: Points = {"preprocess": []}
    if counts:
        data.make_tokenizer(folder / "tokenizer")
    for count in counts:
        raw = folder / "raw"
        data.write_problems(raw, count, words=16)
        run = data.run_apart("lathe", folder, raw, sample_memory=True)
        points["preprocess"].append((count, run["seconds"], run["peak_bytes"]))
        shutil.rmtree(raw)
    return points


def _measure_models(folder: Path, names: list[str]) -> Points:
    points: Points = {"a step of training": [], "merge": [], "convert": [], "quantize": []}
    for name in names:
        base, adapter, merged = folder / "model", folder / "adapter", folder / "merged"
        f16, small = folder / "f16.gguf", folder / "Q4_K_M.gguf"
        # Apart, as a process begins with the peak of its parent.
        _time(_self("make", Path(name), base, adapter))
        size = SHAPES[name].parameters
        points["a step of training"].append((size, *_time_step(folder)))
        points["merge"].append((size, *_time(_self("merge", base, adapter, merged))))
        for file in (paths.ROOT / "models/base").glob("*token*"):
            shutil.copy2(file, merged)
        shutil.rmtree(base)
        points["convert"].append((size, *_time(_self("convert", merged, f16))))
        shutil.rmtree(merged)
        points["quantize"].append((size, *_time(_self("quantize", f16, small))))
        for used in (adapter, folder / "rows"):
            shutil.rmtree(used)
        f16.unlink()
        small.unlink()
        print(f"{size / 1e9:.1f} B: measured", file=sys.stderr, flush=True)
    return points


def _time_step(folder: Path) -> tuple[float, int]:
    """Return the median seconds of a step after the second, and the peak of the process (bytes)."""
    from trainers.materials import write_forms

    chance = random.Random(1)
    words = [f"{chance.randrange(1000)}" for _ in range(1000)]
    rows = []
    for _ in range(STEP_ROWS * 6):
        asked = " ".join(chance.choices(words, k=STEP_LENGTH // 4))
        rows.append([{"role": "user", "content": asked}, {"role": "assistant", "content": asked[: STEP_LENGTH // 8]}])
    write_forms({"messages": [{"messages": messages} for messages in rows]}, folder / "rows")
    work = Work(Settings("lathe"), str(folder), 5, STEP_ROWS, STEP_LENGTH, load_in_4bit=False)
    work.write(folder / "work.json")
    _, peak = _time(_self("train", folder / "work.json", folder / "steps.json"))
    ended = [step["ended"] for step in json.loads((folder / "steps.json").read_text(encoding="utf-8"))["steps"]]
    steps = sorted(after - before for before, after in itertools.pairwise(ended[1:]))
    return steps[len(steps) // 2], peak


def _measure_experiments(folder: Path, counts: list[int]) -> Points:
    points: Points = {"exp show, first": [], "exp show, again": []}
    show = [experiments.DVC, "exp", "show", "--csv"]
    for count in counts:
        clone = folder / f"clone-{count}"
        subprocess.run(["git", "clone", "--quiet", str(experiments.ROOT), str(clone)], check=True)
        for number in range(count):
            experiments.make_experiment(clone, number)
        points["exp show, first"].append((count, _time(show, clone)[0], None))
        points["exp show, again"].append((count, min(_time(show, clone)[0] for _ in range(3)), None))
        shutil.rmtree(clone)
    return points


def _self(child: str, *arguments: Path) -> list[str]:
    return [sys.executable, __file__, "--child", child, *map(str, arguments)]


def _time(command: list[str], folder: Path | None = None) -> tuple[float, int]:
    """Run a command; return its seconds, and the peak of its process (bytes), that of its own children aside."""
    os.sync()  # what was written before would slow it down
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = str(paths.ROOT / "src")
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode(errors='replace')[-3000:]}")
    return seconds, usage.ru_maxrss * 1024


def _run_child(child: str, *arguments: str) -> None:
    children: dict[str, Callable[..., None]] = {
        "make": _make,
        "train": _train,
        "merge": _merge,
        "convert": _convert,
        "quantize": _quantize,
    }
    children[child](*map(Path, arguments))


def _make(name: Path, base: Path, adapter: Path) -> None:
    make_base(SHAPES[str(name)], base, paths.ROOT / "models/base")
    make_adapter(SHAPES[str(name)], adapter)


def _train(work: Path, result: Path) -> None:
    from trainers import lathe_sft, steps

    steps.record(result)
    lathe_sft.run(Work.read(str(work)))


def _merge(base: Path, adapter: Path, out: Path) -> None:
    from lathe.models.merge.merge import merge

    out.mkdir()
    merge(base, adapter, out, dtype="auto", max_shard_size_bytes=5_000_000_000)


def _convert(model: Path, out: Path) -> None:
    from lathe.gguf.convert import convert

    convert(model, out, outtype="f16", llama_cpp=paths.LLAMA_CPP, metadata={})


def _quantize(source: Path, out: Path) -> None:
    from lathe.gguf.quantize import quantize

    quantize(source, out, type="Q4_K_M", threads=os.cpu_count() or 1)


def _print(what: str, points: Points) -> list[str]:
    """Print a table; return whether each part is linear, a line each."""
    goals = []
    if not any(points.values()):
        return goals
    print(f"| {what} | {' | '.join(f'{part}, seconds' for part in points)} | peak, GiB |")
    print(f"| ---: | {'---: | ' * len(points)}---: |")
    for row in zip(*points.values(), strict=True):
        size = row[0][0]
        peaks = ", ".join(f"{peak / GIB:.1f}" for _, _, peak in row if peak)
        seconds = " | ".join(f"{second:.2f}" for _, second, _ in row)
        print(f"| {size:,.0f} | {seconds} | {peaks} |")
    for part, measured in points.items():
        if len(measured) > 1:
            (size, seconds, _), (larger, longer, _) = measured[-2:]
            exponent = math.log(longer / seconds) / math.log(larger / size)
            met = "met" if exponent <= LINEAR else "NOT MET"
            goals.append(f"- {met}: {part} grows as {what} to the power of {exponent:.2f} (goal: at most {LINEAR})")
    print(flush=True)
    return goals


def _draw(tables: dict[str, Points], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lathe"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(12, 3.6), layout="constrained")
    for axis, (what, points) in zip(axes, tables.items(), strict=True):
        for part, measured in points.items():
            axis.loglog([size for size, _, _ in measured], [seconds for _, seconds, _ in measured], "o-", label=part)
        low, high = axis.get_xlim()
        bottom, top = axis.get_ylim()
        across = min(high / low, top / bottom)
        axis.plot([low, low * across], [bottom, bottom * across], ":", color="grey", label="linear")
        axis.set(xlabel=what, ylabel="seconds", xlim=(low, high), ylim=(bottom, top))
        axis.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
