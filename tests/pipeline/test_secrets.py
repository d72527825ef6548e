"""Secrets of the environment: after a run with everything on, they are in no file, commit, message or command line."""

import contextlib
import threading
from pathlib import Path

import pytest
from conftest import Checkout

NAMES = (
    *("HF_TOKEN", "OPENAI_API_KEY", "GEMINI_API_KEY", "GIGACHAT_CREDENTIALS", "WANDB_API_KEY", "LATHE_API_KEY"),
    "LATHE_SERVER_API_KEY",
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "LATHE_STUDIO_TOKEN"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)
PLANTED = "".join(("PLANTED", "SECRET"))  # in parts: this file is in the checkout too
SECRETS = {name: f"{PLANTED}{number:03}{name[::-1]}" for number, name in enumerate(NAMES)}


class CommandLines(threading.Thread):
    """Looks at the command lines of all processes, again and again, for what was planted."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found, self.looks, self.ended = set[str](), 0, threading.Event()

    def run(self) -> None:
        """Look until `ended`."""
        while not self.ended.wait(0.05):
            self.looks += 1
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if PLANTED.encode() in (line := file.read_bytes()):
                        self.found.add(line.replace(b"\0", b" ").decode(errors="replace"))


@pytest.mark.slow
def test_planted_secrets_are_found_nowhere_after_a_run(small_checkout: Checkout) -> None:
    checkout = small_checkout
    checkout.environment |= SECRETS
    # A tracker that is not there, a remote that answers nobody, and the log of all details.
    checkout.environment |= {"LATHE_LOG_LEVEL": "DEBUG", "MLFLOW_ENABLED": "true"}
    checkout.environment |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "WANDB_MODE": "offline"}
    checkout.run("dvc", "remote", "add", "--default", "away", "s3://bucket/lathe")
    checkout.run("dvc", "remote", "modify", "away", "endpointurl", "http://127.0.0.1:9")
    watching = CommandLines()
    watching.start()
    said = []
    for command, may_fail in (
        (("dvc", "exp", "run", "--name", "secret"), False),
        (("python3", "-m", "lathe", "report"), False),
        (("python3", "-m", "lathe", "results"), False),
        (("python3", "-m", "lathe", "doctor"), True),
        (("python3", "-m", "lathe", "remote-check"), True),
        (("python3", "-m", "lathe", "push-runs"), True),
        (("python3", "-m", "lathe", "mirror", "secret", "--mlflow"), True),
        (("dvc", "push", "-v"), True),
    ):
        done = checkout.run(*command, check=not may_fail)
        said.append(f"{command}: {done.stdout}{done.stderr}")
        assert "Traceback" not in done.stderr or command[0] == "dvc", done.stderr
    watching.ended.set()
    watching.join()
    assert watching.looks > 50
    assert not watching.found
    assert [text for text in said if PLANTED in text] == []
    assert PLANTED not in checkout.run("git", "log", "--all", "-p", "--format=%H %an %ae %B").stdout
    files = [file for file in checkout.root.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len(files) > 300
    assert any(".dvc" in file.parts for file in files)
    assert [file for file in files if PLANTED.encode() in file.read_bytes()] == []
