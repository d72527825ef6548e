"""Speed, memory and start-up of lathe's training against TRL's and LLaMA-Factory's: same rows, model and adapter.

python benchmarks/train.py [--cases NAME,…] [--rounds N] [--steps N] [--only PART] [--folder DIR]

Makes random models in a temporary folder, on the CPU one of Qwen3's shape with its vocabulary of 151,936 and a tiny
one, on a GPU one of 0.6 B and one of 8 B, 16-bit and 4-bit. Before them on the CPU comes a real one: the base model of
this checkout, of ChatML, such as SmolLM2, on questions of banking77 with their subjects as answers. Each is trained for
a few steps, LoRA on all linear layers, the last third of each random row supervised: by lathe, by TRL's `SFTTrainer`
(bf16 and gradient checkpointing are its defaults) and, on the CPU, by LLaMA-Factory (float32 and gradient checkpointing
are its defaults) in an environment of its own, which is made in `.bench/` the first time. On a GPU TRL runs with
Liger's kernels too where `liger-kernel` is installed. All run as they are, from text to steps, each in a fresh process,
in turn, in every round. Where an unpacked step of one holds other tokens than lathe's, or they supervise others, the
benchmark stops. LLaMA-Factory packs without letting rows see one another (`neat_packing`), as TRL and lathe do.

Prints, case by case, a Markdown table: supervised tokens per second of the steps after the second, their share of the
rate at which this device multiplies bf16 matrices (forward, backward through the activations, and output layer where it
is needed; what a trainer computes beyond that does not count, so that on a GPU it is the model-FLOPs utilisation), the
processor cores that were at work (fewer than the others where something else ran beside), peak memory (resident; on a
GPU what torch reserved) and seconds from the start of the process to the end of the first step.
Then how long the commands that users type take to the loss of the first step, and for each goal whether it is met.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
from trainers import startup
from trainers.environments import BENCHMARKS, python_of
from trainers.work import QWEN3_600M, Settings, Work, count_operations

WARM_UP_STEPS = 2  # of each run, not timed: what is done once, such as opening the log
PACKS = 2  # packs in a packed step, which together hold about as many tokens as the rows of an unpacked one
LOSS_NOISE = 0.01  # how far apart the losses of equal steps may be, in bf16 and in float32 (nats per token)
MIB = 1 << 20
BANKING77 = BENCHMARKS.parent / "experiments/benchmark/banking77.jsonl"
MODULES = {"lathe": "lathe_sft", "TRL": "trl_sft", "TRL with Liger": "trl_sft", "LLaMA-Factory": "llamafactory_sft"}


@dataclass(frozen=True)
class _Case:
    """A model and how it is trained: steps of `rows` rows of at most `longest` tokens, by each of `settings`."""

    title: str
    shape: dict[str, Any]
    longest: int
    rows: int
    steps: int
    rounds: int
    settings: tuple[Settings, ...]
    over_best: float  # goal: speed over the best peer's, at the same precision and checkpointing
    over_trl: float | None = None  # goal: speed over TRL's with its defaults
    no_more_memory: bool = False  # goal: than any peer with the same settings
    load_in_4bit: bool = False
    base: Path | None = None  # a real model, whose `shape` is read from it

    @property
    def shortest(self) -> int:
        return self.longest // 4


ON_CPU = (
    Settings("lathe"),
    Settings("lathe", packing=True),
    Settings("lathe", checkpointing=True),
    Settings("lathe", "fp32"),
    Settings("lathe", "fp32", checkpointing=True),
    Settings("TRL", checkpointing=True),
    Settings("TRL", checkpointing=True, packing=True),
    Settings("TRL"),
    Settings("TRL", packing=True),
    Settings("TRL", padding_free=True),
    Settings("LLaMA-Factory", "fp32", checkpointing=True),
    Settings("LLaMA-Factory", "fp32", checkpointing=True, packing=True),
    Settings("LLaMA-Factory", "fp32"),
    Settings("LLaMA-Factory", "fp32", packing=True),
    Settings("LLaMA-Factory", checkpointing=True),
    Settings("LLaMA-Factory", checkpointing=True, packing=True),
    Settings("LLaMA-Factory"),
    Settings("LLaMA-Factory", packing=True),
)
ON_GPU = tuple(
    Settings(trainer, packing=packing, checkpointing=True)
    for trainer in ("lathe", "TRL", "TRL with Liger")
    for packing in (False, True)
)

QWEN3_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}

CPU_CASES = {
    "smollm2": _Case(
        "the base model of this checkout",
        {},
        longest=96,
        rows=16,
        steps=10,
        rounds=1,
        settings=tuple(one for one in ON_CPU if one.precision == "bf16" and not (one.packing and one.checkpointing)),
        over_best=2.5,
        no_more_memory=True,
        base=BENCHMARKS.parent / "models/base",
    ),
    "qwen3": _Case(
        "Qwen3's shape, hidden 512, 8 layers, vocabulary 151,936",
        {
            "vocab_size": 151_936,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        longest=256,
        rows=4,
        steps=5,
        rounds=1,
        settings=ON_CPU,
        over_best=2.5,
        over_trl=4.0,
    ),
    "tiny": _Case(
        "tiny, hidden 256, 3 layers, vocabulary 512",
        {
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        longest=96,
        rows=32,
        steps=20,
        rounds=2,
        settings=ON_CPU,
        over_best=1.5,
    ),
}
GPU_CASES = {
    f"{name}-{kind}": _Case(
        f"{title}, {kind}",
        shape,
        longest=2048,
        rows=rows,
        steps=12,
        rounds=2,
        settings=ON_GPU,
        over_best=1.0,
        over_trl=1.2,
        no_more_memory=True,
        load_in_4bit=kind == "QLoRA",
    )
    for name, title, shape, rows in (
        ("600m", "Qwen3's shape, 0.6 B", QWEN3_600M, 8),
        ("8b", "Qwen3's shape, 8 B", QWEN3_8B, 4),
    )
    for kind in ("LoRA", "QLoRA")
}
CASES = {**CPU_CASES, **GPU_CASES}


@dataclass(frozen=True)
class _Run:
    speed: float  # supervised tokens per second
    operations: float  # that the model needs, per second
    busy: float  # cores at work at a time; what is missing waited, or was taken by others
    peak_bytes: int
    first_step_seconds: float
    steps: list[dict[str, Any]]


def main() -> None:
    """Make the models, run everything in turn, print the tables."""
    arguments = _arguments()
    on_gpu = _has_gpu()
    if not on_gpu:
        print("No GPU here: the models of 0.6 B and 8 B are not measured.\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-train-") as name:
        for case_name in arguments.cases.split(",") if arguments.cases else GPU_CASES if on_gpu else CPU_CASES:
            case = CASES[case_name]
            case = replace(
                case,
                steps=arguments.steps or case.steps,
                rounds=arguments.rounds or case.rounds,
                settings=tuple(one for one in case.settings if _is_wanted(one, arguments.only)),
            )
            folder = Path(name).resolve() / case_name
            folder.mkdir()
            if case.base:
                config = case.base / "config.json"
                if not config.is_file():
                    raise SystemExit(f"error: {config}: no such file; run the pipeline first: make repro")
                case = replace(case, shape=json.loads(config.read_text(encoding="utf-8")))
            print(_measure(case, folder, on_gpu=on_gpu), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help=f"which, by commas, of {', '.join(CASES)} (default: those of the device)")
    parser.add_argument("--rounds", type=int, help="runs of each (default: as each case has it)")
    parser.add_argument("--steps", type=int, help="steps of each run, at least 3 (default: as each case has it)")
    parser.add_argument("--only", default="", help="only settings whose name holds this, and lathe's")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    return parser.parse_args()


def _has_gpu() -> bool:
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip() == "True"


def _is_wanted(settings: Settings, only: str) -> bool:
    if settings.trainer == "TRL with Liger":
        from importlib.util import find_spec

        if find_spec("liger_kernel") is None:
            print("liger-kernel is not installed: TRL with Liger is not measured.\n")
            return False
    return only in settings.name or settings.trainer == "lathe"


def _measure(case: _Case, folder: Path, *, on_gpu: bool) -> str:
    """Run all of a case's settings in turn, in every round, and report on them."""
    about = {"shape": case.shape, "shortest": case.shortest, "longest": case.longest}
    about |= {"folder": str(folder), "rows": case.rows * case.steps * 2}
    about |= {"base": str(case.base) if case.base else None, "rows_file": str(BANKING77)}
    (folder / "case.json").write_text(json.dumps(about), encoding="utf-8")
    _run_apart("materials", folder / "case.json", folder=folder)
    rate = 0.0
    runs: dict[Settings, list[_Run]] = {settings: [] for settings in case.settings}
    starts: dict[str, list[float]] = {}
    for turn in range(case.rounds):
        forward = turn % 2 == 0
        rate = max(rate, float(_run_apart("rate", folder=folder)))
        for settings in case.settings if forward else reversed(case.settings):
            runs[settings].append(_run(case, settings, folder))
        rate = max(rate, float(_run_apart("rate", folder=folder)))
    commands = startup.commands(_work(case, Settings("lathe"), folder), on_gpu=on_gpu)
    for _ in range(2):
        for name, (command, where) in commands.items():
            seconds = startup.seconds_to_first_step(command, where, _environment(folder))
            starts.setdefault(name, []).append(seconds)
    return _report(case, runs, rate, starts)


