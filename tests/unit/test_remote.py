"""Runs on other machines: what is refused before anything is sent, and the tasks that are composed."""

import argparse
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from experiment_repository import Repository
from refusals import refused
from ruamel.yaml import YAML

from lathe import cli
from lathe.commands import remote as remote_commands
from lathe.common import metric_files, paths
from lathe.common.errors import InputError
from lathe.experiments.preflight import Preflight
from lathe.remote import job, preparation, records, searches, sky_runs, slurm_runs, ssh_runs
from lathe.remote.host import Host
from lathe.remote.job import Job

COMMIT = "1234567890" * 4
JOB = Job("some", COMMIT, ["lora.r=8"])


def parse(*words: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["remote", "run", "tiny", *words])


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--slurm", "--folder", "x"), "--folder"),
        (("--setup", "make"), "--setup"),
        (("--host", "box", "--gpus", "H100:1"), "--gpus"),
        (("--host", "box", "--sbatch=--gres=gpu:1"), "--sbatch"),
        (("--slurm", "--dvc-remote", "ycloud"), "--dvc-remote"),
        (("--slurm", "--spot"), "--spot"),
    ],
)
def test_options_of_another_kind_of_machine_are_refused(words, option):
    with refused("foreign-option", option):
        remote_commands._run(parse(*words))


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_a_price_is_a_number_from_zero_on(price):
    with refused("option-out-of-range", "--price-per-hour", price):
        remote_commands._run(parse("--host", "box", "--price-per-hour", price))


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a b", "", "box;reboot", "$(id)"])
def test_a_host_that_ssh_would_take_for_something_else_is_refused(name):
    with refused("invalid-host", repr(name)):
        Host(name, "lathe")


@pytest.mark.parametrize("folder", ["", "a b", "~/x", "x;y", "$HOME", "x/"])
def test_a_folder_that_a_shell_would_read_otherwise_is_refused(folder):
    with refused("invalid-folder", repr(folder)):
        Host("me@box", folder)


@pytest.mark.parametrize("name", ["../x", "-x", "", "a b", "a.lock"])
def test_a_name_that_is_none_on_every_machine_is_refused(name):
    with refused("invalid-name", repr(name)):
        preparation.check_name(name)


def test_what_the_commit_lacks_is_told_a_line_each(monkeypatch):
    found = Preflight(["params.yaml", "stages/train.py"], {}, ["src/new.py", "notes"], ["src/new.py"])
    monkeypatch.setattr(preparation.preflight, "find_changes", lambda: found)
    with refused("not-committed", "params.yaml, stages/train.py", "src/new.py") as caught:
        preparation.require_committed()
    assert len(str(caught.value).splitlines()) == 2
    assert "notes" not in str(caught.value)


def test_jobs_are_read_as_they_were_written_and_others_refused(tmp_path):
    file = tmp_path / "jobs.json"
    jobs = [JOB, Job("other", COMMIT, [], "ycloud", "origin", 2.5)]
    job.write_jobs(jobs, file)
    assert [job.read_job(file, number) for number in (1, 2)] == jobs
    for number in (0, 3):
        with refused("no-job", f"--number {number}", kept=False):
            job.read_job(file, number)
    file.write_text('[{"name": "some", "unknown": 1}]')
    with refused("no-jobs", str(file), kept=False):
        job.read_job(file, 1)


def test_another_commit_or_another_value_is_another_job():
    digests = {JOB.digest, Job("some", COMMIT[::-1], ["lora.r=8"]).digest, Job("some", COMMIT, ["lora.r=4"]).digest}
    assert len(digests) == 3
    assert Job("else", COMMIT, ["lora.r=8"], "ycloud", "origin", 3).digest == JOB.digest


def test_what_was_started_is_remembered_until_it_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    record = records.Record("some", "ssh", {"host": "box", "folder": "/x"}, "2030-01-01T00:00:00+00:00", [JOB])
    records.write_record(record)
    assert records.read_record("some") == record
    with refused("no-remote-run", "som", "did you mean 'some'?"):
        records.read_record("som")
    (tmp_path / "some.json").write_text("{}")
    with refused("damaged-record", "some.json", kept=False):
        records.read_record("some")
    records.forget_record("some")
    with refused("no-remote-run", "some"):
        records.forget_record("some")


