"""Host: another machine by ssh, as OpenSSH's own configuration describes it.

Git and `host.sh` go through the same `ssh`, which `GIT_SSH_COMMAND` and Git's `core.sshCommand` name. Nothing asks for
a password: keys or an agent must let the user in.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lathe.common import paths
from lathe.common.bounded_output import run_bounded
from lathe.common.dvc_api import DvcRepository, check_host_keys, open_repository
from lathe.common.errors import InputError
from lathe.common.git import read_line, run_git

SCRIPT = Path(__file__).with_name("host.sh")
REMOTE = "lathe-host"  # the name in messages of DVC for the host's cache
CONNECTION = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=20")


@dataclass(frozen=True)
class Host:
    """A machine by the name that ssh takes, such as `user@box`, and a folder there, absolute or below the home."""

    target: str
    folder: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@:%-]*", self.target):
            raise InputError(
                f"--host {self.target!r}: no name that ssh takes; write user@machine, or a Host of ~/.ssh/config, "
                "which also has the port",
                code="invalid-host",
            )
        if not re.fullmatch(r"[A-Za-z0-9_./-]*[A-Za-z0-9_.-]", self.folder):
            raise InputError(
                f"--folder {self.folder!r}: letters, digits and . _ - / alone; name a folder on the host, "
                "below the home if it does not begin with /",
                code="invalid-folder",
            )

    def call(self, *words: str, variables: Mapping[str, str] | None = None) -> str:
        """Run a command of host.sh and return what it prints. Raises InputError if it or the connection fails.

        `variables` are for the environment there, and are in no command line.
        """
        done = run_bounded(
            [*self._ssh(), self._build_command(words)], stdin=self._write_script(variables or {}), name=self.target
        )
        if done.returncode:
            raise self._explain(done.returncode, done.stderr)
        return done.stdout

    def show(self, *words: str) -> int:
        """Run a command of host.sh and let it print; return its exit code."""
        done = subprocess.run([*self._ssh(), self._build_command(words)], input=SCRIPT.read_bytes(), check=False)
        return done.returncode

    def push(self, commit: str, branch: str) -> None:
        """Push a commit into the host's repository, as a branch."""
        self._run_git("push", "--quiet", "--force", self.repository, f"{commit}:refs/heads/{branch}")

    def fetch(self, ref: str) -> None:
        """Bring a reference of the host's repository into this one."""
        self._run_git("fetch", "--quiet", "--no-tags", self.repository, f"{ref}:{ref}")

    def list_refs(self, pattern: str) -> list[str]:
        """Return the references of the host's repository that match a pattern."""
        listed = self._run_git("ls-remote", self.repository, pattern)
        return [line.split("\t")[1] for line in listed.splitlines()]

    @property
    def repository(self) -> str:
        """Git's address of the host's repository."""
        return f"{self.target}:{self.folder}/repository.git"

    @contextmanager
    def open_cache(self) -> Iterator[DvcRepository]:
        """Open this repository with the host's cache as the remote REMOTE of DVC.

        Raises InputError if the host is reached in a way that DVC does not know, or is not the one that ssh knows.
        """
        from asyncssh import Error

        settings = self._read_settings()
        if settings.get("proxyjump", "none") != "none" or settings.get("proxycommand", "none") != "none":
            raise InputError(
                f"{self.target}: reached through another machine, which DVC cannot; name by --dvc-remote a remote of "
                "DVC that both can reach, such as a bucket",
                code="proxied-host",
            )
        remote = {
            "url": f"ssh://{settings['hostname']}{self.folder}/cache",
            "user": settings["user"],
            "port": int(settings["port"]),
        }
        keys = [key for key in settings["identityfile"].split("\n") if Path(key).expanduser().is_file()]
        if keys:
            remote["keyfile"] = str(Path(keys[0]).expanduser())
        known = [str(Path(name).expanduser()) for name in _split_files(settings)]
        with (
            check_host_keys([name for name in known if Path(name).is_file()]),
            open_repository(paths.ROOT, {"remote": {REMOTE: remote}}) as repo,
        ):
            try:
                yield repo
            except (OSError, Error) as error:
                raise InputError(
                    f"{self.target}: DVC does not get there: {error}; `ssh {self.target}` must work with a key, no "
                    "question asked",
                    code="host-unreachable",
                ) from None

    def _read_settings(self) -> dict[str, str]:
        """Return OpenSSH's settings for the host; a repeated one as lines."""
        done = subprocess.run([*self._ssh_command(), "-G", self.target], capture_output=True, text=True, check=False)
        if done.returncode:
            raise self._explain(done.returncode, done.stderr)
        settings: dict[str, str] = {}
        for line in done.stdout.splitlines():
            key, _, value = line.partition(" ")
            settings[key] = f"{settings[key]}\n{value}" if key in settings else value
        return settings

    def _ssh(self) -> list[str]:
        return [*self._ssh_command(), *CONNECTION, self.target, "--"]

    def _ssh_command(self) -> list[str]:
        return shlex.split(os.environ.get("GIT_SSH_COMMAND") or read_line("config", "core.sshCommand") or "ssh")

    def _build_command(self, words: Sequence[str]) -> str:
        # A login shell: what ~/.profile exports, such as a token, is there.
        return shlex.join(["sh", "-l", "-s", "--", self.folder, *words])

    def _write_script(self, variables: Mapping[str, str]) -> str:
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        return exports + SCRIPT.read_text(encoding="utf-8")

    def _run_git(self, command: str, *words: str) -> str:
        before = os.environ.get("GIT_SSH_COMMAND")
        os.environ["GIT_SSH_COMMAND"] = shlex.join([*self._ssh_command(), *CONNECTION])
        try:
            return run_git(command, *words).decode()
        finally:
            if before is None:
                del os.environ["GIT_SSH_COMMAND"]
            else:
                os.environ["GIT_SSH_COMMAND"] = before

    def _explain(self, code: int, printed: str) -> InputError:
        lines = [line for line in printed.strip().splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"ended with {code} and printed nothing"
        if code == 255:  # of ssh itself
            return InputError(
                f"{self.target}: {said}; `ssh {self.target}` must work with a key, no question asked",
                code="host-unreachable",
            )
        return InputError(f"{self.target}: {said}; see {self.folder} there", code="host-refused")


def _split_files(settings: Mapping[str, str]) -> list[str]:
    return f"{settings.get('userknownhostsfile', '')} {settings.get('globalknownhostsfile', '')}".split()
