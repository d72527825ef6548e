"""An experiment that is stopped leaves HEAD on its branch and Git's index as it was; after a kill it is told."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lathe.common import paths
from lathe.common.workspace_lock import find_holder
from lathe.doctor.doctor import check_head
from lathe.experiments.interrupted import describe_detached_head, find_detached_head, switch_back

DVC_YAML = """\
stages:
  wait:
    cmd: touch started; sleep ${seconds}; echo ${number} > out.txt; test ${number} != 13
    params: [number, seconds]
    outs: [out.txt]
"""
PARAMS = "number: 1\nseconds: 0\nother: 1\n"

# `lathe run` without the pipeline's own rules.
RUN = """
import sys
from pathlib import Path
from lathe.common.entry_point import guard
from lathe.common.workspace_lock import hold_workspace
from lathe.experiments.dvc_command import run_dvc

def run():
    with hold_workspace("lathe run", Path.cwd()):
        sys.exit(run_dvc(sys.argv[1:], Path.cwd()))

guard(run)
"""
# DVC killed while it has put the workspace into Git's stash, to prepare an experiment.
KILLED_WHILE_STASHING = """
import os, signal, sys
from dvc.cli import main
from dvc.repo.experiments.queue.base import BaseStashQueue
BaseStashQueue._stash_commit_deps = lambda self, *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
WAITING = ["exp", "run", "--set-param", "number=2", "--set-param", "seconds=60"]
ENVIRONMENT = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "PYTHONPATH": str(paths.ROOT / "src")}


def run(root: Path, *command: str, check: bool = True) -> str:
    done = subprocess.run(command, cwd=root, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


def dvc(root: Path, *arguments: str, check: bool = True) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments, check=check)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one stage, with an uncommitted parameter and a new file that is staged; to be copied."""
    root = tmp_path_factory.mktemp("stopped") / "repository"
    root.mkdir()
    run(root, "git", "init", "--quiet", "--initial-branch=trunk")
    run(root, "git", "config", "user.name", "A User")
    run(root, "git", "config", "user.email", "user@example.invalid")
    dvc(root, "init", "--quiet")
    dvc(root, "config", "--quiet", "core.check_update", "false")
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "params.yaml").write_text(PARAMS)
    (root / ".gitignore").write_text("started\nout.txt\n")
    dvc(root, "repro", "--quiet")
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "--quiet", "--message", "a state to start from")
    (root / "params.yaml").write_text(PARAMS.replace("other: 1", "other: 5"))
    (root / "rows.txt").write_text("rows")
    dvc(root, "add", "--quiet", "rows.txt")
    run(root, "git", "add", "rows.txt.dvc", ".gitignore")
    (root / "started").unlink()
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A repository of a test's own."""
    return shutil.copytree(template, tmp_path / "repository", symlinks=True)


def start(root: Path, *command: str, new_terminal: bool = False) -> tuple[int, int]:
    """Start a command until its stage waits; return its number and the near end of its terminal."""
    near, far = os.openpty()
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env=ENVIRONMENT,
        stdin=far,
        stdout=far,
        stderr=far,
        start_new_session=True,
        preexec_fn=take_terminal if new_terminal else heed_signals,
    ) as process:
        os.close(far)
        printed = b""
        deadline = time.monotonic() + 60
        while not (root / "started").exists():
            if select.select([near], [], [], 0.05)[0]:
                printed += os.read(near, 65536)
            assert time.monotonic() < deadline, printed
            assert process.poll() is None, printed
        process.returncode = 0  # it is waited for by its number
    time.sleep(0.3)
    return process.pid, near


