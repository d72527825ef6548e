"""Runs mirrored to a real MLflow server, which stops, dies and comes back, and to W&B's offline folders."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Checkout, copy_of
from mlflow_server import MlflowServer, wait_until
from wandb_files import read_records

EXPERIMENT = "tried"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[MlflowServer]:
    """A server that runs while a test begins."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        yield server.start()
    finally:
        server.end()


@pytest.fixture
def checkout(reproduced, tmp_path, server) -> Checkout:
    """A checkout whose pipeline has run, with the server in its environment."""
    checkout = copy_of(reproduced, tmp_path / "lathe")
    checkout.environment |= {
        "PYTHONPATH": str(checkout.root / "src"),
        "MLFLOW_TRACKING_URI": server.uri,
        "MLFLOW_EXPERIMENT_NAME": tmp_path.name,
    }
    return checkout


def mirror(checkout: Checkout, *arguments: str, check: bool = True) -> str:
    return checkout.run(sys.executable, "-m", "lathe", "mirror", *arguments, check=check).stdout


def client(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.uri)


def runs(server: MlflowServer, checkout: Checkout) -> list[Any]:
    """The runs in the checkout's experiment, without those that stand for a study."""
    name = checkout.environment["MLFLOW_EXPERIMENT_NAME"]
    experiment = client(server).get_experiment_by_name(name)
    found = client(server).search_runs([experiment.experiment_id]) if experiment else []
    return [run for run in found if "lathe.parameters" in run.data.tags]


def written(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of dvclive's files, read without Lathe."""
    found = {}
    for folder, prefix in (("train", ""), ("speed", "speed/")):
        plots = root / f"metrics/{folder}/plots/metrics"
        for file in plots.rglob("*.tsv"):
            rows = list(csv.reader(file.read_text().splitlines(), delimiter="\t"))[1:]
            name = prefix + file.relative_to(plots).with_suffix("").as_posix()
            found[name] = [(int(step), float(value)) for step, value in rows]
    assert "train/loss" in found
    assert "speed/train/tokens_per_second" in found
    return found


def shown(server: MlflowServer, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every point that the server has of a run's curves, doubles included."""
    names = [name for name in client(server).get_run(run_id).data.metrics if not name.startswith("evaluate/")]
    return {
        name: sorted((point.step, point.value) for point in client(server).get_metric_history(run_id, name))
        for name in names
    }


def test_a_commit_is_mirrored_whole_and_a_second_time_adds_nothing(server, checkout, tmp_path):
    assert "points sent" in mirror(checkout, "--mlflow", "HEAD")
    [run] = runs(server, checkout)
    assert run.info.status == "FINISHED"
    assert shown(server, run.info.run_id) == written(checkout.root)
    assert run.data.params["training.learning_rate"] == "0.01"
    assert run.data.params["presets.dataset.path"] == "data/local/few.jsonl"
    commit = checkout.run("git", "rev-parse", "HEAD").stdout.strip()
    assert run.data.tags["model"] == "small"
    assert run.data.tags["dataset"] == "few"
    assert run.data.tags["mlflow.source.git.commit"] == commit
    report = checkout.json("metrics/evaluate/validation.json")
    for artifact, scores in report.items():
        assert run.data.metrics[f"evaluate/validation/{artifact}/perplexity"] == scores["perplexity"]

    (tmp_path / "downloaded").mkdir()
    client(server).download_artifacts(run.info.run_id, "", str(tmp_path / "downloaded"))
    for name in ("params.yaml", "presets.yaml", "dvc.lock", "models/gguf/README.md", "models/gguf/Modelfile"):
        assert (tmp_path / "downloaded" / name).read_bytes() == (checkout.root / name).read_bytes(), name
    from safetensors import safe_open

    with safe_open(tmp_path / "downloaded/models/adapter/adapter_model.safetensors", "pt") as adapter:
        assert [name for name in adapter.keys() if "lora" in name]  # noqa: SIM118

    assert ": 0 points sent" in mirror(checkout, "--mlflow", "HEAD", "workspace")
    [again] = runs(server, checkout)
    assert again.info.end_time == run.info.end_time
    assert shown(server, again.info.run_id) == written(checkout.root)
    history = client(server).get_metric_history(again.info.run_id, "evaluate/validation/merged/perplexity")
    assert len(history) == 1


def test_the_page_of_a_run_opens_in_a_browser_with_its_files(server, checkout):
    browser_path = shutil.which("chromium")
    if not browser_path:
        pytest.skip("chromium is not installed")
    from playwright.sync_api import expect, sync_playwright

    address = mirror(checkout, "--mlflow", "HEAD").split(": ")[-1].strip()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path)
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_text("small-few-").first).to_be_visible(timeout=90_000)
        expect(page.get_by_text("training.learning_rate").first).to_be_visible(timeout=30_000)
        page.goto(f"{address}/artifacts")
        page.get_by_text("params.yaml").first.click(timeout=30_000)
        expect(page.get_by_text("per_device_train_batch_size").first).to_be_visible(timeout=30_000)
        browser.close()


