# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""SIGKILL of the studio while two runs and a search go on: they end as if nothing had been, and are found again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import browser  # noqa: F401 - a fixture
from conftest import Checkout, copy_of
from studio_reader import DESKTOP, PHONE, SMALL_RECIPE, Reader
from studio_server import Studio

STEPS, TRIALS = 600, 5
SEARCH = """\
study: pair
sampler: random
startup_trials: 1
seed: 3
n_trials: 5
timeout_seconds: null
objectives:
  - metric: merged.rouge_l
    direction: maximize
space:
  evaluate.bootstrap_samples: {type: int, low: 100, high: 5000}
"""


@pytest.fixture
def checkout(reproduced: Checkout, tmp_path: Path) -> Iterator[Checkout]:
    checkout = copy_of(reproduced, tmp_path / "lathe").without_preloading()
    (checkout.root / "experiments/small.yaml").write_text(SMALL_RECIPE)
    (checkout.root / "experiments/search/pair.yaml").write_text(SEARCH)
    checkout.commit()
    yield checkout
    for process in psutil.process_iter(["cwd"]):  # what a failed test leaves
        with contextlib.suppress(psutil.Error):
            if process.info["cwd"] and Path(process.info["cwd"]).is_relative_to(checkout.root):
                process.kill()


def read_lock(checkout: Checkout, experiment: str) -> str:
    """What dvc.lock says of an experiment: the hash of every output."""
    pattern = f"refs/exps/*/*/{experiment}"
    ref = checkout.run("git", "for-each-ref", "--format=%(refname)", pattern).stdout.strip()
    return checkout.run("git", "show", f"{ref}:dvc.lock").stdout


def list_works(studio: Studio) -> list[dict[str, Any]]:
    works: list[dict[str, Any]] = studio.api("GET", "/api/running").json()
    return works


def name_works(studio: Studio) -> list[tuple[str, int, str | None]]:
    """What does not change from look to look while a stage runs."""
    return sorted((work["title"], work["pid"], work["identifier"]) for work in list_works(studio))


def wait_for(condition: Any, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.25)


@pytest.mark.slow
def test_a_killed_studio_stops_neither_two_runs_nor_a_search_and_two_later_ones_show_the_same(
    browser, checkout, tmp_path
):
    control = copy_of(checkout, tmp_path / "control").without_preloading()
    wanted: dict[str, Any] = {"recipe": "small", "values": {"training.max_steps": STEPS}, "mode": "temp"}
    with Studio(checkout.root) as studio:
        run = studio.api("POST", "/api/runs", {**wanted, "name": "first"}).json()["identifier"]
        # While its checkout is made, DVC has the workspace in Git's stash.
        wait_for(lambda: any(work["stage"] for work in list_works(studio)))
        form = {"file": "experiments/search/pair.yaml", "n_trials": TRIALS}
        search = studio.api("POST", "/api/searches", form).json()["identifier"]
        wait_for(lambda: sum(work["stage"] is not None for work in list_works(studio)) == 2)
        # The second run is typed on a terminal.
        typed = subprocess.Popen(
            [
                *(sys.executable, "-m", "lathe", "run", "small"),
                *("--name", "second", "--temp", "-S"),
                f"training.max_steps={STEPS // 2}",
            ],
            cwd=checkout.root,
            env={**checkout.environment, "PYTHONPATH": str(checkout.root / "src")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: [work["stage"] for work in list_works(studio)].count("train") == 2)
        before = name_works(studio)
        assert len(before) == 3
        os.kill(studio.process.pid, signal.SIGKILL)
        studio.process.wait()
    typed_pid = next(pid for title, pid, _ in before if title == "second")
    processes = {pid: psutil.Process(pid).create_time() for _, pid, _ in before}

    with Studio(checkout.root) as one, Studio(checkout.root) as other:
        for studio in (one, other):
            studio.open()
        assert name_works(one) == name_works(other) == before
        assert {pid: psutil.Process(pid).create_time() for _, pid, _ in before} == processes
        study = [studio.api("GET", "/api/searches/pair").json()["trials"] for studio in (one, other)]
        assert [[trial["parameters"] for trial in trials] for trials in study] == [
            [trial["parameters"] for trial in study[0]]
        ] * 2
        live = [f"/commands/{run}", f"/live/{typed_pid}", "/searches/pair"]
        for size, scheme, language in ((DESKTOP, "light", "en-GB"), (PHONE, "dark", "ru-RU")):
            reader = Reader(browser, other, size, scheme, language)
            for path in live:
                reader.go_live(path)
                assert reader.find_faults() == [], path
                assert reader.measure_overflow() <= 0, path
            assert (reader.complaints, reader.others) == ([], [])
            reader.context.close()

        assert [one.wait(identifier, 400)["code"] for identifier in (run, search)] == [0, 0]
        assert typed.wait(timeout=400) == 0
        wait_for(lambda: list_works(one) == [])
        shown = [studio.api("GET", "/api/runs").json() for studio in (one, other)]
        assert shown[0] == shown[1]
        assert {"first", "second", *(f"pair-{number}" for number in range(TRIALS))} <= {
            each["name"] for each in shown[0]
        }
        trials = one.api("GET", "/api/searches/pair").json()["trials"]
        assert [trial["state"] for trial in trials] == ["complete"] * TRIALS
        assert other.api("GET", "/api/searches/pair").json()["trials"] == trials

    # The same run where nobody killed anything: every output has the same hash.
    control.run(
        *("python3", "-m", "lathe", "run", "small", "--name", "first", "--temp"),
        *("-S", f"training.max_steps={STEPS}"),
        env={"PYTHONPATH": str(control.root / "src")},
    )
    assert read_lock(checkout, "first") == read_lock(control, "first")
