"""What is mirrored, where to, and what is known to be there already."""

import json
import re
from pathlib import Path

import pytest
import yaml
from refusals import refused

from lathe.common import paths
from lathe.common.metric_files import unwrap_list
from lathe.config import params
from lathe.config.load import load
from lathe.experiments.tracking import run_files, start_mirror, targets
from lathe.experiments.tracking.run_files import Context, MirroredRun
from lathe.experiments.tracking.targets import MlflowTarget, WandbTarget
from lathe.experiments.tracking.tracker import TrackerUnreachableError
from lathe.experiments.tracking.trackers import create_mirror


def tracking(**changes):
    tree = load().params.tracking.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return params.Tracking.model_validate(tree)


def test_nothing_is_mirrored_unless_it_is_asked_for():
    assert targets.choose_targets(load().params.tracking, {}) == ([], [])


def test_the_environment_wins_over_the_parameters_and_says_so():
    environment = {
        "MLFLOW_ENABLED": "true",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9/",
        "MLFLOW_EXPERIMENT_NAME": "mine",
        "WANDB_MODE": "offline",
    }
    chosen, said = targets.choose_targets(tracking(), environment)
    assert chosen == [MlflowTarget("http://127.0.0.1:9", "mine"), WandbTarget("offline", "lathe")]
    for variable in environment:
        assert any(variable in line for line in said), variable
    off = {"MLFLOW_ENABLED": "0", "WANDB_MODE": "disabled"}
    assert targets.choose_targets(tracking(mlflow__enabled=True, wandb__enabled=True), off)[0] == []


def test_a_variable_that_says_what_the_parameters_say_is_not_worth_a_line():
    chosen, said = targets.choose_targets(tracking(mlflow__enabled=True), {"MLFLOW_ENABLED": "true"})
    assert len(chosen) == 1
    assert said == []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MLFLOW_ENABLED": "on"}, "MLFLOW_ENABLED is 'on'; must be one of 1, true, yes, 0, false, no"),
        ({"WANDB_MODE": "dryrun"}, "WANDB_MODE is 'dryrun'; must be one of online, offline, disabled"),
        (
            {"MLFLOW_ENABLED": "1", "MLFLOW_TRACKING_URI": "http://me:secret@host"},
            "MLFLOW_TRACKING_URI: 'http:…host' is not a plain address; write http(s)://HOST[:PORT][/PATH], and put "
            "keys into the environment, MLFLOW_TRACKING_PASSWORD for one",
        ),
    ],
)
def test_a_variable_of_no_use_is_refused_and_no_secret_shown(environment, message):
    with refused("invalid-variable", message) as caught:
        targets.choose_targets(tracking(), environment)
    assert "secret" not in str(caught.value)


def test_what_is_named_is_chosen_enabled_or_not():
    [chosen], _ = targets.choose_targets(tracking(mlflow__enabled=True), {}, only=["wandb"])
    assert chosen == WandbTarget("offline", "lathe")
    assert targets.from_json(targets.to_json(chosen)) == chosen


def of_this_checkout(context: Context | None = None) -> MirroredRun:
    return MirroredRun(paths.ROOT, context or Context())


def test_the_parameters_of_a_run_are_all_but_where_it_is_mirrored_to():
    parameters = of_this_checkout().parameters
    assert parameters["training.learning_rate"] == load().params.training.learning_rate
    assert parameters["presets.model.source"] == load().model.source
    assert not [key for key in parameters if key.startswith("tracking")]


def test_the_scores_are_the_numbers_of_metrics_evaluate():
    scores = of_this_checkout().scores
    report = unwrap_list(json.loads((paths.ROOT / "metrics/evaluate/validation.json").read_text()))
    assert scores["evaluate/validation/merged/exact_match"] == report["merged"]["exact_match"]
    assert not [key for key in scores if "intervals" in key or "deltas" in key or "summary" in key]


def test_the_curves_are_those_of_the_dvclive_files():
    curves = of_this_checkout().curves
    lines = (paths.ROOT / "metrics/train/plots/metrics/train/loss.tsv").read_text().splitlines()[1:]
    assert curves["train/loss"] == [(int(line.split("\t")[0]), float(line.split("\t")[1])) for line in lines]
    assert "speed/train/tokens_per_second" in curves
    final = json.loads((paths.ROOT / "metrics/train/metrics.json").read_text())
    assert of_this_checkout().last_step == final["step"]