def _run(case: _Case, settings: Settings, folder: Path) -> _Run:
    print(f"{folder.name}: {settings.name}", file=sys.stderr, flush=True)
    work, result = folder / "work.json", folder / "result.json"
    _work(case, settings, folder).write(work)
    started = time.time()
    _run_apart(MODULES[settings.trainer], work, result, folder=folder, python=python_of(settings.trainer))
    measured = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    steps = measured["steps"]
    timed = steps[WARM_UP_STEPS:]
    before, last = steps[WARM_UP_STEPS - 1], steps[-1]
    seconds = last["ended"] - before["ended"]
    return _Run(
        speed=sum(step["supervised_tokens"] for step in timed) / seconds,
        operations=sum(count_operations(case.shape, step["tokens"], step["supervised_tokens"]) for step in timed)
        / seconds,
        busy=(last["processor_seconds"] - before["processor_seconds"]) / seconds,
        peak_bytes=measured["peak_bytes"],
        first_step_seconds=steps[0]["ended"] - started,
        steps=steps,
    )


def _work(case: _Case, settings: Settings, folder: Path) -> Work:
    # Rows take up five eighths of the longest on average, so that a packed step has as much to do as an unpacked one.
    pack = case.longest * case.rows * 5 // 8 // PACKS
    return Work(
        settings=settings,
        folder=str(folder),
        steps=case.steps,
        examples=PACKS if settings.packing else case.rows,
        max_length=pack if settings.packing else case.longest,
        load_in_4bit=case.load_in_4bit,
    )


