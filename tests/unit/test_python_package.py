"""Files of a model in an installed Python package: found by their path, and only as they came."""

import os
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path

import pytest
from refusals import refused

from lathe.sources import python_package

FILES = {
    "small_model/__init__.py": b"raise SystemExit('imported')",
    "small_model/model.gguf": b"GGUF" + bytes(100),
    "small_model/encoder/config.json": b"{}",
    "small_model/encoder/model.safetensors": bytes(50),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed a small package from a wheel."""
    root = tmp_path_factory.mktemp("package")
    about = "small_model-1.0.dist-info"
    files = FILES | {
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [
        f"{name},sha256={urlsafe_b64encode(sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    wheel = root / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{about}/RECORD", "\n".join([*lines, f"{about}/RECORD,,", ""]))
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet"]
    subprocess.run([*pip, "--target", root / "site", wheel], check=True, env={**os.environ, "PIP_NO_INPUT": "1"})
    return root / "site"


@pytest.fixture(autouse=True)
def on_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)


def test_a_file_and_a_folder_are_found_without_an_import(site: Path) -> None:
    for path in ("small_model/model.gguf", "small_model/encoder", "small_model/encoder/"):
        assert python_package.find_files("small-model", "1.0", path) == site / path
    assert python_package.find_files("Small_Model", "1.0", "small_model/encoder/config.json").read_bytes() == b"{}"
    assert "small_model" not in sys.modules


@pytest.mark.parametrize(
    ("package", "version", "path", "code", "part"),
    [
        ("no-such-model", "1.0", "x", "package-not-installed", "no-such-model is not installed; run `make setup` if"),
        ("small-model", "1.1", "x", "other-version", "version is '1.1', but small-model 1.0 is installed"),
        ("small-model", "1.0", "small_model/mdel.gguf", "no-such-file", "did you mean 'small_model/model.gguf'?"),
        ("small-model", "1.0", "small_model/../../secret", "no-such-file", "path is 'small_model/../../secret'"),
        ("small-model", "1.0", "small_model/encoder/../model.gguf", "no-such-file", "does not hold"),
        ("small-model", "1.0", "/etc/passwd", "no-such-file", "path is '/etc/passwd'"),
        ("small-model", "1.0", ".", "no-such-file", "path is '.'"),
    ],
)
def test_what_a_package_does_not_hold_is_refused(package: str, version: str, path: str, code: str, part: str) -> None:
    with refused(code, part, kept=False) as caught:
        python_package.find_files(package, version, path)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_changed_or_removed_is_refused(site: Path) -> None:
    weights = site / "small_model/encoder/model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(b"\1" + before[1:])
        with refused("changed-file", str(weights), "small-model 1.0 came with", "--force-reinstall", kept=False):
            python_package.find_files("small-model", "1.0", "small_model/encoder")
        python_package.find_files("small-model", "1.0", "small_model/model.gguf")
        weights.unlink()
        with refused("changed-file", str(weights), kept=False):
            python_package.find_files("small-model", "1.0", "small_model/encoder")
    finally:
        weights.write_bytes(before)
