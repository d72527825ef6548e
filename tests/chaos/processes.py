"""Processes of an injection: started in a session of their own, killed, and found again by a mark in their environment.

The mark stays with whatever they start, in whichever folder and session, and with whichever parent it ends up.
"""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

import psutil

MARK = "LATHE_CHAOS"
VICTIMS = ("the whole group", "the command", "a process below")
SECONDS_TO_END = 30.0  # that what is left of a killed command may take to end by itself
LONGEST_SECONDS = 400.0  # of one command


class Command:
    """A command in a checkout, whose output goes to a file."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        log: Path,
        limits: Mapping[int, int] | None = None,
    ) -> None:
        """Start it. `limits` are those of setrlimit(2), by their number."""
        self.words, self.log = list(words), log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {' '.join(words)}\n".encode())
            self.process = subprocess.Popen(
                words,
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_limiter(limits) if limits else None,
            )

    def wait(self, seconds: float = LONGEST_SECONDS) -> int:
        """Return its exit code. Raises AssertionError, and kills it, if it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"{' '.join(self.words)}: had not ended after {seconds:g} s") from None

    def kill_after(self, seconds: float, victim: str, rng: Random) -> str:
        """Kill one of VICTIMS after so many seconds, and wait for its end; return what was killed, and when."""
        try:
            code = self.process.wait(seconds)
            return f"ended with {code} before it was to be killed, after {seconds:.1f} s"
        except subprocess.TimeoutExpired:
            pass
        killed = self._kill(victim, rng)
        self.wait()
        return f"{killed} after {seconds:.1f} s"

    def _kill(self, victim: str, rng: Random) -> str:
        if victim == "the whole group":
            os.killpg(self.process.pid, signal.SIGKILL)
            return "SIGKILL of the group"
        below = []
        with suppress(psutil.Error):
            below = psutil.Process(self.process.pid).children(recursive=True)
        if victim == "a process below" and below:
            child = rng.choice(sorted(below, key=lambda each: each.pid))
            with suppress(psutil.Error):
                name = _describe(child)
                child.kill()
                return f"SIGKILL of {name}"
        self.process.kill()
        return "SIGKILL of the command"


def list_marked(mark: str) -> list[psutil.Process]:
    """Return the processes whose environment holds the mark, but those that have ended."""
    sought, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError, psutil.Error):
                if sought in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(int(folder.name)))
    return found


def wait_for_their_end(mark: str, seconds: float = SECONDS_TO_END) -> list[str]:
    """Wait until no marked process is left; return those that are after so many seconds, and kill them."""
    until = time.monotonic() + seconds
    while (left := list_marked(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    described = [_describe(process) for process in left]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    return described


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something holds. Raises AssertionError, which says what, if it does not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


def _describe(process: psutil.Process) -> str:
    """Return the words of a command that tell it from others."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return "a process"
    shown = [Path(word).name for word in words[:1]] + [word for word in words[1:] if not word.startswith("/")]
    return " ".join(shown)[:80] or "a process"


def _limiter(limits: Mapping[int, int]) -> Callable[[], None]:
    def limit() -> None:
        for number, value in limits.items():
            resource.setrlimit(number, (value, value))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return limit
