"""Runs under Slurm: a real cluster of one node, from Debian's slurm-wlm and munge."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Checkout, copy_of
from slurm_cluster import MISSING, SlurmCluster
from training_checkout import list_checkpoints, list_outputs, make_training_checkout

from lathe.common import paths

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: `apt-get install slurm-wlm munge`"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the cluster's daemons run as root"),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    """A cluster that runs."""
    cluster = SlurmCluster(tmp_path / "slurm", cpus=2)
    yield cluster
    cluster.stop()


def wait_for(condition: Callable[[], object], told: Callable[[], str], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.05)


def test_an_array_that_is_requeued_and_cancelled_in_the_middle_makes_the_bytes_of_runs_that_nothing_stopped(
    cluster: SlurmCluster, small_model: Path, tmp_path: Path
) -> None:
    sent = make_training_checkout(tmp_path / "sent", small_model)
    here = copy_of(sent, tmp_path / "here").without_preloading()
    here.environment["PYTHONPATH"] = str(here.root / "src")
    sent.environment |= cluster.environment
    (sent.root / ".venv").symlink_to(sys.prefix)
    logs = sent.root / ".scratch/remote/jobs"
    start = command("run", "longer", "--slurm", "-S", "lora.r=2,4", "--sbatch=--cpus-per-task=1", "--sbatch=--mem=0")

    def told() -> str:
        return cluster.call("squeue") + "".join(file.read_text() for file in sorted(logs.glob("*.log")))

    def is_over() -> bool:
        return not cluster.call("squeue", "--noheader")

    # While they train, the first is put back into the queue, and later all is cancelled.
    number = submit(sent, start)
    first = logs / "longer-1.log"
    wait_for(lambda: first.exists() and '"step": 60, ' in first.read_text(), told)
    cluster.call("scontrol", "requeue", f"{number}_1")
    wait_for(lambda: first.read_text().count("going on after step") == 1, told)
    sent.run(*command("stop", "longer"))
    wait_for(is_over, told)
    assert "goes on with the others" in sent.run(*command("status", "longer")).stdout
    assert list_checkpoints(sent.root), told()

    submit(sent, start)
    wait_for(is_over, told)
    assert sent.run(*command("status", "longer")).stdout.rstrip().endswith("done"), told()
    assert first.read_text().count("going on after step") == 2, told()
    assert not list_checkpoints(sent.root)

    for name, rank in (("longer-1", 2), ("longer-2", 4)):
        here.run(sys.executable, "-m", "lathe", "run", "longer", "--name", name, "-S", f"lora.r={rank}")
        here.run("git", "reset", "--quiet", "--hard")
        assert list_outputs(sent, name) == list_outputs(here, name)
    assert list_outputs(sent, "longer-1") != list_outputs(sent, "longer-2")
    refused = sent.run(*start, check=False)
    assert refused.returncode == 2
    assert "longer-1, longer-2: has been run from this commit" in refused.stderr


def submit(checkout: Checkout, start: list[str]) -> str:
    """Submit the runs; return the number of the array."""
    said = checkout.run(*start).stdout
    assert said.startswith("longer is job "), said
    return said.split()[3]


def test_what_slurm_does_not_take_is_told_in_its_words(cluster: SlurmCluster, checkout: Checkout) -> None:
    checkout.environment |= {**cluster.environment, "PYTHONPATH": str(checkout.root / "src")}
    done = checkout.run(*command("run", "tiny", "--slurm", "--sbatch=--partition=none"), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: sbatch: error: "), done.stderr
    assert "partition" in done.stderr


def test_out_of_time_a_job_saves_and_goes_back_into_the_queue(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The template alone, around a `python` that notes what it is sent."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program = tmp_path / ".venv/bin/python"
    program.write_text(
        f'#!/bin/sh\necho start "$@" >>{tmp_path}/noted\n[ ! -e {tmp_path}/saved ] || exit 0\n'
        f"trap 'echo saved >{tmp_path}/saved; exit 143' TERM\nwhile :; do sleep 0.2; done\n"
    )
    program.chmod(0o755)
    template = paths.ROOT / "experiments/remote/slurm.sbatch"
    environment = {**os.environ, **cluster.environment}
    options = ["--array=3", "--cpus-per-task=1", "--mem=0", f"--output={tmp_path}/log", "--signal=B:USR1@600"]
    subprocess.run(
        ["sbatch", *options, "--time=1", str(template), "jobs.json"], cwd=tmp_path, env=environment, check=True
    )

    def told() -> str:
        return "".join(file.read_text() for file in (tmp_path / "log", tmp_path / "noted") if file.exists())

    wait_for(lambda: told().count("start -m lathe remote job jobs.json --number 3") == 2, told)
    assert (tmp_path / "saved").exists()
    wait_for(lambda: not cluster.call("squeue", "--noheader"), told)


def command(*words: str) -> list[str]:
    """A command `lathe remote`."""
    return [sys.executable, "-m", "lathe", "remote", *words]
