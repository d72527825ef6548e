"""Runs on another machine by ssh: a real sshd, from Debian's openssh-server."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import copy_of
from refusals import refused
from ssh_server import SSHD, SshServer
from training_checkout import list_checkpoints, list_outputs, make_training_checkout

from lathe.common import paths
from lathe.remote import ssh_runs
from lathe.remote.host import REMOTE, Host

pytestmark = pytest.mark.skipif(SSHD is None, reason="sshd is not installed: `apt-get install openssh-server`")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SshServer]:
    """A server that runs."""
    server = SshServer(tmp_path / "sshd")
    yield server
    server.stop()


@pytest.fixture
def host(server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with a folder that is prepared."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return ssh_runs.prepare("box", str(tmp_path / "host"))


def wait_for(condition: Callable[[], object], seconds: float = 60, told: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def make_repository(checkout_like: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository with one commit, which the host has."""
    from lathe.common.git import run_git

    checkout_like.mkdir()
    monkeypatch.setattr(paths, "ROOT", checkout_like)
    (checkout_like / ".dvc").mkdir()
    (checkout_like / "file").write_text("here\n")
    (checkout_like / ".dvc/config").touch()
    run_git("init", "--quiet")
    run_git("add", "--all")
    run_git("-c", "user.name=A", "-c", "user.email=a@example.invalid", "commit", "--quiet", "--message", "one")
    commit = run_git("rev-parse", "HEAD").decode().strip()
    host.push(commit, "runs/some")
    return commit


