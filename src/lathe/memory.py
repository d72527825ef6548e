"""What is said when memory runs out in training, and memory that is given back."""

import ctypes
import gc
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lathe import track
from lathe.errors import InputError
from lathe.params import Params

MMAP_THRESHOLD_BYTES = 256 * 1024


def return_what_is_freed() -> None:
    """Have glibc's malloc hand freed blocks back to the system at once, those of 256 kB and more.

    By itself it raises that bound to 32 MB with the first tensor of that size that is freed, and from then on keeps a
    heap full of holes: training on the CPU then takes 1.4 to 2.2 times the memory of its tensors.
    """
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3  # M_MMAP_THRESHOLD of mallopt(3)
        ctypes.CDLL(None).mallopt(mmap_threshold, MMAP_THRESHOLD_BYTES)


@contextmanager
def explained(base: Path, params: Params) -> Iterator[None]:
    """Turn running out of memory in a training of `base` into InputError: what was used, what to change."""
    used, cause = 0, ""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        used = track.peak_gpu_memory_bytes() or track.peak_memory_bytes()
        cause = "the GPU" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    if cause:  # here, where the traceback no longer holds the tensors
        give_back()
        raise InputError(_advice(base, params, used, cause)) from None


def give_back() -> None:
    """Free what only cycles still hold, and return what torch keeps of a GPU's memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    # torch raises a RuntimeError of its own kind for a GPU, and a plain one for the CPU.
    known = ("DefaultCPUAllocator: can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(
        text in str(error) for text in known
    )


def _advice(base: Path, params: Params, used: int, where: str) -> str:
    from lathe.estimate import estimate_training_memory, explain, readable_bytes

    said = f"out of memory: training had used up to {readable_bytes(used)} and {where} gave no more"
    try:
        memory = estimate_training_memory(base, params.training, params.lora, params.quantization)
    except (MemoryError, InputError):  # too little is left to count with, or of an architecture that cannot be traced
        return f"{said}; lower training.per_device_train_batch_size or training.max_length"
    return f"{said}; of the estimate for rows of {params.training.max_length} tokens {explain(memory, params.training, params.quantization)}"
