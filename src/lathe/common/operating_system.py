"""Operating system: file locks, processes that end with their parent, memory and cores, with fallbacks off Linux.

No other module imports fcntl or resource, calls prctl, or reads /proc. Tests run on Linux. macOS has no prctl and no
/proc; a system without fcntl gets locks from `filelock`. As a program, `python operating_system.py COMMAND` runs a
command that ends with its parent; so nothing of Lathe is imported here.
"""

import ctypes
import importlib
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
PR_SET_PDEATHSIG = 1  # of prctl(2)
PARENT_POLL_SECONDS = 0.2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# Blocks from this size on go back to the system when they are freed, as few of them fit where another was.
LARGE_BLOCK_BYTES = 1 << 23
TRIM_BYTES = 1 << 25

_stop_watching: threading.Event | None = None  # of the thread that watches the parent, where there is one


def open_locked(file: Path, *, wait: bool) -> BinaryIO | None:
    """Open a file at its end, made where there is none, under an exclusive lock; closing it gives the lock back.

    Returns None where another process holds the lock and `wait` is false. The lock ends with the process.
    """
    fcntl: Any = _import_or_none("fcntl")
    if fcntl is None:
        return _open_with_filelock(file, wait=wait)
    handle = file.open("a+b")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        handle.close()
        return None
    return handle


def unlock(handle: BinaryIO) -> None:
    """Give back the lock of `open_locked` though a copy of this process, which it forked, has the file open as well."""
    fcntl: Any = _import_or_none("fcntl")
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)


def end_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Let this process get a signal, SIGTERM, when its parent ends: a killed `dvc repro` leaves nothing running.

    On Linux the kernel sends it, elsewhere a thread that looks for the parent, and SIGTERM always.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
        return
    global _stop_watching
    if _stop_watching is None:
        _stop_watching = threading.Event()
        threading.Thread(target=_watch_parent, args=(os.getppid(), _stop_watching), daemon=True).start()


def outlive_parent() -> None:
    """Stop ending with the parent.

    Linux sends the signal when the thread ends that started this process, and again when the parent ends. A trainer
    that is saving after the first signal must not be stopped by the second.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)
        return
    global _stop_watching
    if _stop_watching is not None:
        _stop_watching.set()
        _stop_watching = None


def run_command(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program as `subprocess.run` does; it ends with this process, however that ends.

    Raises OSError where the program cannot be run.
    """
    if sys.platform == "linux":
        return subprocess.run(command, check=False, preexec_fn=end_with_parent, **options)
    program = Path(command[0])
    if not os.access(program, os.X_OK):  # the process between would answer with a traceback
        with program.open("rb"):  # raises why, if it cannot even be read
            raise PermissionError(f"{program} is not a program")
    return subprocess.run([sys.executable, __file__, *command], check=False, **options)


