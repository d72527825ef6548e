"""A search over the real pipeline: its trials are experiments of DVC, and no kill loses or doubles one."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Checkout, copy_of

SEARCH = """\
study: late
sampler: {sampler}
startup_trials: 3
seed: 1
n_trials: {n_trials}
timeout_seconds: null
objectives:
  - metric: merged.rouge_l
    direction: maximize
space:
  {space}
"""
RESAMPLES = "evaluate.bootstrap_samples: {type: int, low: 100, high: 5000}"
SOME_FAIL = """evaluate.bootstrap_samples: {type: categorical, choices: [100, 200]}
  evaluate.general_text: {type: categorical, choices: [data/general.txt, data/none.txt]}"""


class Searched:
    """A checkout with a search file, and the command that runs it."""

    def __init__(self, checkout: Checkout, **search: Any) -> None:
        self.checkout = checkout
        (checkout.root / "experiments/search/late.yaml").write_text(SEARCH.format(**search))
        checkout.commit()
        checkout.environment["PYTHONPATH"] = str(checkout.root / "src")

    def command(self, *options: str) -> list[str]:
        return [sys.executable, "-m", "lathe", "search", "experiments/search/late.yaml", *options]

    def run(
        self, *options: str, check: bool = True, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.checkout.run(*self.command(*options), check=check, env=env)

    def begin(self, *options: str, env: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self.command(*options), cwd=self.checkout.root, env={**self.checkout.environment, **(env or {})}
        )

    def trials(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.checkout.json("metrics/search/late/study.json")["trials"]
        return found

    def experiments(self) -> dict[str, Any]:
        """What `dvc exp show` says of every experiment, by name."""
        shown = json.loads(self.checkout.run("dvc", "exp", "show", "--json").stdout)
        groups = [group for commit in shown for group in commit["experiments"] or ()]
        return {group["name"]: group["revs"][0]["data"] for group in groups}


@pytest.fixture
def copied(reproduced: Checkout, tmp_path: Path) -> Checkout:
    """A checkout whose pipeline has run, to be changed."""
    return copy_of(reproduced, tmp_path / "lathe").without_preloading()


def commands(processes: list[psutil.Process]) -> dict[psutil.Process, str]:
    """The command lines of those that have not ended meanwhile."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process] = " ".join(process.cmdline())
    return found


def workers(driver: "subprocess.Popen[Any]") -> list[psutil.Process]:
    children = commands(psutil.Process(driver.pid).children())
    return [child for child, command in children.items() if "lathe.experiments.search.trial" in command]


def is_at_work(driver: "subprocess.Popen[Any]") -> bool:
    """Whether a stage of a trial is running."""
    below = commands(psutil.Process(driver.pid).children(recursive=True))
    return any("python3 stages/" in command for command in below.values())


