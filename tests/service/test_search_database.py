"""Several drivers on one study in PostgreSQL: a real server, from Debian's package."""

import getpass
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Checkout, copy_of
from toy import PYTHONPATH

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
PASSWORD = "s3cret"


class Server:
    """A server that asks for a password, in a folder of its own; another user runs it where this one is root.

    At another `address` than this machine's own it lets clients of `subnet` in.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1", subnet: str | None = None) -> None:
        account = pwd.getpwnam("postgres" if os.geteuid() == 0 else getpass.getuser())
        is_root = os.geteuid() == 0
        self.folder = folder
        self.as_user: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid} if is_root else {}
        secret = folder / "password"
        secret.write_text(PASSWORD)
        for path in (folder, secret):
            os.chown(path, account.pw_uid, account.pw_gid)
        with socket.socket() as probe:
            probe.bind((address, 0))
            self.port = probe.getsockname()[1]
        self.address = address
        self.url = f"postgresql://lathe:{PASSWORD}@{address}:{self.port}/postgres"
        self._call("initdb", "--auth=scram-sha-256", f"--pwfile={secret}", "--username=lathe", "--no-sync")
        if subnet:
            with (folder / "data/pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {subnet} scram-sha-256\n")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = (
            f"-p {self.port} -c listen_addresses={self.address} -c unix_socket_directories={self.folder} -c fsync=off"
        )
        self._call("pg_ctl", f"--options={options}", f"--log={self.folder}/log", "--wait", "start")

    def stop(self) -> None:
        """End it at once, as a machine that loses its power."""
        self._call("pg_ctl", "--mode=immediate", "stop")

    def _call(self, program: str, *options: str) -> None:
        command = [str(PROGRAMS[-1].parent / program), f"--pgdata={self.folder}/data", *options]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, **self.as_user)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that runs."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed: `apt-get install postgresql`")
    folder = Path(tempfile.mkdtemp())
    server = Server(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


# A driver whose trials run no DVC: what is made by one is seen by all, as on a shared disk.
DRIVER = """
import json, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = {places!r}
from lathe.common import paths
from lathe.common.errors import InputError
from toy import load_toy
from lathe.experiments.search import run_search, storage, study, trial
from test_search import RATE, planned
folder, url, name = Path(sys.argv[1]), *sys.argv[2:]
paths.SCRATCH, run_search.LOGS = folder / "s", folder
run_search.SECONDS_BETWEEN_SEARCHES_FOR_WORK = 0.2
def experiment(order):
    content = {{"merged": {{}}, "Q4_K_M": {{"exact_match": 0.5}}}}
    made = (folder / order.name).exists()
    return SimpleNamespace(commit="c", read_json=lambda name: content) if made else None
trial.find_experiment = experiment
def start(order, gpu):
    with (folder / "runs").open("a") as runs:
        runs.write(order.name + "\\n")
    program = "import pathlib, sys, time; time.sleep(.1); pathlib.Path(sys.argv[1]).touch()"
    return subprocess.Popen([sys.executable, "-c", program, str(folder / order.name)])
params = load_toy().params
plan = planned(folder, params, RATE, sampler="random").model_copy(update={{"study": name}})
opened = study.Study(plan, storage.open_storage(url, plan.study), params.model_dump(), is_local=False)
driver = run_search.Driver(opened, 12, 2, None, [], [], "", "", start)
try:
    with storage.translate_connection_errors(url):
        driver.run()
except InputError as error:
    sys.exit(f"error: {{error}}")
print(json.dumps([(one.number, one.state.name, one.values) for one in opened.optuna_study.get_trials()]))
"""


def begun(server: Server, folder: Path, name: str) -> "subprocess.Popen[str]":
    """A driver of the study of that name."""
    tests = Path(__file__).parents[1]
    program = DRIVER.format(places=[str(tests / "unit"), str(tests)])
    command = [sys.executable, "-c", program, str(folder), server.url, name]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_drivers_share_a_study_without_a_repeated_trial(server: Server, tmp_path: Path) -> None:
    drivers = [begun(server, tmp_path, "shared") for _ in range(2)]
    ended = [driver.communicate(timeout=120) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], ended
    told = [output for output, _ in ended]
    assert json.loads(told[0]) == json.loads(told[1]) == [[number, "COMPLETE", [0.5]] for number in range(12)]
    runs = (tmp_path / "runs").read_text().split()
    assert sorted(runs) == sorted(f"shared-{number}" for number in range(12))


def test_a_server_that_goes_away_ends_the_search_in_one_line_and_the_study_goes_on(
    server: Server, tmp_path: Path
) -> None:
    driver, runs, deadline = begun(server, tmp_path, "lost"), tmp_path / "runs", time.monotonic() + 60
    while not (runs.exists() and len(runs.read_text().split()) > 3):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.stop()
    try:
        _, told = driver.communicate(timeout=60)
    finally:
        server.start()
    assert driver.returncode == 1
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    assert last.startswith(f"error: postgresql://lathe@127.0.0.1:{server.port}/postgres: ")
    assert last.endswith("; when the database is back, the same command goes on")

    again, _ = begun(server, tmp_path, "lost").communicate(timeout=120)
    assert json.loads(again) == [[number, "COMPLETE", [0.5]] for number in range(12)]


def test_a_wrong_password_is_told_in_one_line_and_not_shown(server: Server, tmp_path: Path) -> None:
    from lathe.common.errors import InputError
    from lathe.experiments.search import storage

    with pytest.raises(InputError, match="password authentication failed") as caught:
        storage.open_storage(server.url.replace(PASSWORD, "wr0ng"), "some")
    assert "wr0ng" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_checkouts_join_one_study_and_each_has_the_experiments_that_it_ran(
    server: Server, reproduced: Checkout, tmp_path: Path
) -> None:
    checkouts = [copy_of(reproduced, tmp_path / name) for name in ("here", "there")]
    drivers = []
    for checkout in checkouts:
        file = checkout.root / "experiments/search/joined.yaml"
        file.write_text(
            "study: joined\nsampler: random\nstartup_trials: 1\nseed: 1\nn_trials: 6\ntimeout_seconds: null\n"
            "objectives: [{metric: merged.rouge_l, direction: maximize}]\n"
            "space: {evaluate.bootstrap_samples: {type: int, low: 100, high: 5000}}\n"
        )
        environment = {
            **checkout.environment,
            "PYTHONPATH": str(checkout.root / "src"),
            "LATHE_SEARCH_STORAGE": server.url,
        }
        command = [sys.executable, "-m", "lathe", "search", str(file)]
        drivers.append(subprocess.Popen(command, cwd=checkout.root, env=environment, stderr=subprocess.PIPE, text=True))
    told = [driver.communicate(timeout=600)[1] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], told
    assert not any(PASSWORD in text for text in told)
    found = [checkout.json("metrics/search/joined/study.json")["trials"] for checkout in checkouts]
    assert found[0] == found[1]
    assert [trial["state"] for trial in found[0]] == ["complete"] * 6
    names = [
        checkout.run("git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps/*/*/joined-*").stdout.split()
        for checkout in checkouts
    ]
    assert sorted([*names[0], *names[1]]) == [f"joined-{number}" for number in range(6)]
    assert all(names)
