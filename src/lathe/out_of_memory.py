"""What is said when memory runs out in training, and memory that is given back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lathe.common import metric_files, operating_system
from lathe.common.errors import InputError
from lathe.config.params import Params
from lathe.training.memory import _give_back

# How torch says so on the CPU, in a plain RuntimeError: its allocator, C++ beneath it, and oneDNN.
CPU_MESSAGES = ("DefaultCPUAllocator", "std::bad_alloc", "could not create a memory object")


@contextmanager
def explained(base: Path, params: Params) -> Iterator[None]:
    """Turn running out of memory in a training of `base` into InputError: what was used, what to change.

    Where Linux itself ends the process to free memory nothing can be said; the next run goes on from a checkpoint.
    """
    ran_out = None
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's
        if not (on_gpu or isinstance(error, MemoryError) or any(text in str(error) for text in CPU_MESSAGES)):
            raise
        ran_out = "the GPU" if on_gpu else "this machine"
    if ran_out:  # said here, where no traceback holds the tensors any more
        used = metric_files.get_peak_gpu_memory_bytes() or operating_system.get_peak_memory_bytes()
        _give_back()
        raise InputError(_advice(base, params, ran_out, used))


def _advice(base: Path, params: Params, where: str, used: int) -> str:
    from lathe.common.text import readable_bytes
    from lathe.estimate import estimate_training_memory, explain

    said = f"out of memory: {where} had no more when training used {readable_bytes(used)}"
    try:
        memory = estimate_training_memory(base, params)
    except (MemoryError, InputError):  # too little is left to count in, or of an architecture that cannot be traced
        return f"{said}; lower training.per_device_train_batch_size or training.max_length"
    needed = (
        f"rows of {params.training.max_length} tokens take {readable_bytes(memory.total)} beside the process itself"
    )
    return f"{said}; {needed}; {explain(memory, params.training, params.quantization)}"
