"""An interrupted training goes on where it stopped, and ends as if it had never been interrupted."""

import hashlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import Checkout, changed, copy_of, learnt_by_heart, output_hashes, write_splits
from safetensors.torch import load_file, save_file
from toy import load_toy

from lathe.common import paths
from lathe.common.errors import Interrupted
from lathe.sources.builtin import household_commands
from lathe.training.checkpoints import KEPT_TRAININGS, acquire_checkpoints
from lathe.training.train import train

CONFIG = load_toy().params
SPLITS = {
    "train": household_commands.make_rows(1)["train"][:30],
    "validation": household_commands.make_rows(1)["validation"][:6],
}
# Dropout draws random numbers in each step; no two of the intervals divide each other, nor an epoch of 5 steps.
TRAINING = {
    "max_steps": 12,
    "save_steps": 3,
    "logging_steps": 2,
    "eval_steps": 5,
    "max_length": 256,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
}
LONGER = {f"training.{key}": value for key, value in {**TRAINING, "max_steps": 40}.items()} | {"lora.lora_dropout": 0.1}
MODES = [["dvc", "repro", "train"], ["dvc", "exp", "run", "train"], ["dvc", "exp", "run", "--temp", "train"]]


class Runs:
    """Trainings of the small model in this process, all with one scratch folder."""

    def __init__(self, base: Path, folder: Path, scratch: Path | None = None) -> None:
        self.base, self.folder, self.count = base, folder, 0
        self.scratch = scratch or folder / "scratch"

    def run(self, splits: dict[str, list] = SPLITS, changes: dict[str, Any] | None = None) -> dict[str, str]:
        """Train, and return the digest of every file that a training leaves."""
        self.count += 1
        chosen = changed(CONFIG, {**TRAINING, "seed": 1, "lora.lora_dropout": 0.1, **(changes or {})})
        out = self.folder / str(self.count)
        (out / "adapter").mkdir(parents=True)
        train(
            self.base,
            write_splits(self.folder / f"data{self.count}", splits),
            out / "adapter",
            out / "metrics",
            params=chosen,
            scratch=self.scratch,
        )
        return digests(out)

    def interrupt(
        self,
        number: int = signal.SIGTERM,
        after: int = 6,
        splits: dict[str, list] = SPLITS,
        changes: dict[str, Any] | None = None,
    ) -> str:
        """Train, send this process a signal once there is a checkpoint of that step, and return what was said."""
        watch = threading.Thread(target=self._signal_after, args=(number, after))
        watch.start()
        with pytest.raises(Interrupted) as caught:
            self.run(splits, changes)
        watch.join()
        assert caught.value.signal == number
        return str(caught.value)

    def _signal_after(self, number: int, step: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if list(self.scratch.glob(f"*/checkpoint-{step}")):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.001)

    def checkpoints(self) -> list[Path]:
        """All that are there, the oldest first."""
        return sorted(self.scratch.glob("*/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.fixture
def runs(small_model: Path, tmp_path: Path) -> Runs:
    return Runs(small_model, tmp_path)


@pytest.fixture(scope="module")
def expected(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a training leaves that nothing interrupts."""
    return Runs(small_model, tmp_path_factory.mktemp("expected")).run()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(runs, expected, number, caplog):
    before = signal.getsignal(signal.SIGINT)
    said = runs.interrupt(number)
    step = int(runs.checkpoints()[-1].name.split("-")[1])
    assert said.startswith(f"interrupted at step {step} of 12; run the same command again")
    assert said.endswith(f"to go on after step {step}")
    assert signal.getsignal(signal.SIGINT) is before
    with caplog.at_level(logging.INFO, "lathe"):
        assert runs.run() == expected
    assert f"going on after step {step}" in caplog.text
    assert list(runs.scratch.iterdir()) == []


def test_a_training_may_be_interrupted_again_and_again(runs, expected):
    for step in (3, 6):
        runs.interrupt(after=step)
    assert runs.run() == expected


FULL = {"tuning": "full", "quantization.load_in_4bit": False, "learning_rate": 1e-3}


def test_a_model_trained_whole_goes_on_exactly_and_never_from_another_base(runs, caplog):
    """The small model's embeddings are tied: they must come back as one weight."""
    uninterrupted = runs.run(changes=FULL)
    runs.interrupt(changes=FULL)
    checkpoint = load_file(runs.checkpoints()[-1] / "model.safetensors")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    shutil.copytree(runs.base, runs.folder / "other")
    other = load_file(runs.base / "model.safetensors")
    other["model.norm.weight"] += 1
    save_file(other, runs.folder / "other/model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO, "lathe"):
        Runs(runs.folder / "other", runs.folder / "of_other", runs.scratch).run(changes=FULL)
        assert "going on after step" not in caplog.text
        assert runs.run(changes=FULL) == uninterrupted
    assert "going on after step" in caplog.text


def test_the_best_evaluation_before_the_interruption_is_remembered(runs, caplog):
    changes: dict[str, Any] = {"load_best_model_at_end": True, "early_stopping_patience": 4, "eval_steps": 1}
    changes |= {"learning_rate": 0.004, "lr_scheduler_type": "constant", "precision": "fp32", "lora.lora_dropout": 0.0}
    changes |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 20}
    few = learnt_by_heart()
    uninterrupted = runs.run(few, changes)
    runs.interrupt(splits=few, changes=changes)
    with caplog.at_level(logging.INFO, "lathe"):
        assert runs.run(few, changes) == uninterrupted
    assert "stopping early" in caplog.text
    assert "going on after step" in caplog.text


def test_a_training_on_pairs_goes_on_exactly_in_either_phase(runs):
    """The reference of the pairs is what the supervised phase left, whoever has run that phase."""
    changes = {
        "method": "dpo",
        "dpo.sft_epochs": 1.0,
        "dpo.per_device_train_batch_size": 2,
        "dpo.gradient_accumulation_steps": 2,
        "dpo.learning_rate": 0.01,
    }
    uninterrupted = runs.run(changes=changes)
    assert "interrupted at step" in runs.interrupt(after=3, changes=changes)
    assert not list(runs.scratch.glob("*/result")), "the first phase was to be interrupted"
    assert " of 12; " in runs.interrupt(after=9, changes=changes)
    assert list(runs.scratch.glob("*/result")), "the second phase was to be interrupted"
    assert runs.run(changes=changes) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {**FULL, "load_best_model_at_end": True, "eval_steps": 3},
        {"lora.modules_to_save": ["lm_head"], "lora.use_rslora": True},
        {"lora.use_dora": True, "optim": "adamw_torch", "precision": "fp32"},
        {"quantization.load_in_4bit": False, "optim": "adamw_8bit"},
        {"gradient_checkpointing": True, "lr_scheduler_type": "linear", "weight_decay": 0.1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_training_goes_on_exactly(runs, changes, caplog):
    uninterrupted = runs.run(changes=changes)
    runs.interrupt(changes=changes)
    with caplog.at_level(logging.INFO, "lathe"):
        assert runs.run(changes=changes) == uninterrupted
    assert "going on after step" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "one bit", "never finished", "emptied"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(runs, expected, damage, caplog):
    runs.interrupt()
    before, newest = runs.checkpoints()
    file = newest / "optimizer.pt"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "never finished":
        (newest / "sha256.json").unlink()
        newest.rename(newest.parent / ".partial")
    else:
        for each in newest.iterdir():
            each.unlink()
    with caplog.at_level(logging.INFO, "lathe"):
        assert runs.run() == expected
    assert f"going on after step {before.name.split('-')[1]}," in caplog.text


@pytest.mark.parametrize("changes", [{"learning_rate": 0.001}, {"max_steps": 13}, {"logging_steps": 1}, {"seed": 2}])
def test_a_changed_parameter_never_resumes(runs, changes, caplog):
    runs.interrupt()
    with caplog.at_level(logging.INFO, "lathe"):
        runs.run(changes=changes)
    assert "going on" not in caplog.text
    assert len(runs.checkpoints()) == 2  # the interrupted training may still go on


@pytest.mark.parametrize("split", ["train", "validation"])
def test_changed_data_never_resumes(runs, split, caplog):
    runs.interrupt()
    with caplog.at_level(logging.INFO, "lathe"):
        runs.run({**SPLITS, split: SPLITS[split][1:]})
    assert "going on" not in caplog.text


def test_how_often_is_saved_may_change_in_between(runs, expected, caplog):
    runs.interrupt()
    with caplog.at_level(logging.INFO, "lathe"):
        assert runs.run(changes={"save_steps": 1}) == expected
    assert "going on" in caplog.text


def test_two_runs_of_the_same_training_do_not_share_checkpoints(runs, expected, caplog):
    runs.interrupt()
    [folder] = {path.parent for path in runs.checkpoints()}
    before = digests(folder)
    with acquire_checkpoints(runs.scratch, folder.name) as mine:
        assert mine
        assert runs.run() == expected
    assert "the same training is running elsewhere" in caplog.text
    assert digests(folder) == before


def test_who_comes_while_an_interrupted_run_saves_waits_for_it(tmp_path):
    with acquire_checkpoints(tmp_path, "training") as first:
        assert first
        first.announce_stop()
        program = "import sys; from pathlib import Path; from lathe.training.checkpoints import acquire_checkpoints\n"
        program += "with acquire_checkpoints(Path(sys.argv[1]), 'training') as mine: print(mine is not None)"
        command = [sys.executable, "-c", program, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "src")}
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(2)
    assert second.communicate(timeout=10)[0] == "True\n"


def test_of_trainings_that_nobody_went_on_with_the_newest_are_kept(tmp_path):
    for number in range(KEPT_TRAININGS + 3):
        with acquire_checkpoints(tmp_path, f"training{number:02d}") as checkpoints:
            assert checkpoints
            with checkpoints.open_partial() as folder:
                (folder / "checkpoint-1").mkdir()
        os.utime(tmp_path / f"training{number:02d}", (number, number))
    kept = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert kept == [f"training{number:02d}" for number in range(2, KEPT_TRAININGS + 3)]
    assert len(list(tmp_path.glob("*.lock"))) == len(kept)


# --- The real script, killed for good.


@pytest.fixture(scope="module")
def prepared(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with everything done but a longer training."""
    checkout = copy_of(reproduced, tmp_path_factory.mktemp("prepared") / "lathe")
    checkout.set(LONGER)
    checkout.commit()
    return checkout


@pytest.fixture(scope="module")
def finished(prepared: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The same after that training, which nothing interrupted."""
    checkout = copy_of(prepared, tmp_path_factory.mktemp("finished") / "lathe")
    checkout.run("dvc", "repro", "train")
    assert not list((checkout.root / ".scratch/train").iterdir())
    return checkout


def interrupted(
    checkout: Checkout, command: list[str], step: int, end: Callable[["subprocess.Popen[str]"], None]
) -> "subprocess.Popen[str]":
    """Run a command and end it by `end` as soon as there is a checkpoint of at least that step."""
    env = checkout.without_preloading().environment
    process = subprocess.Popen(
        command, cwd=checkout.root, env=env, start_new_session=True, text=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while newest_step(checkout) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    end(process)
    return process


def newest_step(checkout: Checkout) -> int:
    found = (checkout.root / ".scratch/train").glob("*/checkpoint-*")
    return max((int(path.name.split("-")[1]) for path in found), default=0)


def kill_everything(process: "subprocess.Popen[str]") -> None:
    time.sleep(random.uniform(0, 0.1))  # anywhere in the steps that follow, while saving too
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.communicate()


def killed_and_resumed(prepared: Checkout, finished: Checkout, root: Path, command: list[str], seed: int) -> None:
    checkout = copy_of(prepared, root)
    step = random.Random(seed).randrange(3, 31, 3)
    print(f"killed after step {step}")
    interrupted(checkout, command, step, kill_everything)
    assert newest_step(checkout) >= step
    checkout.check()
    resumed = checkout.run(*command)
    assert "going on after step" in resumed.stderr
    if "--temp" in command:
        [name] = checkout.run("dvc", "exp", "list", "--name-only").stdout.split()
        checkout.run("dvc", "exp", "apply", name)
    assert output_hashes(checkout)["train"] == output_hashes(finished)["train"]
    assert not list((checkout.root / ".scratch/train").iterdir())


@pytest.mark.parametrize(
    "command", [MODES[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])], ids=" ".join
)
def test_killed_at_a_random_step_and_run_again_it_ends_the_same(prepared, finished, tmp_path, command):
    killed_and_resumed(prepared, finished, tmp_path / "lathe", command, seed=random.randrange(1000))


@pytest.mark.slow
@pytest.mark.parametrize("command", MODES, ids=" ".join)
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_five_more_steps_it_ends_the_same(prepared, finished, tmp_path, command, seed):
    killed_and_resumed(prepared, finished, tmp_path / "lathe", command, seed)


@pytest.mark.slow
def test_ctrl_c_on_the_script_says_in_one_line_how_to_go_on(prepared, finished, tmp_path):
    checkout = copy_of(prepared, tmp_path / "lathe")
    command = [sys.executable, "stages/train.py"]
    process = interrupted(checkout, command, 9, lambda process: process.send_signal(signal.SIGINT))
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("interrupted at step ")
    assert error.splitlines()[-1].endswith(f"to go on after step {newest_step(checkout)}")
    assert "going on after step" in checkout.stage("train").stderr
    files = [
        "models/adapter/adapter_model.safetensors",
        "metrics/train/metrics.json",
        "metrics/train/freeze_proof.json",
    ]
    for file in [*files, "metrics/train/plots/metrics/train/loss.tsv"]:
        assert (checkout.root / file).read_bytes() == (finished.root / file).read_bytes(), file


def test_a_dvc_that_is_killed_alone_leaves_a_checkpoint_to_go_on_from(prepared, finished, tmp_path):
    """The script, told by the system that its parent is gone, saves and ends; who comes at once waits for it."""
    checkout = copy_of(prepared, tmp_path / "lathe")
    command = ["dvc", "repro", "train"]
    process = interrupted(checkout, command, 9, lambda process: process.kill())
    process.wait()  # a dead process that nobody waited for would keep DVC's locks
    assert "going on after step" in checkout.run(*command).stderr
    assert output_hashes(checkout)["train"] == output_hashes(finished)["train"]
    assert "interrupted at step" in process.communicate(timeout=30)[1]
