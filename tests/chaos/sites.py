"""Sites: checkouts in which nothing has gone wrong yet, made once, and a copy of one for each injection."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import preloaded
import yaml
from conftest import Checkout, copy_of, make_reproduced, make_small_model
from filelock import FileLock
from training_checkout import make_training_checkout

from chaos.processes import MARK, SECONDS_TO_END, Command, wait_for_their_end
from chaos.state import State, describe_differences, describe_half_written, describe_leftovers, read_state

LATHE = (sys.executable, "-m", "lathe")
# A cache of torch's, and two empty folders of W&B's client, where that is installed: TRL imports it.
OF_LIBRARIES = re.compile(r"^torchinductor_|wandb-(media|artifacts)$")
DVC = (str(Path(sys.executable).with_name("dvc")),)


class Site:
    """A copy of a checkout for one injection, with a temporary folder, a log and a mark of its own."""

    def __init__(self, root: Path, folder: Path, mark: str, expected: State, rng: Random) -> None:
        self.root, self.folder, self.mark, self.expected, self.rng = root, folder, mark, expected, rng
        self.temporary, self.log = folder / "tmp", folder / "log"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **Checkout(root).without_preloading().environment,
            MARK: mark,
            "TMPDIR": str(self.temporary),
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "PYTHONPATH": str(root / "src"),
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    def start(
        self, *words: str, env: Mapping[str, str] | None = None, limits: Mapping[int, int] | None = None
    ) -> Command:
        """Start a command in the checkout."""
        return Command(words, self.root, {**self.environment, **(env or {})}, self.log, limits)

    def run(self, *words: str, env: Mapping[str, str] | None = None, check: bool = True) -> int:
        """Run a command to its end. Raises AssertionError, with the end of its output, if it fails."""
        code = self.start(*words, env=env).wait()
        assert not check or code == 0, f"{' '.join(words[-3:])}: exit code {code}: {self.tail()}"
        return code

    def read(self, *words: str) -> str:
        """Run a command and return what it prints."""
        return subprocess.run(
            words, cwd=self.root, env=self.environment, capture_output=True, text=True, check=True
        ).stdout

    def tail(self) -> str:
        """Return the last lines of what the commands have printed."""
        return " | ".join(self.log.read_text(errors="replace").splitlines()[-6:])[-900:]

    @property
    def checkout(self) -> Checkout:
        """The checkout, to be edited and committed as a user does."""
        return Checkout(self.root, self.environment)

    def forget(self, item: str) -> None:
        """Take away an item's entry of dvc.lock, its outputs, and DVC's memory of its runs: it must run again."""
        lock = self.root / "dvc.lock"
        tree = yaml.load(lock.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        for out in tree["stages"].pop(item).get("outs", []):
            remove(self.root / out["path"])
        lock.write_text(yaml.dump(tree, Dumper=yaml.CSafeDumper, sort_keys=False), encoding="utf-8")
        remove(self.root / ".dvc/cache/runs")

    def outputs(self, item: str) -> list[Path]:
        """Return the files that an item makes, the largest first."""
        tops = [self.root / out["path"] for out in self.expected.stages[item].get("outs", [])]
        files = [file for top in tops for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file()]
        return sorted(files, key=lambda file: file.stat().st_size, reverse=True)

    def check_after_fault(self, seconds: float = SECONDS_TO_END) -> None:
        """Raise AssertionError if something goes on without its parent, or what is half written counts as whole."""
        left = wait_for_their_end(self.mark, seconds)
        assert not left, f"still running: {'; '.join(left)}"
        faults = list(describe_half_written(self.root, self.expected))
        assert not faults, "; ".join(faults[:5])

    def check_at_the_end(self, expected: State | None = None) -> None:
        """Raise AssertionError where anything is not as an undisturbed run leaves it."""
        expected = expected or self.expected
        left = wait_for_their_end(self.mark)
        state = read_state(self.root)
        faults = [f"still running: {line}" for line in left]
        faults += [*describe_differences(state, expected), *describe_leftovers(self.root, state, expected)]
        faults += self.describe_temporary_files()
        assert not faults, "; ".join(faults[:6])

    def describe_temporary_files(self) -> list[str]:
        """Return what is left in the temporary folder, but what torch keeps there, and W&B's client when imported."""
        left = [path for path in self.temporary.iterdir() if not OF_LIBRARIES.search(path.name)]
        return [f"{path.name}: left in the temporary folder" for path in left]


