"""Folders that several tests use and none changes, made once per run, however many processes run the tests."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def folder_of_run(factory: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of this run, which all its processes share."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the base of a worker is a folder of its own in that of the run
        base = base.parent
    return base


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder `name` of this run; the first that asks for it calls `make` with its path, which is new."""
    base = folder_of_run(factory)
    folder, done = base / name, base / f".{name}.made"
    with FileLock(base / f".{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


def processor_seconds() -> float:
    """Return the processor time of this process and of the children it has waited for: busy neighbours add nothing."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
