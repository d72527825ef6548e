"""Two processes train as one with batches twice as large; what goes wrong in one ends both, and is said once."""

import csv
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import psutil
import pytest
import torch
from conftest import Checkout, changed, copy_of, output_hashes
from in_processes import LAUNCHER, train_once
from safetensors.torch import load_file
from test_resume import LONGER, interrupted, kill_everything, newest_step
from toy import load_toy

from lathe.common import launch, paths
from lathe.models.merge.merge import merge

CONFIG = load_toy().params
PROGRAM = paths.ROOT / "tests/stage/in_processes.py"
EXACT = {
    "seed": 1,
    "training.precision": "fp32",
    "training.max_length": 256,
    "training.logging_steps": 1,
    "training.eval_steps": 2,
    "training.per_device_eval_batch_size": 2,
    "quantization.load_in_4bit": False,
}
CURVES = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/loss")


class Work:
    """Trainings of the small model in two processes, of a program that is started as a stage's script is."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder

    def training(self, name: str, rows: int, changes: dict[str, Any]) -> dict[str, Any]:
        chosen = changed(CONFIG, {**EXACT, **changes})
        return {"out": str(self.folder / name), "rows": rows, "params": chosen.model_dump()}

    def run(self, *trainings: dict[str, Any], **how: Any) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*trainings, **how), 120)

    def run_on_machines(self, file: str, *trainings: dict[str, Any], **how: Any) -> None:
        """Run a configuration of two machines, here both with one process, which meet at an address of this one."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = f"accelerate launch --config_file {launch.CONFIGS}/{file} --num_processes 2"
        launcher += f" --main_process_ip 127.0.0.1 --main_process_port {port}"
        machines = [self.start(*trainings, machine=rank, launcher=launcher, **how) for rank in (0, 1)]
        for machine in machines:
            done = finish(machine, 200)
            assert done.returncode == 0, done.stderr

    def start(self, *trainings: dict[str, Any], machine: int | None = None, **how: Any) -> "subprocess.Popen[str]":
        work = self.folder / "work.json"
        work.write_text(json.dumps({"base": str(self.base), "trainings": trainings, **how}))
        environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "src"), "OMP_NUM_THREADS": "1"}
        preloaded.start()
        words = [str(preloaded.folder / "python3"), str(PROGRAM), str(work)]
        words += [] if machine is None else [str(machine)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, cwd=paths.ROOT, env=environment, **pipes)


def finish(process: "subprocess.Popen[str]", seconds: float) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a process, which is killed after so long."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def work(small_model: Path, tmp_path: Path) -> Work:
    return Work(small_model, tmp_path)


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    with (folder / f"metrics/plots/metrics/{name}.tsv").open() as file:
        return [(int(row["step"]), float(row[name.split("/")[1]])) for row in csv.DictReader(file, delimiter="\t")]


def assert_same_training(mine: Path, expected: Path) -> None:
    for name in CURVES:
        steps, values = zip(*curve(mine, name), strict=True)
        expected_steps, expected_values = zip(*curve(expected, name), strict=True)
        assert steps == expected_steps
        assert values == pytest.approx(expected_values, rel=1e-3), name
    weights = load_file(expected / "adapter/adapter_model.safetensors")
    for name, tensor in load_file(mine / "adapter/adapter_model.safetensors").items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, weights[name], rtol=1e-2, atol=2e-4, msg=name)
    told, expected_told = (json.loads((each / "trained.json").read_text()) for each in (mine, expected))
    assert told["frozen"] == expected_told["frozen"]


def files(training: dict[str, Any]) -> list[Path]:
    return [file for file in Path(training["out"]).rglob("*") if file.is_file()]


# Of 27 rows, or 9 packs, something is left over for the last batch of an epoch, and for one process alone.
VARIANTS: dict[str, tuple[int, dict[str, Any], tuple[int, int]]] = {
    "padded": (27, {"training.num_train_epochs": 2.0, "training.load_best_model_at_end": True}, (8, 4)),
    "accumulated": (27, {"training.num_train_epochs": 2.0, "training.gradient_accumulation_steps": 3}, (4, 2)),
    "4-bit": (16, {"training.max_steps": 3, "quantization.load_in_4bit": True}, (4, 2)),
    "packed": (27, {"training.num_train_epochs": 2.0, "sft.packing": True}, (4, 2)),
}