class Followed:
    """The process that follows a pipeline, whose DVC is played by one that sleeps."""

    def __init__(self, checkout: Checkout, environment: dict[str, str] | None = None) -> None:
        import psutil

        self.checkout = checkout
        self.dvc = subprocess.Popen(["sleep", "1000"])
        self.mark = checkout.root / f".scratch/mirror/following/{self.dvc.pid}-"
        self.mark = self.mark.with_name(f"{self.mark.name}{psutil.Process(self.dvc.pid).create_time():.2f}")
        self.mark.mkdir(parents=True)
        self.plots = checkout.root / "metrics/train/plots/metrics/train/loss.tsv"
        self.points = self.plots.read_text().splitlines(keepends=True)
        shutil.copytree(checkout.root / "metrics", checkout.root / ".scratch/metrics")
        shutil.rmtree(checkout.root / "metrics/train/plots")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lathe", "mirror", "--follow", str(self.mark)],
            cwd=checkout.root,
            env={**checkout.environment, **(environment or {}), "MLFLOW_ENABLED": "1"},
        )
        (self.mark / "training").touch()

    def train(self, steps: int) -> None:
        """Let the training get to that step."""
        self.plots.parent.mkdir(parents=True, exist_ok=True)
        self.plots.write_text("".join(self.points[: steps + 1]))

    def end(self) -> None:
        """Let the pipeline come to its end."""
        shutil.copytree(self.checkout.root / ".scratch/metrics", self.checkout.root / "metrics", dirs_exist_ok=True)
        self.dvc.kill()
        self.dvc.wait()


def points_of(server: MlflowServer, checkout: Checkout) -> list[tuple[int, float]]:
    found = runs(server, checkout)
    return shown(server, found[0].info.run_id).get("train/loss", []) if found else []


def test_curves_are_shown_while_they_grow_and_the_rest_when_the_pipeline_has_ended(server, checkout):
    trial = {"LATHE_STUDY": "rates", "LATHE_TRIAL": "3", "LATHE_SAMPLER": "TPESampler"}
    followed = Followed(checkout, trial)
    followed.train(2)
    wait_until(lambda: [step for step, _ in points_of(server, checkout)] == [1, 2], 60)
    [run] = runs(server, checkout)
    assert run.info.status == "RUNNING"
    assert run.data.tags | {"study": "rates", "trial": "3", "sampler": "TPESampler"} == run.data.tags
    parent = client(server).get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "rates"
    followed.end()
    assert followed.process.wait(120) == 0
    [run] = runs(server, checkout)
    assert run.info.status == "FINISHED"
    assert shown(server, run.info.run_id) == written(checkout.root)
    assert not list((checkout.root / ".scratch/mirror/pending").iterdir())
    assert "nothing was missed" in mirror(checkout)


def test_a_training_that_was_cut_short_is_shown_as_such_and_gone_on_with(server, checkout):
    followed = Followed(checkout)
    followed.train(2)
    wait_until(lambda: len(points_of(server, checkout)) == 2, 60)
    followed.dvc.kill()
    followed.dvc.wait()
    followed.process.wait(120)
    [run] = runs(server, checkout)
    assert run.info.status == "KILLED"
    shutil.copytree(checkout.root / ".scratch/metrics", checkout.root / "metrics", dirs_exist_ok=True)
    mirror(checkout, "--mlflow", "workspace")
    [again] = runs(server, checkout)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    assert shown(server, again.info.run_id) == written(checkout.root)


def test_another_result_of_the_same_parameters_is_another_run(server, checkout):
    mirror(checkout, "--mlflow", "HEAD")
    loss = checkout.root / "metrics/train/plots/metrics/train/loss.tsv"
    *lines, last = loss.read_text().splitlines()
    loss.write_text("\n".join([*lines, f"{last.split()[0]}\t9.5"]) + "\n")
    checkout.commit()
    mirror(checkout, "--mlflow", "HEAD")
    assert len(runs(server, checkout)) == 2


def test_a_server_that_hangs_is_missed_and_sent_to_later(server, checkout):
    followed = Followed(checkout)
    followed.train(2)
    wait_until(lambda: len(points_of(server, checkout)) == 2, 60)
    server.signal(signal.SIGSTOP)
    try:
        followed.train(4)
        time.sleep(4)  # it is being asked
        followed.end()
        pending = checkout.root / ".scratch/mirror/pending"
        wait_until(lambda: bool(list(pending.glob("*/targets.json"))), 60)
        followed.process.kill()  # it would try for a minute
        followed.process.wait()
    finally:
        server.signal(signal.SIGCONT)
    assert "points sent" in mirror(checkout)
    [run] = runs(server, checkout)
    assert run.info.status == "FINISHED"
    assert shown(server, run.info.run_id) == written(checkout.root)
    assert not list(pending.iterdir())
    assert "nothing was missed" in mirror(checkout)


def test_a_server_that_is_away_is_one_line_and_no_traceback(checkout):
    checkout.environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    done = checkout.run(sys.executable, "-m", "lathe", "mirror", "--mlflow", "HEAD", check=False)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1
    assert "the same command again goes on" in done.stdout
    assert "Traceback" not in done.stderr


