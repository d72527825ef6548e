"""A real MLflow server on SQLite, on 127.0.0.1.

It has an environment of its own, made once with pip, as it wants another pyarrow than .venv has; all else that it
shares with .venv is taken from there. `LATHE_MLFLOW` names an environment that is there already.
"""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from lathe.common import paths

REQUIREMENTS = Path(__file__).with_name("requirements-mlflow.txt")
ENVIRONMENT = paths.MAIN / ".services/mlflow"
SECONDS_TO_START = 180


def environment() -> Path:
    """Return the folder of an environment with MLflow, made if need be; skips the test where none can be had."""
    if given := os.environ.get("LATHE_MLFLOW"):
        return Path(given)
    ENVIRONMENT.parent.mkdir(exist_ok=True)
    ready = ENVIRONMENT / ".ready"
    with ENVIRONMENT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (ready.exists() and ready.read_text() == REQUIREMENTS.read_text()):
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
            [packages] = ENVIRONMENT.glob("lib/python*/site-packages")
            (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))  # looked in last
            command = [str(ENVIRONMENT / "bin/python"), "-m", "pip", "install", "--quiet", "--requirement"]
            done = subprocess.run([*command, str(REQUIREMENTS)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"MLflow could not be installed: {(done.stderr.splitlines() or ['?'])[-1]}")
            ready.write_text(REQUIREMENTS.read_text())
    return ENVIRONMENT


class MlflowServer:
    """A server that can be stopped, killed and started again at the same address, with what it holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "MlflowServer":
        """Start it and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        kept = ENVIRONMENT.with_name("mlflow-empty.db")
        database = self.folder / "mlflow.db"
        if kept.exists() and not database.exists():
            shutil.copy(kept, database)  # making the tables takes most of the start
        bin_folder = environment() / "bin"
        command = [
            str(bin_folder / "mlflow"),
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"sqlite:///{database}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env={**variables, **quiet, "PATH": path}, stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self.answers, SECONDS_TO_START)
        if not kept.exists() and kept.parent.exists():
            shutil.copy(database, kept)
        return self

    def answers(self) -> bool:
        """Whether it answers."""
        assert self.process
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            with urlopen(f"{self.uri}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except (URLError, OSError):
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        assert self.process
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        """Kill it, whatever state it is in."""
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for it, no longer than `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.2)
