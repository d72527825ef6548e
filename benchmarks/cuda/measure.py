"""Tests and speed of training on a GPU, within a time limit: bash benchmarks/cuda/run.sh [--seconds N] [--smoke].

First the tests marked `gpu`, and at the same time random models of the shapes of Qwen3-0.6B and Llama-3-8B are made in
memory (/dev/shm, 18 GB). Then trainings of a few steps, LoRA of rank 16 on all linear layers, the last third of each
row supervised, in order of worth: by lathe, by TRL's SFTTrainer as it is, and by both with Liger's kernels; the kernels
of attention; and where the time of lathe's step goes. Each trainer has a process of its own. Where another precision,
length or checkpointing is compared, all else is equal.

What is done is written to FOLDER/results.json after each step, so that a run that is cut off leaves it; what the steps
print goes to FOLDER/log.txt, the profile to FOLDER/profile.txt. `--only PATTERN` runs the steps whose names match the
regular expression, `--table FILE` prints the Markdown table of a results.json.
"""

import argparse
import gc
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainers.work import QWEN3_600M, Settings, Work, count_operations

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"lathe": "trainers.lathe_sft", "TRL": "trainers.trl_sft"}
WARM_UP_STEPS = 3
TIMED_STEPS = 6
RANK = 16
GB = 1 << 30

LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {"600m": QWEN3_600M, "8b": LLAMA3_8B}
TOKENS = {"600m": 16_384, "8b": 4096}  # in one step


@dataclass(frozen=True)
class Training:
    """One training to be measured."""

    model: str  # a key of MODELS
    length: int  # of every row, or of the longest where they are mixed (tokens)
    settings: Settings
    load_in_4bit: bool = False
    is_mixed: bool = False  # rows of an eighth of `length` up to it

    @property
    def name(self) -> str:
        """What results.json calls it."""
        kind = "QLoRA" if self.load_in_4bit else "LoRA"
        return f"{self.model} {kind} {self.length}{' mixed' * self.is_mixed}: {self.settings.name}"

    @property
    def rows_name(self) -> str:
        """Name of the folder with its rows."""
        return f"{self.model}-{self.length}{'-mixed' * self.is_mixed}"


def list_trainings() -> list[Training]:
    """Return the trainings, those that matter most first."""
    everyone = ("lathe with Liger", "TRL with Liger", "TRL", "lathe")

    def compare(model: str, length: int, *, checkpointing: bool, load_in_4bit: bool = False) -> list[Training]:
        return [
            Training(model, length, Settings(trainer, checkpointing=checkpointing), load_in_4bit)
            for trainer in everyone
        ]

    mixed = [Training("600m", 2048, Settings(trainer), is_mixed=True) for trainer in everyone]
    mixed.append(Training("600m", 2048, Settings("lathe", packing=True), is_mixed=True))
    compiled = [Training(model, 4096, Settings("lathe", compiled=True)) for model in ("600m", "8b")]
    return [
        *compare("8b", 4096, checkpointing=False),
        *compare("8b", 4096, checkpointing=True, load_in_4bit=True),
        *compare("600m", 4096, checkpointing=False),
        *mixed,
        *compare("8b", 4096, checkpointing=True),
        *compare("8b", 2048, checkpointing=False),
        *compare("8b", 4096, checkpointing=False, load_in_4bit=True),
        *compare("600m", 4096, checkpointing=True),
        *compiled,
        *compare("8b", 2048, checkpointing=True),
        *compare("8b", 2048, checkpointing=True, load_in_4bit=True),
        *compare("8b", 2048, checkpointing=False, load_in_4bit=True),
        *compare("600m", 2048, checkpointing=False),
        *compare("600m", 2048, checkpointing=True),
        *compare("600m", 4096, checkpointing=False, load_in_4bit=True),
        *compare("600m", 2048, checkpointing=False, load_in_4bit=True),
    ]


@dataclass(frozen=True)
class Place:
    """Where a run works and writes, and whether with tiny models."""

    work: Path  # temporary: models and rows
    folder: Path  # of the results
    is_smoke: bool


