"""Train under a limit of memory that the batch does not fit into, as stages/train.py does."""

import re
import resource
import sys
import tempfile
from pathlib import Path

from toy import load_toy

from lathe.common import entry_point
from lathe.common.jsonl import write_jsonl
from lathe.config import params, training_params
from lathe.config.base import get_number
from lathe.needs import out_of_memory
from lathe.training.train import train

ROW = {"messages": [{"role": "user", "content": "lamp " * 250}, {"role": "assistant", "content": "on " * 75}]}
ALLOWED_BYTES = 400_000_000


def main(base: Path) -> None:
    chosen = load_toy().params
    few = chosen.model_copy(update={"training": _training(chosen, per_device_train_batch_size=1)})
    _train(base, few)  # what is loaded once is there
    size = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert size
    limit = 1024 * int(size[1]) + ALLOWED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    many = chosen.model_copy(update={"training": _training(chosen, per_device_train_batch_size=512)})
    with out_of_memory.explain_out_of_memory(base, many):
        _train(base, many)


def _training(chosen: params.Params, **changes: int) -> training_params.Training:
    return chosen.training.model_copy(update={"max_steps": 1, "eval_steps": 100, **changes})


def _train(base: Path, chosen: params.Params) -> None:
    rows = get_number(chosen.training.per_device_train_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter").mkdir()
        files = {split: Path(folder) / f"{split}.jsonl" for split in ("train", "validation")}
        write_jsonl([ROW] * rows, files["train"])
        write_jsonl([ROW], files["validation"])
        train(
            base,
            files,
            Path(folder) / "adapter",
            Path(folder) / "metrics",
            params=chosen,
        )


if __name__ == "__main__":
    entry_point.guard(lambda: main(Path(sys.argv[1])))
