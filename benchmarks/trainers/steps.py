"""What happened at each step of a training, seen the same way in every trainer that is built on transformers."""

import hashlib
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, trainer

FILLER = 0  # id of what fills a row up where no mask of attention says so; no row holds it


def record(file: Path) -> None:
    """Have the steps of the training that follows recorded, and written to `file` when it ends.

    The recorder is made one of the callbacks that every Trainer of transformers starts with, so that no trainer is
    changed for it. It reads each batch as the trainer's own collator has made it.
    """
    trainer.DEFAULT_CALLBACKS.append(_Recorder(file))


class _Recorder(TrainerCallback):
    def __init__(self, file: Path) -> None:
        self.file = file
        self.steps: list[dict[str, Any]] = []
        self.batch: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        loader = train_dataloader.base_dataloader  # accelerate's wraps torch's
        collate = loader.collate_fn

        def observed(examples: list[dict[str, Any]]) -> Any:
            batch = collate(examples)
            self.batch = _contents(batch)
            return batch

        loader.collate_fn = observed

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append({"ended": time.time(), "processor_seconds": time.process_time(), **self.batch})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.steps[-1]["loss"] = float(logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        on_gpu = torch.cuda.is_available()
        # Linux counts the resident set in KiB.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_reserved() if on_gpu else resident
        allocated = torch.cuda.max_memory_allocated() if on_gpu else 0
        measured = {"steps": self.steps, "peak_bytes": peak, "allocated_bytes": allocated}
        self.file.write_text(json.dumps(measured), encoding="utf-8")


def _contents(batch: Any) -> dict[str, Any]:
    """Count a batch's tokens, padding aside, and name what it holds, in whatever order and form."""
    input_ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    is_token = mask.bool() if mask is not None and mask.shape == input_ids.shape else input_ids != FILLER
    tokens = sorted(input_ids[is_token].tolist())
    supervised = sorted(labels[labels != -100].tolist())
    digest = hashlib.sha256(repr((tokens, supervised)).encode()).hexdigest()
    return {"tokens": len(tokens), "supervised_tokens": len(supervised), "digest": digest}
