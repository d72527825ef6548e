"""Pruning of trials: which are ended, at which step, and what is recorded of them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import Checkout
from refusals import refused
from test_search import FILE, RATE, kept, opened, params, read  # noqa: F401 - fixtures among them

from lathe.common import paths
from lathe.experiments.search import command, pruning, results, run_search, search_file, trial
from lathe.experiments.search.pruning import CURVE, Losses

PRUNER = "pruner: {min_steps: 10, reduction: 2}\n"


def planned(folder: Path, params: search_file.Params, more: str = PRUNER) -> search_file.Plan:  # noqa: F811
    return read(folder, params, FILE.format(sampler="random", space=RATE) + more)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ("pruner: {min_steps: 0, reduction: 2}\n", "pruner.min_steps is 0; must be greater than or equal to 1"),
        ("pruner: {min_steps: 10, reduction: 1}\n", "pruner.reduction is 1; must be greater than or equal to 2"),
        ("pruner: {min_steps: 10, reductoin: 2}\n", "did you mean 'reduction'?"),
        ("pruner: {min_steps: 10}\n", "pruner.reduction is missing"),
    ],
)
def test_a_pruner_that_makes_no_sense_is_refused_with_its_line(kept, params, more, part):  # noqa: F811
    with refused("invalid-search-file", "some.yaml:", part):
        planned(kept, params, more)


def test_a_pruner_is_refused_where_no_one_curve_of_losses_compares_trials(kept, params):  # noqa: F811
    plan = planned(kept, params)
    plan.check(params, "some.yaml")
    dpo = params.model_copy(update={"training": params.training.model_copy(update={"method": "dpo"})})
    with refused("no-pruning", "some.yaml: pruner: ", "sft"):
        plan.check(dpo, "some.yaml")
    two = plan.model_copy(update={"objectives": plan.objectives * 2})
    with refused("no-pruning", "several objectives"):
        two.check(params, "some.yaml")


def test_of_a_curve_the_whole_lines_are_read_and_never_those_of_the_commit(tmp_path):
    file = tmp_path / "loss.tsv"
    losses = Losses(file, b"step\tloss\n5\t2.5\n")
    assert losses.read() == []
    file.write_bytes(b"step\tloss\n5\t2.5\n")
    assert losses.read() == []
    file.write_bytes(b"step\tloss\n5\t2.25\n10\t1.")
    assert losses.read() == [(5, 2.25)]
    file.write_bytes(b"step\tloss\n5\t2.25\n10\t1.5\n")
    assert losses.read() == [(5, 2.25), (10, 1.5)]
    for other in (b"", b"step\n5\n", b"step\tloss\nfive\t1\n", b"\n\n"):
        file.write_bytes(other)
        assert losses.read() == []


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_at_each_rung_the_lower_loss_goes_on_whichever_way_the_score_is_better(kept, params, direction):  # noqa: F811
    plan = planned(kept, params)
    plan = plan.model_copy(update={"objectives": [plan.objectives[0].model_copy(update={"direction": direction})]})
    study = opened(plan, params, {"overrides": {}, "objectives": plan.directions})
    # Losses after 10 and 20 steps; the first has nothing to be compared with.
    for losses, expected in [
        ([(5, 9.0), (10, 2.0), (20, 1.5)], None),
        ([(5, 1.0), (10, 3.0), (20, 0.5)], (10, 3.0)),
        ([(5, 9.0), (10, 1.0), (20, 1.7)], (20, 1.7)),
        ([(10, 0.9), (20, 0.8)], None),
    ]:
        begun = study.take_trial(4, may_begin=True)
        assert begun is not None
        study.choose_values(begun)
        # As they come: each look sees the curve so far.
        seen = [study.find_hopeless_step(begun, losses[:count]) for count in range(len(losses) + 1)]
        found = next((each for each in seen if each), None)
        assert found == expected
        if found:
            study.prune(begun, *found, commit="c0ffee")
        else:
            study.finish(begun, [0.5], "c0ffee")
    told = results.summarize(study)["trials"]
    assert [one["state"] for one in told] == ["complete", "pruned", "pruned", "complete"]
    assert [one["pruned"] for one in told] == [
        None,
        {"step": 10, "evaluation_loss": 3.0},
        {"step": 20, "evaluation_loss": 1.7},
        None,
    ]
    assert [bool(one["scores"]) for one in told] == [True, False, False, True]
    assert study.count_finished() == 4
    results.write_results(study, kept / "found")


WORK = """
import pathlib, sys, time
curve = pathlib.Path(sys.argv[1])
curve.parent.mkdir(parents=True)
curve.write_text("step\\tloss\\n10\\t" + sys.argv[2] + "\\n")
done = pathlib.Path(sys.argv[3])
time.sleep(0.5 if sys.argv[4] == "ends" else 60)
done.touch()
"""


def test_a_driver_ends_a_hopeless_trial_and_goes_on_with_the_next(kept, params, monkeypatch, tmp_path, capsys):  # noqa: F811
    """Real processes, whose curves are in their checkouts; what is left of one is recorded elsewhere."""
    monkeypatch.setattr(trial, "CHECKOUTS", tmp_path / "checkouts")
    monkeypatch.setattr(run_search, "LOGS", tmp_path)
    monkeypatch.setattr(run_search, "SECONDS_BETWEEN_SEARCHES_FOR_WORK", 0.1)
    report = {name: {"exact_match": 0.5} for name in ("merged", "Q4_K_M")}

    class Made:
        commit = "c"

        def read_json(self, file: str) -> object:
            return report

    monkeypatch.setattr(trial, "find_experiment", lambda order: Made() if (tmp_path / order.name).exists() else None)
    recorded = []

    def record(order: trial.Order, checkout: Path, step: int, loss: float) -> str:
        recorded.append((order.number, checkout.exists(), step, loss))
        return "pruned-commit"

    monkeypatch.setattr(pruning, "record_pruned", record)
    losses = [2.0, 3.0, 1.0]
    delivered = []

    def start(order: trial.Order, gpu: str | None) -> "subprocess.Popen[bytes]":
        # The folder has the number of the process, which is known to it alone: a shell hands its own on.
        ends = "never" if losses[order.number] == 3.0 else "ends"
        program = 'exec "$0" -c "$1" "$2-$$/$3" "$4" "$5" "$6"'
        words = [sys.executable, WORK, str(trial.CHECKOUTS / order.name), CURVE, str(losses[order.number])]
        return subprocess.Popen(["sh", "-c", program, *words, str(tmp_path / order.name), ends])

    study = opened(planned(kept, params), params, {"overrides": {}})
    began = time.monotonic()
    run_search.Driver(
        study, 3, 1, None, [], [], "", "HEAD", start, deliver=lambda order: delivered.append(order.number)
    ).run()
    assert time.monotonic() - began < 50
    assert [one.state.name for one in study.trials()] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert recorded == [(1, True, 10, 3.0)]
    assert delivered == [0, 1, 2]
    assert study.trials()[1].user_attrs["experiment"] == "pruned-commit"
    command._print_best(study)
    assert capsys.readouterr().out.startswith("3 trials ended, 0 of them failed, 1 pruned\n")


def test_what_is_left_of_a_pruned_trial_is_a_commit_with_its_parameters_and_curves_alone(
    checkout: Checkout, tmp_path: Path
) -> None:
    lock = yaml.safe_load((paths.ROOT / "dvc.lock").read_text())
    assert {"preprocess", "train"} <= set(lock["stages"])
    head = checkout.run("git", "rev-parse", "HEAD").stdout.strip()
    order = trial.Order("some", 3, "tpe", "search some, trial 3 of today", [], head, head, 1)
    clone = tmp_path / "clone"
    checkout.run("git", "clone", "--quiet", "--shared", "--no-checkout", str(checkout.root), str(clone))
    there = Checkout(clone, checkout.environment)
    for key, value in (("user.name", "A"), ("user.email", "a@example.invalid")):
        there.run("git", "config", key, value)
    there.run("git", "checkout", "--quiet", "--detach", head)
    there.set({"lora.r": 5})
    (clone / CURVE).write_text("step\tloss\n10\t3.5\n")
    (clone / "left.txt").write_text("no part of it")

    commit = pruning.record_pruned(order, clone, 10, 3.5)

    shown = checkout.run("git", "log", "-1", "--format=%H %P%n%s", trial.build_ref(order)).stdout.splitlines()
    assert shown == [f"{commit} {head}", "search some, trial 3 of today; pruned at step 10, evaluation loss 3.5"]
    files = checkout.run("git", "ls-tree", "-r", "--name-only", commit).stdout.splitlines()
    assert {file.split("/")[1] for file in files if file.startswith("metrics/")} == {"train"}
    assert "left.txt" not in files
    assert "stages/train.py" in files
    assert checkout.run("git", "show", f"{commit}:{CURVE}").stdout == "step\tloss\n10\t3.5\n"
    assert yaml.safe_load(checkout.run("git", "show", f"{commit}:params.yaml").stdout)["lora"]["r"] == 5
    stages = yaml.safe_load(checkout.run("git", "show", f"{commit}:dvc.lock").stdout)["stages"]
    assert "preprocess" in stages
    assert not {"train", "merge", "evaluate"} & set(stages)
    listed = json.loads(checkout.run("dvc", "exp", "show", "--json").stdout)
    assert "some-3" in json.dumps(listed)
    done = checkout.run(
        sys.executable, "-m", "lathe", "results", "--json", env={"PYTHONPATH": str(checkout.root / "src")}
    )
    [run] = [one for one in json.loads(done.stdout) if one.get("name") == "some-3"]
    assert run.get("score") is None
