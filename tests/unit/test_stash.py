"""A command that needs the workspace waits while DVC has it in Git's stash, to prepare an experiment."""

import json
import subprocess
import sys
import threading
import time

import pytest

from lathe.common.errors import InputError
from lathe.experiments import interrupted


@pytest.fixture
def preparing(tmp_path):
    """A process that is noted as one that prepares an experiment in the folder."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    note = tmp_path / ".dvc/tmp/exps/rwlock"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"write": {"workspace": {"pid": process.pid, "cmd": "dvc exp run --temp"}}}))
    yield process
    process.kill()
    process.wait()


def test_the_workspace_is_waited_for_until_it_is_out_of_the_stash(tmp_path, preparing):
    assert interrupted.is_stashed(tmp_path)
    waiting = threading.Thread(target=interrupted.wait_for_stash, args=[tmp_path])
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    preparing.communicate(b"\n")
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    assert not interrupted.is_stashed(tmp_path)


def test_whoever_holds_the_stash_for_too_long_is_named(tmp_path, preparing, monkeypatch):
    monkeypatch.setattr(interrupted, "SECONDS_TO_WAIT", 0.2)
    with pytest.raises(InputError, match=f"process {preparing.pid} ") as raised:
        interrupted.wait_for_stash(tmp_path)
    assert raised.value.code == "workspace-stashed"


def test_the_note_of_a_process_that_was_killed_holds_nobody_up(tmp_path, preparing):
    preparing.kill()
    preparing.wait()
    interrupted.wait_for_stash(tmp_path)
