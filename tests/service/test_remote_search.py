"""A search over two hosts, each with a real sshd, on one study in PostgreSQL."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from refusals import refused
from ssh_server import SSHD, SshServer
from test_search_database import PASSWORD, Server, server  # noqa: F401 - a fixture
from training_checkout import make_training_checkout

from lathe.common import paths
from lathe.remote import searches

SEARCH = """\
study: spread
sampler: random
startup_trials: 1
seed: 1
n_trials: 5
timeout_seconds: null
objectives: [{metric: merged.rouge_l, direction: maximize}]
space: {training.learning_rate: {type: float, low: 0.001, high: 0.01}}
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, SshServer]]:
    """Two hosts with homes of their own, and one configuration that knows both."""
    if SSHD is None:
        pytest.skip("sshd is not installed: `apt-get install openssh-server`")
    both = {name: SshServer(tmp_path / name, name) for name in ("box", "den")}
    (tmp_path / "ssh_config").write_text("".join((each.folder / "ssh_config").read_text() for each in both.values()))
    yield both
    for each in both.values():
        each.stop()


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "lathe", "remote", *words]


def wait_for(condition: Callable[[], object], told: Callable[[], str], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_search_on_two_hosts_outlives_one_that_is_cut_off_and_one_that_is_killed(
    server: Server,  # noqa: F811
    hosts: dict[str, SshServer],
    small_model: Path,
    tmp_path: Path,
) -> None:
    checkout = make_training_checkout(tmp_path / "lathe", small_model)
    checkout.set({"training.max_steps": 20})
    # Evaluation is no stage here: every trial has the score of the commit.
    report = checkout.root / "metrics/evaluate/validation.json"
    report.parent.mkdir()
    report.write_text(json.dumps([{"merged": {"rouge_l": 0.5}}]))
    (checkout.root / "experiments/search/spread.yaml").write_text(SEARCH)
    checkout.commit()
    checkout.environment |= {
        "GIT_SSH_COMMAND": f"ssh -F {tmp_path}/ssh_config",
        "SSH_AUTH_SOCK": "",
        "LATHE_SEARCH_STORAGE": server.url,
    }
    folders = {name: host.folder / "home/lathe/lathe" for name, host in hosts.items()}
    setup = f"ln -sfn {sys.prefix} .venv; ln -sfn {paths.LLAMA_CPP} .llama.cpp"
    checkout.run(*command("search", "experiments/search/spread.yaml", "--hosts", "box,den", "--setup", setup))

    def told() -> str:
        return "".join(file.read_text() for folder in folders.values() for file in folder.glob("runs/*/log"))

    wait_for(lambda: all(f"spread-{number}: delivered" in told() for number in (0, 1)), told, 200)
    hosts["box"].stop()
    runner = psutil.Process(int((folders["den"] / "runs/spread-on-den/pid").read_text()))
    for process in [runner, *runner.children(recursive=True)]:
        process.kill()
    wait_for((folders["box"] / "runs/spread-on-box/exit").exists, told)
    hosts["box"].start()

    states = checkout.run(*command("status", "spread")).stdout.splitlines()
    assert [line.split("+00:00  ")[-1].split(",")[0] for line in states] == ["done", "killed"], told()
    checkout.run(*command("fetch", "spread"))
    refs = checkout.run("git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps/*/*/spread-*").stdout.split()
    assert sorted(refs) == [f"spread-{number}" for number in range(5)]
    again = checkout.run(sys.executable, "-m", "lathe", "search", "experiments/search/spread.yaml")
    assert "5 trials ended, 0 of them failed" in again.stdout
    trials = json.loads((checkout.root / "metrics/search/spread/study.json").read_text())["trials"]
    known = checkout.run("git", "for-each-ref", "--format=%(objectname)", "refs/exps/*/*/spread-*").stdout.split()
    assert sorted(trial["commit"] for trial in trials) == sorted(known)
    for folder in folders.values():
        runs = [file.read_text() for file in (folder / "runs").rglob("*") if file.is_file()]
        assert not any(PASSWORD in text for text in runs)


@pytest.mark.parametrize(
    ("hosts_named", "workers", "url", "code"),
    [
        (["box", "den"], 1, "postgresql://a:b@c/d", "too-few-workers"),
        (["box", "box"], 2, "postgresql://a:b@c/d", "host-twice"),
        (["box"], 1, None, "storage-not-shared"),
        (["box"], 1, "sqlite:///x.db", "storage-not-shared"),
    ],
)
def test_a_search_that_hosts_cannot_share_is_refused_before_anything_is_sent(hosts_named, workers, url, code):
    with refused(code):
        searches.start(
            paths.ROOT / "experiments/search/default.yaml",
            [],
            hosts_named,
            workers=workers,
            n_trials=None,
            url=url,
            folder=None,
            setup=None,
            remote=None,
        )
