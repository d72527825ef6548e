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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Checkout, copy_of

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
PASSWORD = "s3cret"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server that asks for a password; it runs as another user where this one is root."""
    if not PROGRAMS:
        pytest.skip("PostgreSQL is not installed: `apt-get install postgresql`")
    user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    account = pwd.getpwnam(user)
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, account.pw_uid, account.pw_gid)
    secret = folder / "password"
    secret.write_text(PASSWORD)
    os.chown(secret, account.pw_uid, account.pw_gid)
    as_user: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid} if os.geteuid() == 0 else {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs = PROGRAMS[-1].parent

    def call(program: str, *options: str) -> None:
        command = [str(programs / program), f"--pgdata={folder}/data", *options]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **as_user)
        assert done.returncode == 0, done.stderr

    call("initdb", "--auth=scram-sha-256", f"--pwfile={secret}", "--username=lathe", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    call("pg_ctl", f"--options={options}", f"--log={folder}/log", "--wait", "start")
    yield f"postgresql://lathe:{PASSWORD}@127.0.0.1:{port}/postgres"
    call("pg_ctl", "--mode=immediate", "stop")
    shutil.rmtree(folder)


# A driver whose trials run no DVC: what is made by one is seen by all, as on a shared disk.
DRIVER = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {unit!r})
from lathe import paths
from lathe.params import load
from lathe.search import run, storage, study, trial
from test_search import RATE, planned
folder, url = Path(sys.argv[1]), sys.argv[2]
paths.SCRATCH, run.LOGS = folder / "s", folder
run.SECONDS_BETWEEN_SEARCHES_FOR_WORK = 0.2
def experiment(name):
    file = folder / name
    if not file.exists():
        return None
    content = {{"merged": {{}}, "Q4_K_M": {{"exact_match": 0.5}}}}
    return SimpleNamespace(message=file.read_text(), commit="c", json=lambda name: content)
trial.experiment = experiment
def start(order, gpu):
    with (folder / "runs").open("a") as runs:
        runs.write(order.name + "\\n")
    program = "import pathlib, sys, time; time.sleep(.1); pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    import subprocess
    return subprocess.Popen([sys.executable, "-c", program, str(folder / order.name), order.message])
params = load().params
plan = planned(folder, params, RATE, sampler="random")
opened = study.Study(plan, storage.opened(url, plan.study), {{"space": {{}}}}, params.model_dump(), is_local=False)
run.Driver(opened, 12, 2, None, [], [], "", "", start).run()
print(json.dumps([(one.number, one.state.name, one.values) for one in opened.optuna_study.get_trials()]))
"""


def test_two_drivers_share_a_study_without_a_repeated_trial(server: str, tmp_path: Path) -> None:
    program = DRIVER.format(unit=str(Path(__file__).parents[1] / "unit"))
    command = [sys.executable, "-c", program, str(tmp_path), server]
    drivers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [driver.communicate(timeout=120)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    assert json.loads(told[0]) == json.loads(told[1]) == [[number, "COMPLETE", [0.5]] for number in range(12)]
    runs = (tmp_path / "runs").read_text().split()
    assert sorted(runs) == sorted(f"some-{number}" for number in range(12))


def test_a_wrong_password_is_told_in_one_line_and_not_shown(server: str, tmp_path: Path) -> None:
    from lathe.errors import InputError
    from lathe.search import storage

    with pytest.raises(InputError, match="password authentication failed") as caught:
        storage.opened(server.replace(PASSWORD, "wr0ng"), "some")
    assert "wr0ng" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_two_checkouts_join_one_study_and_each_has_the_experiments_that_it_ran(
    server: str, reproduced: Checkout, tmp_path: Path
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
            "LATHE_SEARCH_STORAGE": server,
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
