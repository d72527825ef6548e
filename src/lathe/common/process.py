"""The life of a process: whether it ends with its parent, and how much memory it may still take."""

import ctypes
import os
import re
import signal
import sys
from pathlib import Path


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent is gone: a killed `dvc repro` leaves nothing running."""
    _ask_for_signal(signal.SIGTERM)


def outlive_parent() -> None:
    """Take that back: of a parent with threads each one's end is a signal, and the second may come too soon."""
    _ask_for_signal(0)


def _ask_for_signal(number: int) -> None:
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)


def free_memory_bytes(libraries_bytes: int) -> int:
    """Return what a training may still take: of the GPU if torch sees one, else of the memory and of the cgroup.

    Of the machine's memory, `libraries_bytes` are kept for what the process loads before it holds a model.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(0)[0]
    try:
        [kilobytes] = re.findall(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = 1024 * int(kilobytes)
    except FileNotFoundError:  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free - libraries_bytes)
