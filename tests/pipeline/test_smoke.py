"""`lathe smoke` on a small checkout: every stage runs, the workspace stays as it is, failures are told as they are."""

import json
import re
import sys

import pytest
import yaml
from conftest import EMPTY_LISTS, Checkout, copy_of

from lathe.common.workspace_lock import hold_workspace

# What the copy may not be made of: files that Git does not know, and an edit that is not committed.
RECIPE = """\
description: The small run with another rate.
overrides:
  training.learning_rate: 0.005
"""


@pytest.fixture
def checkout(reproduced: Checkout, tmp_path) -> Checkout:
    checkout = copy_of(reproduced, tmp_path / "lathe")
    (checkout.root / "experiments/few.yaml").write_text(RECIPE)
    return checkout


def smoke(checkout: Checkout, *arguments: str):
    environment = {"PYTHONPATH": str(checkout.root / "src")}
    return checkout.run(sys.executable, "-m", "lathe", "smoke", *arguments, check=False, env=environment)


def state(checkout: Checkout) -> tuple[str, ...]:
    """What a user would notice: Git's and DVC's status, parameters, lock, experiments, and what the cache holds."""
    cached = sorted(str(file) for file in (checkout.root / ".dvc/cache").rglob("*") if file.is_file())
    texts = [(checkout.root / name).read_text() for name in ("params.yaml", "presets.yaml", "dvc.lock")]
    commands = (("git", "status", "--porcelain"), ("git", "for-each-ref"), ("dvc", "status"), ("dvc", "exp", "list"))
    return (*(checkout.run(*command).stdout for command in commands), *texts, *cached)


def test_every_stage_runs_in_a_copy_and_the_checkout_is_as_it_was(checkout):
    before = state(checkout)
    done = smoke(checkout, "few")
    assert done.returncode == 0, done.stdout + done.stderr
    timed = re.findall(r"^(\S+) +[\d.]+ s$", done.stdout, re.MULTILINE)
    stages = yaml.safe_load((checkout.root / "dvc.yaml").read_text())["stages"]
    made = {
        name
        for name, stage in stages.items()
        if not EMPTY_LISTS.intersection(map(str, stage.get("matrix", {}).values()))
    }
    assert {name.partition("@")[0] for name in timed} == made
    assert done.stdout.endswith("\nsmoke: every stage ran; now: lathe run few\n")
    assert state(checkout) == before
    assert [path.name for path in (checkout.root / ".scratch/smoke").iterdir()] == ["few.lock"]
    # Model and data came from the cache, in which the run of the fixture has put them.
    assert "fetch.py" not in done.stderr


def test_a_failing_stage_gives_its_error_its_exit_code_and_the_kept_copy(checkout):
    done = smoke(checkout, "-S", "training.max_length=8")
    assert done.returncode == 2
    *_, error, last = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert "usable" in error
    assert "Traceback" not in done.stderr
    assert last.startswith("smoke: preprocess failed with exit code 2; ")
    kept = checkout.root / ".scratch/smoke/params"
    assert last.endswith(str(kept))
    assert yaml.safe_load((kept / "params.yaml").read_text())["training"]["max_length"] == 8
    assert "every stage ran" not in done.stdout
    assert "metrics" not in checkout.run("git", "status", "--porcelain").stdout
    # What fetch refuses comes through DVC, and has the stage's exit code as well.
    (checkout.root / "data/local/few.jsonl").unlink()
    (checkout.root / "data/local/few.jsonl").write_text(json.dumps({"ask": "a", "reply": "b"}) + "\n")
    (checkout.root / "models/local/small/config.json").unlink()
    done = smoke(checkout)
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "smoke: fetch@model failed with exit code 2" in done.stderr
    assert not (kept / "data/processed").exists(), "the copy is not a new one"


def test_beside_a_command_that_works_in_the_checkout_it_is_refused(checkout):
    with hold_workspace("lathe run other", checkout.root):
        done = checkout.run(
            sys.executable,
            *("-m", "lathe", "smoke", "few"),
            check=False,
            env={"PYTHONPATH": str(checkout.root / "src"), "LATHE_WORKSPACE_TOKEN": ""},
        )
    assert done.returncode == 2
    assert "lathe smoke few: lathe run other has been working here since" in done.stderr
    assert not (checkout.root / ".scratch/smoke/few").exists()
