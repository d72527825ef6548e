"""Pages of freed memory, released to the system now and then during a training."""

from typing import Any

from transformers import TrainerCallback

from lathe.common import operating_system

RELEASE_STEPS = 25


class PageRelease(TrainerCallback):
    """Gives pages that malloc keeps and does not use back to the system every RELEASE_STEPS steps.

    Batches of many lengths leave holes of many sizes between the blocks that live on, in which the next tensors do not
    fit: the heap would grow from step to step.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Release, if it is time."""
        if state.global_step % RELEASE_STEPS == 0:
            operating_system.release_freed_pages()