def assert_trains_as_one(work: Work, names: list[str], kind: str, machines: str | None = None, **how: Any) -> None:
    together = []
    for name in names:
        rows, changes, (whole, half) = VARIANTS[name]
        batch = "training.per_device_train_batch_size"
        alone = work.training(
            f"{name} alone", rows, {**changes, batch: whole, "training.per_device_eval_batch_size": 4}
        )
        train_once(work.base, alone)
        together.append(work.training(name, rows, {**changes, batch: half}))
    if machines:
        work.run_on_machines(machines, *together, **how)
    else:
        done = work.run(*together, **how)
        assert done.returncode == 0, done.stderr
    for name in names:
        told = json.loads((work.folder / name / "trained.json").read_text())
        assert told["kind"] == kind
        # accelerate leaves what is outside of the layers whole after an evaluation.
        has_whole_layers = any(".layers." in name for name in told["whole"])
        assert has_whole_layers == (kind != "FSDP" and how.get("zero") != 3)
        assert_same_training(work.folder / name, work.folder / f"{name} alone")


def test_two_processes_train_as_one_with_a_batch_twice_as_large(work):
    assert_trains_as_one(work, list(VARIANTS), "MULTI_CPU")


@pytest.mark.slow
def test_a_model_whose_weights_are_shared_out_trains_as_a_whole_one(work):
    assert_trains_as_one(work, ["padded", "packed", "4-bit"], "FSDP", sharded=True)


@pytest.mark.slow
def test_the_loss_of_shared_weights_is_the_same_in_tiles(work):
    assert_trains_as_one(work, ["packed", "4-bit"], "FSDP", sharded=True, in_tiles=True)


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process(work, stage):
    assert_trains_as_one(work, ["padded", "accumulated", "4-bit"], "DEEPSPEED", zero=stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "kind", "how"),
    [
        ("fsdp2-2-machines.yaml", "FSDP", {"sharded": True}),
        pytest.param("zero3-2-machines.yaml", "DEEPSPEED", {"zero": 3}, marks=needs_deepspeed),
    ],
)
def test_two_launchers_of_a_process_each_train_as_one_process(work, file, kind, how):
    assert_trains_as_one(work, ["padded", "4-bit"], kind, file, **how)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"sharded": True}, id="fsdp2"),
        *(pytest.param({"zero": stage}, id=f"zero{stage}", marks=needs_deepspeed) for stage in (2, 3)),
    ],
)
def test_an_adapter_of_shared_weights_on_a_4_bit_base_merges_to_the_model_of_one_process(work, how):
    changes = {"training.max_steps": 6, "quantization.load_in_4bit": True}
    whole, half = ({**changes, "training.per_device_train_batch_size": rows} for rows in (4, 2))
    train_once(work.base, work.training("alone", 24, whole))
    done = work.run(work.training("shared", 24, half), **how)
    assert done.returncode == 0, done.stderr
    base = load_file(work.base / "model.safetensors")
    expected, mine = (merged(work, name) for name in ("alone", "shared"))
    assert base.keys() == expected.keys() == mine.keys()
    moved = 0
    for name, before in base.items():
        step, away = ((each[name].double() - before.double()).norm() for each in (expected, mine))
        moved += bool(step)
        assert bool(step) == bool(away), name
        # Both are rounded to the base's 16 bits, where a weight may fall to either side.
        assert (mine[name].double() - expected[name].double()).norm() <= 0.05 * step, name
        torch.testing.assert_close(mine[name].float(), expected[name].float(), rtol=2**-7, atol=1e-4, msg=name)
    assert moved >= 7  # of one layer: the adapter is on all of its matrices


def merged(work: Work, name: str) -> dict[str, torch.Tensor]:
    """Return the weights of the base with the adapter of a training added, as the stage merge does."""
    target = work.folder / f"{name}-merged"
    target.mkdir()
    merge(work.base, work.folder / name / "adapter", target, dtype="auto", max_shard_size_bytes=10**9)
    return load_file(target / "model.safetensors")


ZERO = [pytest.param({"zero": stage}, marks=[pytest.mark.slow, needs_deepspeed]) for stage in (2, 3)]


