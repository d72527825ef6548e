"""The operating system: locks, processes that end with their parent, and what takes their place off Linux."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lathe.common import operating_system, paths
from lathe.common.scratch import acquire_lock

SOURCE = paths.ROOT / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}

# What a process begins with that has neither fcntl nor resource, is not on Linux, and finds no /proc.
ELSEWHERE = """
import sys
import psutil  # knows its platforms
sys.modules["fcntl"] = sys.modules["resource"] = None
import os, time
from pathlib import Path
from lathe.common import operating_system
from lathe.config.load import load
load()
sys.platform = "elsewhere"
operating_system.PROC = Path("/none")
"""


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=60)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("file", sorted([*SOURCE.rglob("*.py"), *(paths.ROOT / "stages").glob("*.py")]), ids=str)
def test_no_other_module_knows_the_operating_system(file):
    if file.name == "operating_system.py":
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"fcntl", "resource", "msvcrt", "pwd", "grp", "termios"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/proc", "/sys/")), node.value
        elif isinstance(node, ast.Attribute):
            assert node.attr not in {"prctl", "sched_getaffinity", "nice", "sysconf", "preexec_fn"}
        elif isinstance(node, ast.keyword):
            assert node.arg != "preexec_fn"


def test_the_configuration_loads_and_a_lock_is_exclusive_without_fcntl(tmp_path):
    program = (
        ELSEWHERE
        + "from lathe.common.scratch import acquire_lock\n"
        + "file = Path(sys.argv[1])\n"
        + "with acquire_lock(file) as held:\n"
        + "    held.write(b'note'); held.flush()\n"
        + "    again = ELSEWHERE + 'from lathe.common.scratch import acquire_lock\\n'\n"
        + "    again += 'print(acquire_lock(Path(sys.argv[1])))'\n"
        + "    import subprocess\n"
        + "    print(subprocess.run([sys.executable, '-c', again, str(file)], capture_output=True, text=True).stdout)\n"
        + "    print(file.read_bytes().decode())\n"
        + "with acquire_lock(file) as held: print(held.name == str(file) or held.name == file)\n"
        + "with operating_system.open_locked(file, wait=True): print('waited')\n"
    )
    done = python(f"ELSEWHERE = {ELSEWHERE!r}\n{program}", str(tmp_path / "work.lock"))
    assert done.stdout.split() == ["None", "note", "True", "waited"]


def test_who_waits_for_a_lock_gets_it_when_the_holder_is_killed(tmp_path):
    file = tmp_path / "lock"
    program = "import sys, time; from pathlib import Path; from lathe.common import operating_system\n"
    program += "held = operating_system.open_locked(Path(sys.argv[1]), wait=True); print('held', flush=True)\n"
    program += "time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(file)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    assert acquire_lock(file) is None
    holder.kill()
    with operating_system.open_locked(file, wait=True) as mine:
        assert acquire_lock(file) is None
        assert mine.name == file or mine.name == str(file)
    holder.communicate()


# Begins a child that ends with it, says its number, and is to be killed.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
LINUX = "import time\nfrom lathe.common import operating_system\n"


@pytest.mark.parametrize("system", [LINUX, ELSEWHERE], ids=["linux", "elsewhere"])
@pytest.mark.parametrize("outlives", [False, True])
def test_a_process_ends_with_its_parent_unless_it_took_that_back(system, outlives):
    child = f"{system}\noperating_system.end_with_parent()\n"
    child += "operating_system.outlive_parent()\n" if outlives else ""
    child += "print(flush=True)\ntime.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, child], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    if outlives:
        time.sleep(5 * operating_system.PARENT_POLL_SECONDS)
        process = psutil.Process(pid)
        assert process.status() != psutil.STATUS_ZOMBIE
        process.kill()
    wait_until_gone(pid)


@pytest.mark.parametrize("system", [LINUX, ELSEWHERE], ids=["linux", "elsewhere"])
def test_a_program_ends_with_the_process_that_runs_it(system, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\nimport os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    program.chmod(0o755)
    runner = subprocess.Popen(
        [sys.executable, "-c", f"{system}\noperating_system.run_command([{str(program)!r}])"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert runner.stdout
    pid = int(runner.stdout.readline())
    runner.kill()
    runner.wait()
    wait_until_gone(pid)


@pytest.mark.parametrize("system", [LINUX, ELSEWHERE], ids=["linux", "elsewhere"])
def test_a_program_gives_its_output_and_exit_code_and_a_missing_one_an_error_of_the_system(system, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint('said')\nsys.exit(7)\n")
    program.chmod(0o755)
    plain = tmp_path / "plain"
    plain.write_text("no program")
    done = python(
        f"{system}\n"
        "import subprocess, sys\n"
        "done = operating_system.run_command([sys.argv[1]], stdout=subprocess.PIPE, text=True)\n"
        "print(done.returncode, done.stdout.strip())\n"
        "for path in sys.argv[2:]:\n"
        "    try: operating_system.run_command([path])\n"
        "    except OSError as error: print(type(error).__name__)\n",
        *(str(program), str(plain), str(tmp_path / "none")),
    )
    assert done.stdout.split() == ["7", "said", "PermissionError", "FileNotFoundError"]


@pytest.mark.parametrize("system", [LINUX, ELSEWHERE], ids=["linux", "elsewhere"])
def test_memory_cores_and_processes_are_known(system):
    done = python(
        f"{system}\n"
        "import os, subprocess, sys\n"
        "held = bytearray(50_000_000)\n"
        "print(operating_system.get_peak_memory_bytes() > len(held))\n"
        "print(operating_system.get_available_memory_bytes() > 0)\n"
        "print(operating_system.count_usable_cores() > 0, operating_system.is_running(os.getpid()))\n"
        "operating_system.lower_priority()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "start = operating_system.get_start_time(child.pid)\n"
        "print(start == operating_system.get_start_time(child.pid), isinstance(start, int))\n"
        "print(operating_system.identify_machine() == operating_system.identify_machine())\n"
        "child.communicate(b'\\n')\n"
        "print(operating_system.get_start_time(child.pid), operating_system.is_running(child.pid))\n"
    )
    assert done.stdout.split() == [*["True"] * 7, "None", "False"]


def test_free_memory_is_at_most_what_the_cgroup_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(operating_system, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert operating_system.get_available_memory_bytes() > 1000
    (tmp_path / "memory.max").write_text("1000\n")
    assert operating_system.get_available_memory_bytes() == 600


@pytest.mark.parametrize("script", sorted((paths.ROOT / "stages").glob("*.py")), ids=lambda script: script.stem)
def test_a_stage_gets_to_the_environment_from_an_old_python(script: Path):
    """`python3` of macOS is 3.9: it must read a script as far as `_path`, which goes on with the environment's."""
    ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 9))