@pytest.fixture
def study_on_two_hosts(tmp_path, monkeypatch):
    """Records of a study's drivers on two hosts, of which the first cannot be reached."""
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    for name in ("box", "den"):
        records.write_record(records.Record(f"mine-on-{name}", "ssh", {"host": name}, "today", study="mine"))

    def answer(record):
        if record.place["host"] == "box":
            raise InputError("box: no route to host; `ssh box` must work", code="host-unreachable")
        return ["den has it"]

    monkeypatch.setattr(ssh_runs, "fetch", answer)
    monkeypatch.setattr(ssh_runs, "stop", answer)
    monkeypatch.setattr(ssh_runs, "read_state", lambda record: answer(record)[0])


def test_a_host_that_cannot_be_reached_keeps_nobody_from_the_others_of_a_study(study_on_two_hosts, capsys):
    def run(*words: str) -> str:
        parsed = cli.build_parser().parse_args(["remote", *words])
        parsed.run(parsed)
        return capsys.readouterr().out

    told = run("status", "mine")
    assert "mine-on-box  box  since today  unknown: box: no route to host" in told
    assert "mine-on-den  den  since today  den has it" in told
    with refused("host-unreachable", "no route", kept=False):
        run("status", "mine-on-box")
    for command, expected in (("fetch", "den has it\n"), ("stop", "mine-on-den: told to stop")):
        with refused("host-unreachable", "no route", kept=False):
            run(command, "mine")
        assert capsys.readouterr().out.startswith(expected)


def test_what_could_not_be_delivered_is_tried_again_with_the_next_and_at_the_end(monkeypatch, caplog):
    arrived, is_gone = [], [True]

    def push(experiment, remote):
        if is_gone[0]:
            raise InputError("ycloud: nobody answers there; check the network")
        arrived.append((experiment, remote))

    monkeypatch.setattr(searches, "push_experiment", push)
    monkeypatch.setattr(searches, "PAUSES", (0.0, 0.0))
    deliveries = searches._Deliveries("ycloud")
    one, two = (job.Experiment(f"mine-{number}", str(number) * 40, COMMIT, "") for number in (1, 2))
    deliveries.add(one)
    deliveries.send()
    deliveries.send()
    said = "mine-1 is not delivered, and will be tried again: ycloud: nobody answers there; check the network"
    assert caplog.messages.count(said) == 2
    with refused("not-delivered", "mine-1", "the same command tries again"):
        deliveries.send_or_raise()
    is_gone[0] = False
    deliveries.add(two)
    deliveries.send()
    deliveries.send_or_raise()
    assert arrived == [(one, "ycloud"), (two, "ycloud")]


def test_without_slurm_or_sky_their_commands_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with refused("no-slurm", "sbatch"):
        slurm_runs.call("sbatch")
    with refused("no-sky", "sky"):
        sky_runs.launch(JOB, sky_runs.Machine(), None)
    with refused("no-sky", "sky"):
        sky_runs.call_sky("jobs", "queue")


def test_timings_name_the_machine_and_the_cost_of_their_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv(metric_files.MACHINE, "box, 1 x H100")
    monkeypatch.setenv(metric_files.PRICE, "7.2")
    for item, seconds in (("base", 10.0), ("merged", 5.0)):
        metric_files.write_timings(
            "convert", item, seconds=seconds, throughput={}, items=["base", "merged"], folder=tmp_path
        )
    found = metric_files.unwrap_list(YAML(typ="safe").load((tmp_path / "timings/convert.json").read_text()))
    assert [entry["cost"] for entry in found["items"]] == [0.02, 0.01]
    assert found["cost"] == 0.03
    assert {entry["machine"] for entry in found["items"]} == {"box, 1 x H100"}
    monkeypatch.delenv(metric_files.MACHINE)
    monkeypatch.delenv(metric_files.PRICE)
    metric_files.write_timings("merge", None, seconds=1.0, throughput={}, folder=tmp_path)
    assert not {"machine", "cost"} & set(YAML(typ="safe").load((tmp_path / "timings/merge.json").read_text())[0])