def assert_nothing_runs_in(root: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [each.info["cwd"] for each in psutil.process_iter(["cwd"])]
        if not any(cwd and Path(cwd).is_relative_to(root / ".dvc") for cwd in found):
            return
        time.sleep(0.1)
    raise AssertionError("a trial runs on without its driver")


def test_a_killed_search_goes_on_and_each_trial_is_an_experiment_or_a_failure_with_its_reason(copied: Checkout) -> None:
    searched = Searched(copied, sampler="grid", n_trials=12, space=SOME_FAIL)
    parameters = copied.root / "params.yaml"
    parameters.write_text(parameters.read_text() + "# not committed\n")
    before = copied.run("git", "status", "--porcelain", "--branch").stdout
    # The number of trials comes from the environment, as does a parameter.
    env = {"LORA_N_TRIALS": "4", "LORA_BATCH_SIZE": "4"}

    driver = searched.begin("--jobs", "2", env=env)
    deadline = time.monotonic() + 90
    while not is_at_work(driver):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert_nothing_runs_in(copied.root)
    told = searched.run("--jobs", "2", env=env)

    assert "goes on with the same parameters" in told.stderr
    assert "-S training.per_device_train_batch_size=4" in told.stderr
    assert "4 trials ended, 2 of them failed" in told.stdout
    found = copied.json("metrics/search/late/study.json")
    assert found["overrides"] == {"training.per_device_train_batch_size": "4"}
    assert found["environment"] == env
    trials = found["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    assert len({json.dumps(trial["parameters"], sort_keys=True) for trial in trials}) == 4
    good = [trial for trial in trials if trial["parameters"]["evaluate.general_text"] == "data/general.txt"]
    kept = {"".join(file.parts[-2:]) for file in (copied.root / ".dvc/tmp/exps/cache").glob("*/*")}
    assert {trial["commit"] for trial in good} <= kept, "DVC has read them"
    experiments = searched.experiments()
    assert set(experiments) == {trial["experiment"] for trial in good}
    assert len(good) == 2
    for trial in trials:
        if trial not in good:
            assert trial["state"] == "fail"
            assert "data/none.txt" in trial["reason"]
            continue
        shown = experiments[trial["experiment"]]
        [report] = json.loads(copied.run("git", "show", f"{trial['commit']}:metrics/evaluate/validation.json").stdout)
        score = report["merged"]["rouge_l"]
        assert trial["scores"] == {"merged.rouge_l": score}
        used = shown["params"]["params.yaml"]["data"]["evaluate"]["bootstrap_samples"]
        assert used == trial["parameters"]["evaluate.bootstrap_samples"]

    # The workspace is as it was, what was not committed included, and the trials took that along.
    assert copied.run("git", "status", "--porcelain", "--branch").stdout == before
    assert parameters.read_text().endswith("# not committed\n")
    [best] = found["best"]
    assert list((copied.root / ".dvc/tmp/search").iterdir()) == []

    # Nothing is left to do; a search that could not be compared is refused; the best is applied.
    assert "4 trials ended" in searched.run(env=env).stdout
    refused = searched.run("-S", "seed=7", check=False, env=env)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: study late: its trials were run with other overrides")
    refused = searched.run("--apply", check=False, env=env)
    assert "what is not committed, which is params.yaml; commit it, or `git stash`" in refused.stderr
    parameters.write_text(parameters.read_text().removesuffix("# not committed\n"))
    searched.run("--apply", env=env)
    chosen = next(trial for trial in trials if trial["experiment"] == best)
    assert f"bootstrap_samples: {chosen['parameters']['evaluate.bootstrap_samples']} " in parameters.read_text()


def test_ctrl_c_ends_a_search_in_one_line_and_leaves_nothing_running(copied: Checkout) -> None:
    searched = Searched(copied, sampler="tpe", n_trials=3, space=RESAMPLES)
    (copied.root / "README.md").touch()  # another time stamp is no change
    driver = subprocess.Popen(
        searched.command(), cwd=copied.root, env=copied.environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not workers(driver):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGINT)
    _, told = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert told.splitlines()[-1] == "study late is interrupted; the same command goes on with it"
    assert "Traceback" not in told
    assert_nothing_runs_in(copied.root)


@pytest.mark.slow
def test_a_search_whose_driver_and_worker_are_killed_at_random_ends_with_every_trial_once(copied: Checkout) -> None:
    searched = Searched(copied, sampler="tpe", n_trials=12, space=RESAMPLES)
    for _ in range(2):
        moment = random.uniform(1, 40)
        print(f"the driver is killed after {moment:.2f} s")
        driver = searched.begin("--jobs", "2")
        time.sleep(moment)
        driver.kill()
        driver.wait()
    driver = searched.begin("--jobs", "2")
    for _ in range(2):
        moment = random.uniform(5, 30)
        print(f"a worker is killed after {moment:.2f} s")
        time.sleep(moment)
        if found := workers(driver):
            random.choice(found).kill()
    assert driver.wait() == 0
    trials = searched.trials()
    assert [trial["number"] for trial in trials] == list(range(12))
    assert {trial["state"] for trial in trials} == {"complete"}
    assert set(searched.experiments()) == {f"late-{number}" for number in range(12)}
    assert copied.run("git", "status", "--porcelain").stdout == ""
    assert_nothing_runs_in(copied.root)
