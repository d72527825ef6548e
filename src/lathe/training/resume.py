"""A trainer that goes on where an interrupted run of the same training stopped, bit for bit on the CPU."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from lathe.errors import Interrupted
from lathe.training.checkpoints import Checkpoints, step_of

logger = logging.getLogger(__name__)

# What transformers does not keep: the loss since the last point of the curve.
UNLOGGED = "unlogged_loss.json"


class ResumableTrainer(SFTTrainer):
    """TRL's trainer with checkpoints that are whole or absent; nothing in them is read with pickle.

    transformers writes optimizer, scheduler and random states with torch.save and reads them with `weights_only`.
    """

    def __init__(self, *, checkpoints: Checkpoints | None, save_steps: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.checkpoints = checkpoints
        self.unlogged: dict[str, Any] = {}
        self.signal: int | None = None
        if checkpoints:
            self.add_callback(_Saver(self, save_steps))

    def train_to_the_end(self) -> None:
        """Train, from the newest checkpoint if there is one.

        Raises Interrupted after SIGINT or SIGTERM, when the step at hand is done and saved.
        """
        if self.checkpoints is None:
            self.train()
            return
        checkpoint = self.checkpoints.newest()
        if checkpoint:
            logger.info("going on after step %d, where an earlier run was interrupted", step_of(checkpoint))
        with self._signals_noted(self.checkpoints):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.signal:
            self._stop(self.checkpoints)

    @contextmanager
    def _signals_noted(self, checkpoints: Checkpoints) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _: Any) -> None:
            self.signal = number
            checkpoints.announce_stop()
            logger.warning("stopping after this step; once more: at once")
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, checkpoints: Checkpoints) -> None:
        newest = checkpoints.newest()
        where = f"after step {step_of(newest)}" if newest else "from the beginning"
        raise Interrupted(
            f"interrupted at step {self.state.global_step} of {self.state.max_steps}; run the same command again "
            f"(`dvc repro`, say) to go on {where}",
            self.signal or signal.SIGINT,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.checkpoints
        usual = self.args.output_dir
        with self.checkpoints.saving() as folder:
            self.args.output_dir = str(folder)
            try:
                Trainer._save_checkpoint(self, model, trial)  # TRL's adds a model card
            finally:
                self.args.output_dir = usual
            unlogged = {"loss": self._tr_loss.item(), "since": self._globalstep_last_logged}
            [written] = folder.iterdir()
            (written / UNLOGGED).write_text(json.dumps(unlogged), encoding="utf-8")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The adapter alone: transformers would add the tokenizer, and its arguments as a pickle.
        self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.unlogged = json.loads((Path(resume_from_checkpoint) / UNLOGGED).read_text(encoding="utf-8"))

    def restore_unlogged_loss(self) -> None:
        """Give the next point of the loss curve the steps before the checkpoint that belong to it."""
        self._tr_loss: torch.Tensor = torch.tensor(self.unlogged["loss"], device=self.args.device)
        self._globalstep_last_logged = self.unlogged["since"]


class _Saver(TrainerCallback):
    """Decides after which steps a checkpoint is written."""

    def __init__(self, trainer: ResumableTrainer, save_steps: int) -> None:
        self.trainer = trainer
        self.save_steps = save_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.trainer.restore_unlogged_loss()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.save_steps == 0:
            control.should_save = True
        self._heed_signal(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._heed_signal(state, control)  # one that came during a long evaluation

    def _heed_signal(self, state: Any, control: Any) -> None:
        if self.trainer.signal:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_save = False  # transformers would go on from there with a step too many