def heed_signals() -> None:
    """Undo what a job in the background, or of nohup, has set for itself and its children: it ignores these signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def take_terminal() -> None:
    heed_signals()
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def head(root: Path) -> str:
    return (root / ".git/HEAD").read_text().strip()


def status(root: Path) -> list[str]:
    return run(root, "git", "status", "--porcelain").splitlines()


def close_terminal(pid: int, near: int) -> None:
    os.close(near)


def interrupt_from_terminal(pid: int, near: int) -> None:
    os.write(near, b"\x03")


STOPS: dict[str, tuple[Callable[[int, int], None], int]] = {
    "the terminal is closed": (close_terminal, 128 + signal.SIGHUP),
    "SIGTERM": (lambda pid, near: os.kill(pid, signal.SIGTERM), 128 + signal.SIGTERM),
    "SIGHUP": (lambda pid, near: os.kill(pid, signal.SIGHUP), 128 + signal.SIGHUP),
    "Ctrl-C": (interrupt_from_terminal, 255),  # the stage ends, and DVC reports it
}


@pytest.mark.parametrize("how", STOPS)
def test_a_stopped_experiment_leaves_head_on_its_branch_and_the_index_as_it_was(root, how):
    stop, code = STOPS[how]
    before = status(root)
    pid, near = start(root, "-c", RUN, *WAITING, new_terminal=True)
    assert head(root) != "ref: refs/heads/trunk"  # DVC's own doing
    assert find_detached_head(root) is None  # it runs
    assert find_holder(root).pid == pid
    stop(pid, near)
    assert wait_for(pid) == code
    assert head(root) == "ref: refs/heads/trunk"
    assert status(root) == before == ["M  .gitignore", " M params.yaml", "A  rows.txt.dvc"]
    assert "other: 5" in (root / "params.yaml").read_text()
    assert run(root, "git", "stash", "list") == ""
    assert find_holder(root) is None
    assert describe_detached_head(root) is None
    run(root, sys.executable, "-c", RUN, "exp", "run", "--set-param", "seconds=0")
    assert status(root)[0] == "M  .gitignore"


def test_an_experiment_that_fails_leaves_staged_files_staged(root):
    before = status(root)
    run(root, sys.executable, "-c", RUN, "exp", "run", "--set-param", "number=13", check=False)
    assert status(root) == before
    dvc(root, "exp", "run", "--set-param", "number=13", check=False)  # what it is needed for
    assert "?? rows.txt.dvc" in status(root)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_after_a_kill_of_dvc_itself_the_way_back_is_told(root, number):
    pid, _ = start(root, "-m", "dvc", *WAITING)
    os.kill(pid, number)
    assert wait_for(pid) == -number
    assert describe_detached_head(root) == (
        "HEAD is on no branch: an experiment that ran on trunk was interrupted; `git switch trunk` goes back"
    )
    [finding] = check_head(root)
    assert (finding.status, finding.remedy) == ("fail", "`git switch trunk`")
    assert switch_back(root) == "trunk"
    assert head(root) == "ref: refs/heads/trunk"
    assert find_detached_head(root) is None
    assert "A  rows.txt.dvc" in status(root)


def test_commits_made_since_come_along(root):
    pid, _ = start(root, "-m", "dvc", *WAITING)
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)
    run(root, "git", "commit", "--quiet", "--all", "--message", "made on no branch")
    commit = run(root, "git", "rev-parse", "HEAD").strip()
    assert f"`git switch trunk && git merge {commit[:10]}` goes back" in describe_detached_head(root)
    assert switch_back(root) is None
    run(root, "sh", "-c", f"git switch --quiet trunk && git merge --quiet {commit[:10]}")
    assert run(root, "git", "rev-parse", "trunk").strip() == commit


def test_changes_that_a_killed_dvc_left_in_the_stash_come_back_by_what_is_told(root):
    before = status(root)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_STASHING, *WAITING], cwd=root, env=ENVIRONMENT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    told = describe_detached_head(root)
    assert "your changes are in `git stash list`" in told
    run(root, "sh", "-c", told.split("`")[-2])
    assert head(root) == "ref: refs/heads/trunk"
    assert status(root) == before
    assert run(root, "git", "stash", "list") == ""


@pytest.mark.parametrize(
    ("how", "after_an_experiment"),
    [("--detach", False), ("--detach", True), ("the commit", True), ("another commit", False)],
)
def test_a_checkout_that_is_detached_on_purpose_is_no_fault(root, how, after_an_experiment):
    run(root, "git", "commit", "--quiet", "--all", "--message", "all of it")
    if after_an_experiment:
        dvc(root, "exp", "run", "--set-param", "number=2")
        run(root, "git", "restore", ".")
    commit = run(root, "git", "rev-parse", "HEAD~1" if how == "another commit" else "HEAD").strip()
    run(root, "git", "checkout", "--quiet", commit if "commit" in how else how)
    assert describe_detached_head(root) is None
    assert [finding.status for finding in check_head(root)] in ([], ["warning"])
    assert switch_back(root) is None


def test_marks_of_a_kill_that_has_been_mended_are_no_fault_of_a_later_checkout(root):
    pid, _ = start(root, "-m", "dvc", *WAITING)
    os.kill(pid, signal.SIGKILL)
    wait_for(pid)
    run(root, "git", "switch", "--quiet", "trunk")
    run(root, "git", "switch", "--quiet", "--detach")
    assert describe_detached_head(root) is None


def test_commands_tell_the_way_back_and_those_that_would_lose_its_marks_refuse(checkout):
    """The marks that DVC leaves when it is killed, in a whole checkout."""
    commit = checkout.run("git", "rev-parse", "HEAD").stdout.strip()
    checkout.run("git", "symbolic-ref", "-m", "dvc: Restore HEAD to 'main'", "HEAD", "refs/heads/main")
    checkout.run("git", "checkout", "--quiet", commit)
    checkout.run("git", "update-ref", "refs/exps/exec/EXEC_BASELINE", commit)

    def lathe(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PYTHONPATH": str(checkout.root / "src")}
        return checkout.run(sys.executable, "-m", "lathe", *arguments, check=False, env=environment)

    told = "HEAD is on no branch: an experiment that ran on main was interrupted; `git switch main` goes back"
    checked = lathe("check")
    assert checked.returncode == 0
    assert told in checked.stderr
    for arguments in (("run", "tiny"), ("run", "tiny", "--temp"), ("reset", "--yes")):
        done = lathe(*arguments)
        assert (done.returncode, done.stderr) == (2, f"error: {told}\n")
    checkout.run("git", "switch", "--quiet", "main")
    assert lathe("check").stderr == ""
