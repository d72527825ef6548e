"""What the workflow for pull requests runs, tried here; GitHub itself is not."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import Checkout, copy_of

from lathe.common import paths

WORKFLOW = paths.ROOT / ".github/workflows/pipeline.yaml"


@pytest.fixture(scope="module")
def origin(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout that has pushed its inputs to its remote `local`."""
    origin = copy_of(reproduced, tmp_path_factory.mktemp("origin") / "lathe")
    origin.run("dvc", "push", "--recursive", "data/local", "models/local")
    return origin


@pytest.fixture
def clone(origin: Checkout, tmp_path: Path) -> Checkout:
    """A fresh clone, without any output."""
    origin.run("git", "clone", "--quiet", str(origin.root), str(tmp_path / "clone"))
    clone = Checkout(tmp_path / "clone")
    clone.run("dvc", "remote", "modify", "--local", "local", "url", str(origin.root / ".storage"))
    clone.environment["PYTHONPATH"] = str(clone.root / "src")
    return clone


def test_a_lock_of_what_is_committed_is_current_without_its_outputs(clone):
    done = clone.run(".github/lock.sh")
    assert done.stdout == "dvc.lock is current: `dvc repro` would run nothing\n"
    assert not (clone.root / "models/adapter").exists()
    assert clone.run("git", "status", "--porcelain").stdout == ""


def test_the_committed_lock_has_the_stages_of_the_committed_pipeline():
    for folder in (paths.ROOT, paths.ROOT / "classify"):
        command = ["dvc", "stage", "list", "--name-only"]
        listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
        lock = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))
        assert sorted(lock["stages"]) == sorted(listed)


@pytest.mark.parametrize(
    ("change", "stage"), [("parameter", "train"), ("code", "quantize@Q8_0"), ("data", "local_files@dataset")]
)
def test_a_lock_of_something_else_is_told_by_the_first_stage_that_it_concerns(clone, change, stage):
    if change == "parameter":
        clone.set({"training.learning_rate": 0.02})
    elif change == "code":
        with (clone.root / "stages/quantize.py").open("a") as script:
            script.write("# changed\n")
    else:
        clone.run("dvc", "pull", "data/local/few.jsonl")
        rows = (clone.root / "data/local/few.jsonl").read_text().splitlines(keepends=True)
        clone.run("dvc", "unprotect", "data/local/few.jsonl")
        (clone.root / "data/local/few.jsonl").write_text("".join(rows[1:]))
        clone.run("dvc", "add", "data/local/few.jsonl")
    done = clone.run(".github/lock.sh", check=False)
    assert done.returncode == 1
    assert f"`dvc repro` would run {stage} first; run `make repro` and commit" in done.stderr
    assert done.stdout == ""


def test_the_summary_shows_what_changed_and_exits_as_the_gates_do(clone):
    summary = clone.json("metrics/evaluate/summary.json")
    metric = yaml.safe_load((clone.root / "params.yaml").read_text())["evaluate"]["primary_metric"]
    summary[metric]["merged"] = 0.4321
    (clone.root / "metrics/evaluate/summary.json").write_text(json.dumps(summary))
    gates = clone.run("python", "-m", "lathe", "gate", check=False)
    done = clone.run(".github/summary.sh", "HEAD", check=False)
    assert done.returncode == gates.returncode == 1
    assert re.search(rf"\| *metrics/evaluate/summary.json *\| *{metric}.merged *\| *\S+ *\| *0.4321 *\|", done.stdout)
    assert f"### Gates\n\n```\n{gates.stdout}```\n" in done.stdout
    clone.run("git", "checkout", "--quiet", "metrics")
    assert "No score changed." in clone.run(".github/summary.sh", "HEAD", check=False).stdout


def test_every_step_of_the_workflow_is_a_make_target_and_every_action_of_a_version():
    targets = set(re.findall(r"^([a-z-]+):", (paths.ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    run = [match[1] for step in steps if (match := re.match(r"make (?:--silent )?([a-z-]+)", step.get("run", "")))]
    assert set(run) <= targets
    assert {"test", "ci-lock", "repro", "ci-summary"} <= set(run)
    assert len(run) + len([step for step in steps if re.search(r"@v\d+\.\d+\.\d+$", step.get("uses", ""))]) == len(
        steps
    )
