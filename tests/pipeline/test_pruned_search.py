"""A search whose second trial learns nothing: it is ended in its training, by its evaluation loss."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from training_checkout import make_training_checkout

from lathe.experiments.search.pruning import CURVE

SEARCH = """\
study: halved
sampler: grid
startup_trials: 1
seed: {seed}
n_trials: 2
timeout_seconds: null
objectives: [{{metric: merged.rouge_l, direction: maximize}}]
space: {{training.learning_rate: {{type: categorical, choices: [0.01, 0.0000001]}}}}
pruner: {{min_steps: 20, reduction: 2}}
"""
SEED = 1  # with which the better rate comes first


@pytest.mark.slow
def test_a_trial_that_learns_nothing_is_ended_at_the_first_comparison_and_is_an_experiment_without_scores(
    small_model: Path, tmp_path: Path
) -> None:
    checkout = make_training_checkout(tmp_path / "lathe", small_model)
    checkout.set({"training.max_steps": 300, "training.eval_steps": 20, "training.save_steps": 100})
    (checkout.root / "experiments/search/halved.yaml").write_text(SEARCH.format(seed=SEED))
    # Evaluation is no stage here: every trial that ends has the score of the commit.
    report = checkout.root / "metrics/evaluate/validation.json"
    report.parent.mkdir(exist_ok=True)
    report.write_text(json.dumps([{"merged": {"rouge_l": 0.5}}]))
    checkout.commit()
    before = checkout.run("git", "status", "--porcelain", "--branch").stdout

    told = checkout.run(sys.executable, "-m", "lathe", "search", "experiments/search/halved.yaml")

    assert "2 trials ended, 0 of them failed, 1 pruned" in told.stdout, told.stderr
    found = json.loads((checkout.root / "metrics/search/halved/study.json").read_text())
    good, pruned = found["trials"]
    assert found["best"] == ["halved-0"]
    assert (good["state"], pruned["state"], pruned["scores"]) == ("complete", "pruned", {})
    step = pruned["pruned"]["step"]
    assert step < 300
    refs = checkout.run("git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps/*/*/halved-*").stdout.split()
    assert refs == ["halved-0", "halved-1"]
    message = checkout.run("git", "log", "-1", "--format=%s", pruned["commit"]).stdout.strip()
    assert message.endswith(f"; pruned at step {step}, evaluation loss {pruned['pruned']['evaluation_loss']:g}")
    curve = checkout.run("git", "show", f"{pruned['commit']}:{CURVE}").stdout.splitlines()
    assert curve[0].split("\t") == ["step", "loss"]
    assert [int(line.split("\t")[0]) for line in curve[1:]][: step // 20] == list(range(20, step + 1, 20))
    values = yaml.safe_load(checkout.run("git", "show", f"{pruned['commit']}:params.yaml").stdout)
    assert float(values["training"]["learning_rate"]) == 1e-7
    files = checkout.run("git", "ls-tree", "-r", "--name-only", pruned["commit"]).stdout.split()
    assert not any(file.startswith("metrics/evaluate/") for file in files)
    assert checkout.run("git", "status", "--porcelain", "--branch").stdout == before
    assert list((checkout.root / ".dvc/tmp/search").glob("*")) == []
    again = checkout.run(sys.executable, "-m", "lathe", "search", "experiments/search/halved.yaml")
    assert "2 trials ended, 0 of them failed, 1 pruned" in again.stdout
