"""Processes of one training: rank, count, and collective operations between them.

Each function must be called by all processes; in a training of one process it does nothing. accelerate and torch
communicate over NCCL between GPUs and gloo between CPUs.
"""

from typing import Any

from lathe.common import launch


def join() -> None:
    """Join the process group, and select this process's GPU; before anything is put on a device."""
    if launch.is_worker():
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Leave the process group when all processes are done."""
    if launch.is_worker():
        _get_state().wait_for_everyone()
        _get_state().destroy_process_group()


def count_processes() -> int:
    """Return how many processes train together."""
    return int(_get_state().num_processes) if launch.is_worker() else 1


def get_rank() -> int:
    """Return the number of this process, from 0."""
    return int(_get_state().process_index) if launch.is_worker() else 0


def wait() -> None:
    """Wait until all processes have called this."""
    if launch.is_worker():
        _get_state().wait_for_everyone()


def reduce_max(value: int) -> int:
    """Return the largest value of all processes."""
    return max(_reduce([value], "MAX"))


def reduce_sum(values: list[int]) -> list[int]:
    """Return each value summed over all processes."""
    return _reduce(values, "SUM")


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if not launch.is_worker():
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def broadcast_from_main(value: Any) -> Any:
    """Return the value of rank 0."""
    if not launch.is_worker():
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _reduce(values: list[int], operation: str) -> list[int]:
    if not launch.is_worker():
        return values
    import torch

    reduced = torch.tensor(values, device=_get_state().device)
    torch.distributed.all_reduce(reduced, getattr(torch.distributed.ReduceOp, operation))
    return [int(value) for value in reduced.tolist()]


def _get_state() -> Any:
    from accelerate import PartialState

    return PartialState()