class Worker:
    """A process that imports the packages at once, and then does one task after another."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.process: Any = None
        self.task: tuple[str, float, float] | None = None  # name, when it started, when it must have ended
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.place.folder / "log.txt"), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, name: str, function: Callable[..., Any], *arguments: Any, limit_s: float) -> None:
        """Have the process call a function of this module."""
        now = time.monotonic()
        self.task = (name, now, now + limit_s)
        self.pipe.send((name, function, arguments))

    def wait(self, deadline: float) -> dict[str, Any]:
        """Return what the task gave, or why it failed; a process that fails or takes too long is replaced."""
        assert self.task is not None
        name, started, ends = self.task
        given: dict[str, Any] = {"error": "took too long"}
        try:
            if self.pipe.poll(max(0.1, min(ends, deadline) - time.monotonic())):
                given = self.pipe.recv()
        except EOFError:
            given = {"error": "the process ended"}
        if "error" in given or given.get("left_bytes", 0) > GB:
            self.process.kill()
            self.process.join()
            self._start()
        return {"name": name, "seconds": round(time.monotonic() - started, 1), **given}


def _serve(pipe: Any, log: Path) -> None:
    """Do the tasks that come through the pipe, with what is printed in the log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for module in ("torch", "transformers.trainer", "datasets", "dvclive", "accelerate", "bitsandbytes", "trl", "peft"):
        importlib.import_module(module)
    for module in ("lathe.training.sft", "lathe.config.load", *MODULES.values()):
        importlib.import_module(module)
    import torch
    from transformers import trainer

    callbacks = list(trainer.DEFAULT_CALLBACKS)
    while True:
        name, function, arguments = pipe.recv()
        print(f"\n=== {name}", flush=True)
        try:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            given = {"result": function(*arguments)}
        except Exception:
            traceback.print_exc()
            given = {"error": traceback.format_exc()[-500:]}
        trainer.DEFAULT_CALLBACKS[:] = callbacks
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            given["left_bytes"] = torch.cuda.memory_allocated()
        sys.stdout.flush()
        pipe.send(given)


class Run:
    """The steps of one run, and what they gave."""

    def __init__(self, folder: Path, *, seconds: float, is_smoke: bool, only: str) -> None:
        self.deadline = time.monotonic() + seconds
        self.only = only
        self.results: dict[str, Any] = {"steps": {}}
        folder.mkdir(parents=True, exist_ok=True)
        shared = Path("/dev/shm")
        has_room = shared.is_dir() and shutil.disk_usage(shared).free > 24 * GB
        work = Path(tempfile.mkdtemp(prefix="bench-cuda-", dir=shared if has_room else None))
        self.place = Place(work, folder.resolve(), is_smoke)
        self.workers: dict[str, Worker] = {}

    def is_wanted(self, name: str) -> bool:
        """Tell whether a step was asked for and there is time left."""
        return bool(re.search(self.only, name)) and time.monotonic() < self.deadline - 5

    def get_worker(self, name: str) -> Worker:
        """Return the process of that name, started if there is none."""
        if name not in self.workers:
            self.workers[name] = Worker(self.place)
        return self.workers[name]

    def keep(self, step: dict[str, Any]) -> Any:
        """Write down what a step gave, and return its result."""
        self.results["steps"][step["name"]] = step
        self.save()
        print(f"{step['seconds']:6.1f} s  {step['name']}: {_summarize(step)}", flush=True)
        return step.get("result")

    def save(self) -> None:
        """Write what there is so far."""
        file = self.place.folder / "results.json.partial"
        file.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        file.replace(self.place.folder / "results.json")


