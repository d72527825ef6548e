"""What SkyPilot's machines do, without SkyPilot: the task's own commands, on two "machines" that are folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import copy_of
from ruamel.yaml import YAML
from training_checkout import list_checkpoints, list_outputs, make_training_checkout

COMPOSE = """
import sys
from lathe.remote import preparation, records, sky_runs
from dataclasses import replace
[job] = preparation.build_jobs("longer", [], "longer", None)
job = replace(job, remote="shared")
records.write_record(records.Record("longer", "sky", {"job": "longer"}, "2030-01-01T00:00:00+00:00", [job]))
print(sky_runs.write_task(job, sky_runs.Machine("H100:1", spot=True)))
"""


@pytest.mark.slow
def test_a_job_whose_machine_is_taken_away_ends_on_another_with_the_bytes_of_one_that_stayed(
    small_model: Path, tmp_path: Path
) -> None:
    checkout = make_training_checkout(tmp_path / "lathe", small_model)
    here = copy_of(checkout, tmp_path / "here").without_preloading()
    here.environment["PYTHONPATH"] = str(here.root / "src")
    checkout.run("dvc", "remote", "add", "shared", str(tmp_path / "shared"))
    checkout.commit()
    checkout.run("dvc", "push", "--quiet", "--remote", "shared", "data/processed", "models/base")
    task = YAML(typ="safe").load(Path(checkout.run(sys.executable, "-c", COMPOSE).stdout.strip()))
    work = tmp_path / "bucket/longer"

    def start(machine: str) -> "subprocess.Popen[bytes]":
        home = tmp_path / machine
        (home / "lathe-sent").mkdir(parents=True)
        for name in ("code.bundle", "jobs.json"):
            (home / "lathe-sent" / name).symlink_to(task["file_mounts"][f"~/lathe-sent/{name}"])
        environment = {**checkout.environment, "HOME": str(home), **task["envs"], "LATHE_WORK": str(work)}
        environment.pop("PYTHONPATH")
        setup = task["setup"].replace("make setup", f"ln -sfn {sys.prefix} .venv && echo")
        subprocess.run(["bash", "-c", setup], env=environment, cwd=home, check=True)
        with (home / "log").open("wb") as log:
            return subprocess.Popen(
                ["bash", "-c", task["run"]], env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
            )

    def read_log(machine: str) -> str:
        return (tmp_path / machine / "log").read_text()

    def find_checkpoints() -> list[Path]:
        return sorted((work / "train").glob("*/checkpoint-*"))

    first = start("first")
    try:
        deadline = time.monotonic() + 200
        while not find_checkpoints():
            assert first.poll() is None, read_log("first")
            assert time.monotonic() < deadline, read_log("first")
            time.sleep(0.05)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    time.sleep(2)
    failed = checkout.run(sys.executable, "-m", "lathe", "remote", "fetch", "longer", check=False)
    assert failed.returncode == 2
    assert "longer: no result in shared" in failed.stderr, failed.stderr
    (tmp_path / "first").rename(tmp_path / "taken-away")

    assert start("second").wait(timeout=300) == 0, read_log("second")
    assert "going on after step" in read_log("second")
    assert not find_checkpoints()
    assert "longer" in checkout.run(sys.executable, "-m", "lathe", "remote", "status").stdout
    told = checkout.run(sys.executable, "-m", "lathe", "remote", "fetch", "longer").stdout
    assert told.startswith("longer: ")

    here.run(sys.executable, "-m", "lathe", "run", "longer")
    assert list_outputs(checkout, "longer") == list_outputs(here, "longer")
    checkout.run("dvc", "exp", "apply", "longer")
    checkout.run("dvc", "checkout", "models/adapter")
    for file in sorted((here.root / "models/adapter").iterdir()):
        assert (checkout.root / "models/adapter" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((checkout.root / "metrics/timings/train.json").read_text())[0]["machine"]
    assert not list_checkpoints(checkout.root)