class Sites:
    """The checkouts that injections start from, in a folder that is kept; each is made when it is asked for first."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.work.mkdir(parents=True, exist_ok=True)
        self._preloaded: Any = None

    @cached_property
    def small_model(self) -> Path:
        """The model that takes every stage through in seconds."""
        return self._made("small_model", make_small_model)

    @cached_property
    def whole(self) -> Path:
        """A checkout whose whole pipeline has run and is committed."""
        return self._made("whole", lambda root: make_reproduced(root, self.small_model))

    @cached_property
    def training(self) -> Path:
        """A checkout whose pipeline is a training of some seconds, which has not run."""
        return self._made("training", lambda root: make_training_checkout(root, self.small_model))

    def made_by(self, name: str, template: Path, make: Callable[[Site], None]) -> Path:
        """Return a copy of a template in which `make` has run without a fault."""

        def copy_and_make(root: Path) -> None:
            copy_of(Checkout(template), root)
            folder = root.with_name(f"{root.name}.folder")
            site = Site(root, folder, f"reference-{os.getpid()}", read_state(root), Random(name))
            make(site)
            assert not wait_for_their_end(site.mark)

        return self._made(name, copy_and_make)

    def state(self, template: Path) -> State:
        """Return the state of a template."""
        return read_state(template)

    @contextmanager
    def copy(self, template: Path, name: str, rng: Random, room_bytes: int | None = None) -> Iterator[Site]:
        """Yield a copy of a template; with `room_bytes` on a file system of its own, with that much room left."""
        folder = self.work / "injections" / f"{name}-{os.getpid()}"
        remove(folder)
        folder.mkdir(parents=True)
        root = folder / "lathe"
        try:
            if room_bytes is None:
                copy_of(Checkout(template), root)
            else:
                mount_copy(template, folder / "disk", room_bytes)
                root = folder / "disk/lathe"
            yield Site(root, folder, folder.name, read_state(template), rng)
        finally:
            wait_for_their_end(folder.name, 0)
            if os.path.ismount(folder / "disk"):
                subprocess.run(["umount", "--lazy", str(folder / "disk")], check=True)
            remove(folder)

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        folder, done = self.work / name, self.work / f".{name}.made"
        with FileLock(self.work / f".{name}.lock"):
            if not done.exists():
                if self._preloaded is None:
                    self._preloaded = tempfile.TemporaryDirectory(prefix="lathe-chaos-", ignore_cleanup_errors=True)
                    preloaded.set_up(Path(self._preloaded.name))
                remove(folder)
                make(folder)
                done.touch()
        return folder


def mount_copy(template: Path, disk: Path, room_bytes: int) -> None:
    """Copy a checkout to a file system in memory that has room for so many bytes more, links within it kept."""
    disk.mkdir()
    run_as_root("mount", "-t", "tmpfs", "-o", "size=4g,mode=0755", "lathe-chaos", str(disk))
    subprocess.run(["cp", "--archive", str(template), str(disk / "lathe")], check=True)
    shut = os.statvfs(disk)
    used = (shut.f_blocks - shut.f_bfree) * shut.f_frsize
    run_as_root("mount", "-o", f"remount,size={used + room_bytes}", str(disk))


def make_room(disk: Path) -> None:
    """Give a full file system of `mount_copy` all the room it needs."""
    run_as_root("mount", "-o", "remount,size=4g", str(disk))


def can_mount() -> bool:
    """Tell whether this process may mount a file system."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_as_root("mount", "-t", "tmpfs", "-o", "size=1m", "lathe-chaos", folder)
        except (OSError, subprocess.CalledProcessError):
            return False
        run_as_root("umount", folder)
        return True


def run_as_root(*words: str) -> None:
    """Run a command that only root may run, and leave its complaints unsaid."""
    subprocess.run(words, check=True, capture_output=True)


def heed_modes() -> Sequence[str]:
    """Return the words before a command that let it heed the modes of files, which root does not."""
    return ("setpriv", "--bounding-set", "-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


def remove(path: Path) -> None:
    """Remove a file or a folder, whatever its mode."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
