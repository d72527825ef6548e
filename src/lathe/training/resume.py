"""A trainer that goes on where an interrupted run of the same training stopped, bit for bit on the CPU."""

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
from lathe.training.best_weights import Best
from lathe.training.checkpoints import RESULT, Checkpoints, step_of
from lathe.training.sharding import state_to_save

logger = logging.getLogger(__name__)

# What transformers does not keep: loss and measures since the last point of the curves, and the tokens counted.
UNLOGGED = "unlogged.json"


class ResumableTrainer(Trainer):
    """What a TRL trainer gets from us: checkpoints that are whole or absent, signals heeded, the best weights kept.

    To be named before TRL's class among the bases of a trainer. Nothing in a checkpoint is read with pickle:
    transformers writes optimizer, scheduler and random states with torch.save and reads them with `weights_only`.
    """

    def __init__(self, *, checkpoints: Checkpoints | None, save_steps: int, best: Best, **arguments: Any) -> None:
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
        self.add_callback(_Saver(self, save_steps))
        self.add_callback(_Judge(self))

    def train_to_the_end(self) -> None:
        """Train, from the newest checkpoint if there is one, and evaluate what came out.

        Raises Interrupted after SIGINT or SIGTERM, when the step at hand is done and saved.
        """
        checkpoint = None
        if self.checkpoints:
            if result := self.checkpoints.result():
                self._take_result(result)
                return
            checkpoint = self.checkpoints.newest()
            if checkpoint:
                logger.info("going on after step %d, where an earlier run was interrupted", step_of(checkpoint))
            with self._signals_noted(self.checkpoints):
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if self.signal:
                self._stop(self.checkpoints)
        else:
            self.train()
        if not _evaluated_last(self.state):
            self.evaluate()
        self.best.put_back(self.model, self.state)

    def keep_result(self) -> None:
        """Keep the weights and curves of a phase that is done, for a run that is interrupted in the next one."""
        if self.checkpoints is None or self.checkpoints.result():
            return
        with self.checkpoints.saving() as folder:
            self._save(str(folder / RESULT))
            if launch.is_main():
                self.state.save_to_json(str(folder / RESULT / TRAINER_STATE_NAME))

    def _take_result(self, result: Path) -> None:
        logger.info("this phase was done before: going on behind it")
        super()._load_from_checkpoint(str(result))
        self.state = TrainerState.load_from_json(str(result / TRAINER_STATE_NAME))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    @contextmanager
    def _signals_noted(self, checkpoints: Checkpoints) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, _: Any) -> None:
            operating_system.outlive_parent()
            self.note_signal(number, checkpoints)
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note_signal(self, number: int, checkpoints: Checkpoints) -> None:
        """Stop after the step at hand."""
        self.signal = number
        checkpoints.announce_stop()
        logger.warning("stopping after this step; once more: at once")

    def heed_signal(self) -> bool:
        """Tell whether to stop after this step. Signals reach processes at different moments; here they agree."""
        if self.checkpoints is None:
            return False
        agreed = distributed.largest(self.signal or 0)
        if agreed and not self.signal:
            self.note_signal(agreed, self.checkpoints)
        return bool(agreed)

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
            self._save_own(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained, and nothing of the rest; transformers would gather a sharded base for it."""
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # What is trained alone: transformers would add the tokenizer, and its arguments as a pickle.
        assert output_dir
        state_dict = state_to_save(self.model)
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

    def _save_own(self, checkpoint: Path) -> None:
        """Add to a checkpoint what transformers does not keep."""
        unlogged = {
            "loss": distributed.gathered(self._tr_loss.item()),  # these by rank
            "tokens": distributed.gathered(self.trained_tokens),
            "supervised_tokens": distributed.gathered(self.trained_supervised_tokens),
            "measures": distributed.gathered(dict(self._metrics["train"])),  # TRL's
            "since": self._globalstep_last_logged,
        }
        if launch.is_main():
            (checkpoint / UNLOGGED).write_text(json.dumps(unlogged), encoding="utf-8")
            self.best.save(checkpoint)

    def _load_own(self, checkpoint: Path) -> None:
        """Take from a checkpoint what `_save_own` added."""
        self.unlogged = json.loads((checkpoint / UNLOGGED).read_text(encoding="utf-8"))
        self.trained_tokens = self.unlogged["tokens"][distributed.own()]
        self.trained_supervised_tokens = self.unlogged["supervised_tokens"][distributed.own()]
        self.best.load(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_own(Path(resume_from_checkpoint))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what is given, and beside the loss of steps the tokens that they were trained on."""
        if "loss" in logs:
            logs = {**logs, "num_tokens": distributed.total([self.trained_tokens])[0]}
        super().log(logs, start_time)

    def restore_unlogged(self) -> None:
        """Give the next point of the curves the steps before the checkpoint that belong to it."""
        self._tr_loss: torch.Tensor = torch.tensor(self.unlogged["loss"][distributed.own()], device=self.args.device)
        self._globalstep_last_logged = self.unlogged["since"]
        self._metrics["train"].update(self.unlogged["measures"][distributed.own()])


class _Saver(TrainerCallback):
    """Decides after which steps a checkpoint is written."""

    def __init__(self, trainer: ResumableTrainer, save_steps: int) -> None:
        self.trainer = trainer
        self.save_steps = save_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.unlogged:
            self.trainer.restore_unlogged()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.checkpoints and state.global_step % self.save_steps == 0:
            control.should_save = True
        self._heed_signal(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._heed_signal(state, control)  # one that came during a long evaluation

    def _heed_signal(self, state: Any, control: Any) -> None:
        if self.trainer.heed_signal():
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_save = False  # transformers would go on from there with a step too many


class _Judge(TrainerCallback):
    """Lets the best weights be noted after each evaluation, and stops where they have not been beaten for long."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = self.trainer.best
        best.note(self.trainer.model, state)
        if best.out_of_patience(state) and state.global_step < state.max_steps:
            logger.info("stopping early at step %d: %s", state.global_step, best.said(state))
            control.should_training_stop = True
            control.should_save = False  # transformers would go on from there with a step too many


def _evaluated_last(state: Any) -> bool:
    return any(
        entry["step"] == state.global_step and any(name.startswith("eval_") for name in entry)
        for entry in state.log_history
    )
