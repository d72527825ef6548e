"""Time and memory of lathe's merge against PEFT's and mergekit's, on a random model of the shape of Qwen3-0.6B.

python benchmarks/merge.py [--rounds 3] [--folder DIR]

Makes the model (bf16, tied embeddings, three shards) and an r = 16 adapter on all linear layers in a
temporary folder (8 GB are needed), merges them in turn with `lathe.models.merge`, with PEFT (load in bf16,
merge_and_unload, save_pretrained) and with mergekit (which has an environment of its own, made in `.bench/` the first
time), each time in a fresh process, compares what they wrote bit by bit, and prints a Markdown table. Wall seconds are
those of the whole process, imports included, then those of the merge alone; memory is the peak resident set
(ru_maxrss), for ours also above a Python that has only imported torch.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import machine
from random_models import QWEN3_600M, RANK, make_adapter, make_base
from trainers.environments import python_of

MIB = 1 << 20
PEERS = {"peft": "PEFT", "mergekit": "mergekit"}


def main() -> None:
    """Make the model, run the pairs, print the table."""
    arguments = _arguments()
    if arguments.child:
        _run_child(arguments.child, *arguments.paths)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-merge-") as name:
        folder = Path(name)
        base, adapter = folder / "base", folder / "adapter"
        # Made in a process of its own: a child starts with its parent's peak memory as its own.
        _run_apart("make", base, adapter, folder)
        largest_shard = max(path.stat().st_size for path in base.glob("*.safetensors"))
        idle = _measure("idle", base, adapter, folder / "idle").peak_bytes
        runs: dict[str, list[_Run]] = {name: [] for name in ("lathe", *PEERS)}
        for number in range(arguments.rounds):
            for child in runs if number % 2 == 0 else reversed(runs):
                runs[child].append(_measure(child, base, adapter, folder / child))
        equal = {peer: _count_equal_tensors(folder / "lathe", folder / peer) for peer in PEERS}
        sys.stdout.write(_report(runs, idle, largest_shard, equal))


@dataclass(frozen=True)
class _Run:
    process_seconds: float
    merge_seconds: float
    peak_bytes: int


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="merges by each (default 3)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--child", choices=("make", "idle", "lathe", *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(child: str, base: Path, adapter: Path, out: Path) -> _Run:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    # What the last run wrote is still on its way to the disk, and would slow down whoever comes next.
    os.sync()
    started = time.perf_counter()
    measured = json.loads(_run_apart(child, base, adapter, out))
    return _Run(time.perf_counter() - started, measured["seconds"], measured["peak_bytes"])


def _run_apart(child: str, base: Path, adapter: Path, out: Path) -> str:
    """Run one step in a fresh process; return the last line that it wrote."""
    command = [python_of(child), __file__, "--child", child, *map(str, (base, adapter, out))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout.splitlines()[-1]


def _run_child(child: str, base: Path, adapter: Path, out: Path) -> None:
    # Imported by all, so that `idle` shows what they alone take.
    import safetensors.torch  # noqa: F401
    import torch

    started = time.perf_counter()
    if child == "make":
        make_base(QWEN3_600M, base)
        make_adapter(QWEN3_600M, adapter)
    elif child == "lathe":
        from lathe.models.merge.merge import merge

        started = time.perf_counter()
        merge(base, adapter, out, dtype="auto", max_shard_size_bytes=5_000_000_000)
    elif child == "peft":
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    elif child == "mergekit":
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        started = time.perf_counter()
        recipe = {"models": [{"model": f"{base}+{adapter}"}], "merge_method": "passthrough", "dtype": "bfloat16"}
        cache = out.with_name("mergekit-cache")
        shutil.rmtree(cache, ignore_errors=True)
        options = MergeOptions(lora_merge_cache=str(cache), copy_tokenizer=False, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    elapsed = time.perf_counter() - started
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"seconds": elapsed, "peak_bytes": peak_bytes}) + "\n")


def _count_equal_tensors(one: Path, other: Path) -> tuple[int, int]:
    """How many tensors of the two folders are equal bit by bit, and how many there are in all."""
    import torch
    from safetensors import safe_open

    def files_by_tensor(folder: Path) -> dict[str, Path]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    def read(path: Path, name: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    first, second = files_by_tensor(one), files_by_tensor(other)
    equal = sum(torch.equal(read(first[name], name), read(second[name], name)) for name in first.keys() & second.keys())
    return equal, len(first.keys() | second.keys())


def _report(runs: dict[str, list[_Run]], idle: int, largest_shard: int, equal: dict[str, tuple[int, int]]) -> str:
    def median(child: str, field: str) -> float:
        return statistics.median(getattr(run, field) for run in runs[child])

    def ratios(peer: str, field: str) -> str:
        rounds = [
            getattr(theirs, field) / getattr(ours, field)
            for ours, theirs in zip(runs["lathe"], runs[peer], strict=True)
        ]
        return f"{statistics.median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"

    rows = [
        ("whole process, seconds", "process_seconds", 1.0, ".2f"),
        ("merge alone, seconds", "merge_seconds", 1.0, ".2f"),
        ("peak memory, MiB", "peak_bytes", float(MIB), ".0f"),
    ]
    lines = [
        f"A random Qwen3-0.6B (bf16) and an adapter of r = {RANK}, medians of {len(runs['lathe'])} rounds.",
        f"Machine: {machine.describe()}.",
        "",
        f"| | lathe | {' | '.join(f'{name} | {name} / lathe (range)' for name in PEERS.values())} |",
        f"| --- | ---: | {' | '.join(['---: | ---:'] * len(PEERS))} |",
    ]
    for label, field, unit, form in rows:
        cells = [f"{median('lathe', field) / unit:{form}}"]
        for peer in PEERS:
            cells += [f"{median(peer, field) / unit:{form}}", ratios(peer, field)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    worst = max(run.peak_bytes for run in runs["lathe"])
    alike = "; ".join(f"{PEERS[peer]}: {same} of {total}" for peer, (same, total) in equal.items())
    lines += [
        "",
        f"lathe's highest peak is {(worst - idle) / MIB:.0f} MiB above Python with torch ({idle / MIB:.0f} MiB); "
        f"the largest shard has {largest_shard / MIB:.0f} MiB. Tensors that are lathe's bit by bit: {alike}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
