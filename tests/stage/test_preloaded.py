"""A process that is forked from the preloaded one is as a process of its own, but for the imports it need not do."""

import os
import signal
import subprocess
import time
from pathlib import Path

import preloaded
import psutil
import pytest
from conftest import Checkout

STATE = """\
import atexit, os, sys, threading
SET = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "PWD", "TORCHINDUCTOR_CACHE_DIR", "_MLFLOW_TELEMETRY_SESSION_ID")
assert not [name for name in sys.modules if name.partition(".")[0] in ("gguf", "conftest", "preloaded")]
atexit.register(print, "at exit")
threading.Timer(0.2, print, ["a thread"]).start()
variables = sorted(item for item in os.environ.items() if item[0] not in SET)
print(__name__, sys.argv, os.getcwd(), *variables, sep="\\n")
print(*sys.path, sys.modules["__main__"].__dict__["__file__"], sys.stdin.read(), oct(os.umask(0o22)), sep="\\n")
print("to stderr", file=sys.stderr)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Checkout:
    """A folder that is no checkout, with a package on the import path."""
    (tmp_path / "packages/some").mkdir(parents=True)
    (tmp_path / "packages/some/__init__.py").touch()
    (tmp_path / "packages/some/__main__.py").write_text(STATE)
    checkout = Checkout(tmp_path)
    checkout.environment["PYTHONPATH"] = str(tmp_path / "packages")
    return checkout


def script(folder: Checkout, text: str) -> str:
    (folder.root / "scripts").mkdir(exist_ok=True)
    (folder.root / "scripts/it.py").write_text(text)
    return "scripts/it.py"


def run_both(folder: Checkout, *arguments: str) -> list[tuple[int, str, str]]:
    """Return how the forked process ended and what it said, and how one of its own did."""
    found = []
    for each in (folder, folder.without_preloading()):
        done = each.run("python3", *arguments, check=False, input="given", env={"PATH": each.environment["PATH"]})
        path = each.environment["PATH"]
        found.append((done.returncode, done.stdout.replace(path, "PATH"), done.stderr.replace(path, "PATH")))
    return found


def imported(folder: Checkout, **variables: str) -> bool:
    file = script(folder, "import sys; print('torch' in sys.modules)")
    return folder.run("python3", file, env=variables).stdout == "True\n"


def test_it_is_forked_and_others_import_for_themselves(folder: Checkout) -> None:
    assert imported(folder)
    assert imported(folder, PYTHONUTF8="1", HF_DATASETS_OFFLINE="1", ANOTHER="1", RANK="1", OMP_NUM_THREADS="1")
    for name, value in {"HF_DATASETS_CACHE": "/nowhere", "OMP_PROC_BIND": "true", "LC_ALL": "C"}.items():
        assert not imported(folder, **{name: value}), name
    assert not imported(folder.without_preloading())
    assert folder.run("python3", "-s", "-c", "import sys; print('torch' in sys.modules)").stdout == "False\n"


def test_the_client_of_the_hub_is_imported_again_where_its_variables_differ(folder: Checkout, tmp_path: Path) -> None:
    program = "import sys; from huggingface_hub import constants as c; print('torch' in sys.modules, c.HF_HUB_OFFLINE, "
    program += "c.ENDPOINT, c.HF_HUB_CACHE)"
    variables = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "home")}
    forked = folder.run("python3", "-c", program, env=variables).stdout
    assert forked == f"True False http://127.0.0.1:1 {tmp_path}/home/hub\n"
    own = folder.without_preloading().run("python3", "-c", program, env=variables).stdout
    assert own == forked.replace("True", "False", 1)


def test_a_forked_process_has_the_threads_of_its_environment(folder: Checkout) -> None:
    program = "import torch; print(torch.get_num_threads())"
    assert folder.run("python3", "-c", program, env={"OMP_NUM_THREADS": "1"}).stdout == "1\n"
    assert folder.run("python3", "-c", program, env={"OMP_NUM_THREADS": "3"}).stdout == "3\n"


@pytest.mark.parametrize("option", [[], ["-u"]])
def test_a_program_is_run_as_by_python(folder: Checkout, option: list[str]) -> None:
    program = "import os, sys\nprint(__name__, sys.argv, sys.path[0], end='')\nif '-x' in sys.argv:\n    os._exit(3)\n"
    for arguments in (["an argument"], ["-x"]):
        forked, own = run_both(folder, *option, "-c", program, *arguments)
        assert forked == own


@pytest.mark.parametrize("kind", ["script", "module"])
def test_arguments_folder_environment_import_path_and_files_are_those_of_a_process_of_its_own(
    folder: Checkout, kind: str
) -> None:
    arguments = [script(folder, STATE)] if kind == "script" else ["-m", "some"]
    forked, own = run_both(folder, *arguments, "an argument", "--option")
    assert own[0] == 0, own
    assert own[1].endswith("a thread\nat exit\n")
    assert forked[1].splitlines() == own[1].splitlines()
    assert forked == own


@pytest.mark.parametrize(
    "text",
    [
        "raise SystemExit",
        "raise SystemExit(3)",
        "raise SystemExit('a reason')",
        "def fail():\n    raise ValueError('wrong')\n\nfail()\n",
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "import os\nprint('not flushed')\nos._exit(7)",
        "this is no Python",
        "import nothing_of_that_name",
    ],
)
def test_it_ends_as_a_process_of_its_own(folder: Checkout, text: str) -> None:
    forked, own = run_both(folder, script(folder, text))
    assert forked == own


def test_a_missing_script_is_told_by_python_itself(folder: Checkout) -> None:
    forked, own = run_both(folder, "scripts/none.py")
    assert forked[0] == own[0] == 2
    assert forked[2].partition(": ")[2] == own[2].partition(": ")[2]


WAITS = """\
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 5), (signal.SIGKILL, -9), (signal.SIGHUP, -1)])
def test_a_signal_to_it_reaches_the_child_and_none_outlives_it(folder: Checkout, number: int, code: int) -> None:
    folder.run("python3", script(folder, "pass"))  # starts the process that forks, if none has
    file = script(folder, WAITS)
    command = [str(preloaded.folder / "python3"), file]
    with subprocess.Popen(command, cwd=folder.root, env=folder.environment, stdout=subprocess.PIPE) as client:
        assert client.stdout
        child = int(client.stdout.readline())
        assert child != client.pid
        os.kill(client.pid, number)
        assert client.wait(10) == code
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not psutil.pid_exists(child)