@pytest.mark.parametrize("how", [{}, pytest.param({"sharded": True}, marks=pytest.mark.slow), *ZERO])
@pytest.mark.parametrize("load_in_4bit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_they_go_on_exactly(work, how, load_in_4bit):
    changes = {"training.max_steps": 7, "training.save_steps": 2, "training.logging_steps": 3, "lora.lora_dropout": 0.1}
    changes["quantization.load_in_4bit"] = load_in_4bit
    interrupted, expected = (work.training(name, 27, changes) for name in ("interrupted", "expected"))
    done = work.run(interrupted, wrong="is told to stop", **how)
    assert done.returncode == 143, done.stderr
    assert done.stderr.count("interrupted at step 4 of 7; run the same command again") == 1
    assert done.stderr.count("stopping after this step") == 1
    done = work.run(interrupted, expected, **how)
    assert done.returncode == 0, done.stderr
    assert "going on after step 4" in done.stderr
    mine, other = (
        {file.relative_to(each["out"]): file.read_bytes() for file in files(each)} for each in (interrupted, expected)
    )
    assert mine == other


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ("computes nan", 2, r"error: loss is nan at step 2, .*train.jsonl:(\d+, ){3}\d+; .*"),  # of its four rows
        pytest.param("refuses", 2, r"error: the second rank refuses", marks=pytest.mark.slow),
        pytest.param(
            "crashes", 1, r"Traceback (.*\n)+ZeroDivisionError: the second rank crashes", marks=pytest.mark.slow
        ),
        pytest.param(
            "is killed",
            137,
            r"the process of rank 1 was ended by SIGKILL, .*; run the same command again .*",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_goes_wrong_in_one_process_ends_all_and_is_said_once(work, wrong, code, said):
    done = work.run(work.training("it", 16, {"training.per_device_train_batch_size": 4}), wrong=wrong)
    assert done.returncode == code, done.stderr
    log = re.compile(r"^(INFO|WARNING) .*\n|^Failed to load CPU gemm.*\n|.*FutureWarning.*\n +.*\n", re.MULTILINE)
    assert re.fullmatch(said, log.sub("", done.stderr).strip()), done.stderr


# --- The real script, under DVC.


@pytest.fixture(scope="module")
def prepared(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with everything done but a training in two processes, and what follows it."""
    checkout = copy_of(reproduced, tmp_path_factory.mktemp("prepared") / "lathe")
    checkout.set({**LONGER, "training.max_steps": 16, "training.launcher": LAUNCHER})
    checkout.commit()
    return checkout


@pytest.fixture(scope="module")
def finished(prepared: Checkout, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, str]:
    """The same after `dvc repro`, which nothing interrupted, and what that said."""
    checkout = copy_of(prepared, tmp_path_factory.mktemp("finished") / "lathe")
    done = checkout.run("dvc", "repro")
    return checkout, done.stdout + done.stderr


def test_the_pipeline_goes_on_to_the_end_after_a_training_in_two_processes(finished):
    checkout, said = finished
    for name in ("train", "merge", "evaluate"):
        assert f"Running stage '{name}'" in said
    assert len(re.findall(r'"step": 16, "of": 16, .*"train/loss"', said)) == 1  # rank 0 alone logs
    assert {"seconds", "peak_memory_bytes", "tokens_per_second"} <= checkout.json("metrics/timings/train.json").keys()
    assert checkout.json("metrics/train/freeze_proof.json")["sha256"]
    assert not list((checkout.root / ".scratch/train").iterdir())
    assert "Running stage" not in checkout.run("dvc", "repro").stdout


def kill_launcher(process: "subprocess.Popen[str]") -> None:
    [script] = psutil.Process(process.pid).children()
    script.kill()


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(kill_everything, marks=pytest.mark.slow),
        pytest.param(lambda process: process.kill(), id="kill_dvc", marks=pytest.mark.slow),
        pytest.param(kill_launcher, marks=pytest.mark.slow),
    ],
)
def test_killed_and_run_again_two_processes_end_as_if_nothing_had_been(
    prepared: Checkout, finished: tuple[Checkout, str], tmp_path: Path, kill: Callable[["subprocess.Popen[str]"], None]
) -> None:
    checkout = copy_of(prepared, tmp_path / "lathe")
    command = ["dvc", "repro", "train"]
    process = interrupted(checkout, command, 6, kill)
    process.wait()
    assert newest_step(checkout) >= 6
    checkout.check()
    assert "going on after step" in checkout.run(*command).stderr
    assert output_hashes(checkout)["train"] == output_hashes(finished[0])["train"]
    assert not list((checkout.root / ".scratch/train").iterdir())
    process.communicate(timeout=30)  # its workers, which hold its stderr, are gone


@pytest.mark.slow
def test_ctrl_c_on_the_script_says_once_how_to_go_on(prepared: Checkout, tmp_path: Path) -> None:
    checkout = copy_of(prepared, tmp_path / "lathe")
    process = interrupted(checkout, [sys.executable, "stages/train.py"], 6, lambda it: it.send_signal(signal.SIGINT))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.count("interrupted at step ") == 1
    assert error.splitlines()[-1].endswith(f"to go on after step {newest_step(checkout)}")