KEEP_AND_RETURN = """
import ctypes, os, sys
from lathe.common import operating_system

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

malloc = ctypes.CDLL(None)
malloc.malloc.restype, malloc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def use(size: int = 1 << 20) -> int:  # bytes that stay after 128 MiB in such blocks were used and freed
    before = resident()
    blocks = [malloc.malloc(size) for _ in range((1 << 27) // size)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        malloc.free(block)
    return resident() - before

plain = use()
operating_system.keep_freed_memory()
kept = use()
again = use()
operating_system.return_freed_memory()
returned = use()
operating_system.keep_freed_memory()
print(plain, kept, again, returned, use(1 << 24))
"""


@pytest.mark.parametrize("tunable", [None, "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_"])
def test_freed_memory_is_kept_until_it_is_returned_unless_the_user_has_set_malloc(tunable, monkeypatch):
    if tunable:
        value = "262144" if tunable.startswith("MALLOC") else "glibc.malloc.mmap_threshold=262144"
        monkeypatch.setitem(ENVIRONMENT, tunable, value)
    plain, kept, again, returned, large = (int(count) for count in python(KEEP_AND_RETURN).stdout.split())
    used = 1 << 27
    assert plain < used / 4
    assert kept > used * 0.9 if tunable is None else kept < used / 4
    assert again < used / 4  # what was kept is used again
    assert returned < used / 4
    assert large < used / 4


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_pages_that_malloc_keeps_between_blocks_in_use_are_released_every_few_steps():
    """As in a training: blocks of one step lie between those that live on, and the heap's end is never free."""
    code = """
import ctypes
from types import SimpleNamespace
import psutil
from lathe.common import operating_system
from lathe.training.page_release import RELEASE_STEPS, PageRelease

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def allocate(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

def resident():
    return psutil.Process().memory_info().rss

operating_system.keep_freed_memory()
before = resident()
blocks = [(allocate(1 << 20), allocate(4096)) for _ in range(200)]
for large, _ in blocks:
    libc.free(large)
kept = resident() - before
release = PageRelease()
release.on_step_end(None, SimpleNamespace(global_step=RELEASE_STEPS - 1), None)
early = resident() - before
release.on_step_end(None, SimpleNamespace(global_step=RELEASE_STEPS), None)
print(kept, early, resident() - before)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment["PYTHONPATH"] = str(paths.ROOT / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    kept, early, released = map(int, done.stdout.split())
    assert kept > 180 << 20
    assert early > 180 << 20
    assert released < 40 << 20
