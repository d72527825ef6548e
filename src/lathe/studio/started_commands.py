"""Commands that the studio starts: processes of their own, found again by their files.

Each has a folder in `.scratch/studio` with the command, its log and, once it has ended, its exit code. A small process
beside the command (`python -m lathe.studio.started_commands FOLDER`) writes these; it is in a session of its own, so
that neither the end of the studio nor a closed terminal reaches it.
"""

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from lathe.common import operating_system, paths
from lathe.common.errors import InputError
from lathe.common.text import make_printable
from lathe.studio.child_process import make_environment

FOLDER = paths.SCRATCH / "studio/commands"
COMMAND, PROCESS, EXIT, LOG = "command.json", "process.json", "exit.json", "log.txt"
IDENTIFIER = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
SECONDS_TO_BEGIN = 20  # until a command that has no process yet counts as lost
LONGEST_TAIL_BYTES = 400_000
SHORTEST_LINES = 200

ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)")

# The programs that are started, as they are typed, and as they run here.
PROGRAMS = {"lathe": [sys.executable, "-m", "lathe"], "dvc": [sys.executable, "-m", "dvc"], "git": ["git"]}
AND = "&&"  # a word between two commands, of which the second runs if the first ends well

State = Literal["running", "ended", "failed", "lost"]


@dataclass(frozen=True)
class StartedCommand:
    """A command with what its files say; `words` are those that a person would type, `code` is None until it ends.

    `lost`: it ended without a code, as when it was killed or the machine went down.
    """

    identifier: str
    words: list[str]
    started: str
    pid: int | None
    state: State
    code: int | None

    @property
    def text(self) -> str:
        """The command as it is typed."""
        return join_words(self.words)

    @property
    def log(self) -> Path:
        """The file with what it prints."""
        return FOLDER / self.identifier / LOG

    @property
    def experiment(self) -> str | None:
        """The name of the experiment that `lathe run` makes; None for other commands."""
        if self.words[:2] != ["lathe", "run"]:
            return None
        for option in ("-n", "--name"):
            if option in self.words[:-1]:
                return self.words[self.words.index(option) + 1]
        return self.words[2]


def split_commands(words: Sequence[str]) -> list[list[str]]:
    """Return the commands that stand between `&&`."""
    ends = [place for place, word in enumerate(words) if word == AND]
    return [list(words[start + 1 : end]) for start, end in zip([-1, *ends], [*ends, len(words)], strict=True)]


def join_words(words: Sequence[str]) -> str:
    """Return commands as they are typed."""
    return f" {AND} ".join(map(shlex.join, split_commands(words)))


def start_command(words: Sequence[str]) -> StartedCommand:
    """Start a command in the checkout, as its own process; `words` begin with `lathe` or `dvc`.

    After `&&` there may be another one, which is quick.
    """
    identifier = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    folder = FOLDER / identifier
    folder.mkdir(parents=True)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    (folder / COMMAND).write_text(json.dumps({"words": list(words), "started": started}), encoding="utf-8")
    environment = make_environment()
    # As in an activated environment: the stages are started as `python3`.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    subprocess.Popen(
        [sys.executable, "-m", "lathe.studio.started_commands", str(folder)],
        cwd=paths.ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + SECONDS_TO_BEGIN
    while not (folder / PROCESS).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return read_command(identifier)


def list_commands() -> list[StartedCommand]:
    """Return all that have been started, the newest first."""
    names = sorted((path.name for path in FOLDER.glob("*") if IDENTIFIER.fullmatch(path.name)), reverse=True)
    return [read_command(name) for name in names if (FOLDER / name / COMMAND).is_file()]


def read_command(identifier: str) -> StartedCommand:
    """Return one by its identifier. Raises InputError if there is none."""
    folder = FOLDER / identifier
    if not IDENTIFIER.fullmatch(identifier) or not (folder / COMMAND).is_file():
        raise InputError(f"{identifier[:80]!r}: no such command was started here; see the list", code="no-such-command")
    command, process, ended = (_read(folder / name) for name in (COMMAND, PROCESS, EXIT))
    code, pid = ended.get("code"), process.get("pid")
    state: State
    if code is not None:
        state = "ended" if code == 0 else "failed"
    elif pid is not None:
        # Between the end of the command and the note of its code it is the process beside it that still runs.
        is_alive = any(
            start is not None and operating_system.get_start_time(number) == start
            for number, start in ((pid, process.get("started")), process.get("beside", (0, None)))
        )
        state = "running" if is_alive else "lost"
    else:
        age = (datetime.now().astimezone() - datetime.fromisoformat(command["started"])).total_seconds()
        state = "running" if age < SECONDS_TO_BEGIN else "lost"
    return StartedCommand(identifier, command["words"], command["started"], pid, state, code)


def cancel_command(command: StartedCommand) -> None:
    """End a command in good order, by SIGTERM: a training saves a checkpoint. Raises InputError if it has ended."""
    process = _read(FOLDER / command.identifier / PROCESS)
    if command.state != "running" or command.pid is None:
        raise InputError(f"{command.text}: is not running; nothing to cancel", code="not-running")
    if operating_system.get_start_time(command.pid) == process.get("started"):
        os.kill(command.pid, signal.SIGTERM)


def resume_command(command: StartedCommand) -> StartedCommand:
    """Start a command again that has not ended well; what it had done is not done twice. Raises InputError."""
    if command.state in ("running", "ended"):
        remedy = "wait for its end" if command.state == "running" else "start a new one"
        raise InputError(f"{command.text}: has not stopped halfway; {remedy}", code="nothing-to-resume")
    return start_command(command.words)


def read_tail(file: Path, search: str = "", lines: int = SHORTEST_LINES) -> list[str]:
    """Return the last lines of a log, printable, as a terminal would leave them; with `search` those that hold it."""
    try:
        with file.open("rb") as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(max(0, size - LONGEST_TAIL_BYTES))
            text = content.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    kept = [make_printable(_strip_line(line)) for line in text.split("\n")]
    found = [line for line in kept if search.casefold() in line.casefold()] if search else kept
    while found and not found[-1]:
        found.pop()
    return found[-lines:]


def _strip_line(line: str) -> str:
    """Return a line without colours, and what a progress bar has last written over it."""
    return ANSI.sub("", line).rstrip("\r").rpartition("\r")[2]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):  # not there yet, or being written
        return {}
    return content if isinstance(content, dict) else {}


def _run_beside(folder: Path) -> None:
    """Run the command of a folder to its end, and write its exit code."""
    words, *others = split_commands(json.loads((folder / COMMAND).read_text(encoding="utf-8"))["words"])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the command's own business
        signal.signal(number, lambda *_: None)
    with (folder / LOG).open("ab", buffering=0) as log:
        process = subprocess.Popen(
            [*PROGRAMS[words[0]], *words[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    beside = os.getpid(), operating_system.get_start_time(os.getpid())
    note = {"pid": process.pid, "started": operating_system.get_start_time(process.pid), "beside": beside}
    with paths.replace_file(folder / PROCESS) as partial:
        partial.write_text(json.dumps(note), encoding="utf-8")
    code = process.wait()
    for following in others:
        if code == 0:
            with (folder / LOG).open("ab", buffering=0) as log:
                log.write(f"$ {shlex.join(following)}\n".encode())
                whole = [*PROGRAMS[following[0]], *following[1:]]
                code = subprocess.run(whole, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
    with paths.replace_file(folder / EXIT) as partial:
        partial.write_text(json.dumps({"code": code if code >= 0 else 128 - code}), encoding="utf-8")


if __name__ == "__main__":
    _run_beside(Path(sys.argv[1]))