def _run_apart(module: str, *arguments: Path, folder: Path, python: str = sys.executable) -> str:
    """Run a module of `trainers` in a fresh process; return the last line that it wrote, if any."""
    command = [python, "-m", f"trainers.{module}", *map(str, arguments)]
    result = subprocess.run(command, cwd=BENCHMARKS, env=_environment(folder), capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}\n{result.stderr}")
    return (result.stdout.splitlines() or [""])[-1]


def _environment(folder: Path) -> dict[str, str]:
    """Offline, with caches in the temporary folder, and threads that wait without spinning."""
    source = str(BENCHMARKS.parent / "src")
    ours = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface"), "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **ours, "PYTHONPATH": source}


def _report(case: _Case, runs: dict[Settings, list[_Run]], rate: float, starts: dict[str, list[float]]) -> str:
    lines = [
        f"{_describe(case)}, {case.rows} in a step; {case.rounds} x {case.steps - WARM_UP_STEPS} steps timed.",
        f"Machine: {machine.describe()}; bf16 products at {rate / 1e9:.0f} GFLOP/s.",
        "",
        "| | supervised tokens/s | share of bf16 rate | cores busy | peak, MiB | first step, s | last loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for settings, ran in runs.items():
        lines.append(
            f"| {settings.name} | {_median(ran, 'speed'):.0f} | {100 * _median(ran, 'operations') / rate:.0f} % "
            f"| {_median(ran, 'busy'):.1f} | {_median(ran, 'peak_bytes') / MIB:.0f} "
            f"| {_median(ran, 'first_step_seconds'):.1f} | {ran[-1].steps[-1]['loss']:.3f} |"
        )
    lines += ["", "| command, one step's loss after | seconds |", "| --- | ---: |"]
    lines += [f"| {name} | {min(seconds):.1f} |" for name, seconds in starts.items()]
    return "\n".join([*lines, "", *_goals(case, runs, starts), ""])


def _describe(case: _Case) -> str:
    if case.base:
        return f"A real model, {case.title}; questions of banking77, rows of at most {case.longest} tokens"
    return f"A random model: {case.title}; rows of {case.shortest} to {case.longest} tokens"


def _median(runs: list[_Run], field: str) -> float:
    return statistics.median(getattr(run, field) for run in runs)


def _goals(case: _Case, runs: dict[Settings, list[_Run]], starts: dict[str, list[float]]) -> list[str]:
    """Return a line for each goal: what was aimed at, what was seen, and whether that will do."""
    lines = []
    for precision in ("bf16", "fp32"):
        for checkpointing in (False, True):
            alike = [one for one in runs if (one.precision, one.checkpointing) == (precision, checkpointing)]
            ours = [one for one in alike if one.trainer == "lathe"]
            theirs = [one for one in alike if one.trainer != "lathe"]
            if ours and theirs:
                best = _fastest(theirs, runs)
                how = f"{precision}, {'' if checkpointing else 'no '}checkpointing"
                what = f"over the best of the others ({how}: {best.name})"
                lines.append(_goal(what, _ratio(_fastest(ours, runs), best, runs), case.over_best))
    plain = Settings("TRL", checkpointing=True)
    if case.over_trl and plain in runs:
        lines.append(_goal(f"over {plain.name}", _ratio(case.settings[0], plain, runs), case.over_trl))
    if case.no_more_memory:
        peers = [one for one in runs if one.trainer != "lathe"]
        lines += [_memory_goal(one, runs) for one in peers if replace(one, trainer="lathe") in runs]
    apart = _largest_difference(runs)
    lines.append(
        f"- {_met(apart <= LOSS_NOISE)}: losses of equal steps differ by {apart:.4f} at most (goal {LOSS_NOISE})"
    )
    ours, *theirs = (min(seconds) for seconds in starts.values())
    lines.append(
        f"- {_met(ours <= min(theirs))}: lathe's stage is at its first loss after {ours:.1f} s, "
        f"the quickest of the others after {min(theirs):.1f} s (goal: no later)"
    )
    return lines


def _fastest(among: list[Settings], runs: dict[Settings, list[_Run]]) -> Settings:
    return max(among, key=lambda settings: _median(runs[settings], "speed"))


def _ratio(ours: Settings, theirs: Settings, runs: dict[Settings, list[_Run]]) -> list[float]:
    """Speed of the one over the other's, round by round."""
    return [our.speed / their.speed for our, their in zip(runs[ours], runs[theirs], strict=True)]


def _goal(over_what: str, ratios: list[float], least: float) -> str:
    seen = statistics.median(ratios)
    spread = f", {min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
    return f"- {_met(seen >= least)}: {seen:.2f} x the speed{spread}, {over_what} (goal {least:g} x)"


def _memory_goal(theirs: Settings, runs: dict[Settings, list[_Run]]) -> str:
    ours = replace(theirs, trainer="lathe")
    seen = _median(runs[ours], "peak_bytes") / _median(runs[theirs], "peak_bytes")
    return f"- {_met(seen <= 1)}: {seen:.2f} x the memory of {theirs.name} (goal: no more)"


def _met(met: bool) -> str:
    return "met" if met else "NOT MET"


def _largest_difference(runs: dict[Settings, list[_Run]]) -> float:
    """Compare the losses of unpacked steps with lathe's; raise SystemExit where the steps hold other tokens."""
    apart = {settings: ran for settings, ran in runs.items() if not settings.packing and not settings.padding_free}
    unpacked = {settings: ran[-1].steps for settings, ran in apart.items()}
    reference = unpacked[next(iter(unpacked))]
    largest = 0.0
    for settings, steps in unpacked.items():
        for number, (step, expected) in enumerate(zip(steps, reference, strict=True), 1):
            if step["digest"] != expected["digest"]:
                raise SystemExit(
                    f"{settings.name}: step {number} holds other tokens than lathe's, or supervises others"
                )
            largest = max(largest, abs(step["loss"] - expected["loss"]))
    return largest


if __name__ == "__main__":
    main()
