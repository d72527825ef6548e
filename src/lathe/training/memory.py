"""Memory of a training given back to the system."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def given_back() -> Iterator[None]:
    """When what it is put around ends, free what only cycles hold, and return what torch keeps of a GPU's memory."""
    try:
        yield
    finally:
        _give_back()


def _give_back() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