def main() -> None:
    """Run all steps, or print the table of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench/cuda", help="where the results go")
    parser.add_argument("--seconds", type=float, default=520, help="time limit of the whole run")
    parser.add_argument("--smoke", action="store_true", help="tiny models and few tests, on a CPU too")
    parser.add_argument("--only", default="", help="only the steps whose names match this regular expression")
    parser.add_argument("--table", type=Path, help="print the table of this results.json, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(make_table(json.loads(arguments.table.read_text(encoding="utf-8"))))
        return
    run = Run(arguments.folder, seconds=arguments.seconds, is_smoke=arguments.smoke, only=arguments.only)
    try:
        _run_steps(run)
    finally:
        run.save()
        for worker in run.workers.values():
            worker.process.kill()
        shutil.rmtree(run.place.work, ignore_errors=True)
    print(make_table(run.results))


def _run_steps(run: Run) -> None:
    trainings = [training for training in list_trainings() if run.is_wanted(training.name)]
    if run.place.is_smoke:
        few = [training for training in trainings if not training.settings.has_liger]  # whose kernels need a GPU
        trainings = [*few[:2], *(one for one in few if one.is_mixed or one.load_in_4bit)][:6]
    models = {training.model for training in trainings} | ({"8b"} if run.is_wanted("profile") else set())
    tests = _start_tests(run) if run.is_wanted("tests") else None
    preparing: list[tuple[str, str, Callable[..., Any], tuple[Any, ...]]] = [
        ("tools", "machine", _describe_machine, ()),
        *((name, f"make {name}", _make_model, (run.place, name)) for name in sorted(models)),
        ("rows", "make rows", _make_rows, (run.place, trainings)),
    ]
    for worker, name, function, arguments in preparing:
        run.get_worker(worker).begin(name, function, *arguments, limit_s=150)
    for trainer in dict.fromkeys(training.settings.trainer for training in trainings):
        run.get_worker(trainer)  # it imports the packages meanwhile
    for worker, name, *_ in preparing:
        result = run.keep(run.get_worker(worker).wait(run.deadline))
        if name == "machine":
            run.results["machine"] = result
    if any("error" in run.results["steps"][name] for _, name, *_ in preparing):
        return
    run.get_worker("rows").begin("estimates", _estimate, run.place, trainings, limit_s=200)
    if tests:
        _wait_for_tests(run, tests)

    def do(worker: str, name: str, function: Callable[..., Any], *arguments: Any, limit_s: float) -> None:
        if run.is_wanted(name):
            run.get_worker(worker).begin(name, function, *arguments, limit_s=limit_s)
            run.keep(run.get_worker(worker).wait(run.deadline))

    do("tools", "attention", _time_attention, limit_s=40)
    for index, training in enumerate(trainings):
        do(training.settings.trainer, training.name, _train, run.place, training, limit_s=90)
        if index == min(3, len(trainings) - 1):
            do("lathe" if run.place.is_smoke else "lathe with Liger", "profile", _profile, run.place, limit_s=60)
    run.keep(run.get_worker("rows").wait(run.deadline))


def _describe_machine() -> dict[str, Any]:
    import platform

    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "trl", "peft", "accelerate", "bitsandbytes", "liger_kernel"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    described: dict[str, Any] = {"cores": os.cpu_count(), "versions": versions}
    if torch.cuda.is_available():
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        described["gpu"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        device = torch.device("cuda")
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
        seconds = _time(lambda: a @ b)
        described["bf16 TFLOP/s"] = round(2 * 8192**3 / seconds / 1e12)
    return described


def _time(function: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median seconds of a call."""
    import torch

    for _ in range(3):
        function()
    on_gpu = torch.cuda.is_available()
    seconds = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _start_tests(run: Run) -> "subprocess.Popen[bytes]":
    log = (run.place.folder / "tests.txt").open("wb")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "tests/gpu", f"--junitxml={run.place.folder / 'tests.xml'}"]
    command += ["-p", "no:cacheprovider", "--timeout=120", "-o", "addopts="]
    environment = dict(os.environ)
    if run.place.is_smoke:
        command += ["-k", "attend or float32 or killed"]
        environment["LATHE_GPU_TESTS_ON_CPU"] = "1"
    else:
        command += ["-n", "8"]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _wait_for_tests(run: Run, tests: "subprocess.Popen[bytes]") -> None:
    started = time.monotonic()
    try:
        tests.wait(timeout=max(1, min(120, run.deadline - time.monotonic())))
    except subprocess.TimeoutExpired:
        tests.kill()
    outcomes: dict[str, Any] = {}
    file = run.place.folder / "tests.xml"
    if file.exists():
        for case in ElementTree.parse(file).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            said = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
            outcomes[str(case.get("name"))] = {"outcome": next(iter(kinds), "passed"), "time": case.get("time"), **said}
    run.results["tests"] = outcomes
    run.save()
    passed = sum(test["outcome"] == "passed" for test in outcomes.values())
    failed = [name for name, test in outcomes.items() if test["outcome"] in ("failure", "error")]
    print(f"{time.monotonic() - started:6.1f} s waited for tests: {passed} passed of {len(outcomes)}, failed: {failed}")