def test_a_point_whose_line_is_not_yet_whole_waits(tmp_path: Path):
    file = tmp_path / "metrics/train/plots/metrics/train/loss.tsv"
    file.parent.mkdir(parents=True)
    file.write_text("step\tloss\n1\t2.5\n2\t2.")
    assert run_files.read_curves(tmp_path) == {"train/loss": [(1, 2.5)]}
    assert run_files.read_curves(tmp_path, since=file.stat().st_mtime + 1) == {}


def test_only_points_that_are_not_known_are_sent():
    curves = {"train/loss": [(1, 2.5), (2, 2.0)], "eval/loss": [(1, 3.0)]}
    assert run_files.find_unsent_points({"train/loss": {1: 2.5}}, curves) == [
        ("eval/loss", 1, 3.0),
        ("train/loss", 2, 2.0),
    ]
    assert run_files.find_unsent_points({"train/loss": {1: 2.5, 2: 2.0}, "eval/loss": {1: 3.0}}, curves) == []


def test_a_run_with_another_point_is_another_run():
    curves = {"train/loss": [(1, 2.5), (2, 2.0)], "speed/train/tokens_per_second": [(1, 10.0)]}
    same = {"train/loss": {1: 2.5}}
    assert not run_files.contradicts(same, curves, whole=True)
    assert run_files.contradicts({"train/loss": {1: 2.4}}, curves, whole=False)
    assert not run_files.contradicts({"speed/train/tokens_per_second": {1: 11.0}}, curves, whole=True)
    longer = {"train/loss": {1: 2.5, 2: 2.0, 3: 1.5}}
    assert not run_files.contradicts(longer, curves, whole=False)
    assert run_files.contradicts(longer, curves, whole=True)


def test_a_run_is_called_as_its_experiment_and_tagged_with_its_trial():
    params_now = load().params
    found = of_this_checkout(Context(experiment="rates-3", study="rates", trial="3", sampler="TPESampler"))
    assert found.name == "rates-3"
    assert found.tags == {
        "model": params_now.model,
        "dataset": params_now.dataset,
        "experiment": "rates-3",
        "study": "rates",
        "trial": "3",
        "sampler": "TPESampler",
    }
    assert of_this_checkout().name.startswith(f"{params_now.model}-{params_now.dataset}-")


def test_what_a_search_tells_its_trials_is_read_from_the_environment():
    told = {"LATHE_STUDY": "rates", "LATHE_TRIAL": "3", "LATHE_SAMPLER": "TPESampler", "DVC_EXP_NAME": "rates-3"}
    assert Context.from_environment(told) == Context(None, "rates-3", "rates", "3", "TPESampler")
    assert Context.from_environment({}) == Context()


def test_a_variable_of_no_use_stops_no_stage_and_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(start_mirror, "FOLLOWING", tmp_path / "following")
    monkeypatch.setenv("MLFLOW_ENABLED", "on")
    with caplog.at_level("INFO"):
        start_mirror.start_mirroring("preprocess", tracking())
        start_mirror.start_mirroring("train", tracking())
    assert caplog.messages == ["mirrored nowhere: MLFLOW_ENABLED is 'on'; must be one of 1, true, yes, 0, false, no"]


def test_a_connection_that_fails_is_told_by_its_cause_alone():
    with pytest.raises(TrackerUnreachableError) as caught:
        create_mirror(MlflowTarget("http://127.0.0.1:9", "mine"), of_this_checkout()).check()
    assert str(caught.value) == "[Errno 111] Connection refused"


def test_wandb_online_without_a_key_is_one_line_and_no_request(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    found = of_this_checkout()
    with pytest.raises(TrackerUnreachableError) as caught:
        create_mirror(WandbTarget("online", "lathe"), found).finish(found)
    assert str(caught.value) == "WANDB_API_KEY is not set; set it, or tracking.wandb.mode to offline"


def test_the_server_of_the_compose_file_is_the_tested_one_and_open_to_this_machine_alone():
    server = yaml.safe_load((paths.ROOT / "compose.yaml").read_text())["services"]["mlflow"]
    tested = (paths.ROOT / "tests/service/requirements-mlflow.txt").read_text()
    [version] = re.findall(r"^mlflow==\S+$", tested, re.MULTILINE)
    assert server["build"]["dockerfile_inline"].endswith(f" {version}\n")
    assert [port.startswith("127.0.0.1:") for port in server["ports"]] == [True]