@pytest.mark.parametrize("damaged", ["<<<<<<< HEAD\n", "", "[]", "[7]", '[{"items": [{"item": "base"}]}]'])
def test_damaged_timings_fail_no_stage_at_its_end(tmp_path, damaged, caplog):
    file = tmp_path / "timings/convert.json"
    file.parent.mkdir()
    file.write_text(damaged)
    items = ["base", "merged"]
    metric_files.write_timings("convert", "merged", seconds=5.0, throughput={}, items=items, folder=tmp_path)
    found = metric_files.unwrap_list(YAML(typ="safe").load(file.read_text()))
    assert [entry["item"] for entry in found["items"]] == ["merged"]
    assert "convert.json: damaged; the times of other items are lost, and nothing else" in caplog.text


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository with one commit, and records of its own."""
    (tmp_path / "repository").mkdir()
    made = Repository(tmp_path / "repository")
    monkeypatch.setattr(paths, "ROOT", made.root)
    monkeypatch.setattr(sky_runs, "FOLDER", tmp_path / "records")
    return made


def compose(repository: Repository, machine: sky_runs.Machine) -> Path:
    return sky_runs.write_task(Job("some", repository.base, ["lora.r=8"], "ycloud"), machine)


def test_the_task_for_sky_brings_the_commit_and_goes_on_in_a_folder_of_the_job(repository, tmp_path):
    file = compose(repository, sky_runs.Machine("H100:1", spot=True))
    task = YAML(typ="safe").load(file)
    assert task["resources"]["accelerators"] == "H100:1"
    assert task["resources"]["use_spot"] is True
    assert task["file_mounts"]["/lathe"]["mode"] == "MOUNT_CACHED"
    assert task["envs"]["LATHE_COMMIT"] == repository.base
    assert "set" not in [*task["envs"].values(), task["name"], *map(str, task["file_mounts"].values())]

    # What `setup` does with the bundle, but for the environment; twice, as on a machine that is asked again.
    home = tmp_path / "home"
    (home / "lathe-sent").mkdir(parents=True)
    for name in ("code.bundle", "jobs.json"):
        shutil.copy(task["file_mounts"][f"~/lathe-sent/{name}"], home / "lathe-sent")
    for _ in range(2):
        script = task["setup"].replace("make setup", "echo set up")
        environment = {**os.environ, "HOME": str(home), **task["envs"], "GIT_CONFIG_GLOBAL": os.devnull}
        subprocess.run(["bash", "-c", script], env=environment, check=True, cwd=home)
    assert repository.git("rev-parse", "HEAD") == repository.base
    made = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home / "lathe", capture_output=True, text=True, check=True)
    assert made.stdout.strip() == repository.base
    assert job.read_job(home / "lathe-sent/jobs.json", 1).commit == repository.base


def test_the_bucket_is_the_same_for_every_clone(repository):
    name = sky_runs.name_bucket()
    assert name == f"lathe-work-{repository.base[:16]}"
    repository.run("main", [True] * 40)
    assert sky_runs.name_bucket() == name


SKY = shutil.which("sky")


@pytest.mark.skipif(SKY is None, reason="sky is not on the PATH: `uv tool install skypilot`")
@pytest.mark.parametrize(
    "machine", [sky_runs.Machine(), sky_runs.Machine("H100:1", spot=True), sky_runs.Machine("A100:8")]
)
def test_skypilot_reads_the_task_as_it_is_meant(repository, tmp_path, machine):
    assert SKY is not None
    file = compose(repository, machine)
    python = Path(SKY).resolve().with_name("python")
    program = (
        "import sys, sky\n"
        "task = sky.Task.from_yaml(sys.argv[1])\n"
        "[wanted] = task.resources\n"
        "print(task.name, wanted.accelerators, wanted.use_spot, wanted.job_recovery,\n"
        "      [(path, storage.name, storage.mode.value) for path, storage in task.storage_mounts.items()],\n"
        "      sorted(task.file_mounts or {}), task.envs['LATHE_COMMIT'], sep='|')\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", program, file], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    name, gpus, spot, recovery, storages, files, commit = done.stdout.splitlines()[-1].split("|")
    kind, _, count = (machine.gpus or "").partition(":")
    assert name == "some"
    assert gpus == (f"{{'{kind}': {count}}}" if kind else "None")
    assert spot == str(machine.spot)
    assert "EAGER_NEXT_REGION" in recovery.upper()
    assert storages == f"[('/lathe', '{sky_runs.name_bucket()}', 'MOUNT_CACHED')]"
    assert files == "['~/lathe-sent/code.bundle', '~/lathe-sent/jobs.json']"
    assert commit == repository.base
