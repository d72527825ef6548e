"""Resume: a trainer that continues an interrupted run of the same training, bit for bit on the CPU."""

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file, save_model
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from lathe.common import launch, operating_system
from lathe.common.errors import Interrupted
from lathe.training import distributed
from lathe.training.best_weights import BestWeights
from lathe.training.checkpoints import RESULT, Checkpoints, get_step
from lathe.training.sharding import get_state_to_save

logger = logging.getLogger(__name__)

# Not in transformers' checkpoints: loss and measures since the last point of the curves, and the tokens counted.
UNLOGGED = "unlogged.json"


class ResumableTrainer(Trainer):
    """Adds to a TRL trainer: checkpoints that are complete or absent, a stop at a signal, and the best weights.

    Among the bases of a trainer it goes before TRL's class. Nothing in a checkpoint is read with pickle: transformers
    writes optimizer, scheduler and random states with torch.save and reads them with `weights_only`.
    """

    def __init__(
        self, *, checkpoints: Checkpoints | None, save_steps: int, best: BestWeights, **arguments: Any
    ) -> None:
        trained = [(weight, weight.data) for weight in arguments["model"].parameters() if weight.requires_grad]
        super().__init__(**arguments)
        for weight, exact in trained:  # TRL casts a 4-bit model's adapter to bf16, which rounds small updates away
            weight.data = exact.float()
        self.checkpoints = checkpoints
        self.best = best
        self.unlogged: dict[str, Any] = {}
        self.signal: int | None = None
        self.trained_tokens = 0  # without padding, since the first step
        self.trained_supervised_tokens = 0
        self.add_callback(_CheckpointCallback(self, save_steps))
        self.add_callback(_BestWeightsCallback(self))

    def train_to_end(self) -> None:
        """Train, from the newest checkpoint if there is one, and evaluate the last step.

        Raises Interrupted after SIGINT or SIGTERM, when the current step is done and saved.
        """
        checkpoint = None
        if self.checkpoints:
            if result := self.checkpoints.find_result():
                self._load_result(result)
                return
            checkpoint = self.checkpoints.find_newest()
            if checkpoint:
                logger.info("going on after step %d, where an earlier run was interrupted", get_step(checkpoint))
                if launch.get_zero_stage():  # whose engine reads its own part alone
                    self._load_extra_state(checkpoint)
            with self._catch_signals(self.checkpoints):
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if self.signal:
                self._raise_interrupted(self.checkpoints)
        else:
            self.train()
        if not _has_evaluated_last_step(self.state):
            self.evaluate()
        self.best.restore(self.model, self.state)

    def save_result(self) -> None:
        """Save weights and curves of a finished phase, for a run that is interrupted in the next phase."""
        if self.checkpoints is None or self.checkpoints.find_result():
            return
        with self.checkpoints.open_partial() as folder:
            self._save(str(folder / RESULT))
            if launch.is_main():
                self.state.save_to_json(str(folder / RESULT / TRAINER_STATE_NAME))

    def _load_result(self, result: Path) -> None:
        logger.info("this phase was done before: going on behind it")
        super()._load_from_checkpoint(str(result))
        self.state = TrainerState.load_from_json(str(result / TRAINER_STATE_NAME))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    @contextmanager
    def _catch_signals(self, checkpoints: Checkpoints) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def restore_handlers() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def handle(number: int, _: Any) -> None:
            operating_system.outlive_parent()  # saving must not be stopped by the parent's end
            self.request_stop(number, checkpoints)
            restore_handlers()  # a second signal stops at once

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            restore_handlers()

    def request_stop(self, number: int, checkpoints: Checkpoints) -> None:
        """Stop after the current step."""
        self.signal = number
        checkpoints.announce_stop()
        logger.warning("stopping after this step; once more: at once")

    def should_stop(self) -> bool:
        """Tell whether to stop after this step. Processes agree, though signals reach them at different moments."""
        if self.checkpoints is None:
            return False
        number = distributed.reduce_max(self.signal or 0)
        if number and not self.signal:
            self.request_stop(number, self.checkpoints)
        return bool(number)

    def _raise_interrupted(self, checkpoints: Checkpoints) -> None:
        newest = checkpoints.find_newest()
        where = f"after step {get_step(newest)}" if newest else "from the beginning"
        raise Interrupted(
            f"interrupted at step {self.state.global_step} of {self.state.max_steps}; run the same command again "
            f"(`dvc repro`, say) to go on {where}",
            self.signal or signal.SIGINT,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.checkpoints
        output_dir = self.args.output_dir
        with self.checkpoints.open_partial() as folder:
            self.args.output_dir = str(folder)
            try:
                Trainer._save_checkpoint(self, model, trial)  # TRL's adds a model card
            finally:
                self.args.output_dir = output_dir
            self._save_extra_state(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights only; transformers would gather a sharded base too."""
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Trained weights only: transformers would add the tokenizer, and its arguments as a pickle.
        assert output_dir
        state_dict = get_state_to_save(self.model)
        if not launch.is_main():
            return
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(
                output_dir, state_dict=state_dict, save_embedding_layers=False, selected_adapters=["default"]
            )
        else:
            Path(output_dir).mkdir(exist_ok=True)
            file = str(Path(output_dir) / SAFE_WEIGHTS_NAME)
            if state_dict is None:
                save_model(self.model, file)  # a tied weight once
            else:
                save_file(state_dict, file)

    def _save_extra_state(self, checkpoint: Path) -> None:
        """Add to a checkpoint what transformers does not keep."""
        unlogged = {
            "loss": distributed.gather(self._tr_loss.item()),  # by rank, as the next three
            "tokens": distributed.gather(self.trained_tokens),
            "supervised_tokens": distributed.gather(self.trained_supervised_tokens),
            "measures": distributed.gather(dict(self._metrics["train"])),  # TRL's
            "since": self._globalstep_last_logged,
        }
        if launch.is_main():
            (checkpoint / UNLOGGED).write_text(json.dumps(unlogged), encoding="utf-8")
            self.best.save(checkpoint)

    def _load_extra_state(self, checkpoint: Path) -> None:
        """Read from a checkpoint what `_save_extra_state` added."""
        self.unlogged = json.loads((checkpoint / UNLOGGED).read_text(encoding="utf-8"))
        self.trained_tokens = self.unlogged["tokens"][distributed.get_rank()]
        self.trained_supervised_tokens = self.unlogged["supervised_tokens"][distributed.get_rank()]
        self.best.load(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_extra_state(Path(resume_from_checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the values, and with the loss of steps the number of tokens trained on so far."""
        if "loss" in logs:
            logs = {**logs, "num_tokens": distributed.reduce_sum([self.trained_tokens])[0]}
        super().log(logs, start_time)

    def restore_unlogged(self) -> None:
        """Restore the steps before the checkpoint that belong to the next point of the curves."""
        rank = distributed.get_rank()
        self._tr_loss: torch.Tensor = torch.tensor(self.unlogged["loss"][rank], device=self.args.device)
        self._globalstep_last_logged = self.unlogged["since"]
        self._metrics["train"].update(self.unlogged["measures"][rank])


class _CheckpointCallback(TrainerCallback):
    """Saves a checkpoint every `save_steps`, and when the training is to stop."""

    def __init__(self, trainer: ResumableTrainer, save_steps: int) -> None:
        self.trainer = trainer
        self.save_steps = save_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.unlogged:
            self.trainer.restore_unlogged()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.checkpoints and state.global_step % self.save_steps == 0:
            control.should_save = True
        self._stop_if_asked(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop_if_asked(state, control)  # a signal may come during a long evaluation

    def _stop_if_asked(self, state: Any, control: Any) -> None:
        if self.trainer.should_stop():
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_save = False  # resumed from there, transformers would train a step too many


class _BestWeightsCallback(TrainerCallback):
    """Keeps the best weights after each evaluation, and stops early when `early_stopping_patience` is over."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = self.trainer.best
        best.keep_if_best(self.trainer.model, state)
        if best.is_out_of_patience(state) and state.global_step < state.max_steps:
            logger.info("stopping early at step %d: %s", state.global_step, best.describe(state))
            control.should_training_stop = True
            control.should_save = False  # resumed from there, transformers would train a step too many


def _has_evaluated_last_step(state: Any) -> bool:
    return any(
        entry["step"] == state.global_step and any(name.startswith("eval_") for name in entry)
        for entry in state.log_history
    )