def start_command(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a program as `subprocess.Popen` does; it ends with this process, however that ends.

    On Linux it is killed when the thread ends that started it. Raises OSError where the program cannot be run.
    """
    if sys.platform == "linux":
        return subprocess.Popen(command, preexec_fn=_be_killed_with_parent, **options)
    return subprocess.Popen([sys.executable, __file__, *command], **options)


def end_children() -> None:
    """Send SIGTERM to the processes that this one has started, and wait until all have ended.

    Their exit codes stay to be asked for.
    """
    import psutil

    children = psutil.Process().children()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    while any(get_start_time(child.pid) is not None for child in children):
        time.sleep(PARENT_POLL_SECONDS / 4)


def leave_terminal() -> None:
    """Let what is printed from here on go nowhere instead of to a terminal: one that was closed refuses it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            # A closed terminal no longer says that it is one.
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def disable_core_dumps() -> None:
    """Leave no image of this process on the disk when it is aborted."""
    resource: Any = _import_or_none("resource")
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def get_peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far; the present one where no system call tells."""
    resource: Any = _import_or_none("resource")
    if resource is None:
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024


def get_total_memory_bytes() -> int:
    """Return the main memory of the machine, or of the cgroup that this process is in."""
    import psutil

    total, limit = int(psutil.virtual_memory().total), CGROUP / "memory.max"
    most = limit.read_text().strip() if limit.exists() else "max"
    return total if most == "max" else min(total, int(most))


def get_available_memory_bytes() -> int:
    """Return the main memory that this process may still take: of the machine, and of its cgroup."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int(used.read_text()))
    return available


def keep_freed_memory() -> None:
    """Let malloc keep the blocks that this process frees, but for large ones, until `return_freed_memory` is called.

    glibc gives the end of its heap back to the system whenever it is free, and takes it again, page by page, for the
    next tensor. This does nothing off glibc, and where the environment sets malloc.
    """
    _set_malloc(trim_threshold=-1)


def return_freed_memory() -> None:
    """Let malloc give freed memory back to the system, now and from now on."""
    _set_malloc(trim_threshold=TRIM_BYTES)


def release_freed_pages() -> None:
    """Give the pages in which malloc keeps nothing but freed blocks back to the system, once.

    This does nothing off glibc, and where the environment sets malloc.
    """
    if (library := _find_malloc()) is not None:
        library.malloc_trim(0)


def count_usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def lower_priority() -> None:
    """Let every other process go first."""
    if hasattr(os, "nice"):
        os.nice(19)


def is_running(pid: int, *, started_by: float | None = None) -> bool:
    """Tell whether a process of that number exists; with `started_by` (seconds since 1970), one that did at that time.

    A process that has ended counts as none though its parent has not asked for its exit code.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if started_by is None:
            return True
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= started_by + 1
    except psutil.NoSuchProcess:
        return False


def identify_machine() -> str:
    """Return a name for this machine since it was started, and for this container's own numbering of processes."""
    try:
        # Containers may share name and kernel of their machine, and number their processes each from 1.
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        numbering = os.readlink(PROC / "self/ns/pid")
    except OSError:
        import psutil

        boot, numbering = str(int(psutil.boot_time())), sys.platform
    return f"{socket.gethostname()} {boot} {numbering}"


def get_start_time(pid: int) -> int | None:
    """Return when a process of this machine started, in the system's own unit; None where it has ended.

    With its number it names a process so that no later one has the same name.
    """
    if (PROC / "self/stat").exists():
        try:
            text = (PROC / str(pid) / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        after_name = text.rpartition(")")[2].split()  # the name may hold spaces
        return None if after_name[0] in "ZX" else int(after_name[19])
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time() * 100)
    except psutil.NoSuchProcess:
        return None


class _FilelockFile(io.FileIO):
    """A file that gives back the lock of `filelock` when it is closed."""

    lock: Any = None

    def close(self) -> None:
        super().close()
        if self.lock is not None:
            self.lock.release()


def _open_with_filelock(file: Path, *, wait: bool) -> BinaryIO | None:
    import filelock

    # Beside the file: on Windows the bytes of a locked file cannot be read, and holders leave notes there.
    lock = filelock.FileLock(f"{file}.held", thread_local=False)
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        return None
    handle = _FilelockFile(file, "a+b")
    handle.lock = lock
    return cast(BinaryIO, handle)


def _import_or_none(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _find_malloc() -> Any:
    """Return glibc, whose malloc can be told what to keep; None elsewhere, and where the environment tells it."""
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    is_set_by_user = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    return None if is_set_by_user or not hasattr(library, "gnu_get_libc_version") else library


def _set_malloc(*, trim_threshold: int) -> None:
    library = _find_malloc()
    if library is None:
        return
    library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
    library.mallopt(M_TRIM_THRESHOLD, trim_threshold)
    if trim_threshold >= 0:
        library.malloc_trim(0)


def _be_killed_with_parent() -> None:
    end_with_parent(signal.SIGKILL)


def _watch_parent(parent: int, stop: threading.Event) -> None:
    while not stop.wait(PARENT_POLL_SECONDS):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _run_until_parent_ends(command: Sequence[str]) -> int:
    parent = os.getppid()
    with subprocess.Popen(command) as process:
        while True:
            try:
                code = process.wait(PARENT_POLL_SECONDS)
                return code if code >= 0 else 128 - code
            except KeyboardInterrupt:  # the command has had it too
                return 128 + signal.SIGINT
            except subprocess.TimeoutExpired:
                if os.getppid() != parent:
                    process.terminate()


if __name__ == "__main__":
    sys.exit(_run_until_parent_ends(sys.argv[1:]))
