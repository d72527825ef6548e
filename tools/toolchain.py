"""What the machine has: a Python to make an environment with, compilers, room on the disk, compiled wheels."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockfile import SetupError

PYTHONS = ("3.13", "3.12", "3.11")  # newest first
GB = 10**9


def capture_output(*command: str) -> str:
    """Return what a command prints; nothing where it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def get_python_version(python: str) -> str | None:
    """Return the version, such as 3.11.7, of a Python that can make environments; None where it cannot.

    pyenv puts commands on the PATH for versions that are switched off, and Debian packages Python without `venv`.
    """
    code = "import ensurepip, platform, venv; print(platform.python_version())"
    try:
        return capture_output(python, "-c", code).strip() or None
    except OSError:
        return None


def is_supported(version: str) -> bool:
    """Tell whether the packages are locked for a version of Python."""
    return version.rpartition(".")[0] in PYTHONS


def choose_python(requested: str | None, existing: Path | None, earlier: str | None) -> str:
    """Return the Python that PYTHON names, else the one of the existing environment, else the newest that runs.

    `earlier` is the one that an interrupted setup had taken. Raises SetupError where none can be used, or where an
    environment exists and has another version than the one asked for.
    """
    current = get_python_version(str(existing)) if existing else None
    example = f"make setup PYTHON=/path/to/python{PYTHONS[0]}"
    if requested:
        version = get_python_version(requested)
        if version is None:
            raise SetupError(
                f"PYTHON={requested}: does not run, or lacks the modules venv and ensurepip (Debian: python3-venv); "
                f"install it, or name another one: {example}"
            )
        if not is_supported(version):
            raise SetupError(
                f"PYTHON={requested}: Python {version}; must be {_any_of(PYTHONS)}; name another: {example}"
            )
        if current and current.rpartition(".")[0] != version.rpartition(".")[0]:
            raise SetupError(
                f"PYTHON={requested}: Python {version}, but .venv was made with {current}; to change it, run "
                "`make clean` first"
            )
        return requested
    if current and is_supported(current):
        return str(existing)
    for candidate in (earlier, *(f"python{version}" for version in PYTHONS)):
        path = shutil.which(candidate) if candidate else None
        if path and is_supported(get_python_version(path) or ""):
            return path
    raise SetupError(
        f"no Python {_any_of(PYTHONS)} on the PATH that runs and has the modules venv and ensurepip (Debian: "
        f"python3-venv); install one, or name it: {example}"
    )


def _any_of(names: Sequence[str]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} or {last}"


def find_compilers(environment: Mapping[str, str], *, cuda: bool) -> dict[str, str]:
    """Return the compilers that CMake would find. Raises SetupError where one is missing."""
    install = "install one (Debian: apt-get install g++; macOS: xcode-select --install)"
    wanted = [("CC", "C", ["cc", "gcc", "clang"], install), ("CXX", "C++", ["c++", "g++", "clang++"], install)]
    if cuda:
        wanted.append(("CUDACXX", "CUDA", ["nvcc"], "install NVIDIA's CUDA toolkit"))
    compilers = {}
    for variable, language, names, remedy in wanted:
        names = (environment.get(variable) or "").split()[:1] or names
        paths = filter(None, (shutil.which(name, path=environment.get("PATH")) for name in names))
        compilers[variable] = next(paths, "")
        if not compilers[variable]:
            raise SetupError(
                f"{' and '.join(names)}: not on the PATH; a {language} compiler must be, as llama.cpp is compiled for "
                f"this machine; {remedy}, or name it in the environment: {variable}=/path/to/compiler"
            )
    return compilers


def check_git(environment: Mapping[str, str]) -> None:
    """Raise SetupError where there is no Git."""
    if shutil.which("git", path=environment.get("PATH")) is None:
        raise SetupError(
            "git: not on the PATH; DVC works in a Git repository; install it (Debian: apt-get install git)"
        )


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise SetupError where the disk is too full."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise SetupError(
            f"{folder}: {free / GB:.1f} GB free; {what} needs {needed_bytes / GB:.0f}; make room, or move the checkout"
        )


def describe_processor() -> str:
    """Return what code that is compiled for this machine alone depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return " ".join(sorted(flags[1].split())) if flags else platform.processor()


def get_cache_folder(
    source: str, environment: Mapping[str, str], compilers: Mapping[str, str], cmake_args: str
) -> Path:
    """Return the folder of the user's cache for the wheel that is compiled from `source` (version and hash) this way.

    It does not depend on the Python: the library is loaded through ctypes, and one wheel serves every version.
    """
    decides = {
        "source": source,
        "machine": [platform.system(), platform.machine(), *platform.libc_ver(), describe_processor()],
        "compilers": [capture_output(path, "--version") for path in compilers.values()],
        "flags": [cmake_args, *(environment.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS"))],
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = "cuda" if "GGML_CUDA=on" in cmake_args else "cpu"
    return cache / "lathe/wheels" / f"{source.split()[0]}-{platform.machine()}-{kind}-{key}"


def find_cached_wheel(folder: Path) -> Path | None:
    """Return the wheel in a folder of the cache, if there is one and it is whole."""
    for wheel in sorted(folder.glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as content:
                if content.testzip() is None:
                    return wheel
        except (zipfile.BadZipFile, OSError):
            continue
    return None


def keep_wheel(wheel: Path, folder: Path) -> Path:
    """Copy a wheel into a folder of the cache, where it appears whole or not at all, and return its new place."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}.partial"
    shutil.copyfile(wheel, partial)
    os.replace(partial, folder / wheel.name)
    return folder / wheel.name
