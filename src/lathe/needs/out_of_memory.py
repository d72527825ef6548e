"""Out of memory: the message when a training runs out of it, with the estimate and what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lathe.common import metric_files, operating_system
from lathe.common.errors import InputError
from lathe.config.params import Params
from lathe.training.memory import release_memory

# In the RuntimeErrors for it on the CPU: by torch's allocator, by C++, by oneDNN.
CPU_MESSAGES = ("DefaultCPUAllocator", "std::bad_alloc", "could not create a memory object")


@contextmanager
def explain_out_of_memory(base: Path, params: Params) -> Iterator[None]:
    """Turn running out of memory in a training of `base` into InputError: what was used, what to change.

    If Linux kills the process there is no message; the next run resumes from a checkpoint.
    """
    ran_out = None
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's
        if not (on_gpu or isinstance(error, MemoryError) or any(text in str(error) for text in CPU_MESSAGES)):
            raise
        ran_out = "the GPU" if on_gpu else "this machine"
    if ran_out:  # here, where no traceback holds the tensors any more
        used = metric_files.get_peak_gpu_memory_bytes() or operating_system.get_peak_memory_bytes()
        release_memory()
        raise InputError(_advise(base, params, ran_out, used), code="out-of-memory")


def _advise(base: Path, params: Params, where: str, used: int) -> str:
    from lathe.common.text import readable_bytes
    from lathe.needs.estimate import estimate_training_memory, explain

    problem = f"out of memory: {where} had no more when training used {readable_bytes(used)}"
    try:
        memory = estimate_training_memory(base, params)
    except (MemoryError, InputError):  # too little is left, or the architecture cannot be traced
        return f"{problem}; lower training.per_device_train_batch_size or training.max_length"
    needed = (
        f"rows of {params.training.max_length} tokens take {readable_bytes(memory.total)} beside the process itself"
    )
    return f"{problem}; {needed}; {explain(memory, params.training, params.quantization)}"
