"""Memory that a training has used, released to the system."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def release_memory_afterwards() -> Iterator[None]:
    """Release memory when the block, or the function that this decorates, ends."""
    try:
        yield
    finally:
        release_memory()


def release_memory() -> None:
    """Free objects that only reference cycles hold, and the GPU memory that torch keeps cached."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
