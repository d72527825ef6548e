"""What the processes of one training settle between them; each of these must be called by all of them.

In one process they do nothing. accelerate and torch do the talking, over NCCL between GPUs and gloo between CPUs.
"""

from typing import Any

from lathe.common import launch


def join() -> None:
    """Meet the other processes, and take this one's GPU; before anything is put on a device."""
    if launch.is_worker():
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Part in good order, when all is done."""
    if launch.is_worker():
        _state().wait_for_everyone()
        _state().destroy_process_group()


def count() -> int:
    """Return how many processes train together."""
    return int(_state().num_processes) if launch.is_worker() else 1


def own() -> int:
    """Return which of them this one is, from 0."""
    return int(_state().process_index) if launch.is_worker() else 0


def wait() -> None:
    """Wait until all are here."""
    if launch.is_worker():
        _state().wait_for_everyone()


def largest(value: int) -> int:
    """Return the largest value that any of them gives."""
    return max(_reduced([value], "MAX"))


def total(values: list[int]) -> list[int]:
    """Return for each value its sum over all of them."""
    return _reduced(values, "SUM")


def gathered(value: Any) -> list[Any]:
    """Return what each of them gives, by rank."""
    if not launch.is_worker():
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def from_main(value: Any) -> Any:
    """Return what rank 0 gives."""
    if not launch.is_worker():
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _reduced(values: list[int], operation: str) -> list[int]:
    if not launch.is_worker():
        return values
    import torch

    agreed = torch.tensor(values, device=_state().device)
    torch.distributed.all_reduce(agreed, getattr(torch.distributed.ReduceOp, operation))
    return [int(value) for value in agreed.tolist()]


def _state() -> Any:
    from accelerate import PartialState

    return PartialState()
