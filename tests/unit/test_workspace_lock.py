"""The lock over the workspace: real processes, of which one holds it, and of which one is killed."""

import getpass
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from refusals import refused

from lathe.common import paths, workspace_lock
from lathe.common.workspace_lock import find_holder, hold_workspace, refuse_beside_holder

HOLD = """
import subprocess, sys, time
from pathlib import Path
from lathe.common.workspace_lock import hold_workspace
with hold_workspace("lathe run tiny", Path(sys.argv[1])):
    below = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
    print("held", flush=True)
    sys.stdin.read()
"""
BELOW = """
import sys, time
from pathlib import Path
from lathe.common.workspace_lock import refuse_beside_holder
refuse_beside_holder("train", Path(sys.argv[1]))
Path(sys.argv[1], "not refused").touch()
time.sleep(30)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock, with a process of its own below it."""
    environment = {**os.environ, "PYTHONPATH": str(paths.ROOT / "src")}
    command = [sys.executable, "-c", HOLD, str(tmp_path), BELOW]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_command_is_refused_with_who_holds_the_workspace(tmp_path, holder):
    who = (f"process {holder.pid} of {getpass.getuser()} on {socket.gethostname()}", f"`kill {holder.pid}`")
    with (
        refused("workspace-busy", "lathe reset: lathe run tiny has been working here since 2", *who, kept=False),
        hold_workspace("lathe reset", tmp_path),
    ):
        pytest.fail("held by two")
    found = find_holder(tmp_path)
    assert (found.command, found.pid) == ("lathe run tiny", holder.pid)


def test_a_stage_of_the_holder_runs_and_one_of_another_is_refused(tmp_path, holder):
    with refused("workspace-busy", "train: lathe run tiny has been", "run this when it has ended", kept=False):
        refuse_beside_holder("train", tmp_path)
    deadline = time.monotonic() + 20
    while not (tmp_path / "not refused").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_lock_of_a_killed_holder_is_free_though_a_process_below_it_runs_on(tmp_path, holder):
    assert find_holder(tmp_path)
    holder.kill()
    holder.wait()
    assert find_holder(tmp_path) is None
    refuse_beside_holder("train", tmp_path)
    with hold_workspace("lathe reset", tmp_path):
        assert find_holder(tmp_path).command == "lathe reset"
    os.killpg(holder.pid, signal.SIGKILL)


def test_the_lock_is_given_back_at_the_end_and_after_an_error(tmp_path):
    assert find_holder(tmp_path) is None
    with pytest.raises(ZeroDivisionError), hold_workspace("one", tmp_path):
        assert os.environ[workspace_lock.TOKEN] == find_holder(tmp_path).token
        refuse_beside_holder("a stage of it", tmp_path)
        raise ZeroDivisionError
    assert find_holder(tmp_path) is None
    assert workspace_lock.TOKEN not in os.environ
    with hold_workspace("two", tmp_path):
        pass
