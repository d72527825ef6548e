"""Conversion and quantization by the pipeline against llama.cpp's own programs: seconds, memory, and equal tensors.

python benchmarks/convert.py [--rounds 3] [--folder DIR]

Takes the merged model of this checkout, and makes a random one of 1.1 B weights with the same tokenizer (10 GB of disk
in the temporary folder). Each is converted to f16 by what the stage `convert` calls and by `convert_hf_to_gguf.py`, and
quantized to Q4_K_M by what the stage `quantize` calls and by `llama-quantize` (built by `make llama-server`), in turn,
each in a fresh process, whose imports count. Then the tensors of both files are compared: names, types and bytes.
Prints Markdown tables.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import machine
from random_models import Shape, make_base

from lathe.common import paths
from lathe.gguf.build_llama_server import QUANTIZE, find_program

ONE_BILLION = Shape("llama", 2048, 16, 8192, 32, 8, 64, 49_152)
TYPE = "Q4_K_M"
MOST_OVERHEAD = 0.05  # goal: of the seconds of llama.cpp's program
MIB = 1 << 20


@dataclass(frozen=True)
class _Run:
    seconds: float
    processor_seconds: float
    peak_bytes: int


def main() -> None:
    """Measure both models and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default 3)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--child", choices=("make", "convert", "quantize", "count"), help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _run_child(arguments.child, *arguments.paths)
        return
    program = find_program(QUANTIZE)
    if program is None:
        raise SystemExit(f"error: {QUANTIZE} is not built; run: make llama-server")
    merged = paths.ROOT / "models/merged"
    if not (merged / "config.json").is_file():
        raise SystemExit(f"error: {merged}: no model there; run the pipeline first: make repro")
    print(f"{machine.describe()}; medians of {arguments.rounds} rounds; {QUANTIZE} with {_threads()} threads\n")
    print(
        "| model | step | | seconds | of llama.cpp's (range) | processor seconds | of llama.cpp's | peak, MiB | "
        "tensors |\n| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    goals = []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-convert-") as name:
        folder = Path(name)
        random = folder / "random"
        _run_apart("make", merged, random)
        for title, model in (("of this checkout", merged), ("random, 1.1 B", random)):
            f16 = folder / "lathe-f16.gguf"
            steps = {
                "convert": ({"lathe": [_self("convert"), model], "llama.cpp": [_converter(), model]}, "f16.gguf"),
                "quantize": ({"lathe": [_self("quantize"), f16], "llama.cpp": [[str(program)], f16]}, f"{TYPE}.gguf"),
            }
            for step, (commands, ending) in steps.items():
                outs = {by: folder / f"{by}-{ending}" for by in commands}
                runs: dict[str, list[_Run]] = {by: [] for by in commands}
                for number in range(arguments.rounds):
                    for by in commands if number % 2 == 0 else reversed(commands):
                        begin, source = commands[by]
                        runs[by].append(_measure(_complete(begin, source, outs[by], step, by), outs[by]))
                goals += _print(title, step, runs, _run_apart("count", *outs.values()))
                outs["llama.cpp"].unlink()
            for file in folder.glob("*.gguf"):
                file.unlink()
    print("\n" + "\n".join(goals))


def _threads() -> int:
    return os.cpu_count() or 1


def _self(step: str) -> list[str]:
    return [sys.executable, __file__, "--child", step]


def _converter() -> list[str]:
    return [sys.executable, str(paths.LLAMA_CPP / "convert_hf_to_gguf.py")]


def _complete(begin: list[str], source: Path, out: Path, step: str, by: str) -> list[str]:
    if by == "lathe":
        return [*begin, str(source), str(out)]
    if step == "convert":
        return [*begin, str(source), "--outtype", "f16", "--outfile", str(out)]
    return [*begin, str(source), str(out), TYPE, str(_threads())]


def _run_child(step: str, source: Path, out: Path) -> None:
    """Do what the stage does with a model; or what is done apart, as a process begins with the peak of its parent."""
    if step == "make":
        make_base(ONE_BILLION, out, source)
        return
    if step == "count":
        print("{} of {}".format(*_count_equal_tensors(source, out)))
        return
    if step == "convert":
        from lathe.gguf.convert import convert
        from lathe.models.weight_range import find_beyond_f16

        assert find_beyond_f16(source) is None
        convert(source, out, outtype="f16", llama_cpp=paths.LLAMA_CPP, metadata={"lathe.note": "a benchmark"})
        return
    from lathe.gguf.description import describe_gguf
    from lathe.gguf.quantize import quantize

    quantize(source, out, type=TYPE, threads=_threads())
    describe_gguf(out)


def _measure(command: list[str], out: Path) -> _Run:
    out.unlink(missing_ok=True)
    os.sync()  # what the last run wrote would slow down whoever comes next
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=_environment(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return _Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _run_apart(step: str, *arguments: Path) -> str:
    command = [*_self(step), *map(str, arguments)]
    return subprocess.run(
        command, env=_environment(os.environ), stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    return {**own, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(paths.ROOT / "src")}


def _count_equal_tensors(one: Path, other: Path) -> tuple[int, int]:
    """How many tensors of two GGUF files have the same name, type and bytes, and how many there are in all."""
    import gguf

    first, second = (
        {
            tensor.name: (tensor.tensor_type, hashlib.sha256(tensor.data.tobytes()).hexdigest())
            for tensor in gguf.GGUFReader(file).tensors
        }
        for file in (one, other)
    )
    names = first.keys() | second.keys()
    return sum(name in first and first[name] == second.get(name) for name in names), len(names)


def _print(title: str, step: str, runs: dict[str, list[_Run]], equal: str) -> list[str]:
    """Print the lines of a step; return whether its goals are met, a line each."""

    def ratios(field: str) -> list[float]:
        pairs = zip(runs["lathe"], runs["llama.cpp"], strict=True)
        return [getattr(ours, field) / getattr(theirs, field) for ours, theirs in pairs]

    for by, ran in runs.items():
        seconds, processor = (statistics.median(getattr(run, field) for run in ran) for field in _FIELDS)
        peak = statistics.median(run.peak_bytes for run in ran) / MIB
        wall, busy = ratios("seconds"), ratios("processor_seconds")
        compared = f"{statistics.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f}) | {processor:.1f}"
        compared += f" | {statistics.median(busy):.2f}"
        alone = f" | {processor:.1f} | "
        cells = compared if by == "lathe" else alone
        print(f"| {title} | {step} | {by} | {seconds:.2f} | {cells} | {peak:.0f} | {equal} |", flush=True)
    overhead = statistics.median(ratios("seconds")) - 1
    met = "met" if overhead <= MOST_OVERHEAD else "NOT MET"
    return [f"- {met}: {step}, {title}: {100 * overhead:+.0f} % seconds (goal: at most {100 * MOST_OVERHEAD:.0f} %)"]


_FIELDS = ("seconds", "processor_seconds")

if __name__ == "__main__":
    main()