def test_a_run_goes_on_without_a_connection_and_its_end_is_told(
    host: Host, server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = make_repository(tmp_path / "here", host, monkeypatch)
    command = f'cat file; test "$TOLD" = "it\'s \\$HOME"; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; exit 7'
    ssh_runs.start_command(
        host, "some", commit, "[]", "echo set up once >>set-up", command, variables={"TOLD": "it's $HOME"}
    )
    assert host.call("status", "some") == "some running\n"
    with refused("host-refused", "some is running there already", kept=False):
        ssh_runs.start_command(host, "some", commit, "[]", "true", "true")
    server.stop()
    (tmp_path / "go").touch()
    time.sleep(1)
    server.start()
    wait_for(lambda: host.call("status", "some") == "some ended 7\n")
    log = (tmp_path / "host/runs/some/log").read_text()
    assert log.splitlines()[-1] == "here"
    assert (tmp_path / "host/checkout/set-up").read_text() == "set up once\n"
    assert "it's" not in "".join(
        file.read_text() for file in (tmp_path / "host/runs/some").iterdir() if file.name != "command.sh"
    )


def test_a_run_is_stopped_by_sigterm_and_one_that_was_killed_is_gone(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    commit = make_repository(tmp_path / "here", host, monkeypatch)
    saves = "trap 'sleep 0.5; echo saved; exit 143' TERM; echo works; while :; do sleep 0.1; done"
    ssh_runs.start_command(host, "some", commit, "[]", "true", saves)
    log = tmp_path / "host/runs/some/log"
    wait_for(lambda: "works" in log.read_text())
    host.call("stop", "some")
    wait_for(lambda: host.call("status") == "some ended 143\n", told=log.read_text)
    assert log.read_text().splitlines()[-1] == "saved"
    with refused("host-refused", "some is not running there", kept=False):
        host.call("stop", "some")

    ssh_runs.start_command(host, "some", commit, "[]", "true", "sleep 60")
    process = psutil.Process(int((tmp_path / "host/runs/some/pid").read_text()))
    for each in [process, *process.children(recursive=True)]:
        each.kill()
    wait_for(lambda: host.call("status", "some") == "some gone\n")
    assert host.call("status", "other") == "other none\n"


def test_beside_a_run_another_commit_is_refused_there_and_the_same_is_not(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lathe.common.git import run_git

    commit = make_repository(tmp_path / "here", host, monkeypatch)
    ssh_runs.start_command(host, "first", commit, "[]", "true", f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done")
    wait_for(lambda: (tmp_path / "host/checkout/file").exists())
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.invalid")
    run_git(*identity, "commit", "--quiet", "--allow-empty", "--message", "two")
    other = run_git("rev-parse", "HEAD").decode().strip()
    host.push(other, "runs/second")
    ssh_runs.start_command(host, "second", other, "[]", "true", "true")
    ssh_runs.start_command(host, "third", commit, "[]", "false", "true")
    wait_for(lambda: host.call("status", "second", "third") == "second ended 2\nthird ended 0\n")
    assert "runs of another commit are going on" in (tmp_path / "host/runs/second/log").read_text()
    (tmp_path / "go").touch()
    wait_for(lambda: host.call("status", "first") == "first ended 0\n")


def test_a_host_whose_key_is_not_known_gets_neither_commits_nor_data(
    host: Host, server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_repository(tmp_path / "here", host, monkeypatch)
    with host.open_cache() as repo:
        assert repo.remote(REMOTE).list_files(f"{host.folder}/cache") == []
    known = server.folder / "known_hosts"
    other = (server.folder / "user_key.pub").read_text()
    known.write_text(f"[127.0.0.1]:{server.port} {other}")
    with refused("host-unreachable", "box", kept=False):
        host.call("status")
    with refused("host-unreachable", "Host key is not trusted", kept=False), host.open_cache() as repo:
        storage = repo.remote(REMOTE)
        storage.write(storage.join("sent"), b"secret")
    assert not (tmp_path / "host/cache/sent").exists()


def test_nothing_at_the_address_is_told_in_one_line(host: Host, server: SshServer) -> None:
    server.stop()
    with refused("host-unreachable", "box", "Connection refused", kept=False) as caught:
        host.call("status")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_by_ssh_that_was_stopped_killed_and_cut_off_makes_the_same_bytes_as_one_here(
    server: SshServer, small_model: Path, tmp_path: Path
) -> None:
    import psutil

    checkout = make_training_checkout(tmp_path / "lathe", small_model)
    here = copy_of(checkout, tmp_path / "here").without_preloading()
    here.environment["PYTHONPATH"] = str(here.root / "src")
    checkout.environment |= server.environment
    host = server.folder / "home/lathe/lathe"
    setup = f"ln -sfn {sys.prefix} .venv; ln -sfn {paths.LLAMA_CPP} .llama.cpp"
    start = command("run", "longer", "--host", "box", "--setup", setup, "--price-per-hour", "3.6")
    log, ended = host / "runs/longer/log", host / "runs/longer/exit"

    checkout.set({"lora.r": 2})
    refused_run = checkout.run(*start, check=False)
    assert refused_run.returncode == 2
    assert "error: not committed: params.yaml; " in refused_run.stderr
    assert not host.exists()
    checkout.run("git", "restore", "params.yaml")

    checkout.run(*start)
    wait_for(lambda: list_checkpoints(host / "checkout"), 300, lambda: log.read_text())
    checkout.run(*command("stop", "longer"))
    wait_for(ended.exists, 120, lambda: log.read_text())
    assert "stopped; the same `lathe remote run` goes on" in checkout.run(*command("status")).stdout, log.read_text()
    failed = checkout.run(*command("fetch", "longer"), check=False)
    assert failed.returncode == 2
    assert "longer: not done: stopped" in failed.stderr
    first = list_checkpoints(host / "checkout")[-1]

    checkout.run(*start)
    wait_for(lambda: list_checkpoints(host / "checkout")[-1:] > [first], 300, lambda: log.read_text())
    runner = psutil.Process(int((host / "runs/longer/pid").read_text()))
    for process in [runner, *runner.children(recursive=True)]:
        process.kill()
    assert "killed, or its host restarted" in checkout.run(*command("status", "longer")).stdout

    checkout.run(*start)
    server.stop()
    wait_for(ended.exists, 300, lambda: log.read_text())
    server.start()
    assert checkout.run(*command("status", "longer")).stdout.rstrip().endswith("done"), log.read_text()
    assert "going on after step" in checkout.run(*command("logs", "longer")).stdout
    told = checkout.run(*command("fetch", "longer")).stdout
    assert told.startswith("longer: ")

    here.run(sys.executable, "-m", "lathe", "run", "longer")
    assert list_outputs(checkout, "longer") == list_outputs(here, "longer")
    checkout.run("dvc", "exp", "apply", "longer")
    checkout.run("dvc", "checkout")
    for file in sorted((here.root / "models/adapter").iterdir()):
        assert (checkout.root / "models/adapter" / file.name).read_bytes() == file.read_bytes()
    [timing] = json.loads((checkout.root / "metrics/timings/train.json").read_text())
    assert timing["cost"] == pytest.approx(timing["seconds"] / 1000, abs=1e-5)
    assert timing["machine"]
    checkout.run("git", "reset", "--quiet", "--hard")
    again = checkout.run(*start, check=False)
    assert again.returncode == 2
    assert "longer: has been run from this commit" in again.stderr


def command(*words: str) -> list[str]:
    """A command `lathe remote`."""
    return [sys.executable, "-m", "lathe", "remote", *words]