def _get_shape(place: Place, model: str) -> dict[str, Any]:
    return MODELS[model] | (TINY if place.is_smoke else {})


def _make_model(place: Place, name: str) -> None:
    from trainers import materials

    materials.make_model(_get_shape(place, name), place.work / name)


def _make_rows(place: Place, trainings: list[Training]) -> None:
    from trainers import materials

    trainings = [*trainings, Training("8b", 4096, Settings("lathe"))]
    for training in {training.rows_name: training for training in trainings}.values():
        folder = place.work / training.rows_name
        folder.mkdir()
        (folder / "model").symlink_to(place.work / training.model)
        longest = _get_length(place, training)
        case = {
            "shape": _get_shape(place, training.model),
            "shortest": longest // 8 if training.is_mixed else longest,
            "longest": longest,
            "rows": _count_rows(training) * (WARM_UP_STEPS + TIMED_STEPS + 2),
        }
        materials.write_rows(case, folder / "rows")


def _get_length(place: Place, training: Training) -> int:
    return training.length // 32 if place.is_smoke else training.length


def _count_rows(training: Training) -> int:
    """Return the rows of a step."""
    rows = TOKENS[training.model] // training.length
    return 2 * rows if training.is_mixed else rows


def _make_work(place: Place, training: Training) -> Work:
    length, rows = _get_length(place, training), _count_rows(training)
    return Work(
        settings=training.settings,
        folder=str(place.work / training.rows_name),
        steps=WARM_UP_STEPS + TIMED_STEPS,
        examples=2 if training.settings.packing else rows,
        max_length=length * rows * 9 // 32 if training.settings.packing else length,
        load_in_4bit=training.load_in_4bit,
        rank=RANK,
        logging_steps=WARM_UP_STEPS + TIMED_STEPS,
    )


def _train(place: Place, training: Training) -> dict[str, Any]:
    from trainers import steps

    result = place.work / f"steps-{os.getpid()}.json"
    steps.record(result)
    started = time.time()
    trainer = training.settings.trainer.removesuffix(" with Liger")
    importlib.import_module(MODULES[trainer]).run(_make_work(place, training))
    measured = json.loads(result.read_text(encoding="utf-8"))
    done = measured["steps"]
    first, last = done[WARM_UP_STEPS - 1], done[-1]
    seconds = last["ended"] - first["ended"]
    timed = done[WARM_UP_STEPS:]
    tokens = sum(step["tokens"] for step in timed)
    supervised = sum(step["supervised_tokens"] for step in timed)
    shape = _get_shape(place, training.model)
    return {
        "tokens_per_second": tokens / seconds,
        "supervised_tokens_per_second": supervised / seconds,
        "flops_per_second": count_operations(shape, tokens, supervised) / seconds,
        "step_seconds": [after["ended"] - before["ended"] for before, after in itertools.pairwise(done)],
        "first_step_seconds": done[0]["ended"] - started,
        "reserved_bytes": measured["peak_bytes"],
        "allocated_bytes": measured["allocated_bytes"],
        "loss": done[-1]["loss"],  # mean of all steps
    }


def _estimate(place: Place, trainings: list[Training]) -> dict[str, Any]:
    """Return the bytes that the estimate gives for lathe's trainings, by their names."""
    from trainers import lathe_sft

    from lathe.config.load import load
    from lathe.needs.estimate import estimate_training_memory

    estimates = {}
    for training in trainings:
        if training.settings.trainer == "lathe" and not training.settings.compiled and not training.settings.packing:
            params = load().params
            own = lathe_sft.parameters(_make_work(place, training))
            sections = {name: getattr(params, name).model_copy(update=values) for name, values in own.items()}
            length = _get_length(place, training)
            memory = estimate_training_memory(
                place.work / training.model,
                params.model_copy(update=sections),
                length=length,
                supervised_tokens=length // 3,
            )
            estimates[training.name] = memory.total
    return estimates


