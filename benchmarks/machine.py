"""The machine that a figure was seen on."""

import os
import platform
from pathlib import Path


def describe() -> str:
    """Return processor, cores, memory, Python and the load of the last minute in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return f"{processor}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}, load {load:.1f}"
