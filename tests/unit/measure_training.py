"""Train in this process and print, for each case, how far the resident size rose and what was estimated."""

import gc
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from toy import load_toy

from lathe.common.jsonl import write_jsonl
from lathe.config import params
from lathe.config.base import get_number
from lathe.models.loss_mask import encode
from lathe.models.tokenizer import load_tokenizer
from lathe.needs.estimate import estimate_training_memory
from lathe.training.train import train

ROW = {
    "messages": [
        {"role": "user", "content": "lamp " * 250},
        {"role": "assistant", "content": "on " * 75},
    ]
}
QUICK = {
    "max_steps": 2,
    "eval_steps": 100,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-4,
    "precision": "bf16",
}


def main(small_model: Path, cases: dict[str, Any]) -> None:
    [row] = encode(load_tokenizer(small_model), [ROW["messages"]], supervise="all")
    run(small_model, sections({}))  # what is loaded and set up once is no part of a training
    results = {}
    for name, case in cases.items():
        chosen = sections(case)
        expected = estimate_training_memory(
            Path(case["model"]), chosen, length=len(row.input_ids), supervised_tokens=sum(row.supervised)
        ).total
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        run(Path(case["model"]), chosen)
        results[name] = resident("VmHWM") - before, expected
    print(json.dumps(results))


def sections(case: dict[str, Any]) -> params.Params:
    base = load_toy().params
    return base.model_copy(
        update={
            "seed": 1,
            "training": base.training.model_copy(update={**QUICK, **case.get("training", {})}),
            "lora": base.lora.model_copy(update=case.get("lora", {})),
            "quantization": base.quantization.model_copy(update=case.get("quantization", {"load_in_4bit": False})),
        }
    )


def run(model: Path, chosen: params.Params) -> None:
    training = chosen.training
    rows = get_number(training.per_device_train_batch_size) * (training.max_steps or 1)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        adapter.mkdir()
        files = {split: Path(folder) / f"{split}.jsonl" for split in ("train", "validation")}
        write_jsonl([ROW] * rows, files["train"])
        write_jsonl([ROW] * get_number(training.per_device_eval_batch_size), files["validation"])
        train(model, files, adapter, Path(folder) / "metrics", params=chosen)


def resident(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