def _time_attention() -> dict[str, float]:
    """Return the milliseconds of attention, forward and backward, of 8 B's shape in a step of 4,096 tokens."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from lathe.training import varlen_attention
    from lathe.training.row_attention import attend_rows, build_attention_arguments

    on_gpu = torch.cuda.is_available()
    device, tokens = ("cuda", 4096) if on_gpu else ("cpu", 128)
    seconds: dict[str, float] = {}

    def make(heads: int) -> torch.Tensor:
        states = torch.randn(1, tokens, heads, 128, device=device, dtype=torch.bfloat16).transpose(1, 2)
        return states.requires_grad_()

    query, key, value = make(32), make(8), make(8)
    gradient = torch.randn(1, tokens, 32, 128, device=device, dtype=torch.bfloat16)
    module = torch.nn.Module()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    quarter = tokens // 4
    for shown, lengths in {
        "one row": [tokens],
        "mixed rows": [quarter * 2, quarter, quarter // 2, quarter // 2],
    }.items():
        arguments = {
            name: given.to(device) if isinstance(given, torch.Tensor) else given
            for name, given in build_attention_arguments(lengths).items()
        }
        padded = {name: given for name, given in arguments.items() if name != "cu_seq_lens_q"}

        def attend(chosen: dict[str, Any]) -> None:
            attend_rows(module, query, key, value, None, **chosen)[0].backward(gradient)

        for kind, chosen in {"lathe": arguments, "padded": padded}.items():
            seconds[f"{shown}, {kind}"] = _time(partial(attend, chosen), 10)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                seconds[f"one row, SDPA {backend.name}"] = _time(
                    lambda: (
                        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
                        .transpose(1, 2)
                        .backward(gradient)
                    ),
                    10,
                )
        except RuntimeError as error:
            print(f"{backend.name}: {error}")
    seconds["has varlen"] = float(varlen_attention.is_supported(query, 0.0))
    return {name: round(1000 * value, 3) for name, value in seconds.items()}


def _profile(place: Place) -> dict[str, Any]:
    """Profile two steps of lathe on the 8 B model; the table goes to profile.txt, the sum of seconds is returned."""
    import torch
    from trainers import lathe_sft
    from transformers import TrainerCallback, trainer

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP_STEPS:
                profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP_STEPS + 2:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                profiler.stop()

    trainer.DEFAULT_CALLBACKS.append(Callback())
    trainer_name = "lathe with Liger" if torch.cuda.is_available() else "lathe"
    lathe_sft.run(_make_work(place, Training("8b", 4096, Settings(trainer_name))))
    averages = profiler.key_averages()
    on_gpu = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = averages.table(sort_by=on_gpu, row_limit=60, max_name_column_width=110)
    (place.folder / "profile.txt").write_text(table, encoding="utf-8")
    kernels = [
        (event.key[:150], event.self_device_time_total / 2000, event.count / 2)
        for event in averages
        if event.self_device_time_total and str(event.device_type).endswith("CUDA")
    ]
    kernels.sort(key=lambda kernel: -kernel[1])
    return {"kernel, ms a step, calls a step": kernels[:40], "ms a step": sum(kernel[1] for kernel in kernels)}


def _summarize(kept: dict[str, Any]) -> str:
    value = kept.get("result") or {}
    if "tokens_per_second" in value:
        return (
            f"{value['tokens_per_second']:.0f} tokens/s, {value['allocated_bytes'] / GB:.1f} GiB, "
            f"{value['flops_per_second'] / 1e12:.0f} TFLOP/s, loss {value['loss']:.4f}"
        )
    if "error" in kept:
        return f"failed: {kept['error'][-400:]}"
    text = json.dumps(value)
    return text if len(text) < 600 else "done"


def make_table(results: dict[str, Any]) -> str:
    """Return a Markdown table of the trainings of a run."""
    rate = results.get("machine", {}).get("bf16 TFLOP/s")
    estimates = results["steps"].get("estimates", {}).get("result") or {}
    lines = [
        json.dumps(results.get("machine")),
        "",
        "| training | tokens/s | supervised tokens/s | TFLOP/s | of bf16 rate | peak, GiB | estimate, GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, step in results["steps"].items():
        value = step.get("result") or {}
        if "tokens_per_second" not in value:
            continue
        flops = value["flops_per_second"] / 1e12
        share = f"{100 * flops / rate:.0f} %" if rate else ""
        estimate = f"{estimates[name] / GB:.1f}" if name in estimates else ""
        lines.append(
            f"| {name} | {value['tokens_per_second']:,.0f} | {value['supervised_tokens_per_second']:,.0f} "
            f"| {flops:.0f} | {share} | {value['allocated_bytes'] / GB:.1f} | {estimate} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