def test_what_cannot_be_mirrored_is_refused(checkout):
    for arguments, message in (
        (("--mlflow", "no-such"), "error: no-such: no such experiment, commit or branch; "),
        (("HEAD",), "error: tracking is enabled for nothing; give --mlflow or --wandb, or enable one in params.yaml"),
    ):
        done = checkout.run(sys.executable, "-m", "lathe", "mirror", *arguments, check=False)
        assert done.returncode == 2
        assert message in done.stderr
    checkout.set({"training.learning_rate": 0.5})
    done = checkout.run(sys.executable, "-m", "lathe", "mirror", "--mlflow", "workspace", check=False)
    assert "workspace: training is not as dvc.lock has it; run `dvc repro`, or name a commit" in done.stderr


def test_an_offline_run_of_wandb_holds_what_dvclive_wrote_and_is_written_once(checkout):
    assert "points sent" in mirror(checkout, "--wandb", "HEAD")
    [folder] = (checkout.root / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    read = read_records(file)
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in (record.history for record in read if record.HasField("history")):
        values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for name, value in values.items():
            if not name.startswith("_") and name != "optimizer_step":
                curves.setdefault(name, []).append((values["optimizer_step"], value))
    assert curves == written(checkout.root)
    [run, *_] = [record.run for record in read if record.HasField("run")]
    config = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["training.learning_rate"] == 0.01
    assert run.project == "lathe"
    assert "model:small" in run.tags
    summary = {}
    for record in read:
        if record.HasField("summary"):
            for item in record.summary.update:
                summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    report = checkout.json("metrics/evaluate/validation.json")
    assert summary["evaluate/validation/merged/perplexity"] == report["merged"]["perplexity"]
    [artifact] = [record.artifact for record in read if record.HasField("artifact")]
    kept = {entry.path for entry in artifact.manifest.contents}
    assert {"params.yaml", "dvc.lock", "models/gguf/README.md", "models/adapter/adapter_model.safetensors"} <= kept
    sync = checkout.run("wandb", "sync", "--dry-run", str(folder))
    assert run.run_id in sync.stdout + sync.stderr

    # Killed before it has noted its folder, and run again: one folder.
    run_id = folder.name.rpartition("-")[2]
    shutil.copytree(folder, folder.with_name(f"offline-run-20200101_000000-{run_id}"))
    for note in (checkout.root / ".scratch/mirror/wandb").glob("*.json"):
        note.unlink()
    assert "points sent" in mirror(checkout, "--wandb", "HEAD")
    [folder] = (checkout.root / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    assert not folder.name.startswith("offline-run-2020")

    before = file.read_bytes()
    assert ": 0 points sent" in mirror(checkout, "--wandb", "HEAD")
    assert [folder] == list((checkout.root / "wandb").glob("offline-run-*"))
    assert file.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("temp", [["--temp"], []], ids=["temp", "workspace"])
def test_an_experiment_ends_as_ever_when_the_server_goes_in_the_middle_of_its_training(checkout, tmp_path, how, temp):
    own = MlflowServer(tmp_path / "server").start()
    environment = {**checkout.environment, "MLFLOW_ENABLED": "1", "MLFLOW_TRACKING_URI": own.uri}
    pending, logs = (checkout.root / f".scratch/mirror/{name}" for name in ("pending", "logs"))
    command = ["dvc", "exp", "run", *temp, "--name", EXPERIMENT, "-S", "training.max_steps=60"]
    try:
        with (tmp_path / "log").open("wb") as log:
            dvc = subprocess.Popen(command, cwd=checkout.root, env=environment, stdout=log, stderr=log)
            wait_until(lambda: bool(points_of(own, checkout)) or dvc.poll() is not None, 300)
            assert 0 < len(points_of(own, checkout)) < 60
            own.signal(how)
            assert dvc.wait(600) == 0, (tmp_path / "log").read_text()
        wait_until(lambda: "python -m lathe mirror" in "".join(f.read_text() for f in logs.iterdir()), 180)
        if how == signal.SIGSTOP:
            own.signal(signal.SIGCONT)
        else:
            own.start()
        checkout.environment = environment
        assert f"{EXPERIMENT}: MLflow" in mirror(checkout)
        assert not list(pending.iterdir())
        [run] = runs(own, checkout)
        restored = tmp_path / "restored"
        checkout.run("git", "worktree", "add", "--detach", str(restored), commit_of_experiment(checkout))
        assert shown(own, run.info.run_id) == written(restored)
        assert run.info.status == "FINISHED"
        assert run.data.tags["experiment"] == EXPERIMENT
        assert ": 0 points sent" in mirror(checkout, EXPERIMENT)
        assert len(runs(own, checkout)) == 1
    finally:
        own.end()


def commit_of_experiment(checkout: Checkout) -> str:
    listed = checkout.run("git", "for-each-ref", "--format=%(objectname)", f"refs/exps/**/{EXPERIMENT}").stdout.split()
    assert len(listed) == 1
    return listed[0]
