"""Installation of llama.cpp's own converter, and of its Jinja engine: `python -m lathe.gguf.install_converter`.

The source package of llama-cpp-python contains the llama.cpp that the installed library was built from. pip downloads
it and checks its hash; the converter's files are unpacked into `.llama.cpp`, which Git ignores. A folder that already
has the pinned version is not changed. The engine is built there if there is a C++ compiler; without it, it is not asked
about templates.
"""

import importlib.metadata
import logging
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from lathe.common import entry_point, paths
from lathe.common.errors import InputError
from lathe.gguf import jinja_engine

logger = logging.getLogger(__name__)

PACKAGE = "llama-cpp-python"
REQUIREMENT = paths.ROOT / "requirements-converter.txt"

# Below vendor/llama.cpp in the source package; `models` has real vocabularies without weights, and chat templates,
# `llama-vocab.cpp` what the names of pre-tokenizers stand for.
UNPACKED = (
    "LICENSE",
    "conversion",
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "gguf-py",
    "models",
    "src/llama-vocab.cpp",
)
PIN_FILE = ".pinned"
SCRIPT = "convert_hf_to_gguf.py"

State = Literal["missing", "outdated", "ready"]


def main() -> None:
    """Install the pinned converter into `.llama.cpp`; an InputError is printed in one line, exit code 2."""
    entry_point.guard(lambda: install(paths.LLAMA_CPP, REQUIREMENT))


def install(target: Path, requirement: Path) -> bool:
    """Fill `target` with the converter that the file `requirement` pins, unless it is there already.

    Returns whether anything was done. The folder appears completely or not at all. Raises InputError if the
    installed llama-cpp-python is of another version, if pip cannot download the package, or if its hash
    differs.
    """
    if is_installed(target, requirement) and all((target / name).exists() for name in jinja_engine.SOURCES):
        _build_engine(target)
        return False
    with paths.replace_folder(target) as folder:
        # Inside the folder that is written, so that the next run removes it if this one is killed.
        download = folder / ".download"
        unpack(download_source(requirement, download), folder, required=UNPACKED, more=jinja_engine.SOURCES)
        shutil.rmtree(download)
        (folder / PIN_FILE).write_text(_read_pin(requirement), encoding="utf-8")
    _build_engine(target)
    return True


def _build_engine(target: Path) -> None:
    if not jinja_engine.find_engine(target) and (reason := jinja_engine.build_engine(target)):
        logger.warning("%s: no Jinja engine, so that it is not asked about chat templates: %s", target, reason)


def find_converter(root: Path, llama_cpp_dir: str | None) -> tuple[Path, State]:
    """Return the folder of the converter that a checkout uses, and whether it is there and of the pinned version.

    `llama_cpp_dir` is convert.llama_cpp_dir; a folder of the user's own is of no pinned version. Raises InputError as
    `is_installed`.
    """
    folder = root / llama_cpp_dir if llama_cpp_dir else paths.LLAMA_CPP
    if not (folder / SCRIPT).is_file():
        return folder, "missing"
    ready = bool(llama_cpp_dir) or is_installed(folder, root / REQUIREMENT.name)
    return folder, "ready" if ready else "outdated"


def is_installed(target: Path, requirement: Path) -> bool:
    """Tell whether `target` holds the converter that the file `requirement` pins.

    Raises InputError if the installed llama-cpp-python is of another version.
    """
    stamp, pin = target / PIN_FILE, _read_pin(requirement)
    # A checkout of an earlier version may lack a file that is unpacked today.
    return (
        stamp.is_file()
        and stamp.read_text(encoding="utf-8") == pin
        and all((target / name).exists() for name in UNPACKED)
    )


def _read_pin(requirement: Path) -> str:
    lines = requirement.read_text(encoding="utf-8").splitlines()
    pin = " ".join(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    match = re.fullmatch(rf"{PACKAGE}==(\S+) --hash=sha256:[0-9a-f]{{64}}", pin)
    if match is None:
        raise InputError(
            f"{requirement}: {pin!r} does not pin the converter; "
            f"it must read '{PACKAGE}==VERSION --hash=sha256:DIGEST' and nothing else",
            code="converter-not-pinned",
        )
    try:
        installed = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed != match[1]:
        raise InputError(
            f"{PACKAGE} {installed} is installed but {requirement.name} pins {match[1]}: converter and library must be "
            f"of one llama.cpp; run `make setup`, or pin the same version here and in pyproject.toml",
            code="other-llama-cpp",
        )
    return pin


def download_source(requirement: Path, folder: Path) -> Path:
    """Download the pinned source package into a new folder, and return it. Raises InputError if pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
    command += ["--no-binary", PACKAGE, "--requirement", str(requirement), "--dest", str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        output = " / ".join(line.strip() for line in done.stderr.splitlines() if line.strip()) or "nothing"
        raise InputError(
            f"pip could not download the source package that {requirement.name} pins; check the network and the "
            f"package index, then run `python -m lathe.gguf.install_converter` again; from pip: {output[-600:]}",
            code="download-failed",
        )
    [archive] = folder.iterdir()
    return archive


def unpack(archive: Path, folder: Path, *, required: Sequence[str], more: Sequence[str] = ()) -> None:
    """Unpack files and folders below vendor/llama.cpp of a source package: `required`, and of `more` those that it has.

    Raises InputError if one of `required` is not there, or a path leads out of the folder.
    """
    missing = set(required)
    with tarfile.open(archive) as source:
        for member, path in _select_files(source, (*required, *more)):
            missing -= {path.as_posix(), *(parent.as_posix() for parent in path.parents)}
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            content = source.extractfile(member)
            assert content is not None, member.name
            with content, (folder / path).open("wb") as file:
                shutil.copyfileobj(content, file)
    if missing:
        raise InputError(
            f"{archive.name} lacks vendor/llama.cpp/{sorted(missing)[0]}: it is not the source package",
            code="incomplete-source-package",
        )


def _select_files(archive: tarfile.TarFile, names: Sequence[str]) -> Iterator[tuple[tarfile.TarInfo, Path]]:
    # Only regular files, and written here: no link and no path out of the folder can reach the disk.
    for member in archive:
        parts = PurePosixPath(member.name).parts
        if not member.isfile() or parts[1:3] != ("vendor", "llama.cpp") or not parts[3:]:
            continue
        path = PurePosixPath(*parts[3:])
        if any(path.is_relative_to(name) for name in names):
            if ".." in parts:
                raise InputError(
                    f"the source package holds the path {member.name!r}, which leads out; do not use it",
                    code="unsafe-path",
                )
            yield member, Path(*parts[3:])


if __name__ == "__main__":
    main()
