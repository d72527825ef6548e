"""llama-server is built from the pinned source package, once, and a build that fails says why."""

import io
import tarfile
from pathlib import Path

import pytest
from refusals import refused

from lathe.gguf import build_llama_server, install_converter

ROOT = "llama_cpp_python-1.0/vendor/llama.cpp"


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pinned converter, and a source package in place of the one that pip would download."""
    monkeypatch.setattr(install_converter.importlib.metadata, "version", lambda name: "1.0")
    requirement = tmp_path / "requirements-converter.txt"
    requirement.write_text(f"llama-cpp-python==1.0 --hash=sha256:{'a' * 64}\n")
    folder = tmp_path / "llama"
    for name in install_converter.UNPACKED:
        (folder / name).mkdir(parents=True)
    (folder / install_converter.PIN_FILE).write_text(requirement.read_text().strip())

    def download(_: Path, into: Path) -> Path:
        into.mkdir()
        with tarfile.open(into / "package.tar.gz", "w:gz") as archive:
            for name in build_llama_server.SOURCES:
                member = tarfile.TarInfo(f"{ROOT}/{name}" if "." in name else f"{ROOT}/{name}/file.cpp")
                archive.addfile(member, io.BytesIO())
            archive.addfile(tarfile.TarInfo(f"{ROOT}/src/llama.cpp"), io.BytesIO())
        return into / "package.tar.gz"

    monkeypatch.setattr(install_converter, "download_source", download)
    return folder


def stand_in_for_cmake(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the build run a shell script in place of cmake; $3 of the second step is the folder."""
    tool = folder / "cmake"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(build_llama_server, "_find_tool", lambda name: str(tool))


BUILDS = (
    '[ "$1" = --build ] || exit 0; echo "[1/2] one"; echo "[2/2] two"; '
    'mkdir -p "$2/bin"; for p in {}; do : > "$2/bin/$p"; done'
)


def test_the_programs_are_put_in_place_and_nothing_else_is_left(converter, tmp_path, monkeypatch):
    stand_in_for_cmake(tmp_path, BUILDS.format(" ".join(build_llama_server.PROGRAMS)), monkeypatch)
    requirement = tmp_path / "requirements-converter.txt"
    assert build_llama_server.find_program("llama-server", converter) is None
    assert build_llama_server.build(converter, requirement)
    assert build_llama_server.find_program("llama-server", converter) == converter / "bin/llama-server"
    assert not (converter / "server-build").exists()
    assert not build_llama_server.build(converter, requirement)


def test_only_what_is_compiled_is_unpacked_below_a_list_of_its_own(converter, tmp_path, monkeypatch):
    stand_in_for_cmake(tmp_path, "exit 1", monkeypatch)
    with refused("build-failed", "exit code 1", kept=False):
        build_llama_server.build(converter, tmp_path / "requirements-converter.txt")
    source = converter / "server-build/source"
    assert (source / "CMakeLists.txt").read_text() == build_llama_server.TOP.read_text()
    assert not (source / "src/llama.cpp").exists()
    assert (source / "tools/server/file.cpp").exists()


def test_a_build_that_fails_says_the_first_error_and_where_its_output_is_and_goes_on_afterwards(
    converter, tmp_path, monkeypatch
):
    requirement = tmp_path / "requirements-converter.txt"
    fails = '[ "$1" = --build ] || exit 0; echo "[1/2] one"; echo "a.cpp:1: error: no such type"; echo end; exit 2'
    stand_in_for_cmake(tmp_path, fails, monkeypatch)
    with refused("build-failed", "a.cpp:1: error: no such type", "build.log", kept=False):
        build_llama_server.build(converter, requirement)
    (converter / "server-build/source/kept").touch()
    stand_in_for_cmake(tmp_path, BUILDS.format(" ".join(build_llama_server.PROGRAMS)), monkeypatch)
    monkeypatch.setattr(install_converter, "download_source", None)  # not called again
    assert build_llama_server.build(converter, requirement)


def test_without_the_pinned_converter_it_says_to_run_setup(converter, tmp_path):
    (converter / install_converter.PIN_FILE).unlink()
    with refused("converter-outdated", "run `make setup` first", kept=False):
        build_llama_server.build(converter, tmp_path / "requirements-converter.txt")
