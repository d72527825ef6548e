"""Memory of a training: kept between its steps, released to the system at its end."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lathe.common import operating_system


@contextmanager
def keep_memory_until_the_end() -> Iterator[None]:
    """Keep freed memory while the block, or the function that this decorates, runs, and release it when it ends."""
    operating_system.keep_freed_memory()
    try:
        yield
    finally:
        release_memory()
        operating_system.return_freed_memory()


def release_memory() -> None:
    """Free objects that only reference cycles hold, and the GPU memory that torch keeps cached."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
