import io
import re
import tarfile

import pytest
from refusals import refused

from lathe.common import paths
from lathe.gguf import install_converter, jinja_engine

ROOT = "llama_cpp_python-1.0"
FILES = {
    f"{ROOT}/vendor/llama.cpp/LICENSE": b"MIT",
    f"{ROOT}/vendor/llama.cpp/convert_hf_to_gguf.py": b"print(1)",
    f"{ROOT}/vendor/llama.cpp/convert_lora_to_gguf.py": b"",
    f"{ROOT}/vendor/llama.cpp/conversion/base.py": b"# base",
    f"{ROOT}/vendor/llama.cpp/gguf-py/gguf/gguf.py": b"",
    f"{ROOT}/vendor/llama.cpp/models/ggml-vocab-x.gguf": b"GGUF",
    f"{ROOT}/vendor/llama.cpp/src/llama-vocab.cpp": b"// vocabulary",
    f"{ROOT}/vendor/llama.cpp/common/jinja/lexer.cpp": b"// lexer",
    **{
        f"{ROOT}/vendor/llama.cpp/{name}": b"// engine"
        for name in jinja_engine.SOURCES
        if name.endswith((".cpp", ".h", ".hpp"))
    },
}
UNWANTED = {
    f"{ROOT}/vendor/llama.cpp/src/llama.cpp": b"",
    f"{ROOT}/vendor/llama.cpp/common/chat.cpp": b"",
    f"{ROOT}/vendor/llama.cpp/common/jinja.cpp": b"",
    f"{ROOT}/llama_cpp/__init__.py": b"",
    f"{ROOT}/LICENSE": b"",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Gives files to a source package that stands in for the one pip would download; counts the downloads."""
    downloads = []

    def provide(files, links=()):
        def download(requirement, folder):
            downloads.append(folder)
            folder.mkdir()
            with tarfile.open(folder / "package.tar.gz", "w:gz") as archive:
                for name, content in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                for name, target in links:
                    member = tarfile.TarInfo(name)
                    member.type, member.linkname = tarfile.SYMTYPE, target
                    archive.addfile(member)
            return folder / "package.tar.gz"

        monkeypatch.setattr(install_converter, "download_source", download)
        return downloads

    return provide


@pytest.fixture
def requirement(tmp_path, monkeypatch):
    monkeypatch.setattr(install_converter.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setenv("CXX", "false")  # builds nothing
    path = tmp_path / "requirements-converter.txt"
    path.write_text(f"# why\nllama-cpp-python==1.0 --hash=sha256:{'a' * 64}\n")
    return path


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_only_what_converting_needs_is_unpacked(tmp_path, package, requirement):
    package({**FILES, **UNWANTED}, links=[(f"{ROOT}/vendor/llama.cpp/models/link", "/etc/passwd")])
    assert install_converter.install(tmp_path / "llama", requirement)
    wanted = [name.removeprefix(f"{ROOT}/vendor/llama.cpp/") for name in FILES]
    assert listing(tmp_path / "llama") == sorted([*wanted, ".pinned"])
    assert (tmp_path / "llama/conversion/base.py").read_bytes() == b"# base"


def test_a_second_run_does_nothing_and_a_new_pin_starts_over(tmp_path, package, requirement):
    downloads = package(FILES)
    assert install_converter.install(tmp_path / "llama", requirement)
    assert not install_converter.install(tmp_path / "llama", requirement)
    requirement.write_text(requirement.read_text().replace("a" * 64, "b" * 64))
    assert install_converter.install(tmp_path / "llama", requirement)
    assert len(downloads) == 2


def test_what_an_earlier_version_left_out_is_unpacked(tmp_path, package, requirement):
    downloads = package(FILES)
    install_converter.install(tmp_path / "llama", requirement)
    (tmp_path / "llama/src/llama-vocab.cpp").unlink()
    assert install_converter.install(tmp_path / "llama", requirement)
    assert (tmp_path / "llama/src/llama-vocab.cpp").exists()
    assert len(downloads) == 2


def test_the_engine_is_built_of_its_sources_once_there_is_a_compiler(
    tmp_path, package, requirement, monkeypatch, caplog
):
    downloads = package(FILES)
    target = tmp_path / "llama"
    install_converter.install(target, requirement)
    assert "is not asked about chat templates: false ends with exit code 1" in caplog.text
    assert jinja_engine.find_engine(target) is None
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\nfor word; do echo "$word"; done > "$0.words"\nfor last; do :; done\ntouch "$last"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert not install_converter.install(target, requirement)
    assert jinja_engine.find_engine(target) == target / "bin/render-template"
    words = (tmp_path / "compiler.words").read_text().splitlines()
    compiled = {str(jinja_engine.MAIN), *(f"{target}/common/{name}.cpp" for name in ("json", "unicode", "jinja/lexer"))}
    assert {word for word in words if word.endswith(".cpp")} == compiled
    assert len(downloads) == 1
    compiler.unlink()
    assert not install_converter.install(target, requirement)  # it is there


def test_no_compiler_is_no_fault(tmp_path, package, requirement, monkeypatch, caplog):
    package(FILES)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_converter.install(tmp_path / "llama", requirement)
    assert "there is no C++ compiler (c++, g++, clang++)" in caplog.text


def test_a_run_that_was_killed_is_taken_up(tmp_path, package, requirement):
    partial = tmp_path / ".llama.partial"
    (partial / ".download").mkdir(parents=True)
    (partial / "conversion").write_text("half")
    package(FILES)
    assert install_converter.install(tmp_path / "llama", requirement)
    assert not partial.exists()
    assert (tmp_path / "llama/conversion/base.py").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{ROOT}/vendor/llama.cpp/models/../../../out": b""}, "leads out"),
        ({f"{ROOT}/vendor/llama.cpp/models/../out": b""}, "leads out"),
    ],
)
def test_a_path_that_leads_out_is_refused_and_nothing_appears(tmp_path, package, requirement, change, message):
    package({**FILES, **change})
    with refused("unsafe-path", message):
        install_converter.install(tmp_path / "llama", requirement)
    assert [path.name for path in tmp_path.iterdir()] == [requirement.name]


def test_a_package_without_the_converter_is_refused(tmp_path, package, requirement):
    package({name: content for name, content in FILES.items() if "convert_hf" not in name})
    with refused("incomplete-source-package", "lacks vendor/llama.cpp/convert_hf_to_gguf.py", kept=False):
        install_converter.install(tmp_path / "llama", requirement)
    assert not (tmp_path / "llama").exists()


def test_another_installed_version_is_refused(tmp_path, package, requirement, monkeypatch):
    package(FILES)
    monkeypatch.setattr(install_converter.importlib.metadata, "version", lambda name: "1.1")
    with refused("other-llama-cpp", "llama-cpp-python 1.1 is installed but", "pins 1.0"):
        install_converter.install(tmp_path / "llama", requirement)


def test_a_requirement_without_a_hash_is_refused(tmp_path, requirement):
    requirement.write_text("llama-cpp-python==1.0\n")
    with refused("converter-not-pinned", "does not pin the converter"):
        install_converter.install(tmp_path / "llama", requirement)


def test_a_failing_download_is_told_in_one_line_and_leaves_nothing(tmp_path, requirement, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with refused("download-failed", "pip could not download", "; from pip: ", kept=False) as caught:
        install_converter.install(tmp_path / "llama", requirement)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [requirement.name]


def test_converter_and_library_are_pinned_to_one_version():
    pinned = re.compile(r"\bllama-cpp-python==([\w.]+)")
    library = pinned.search((paths.ROOT / "pyproject.toml").read_text())
    source = pinned.search(install_converter.REQUIREMENT.read_text())
    assert library is not None
    assert source is not None
    assert library[1] == source[1]
