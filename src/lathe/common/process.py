"""The life of a process: whether it ends with its parent."""

import ctypes
import signal
import sys


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
