"""The classifier's pipeline by real `dvc repro` and real commands, on a small file and a BERT of two layers."""

import json
import re
import sys

import pytest
import tiny_bert
from conftest import Checkout, make_checkout
from ruamel.yaml import YAML

SMALL = {
    "model.backbone": "tiny-bert",
    "dataset": "tickets",
    "model.hidden_dim": 16,
    "data.label_fields": None,
    "data.none_label": "other",
    "data.max_length": 16,
    "training.learning_rate": 0.01,
    "training.epochs": 40,
    "training.batch_size": 16,
    "training.mixed_precision": "fp32",
    "training.early_stopping_patience": None,
    "evaluate.bootstrap_samples": 100,
}


def ran(done) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", done.stdout)


def lathe(checkout: Checkout, *arguments: str, check: bool = True):
    environment = {"PYTHONPATH": str(checkout.root / "src")}
    return checkout.run(sys.executable, "-m", "lathe", *arguments, check=check, env=environment)


def set_params(checkout: Checkout, changes: dict[str, object]) -> None:
    editor, file = YAML(), checkout.root / "classify/params.yaml"
    tree = editor.load(file)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
    editor.dump(tree, file)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with a local backbone and local rows, whose classifier has been made and committed."""
    checkout = make_checkout(tmp_path_factory.mktemp("classifier") / "lathe")
    rows = [
        *tiny_bert.make_rows(),
        *((f"{text} {number}", "other") for text in tiny_bert.OFF_TOPIC for number in range(8)),
    ]
    tiny_bert.make_backbone(checkout.root / "models/local/tiny-bert", [text for text, _ in rows])
    tiny_bert.write_csv(checkout.root / "data/local/tickets.csv", rows)
    presets = checkout.root / "presets.yaml"
    tree = YAML().load(presets)
    tree["models"]["tiny-bert"] = {"source": "local", "path": "models/local/tiny-bert"}
    tree["datasets"]["tickets"] = {
        "source": "local",
        "path": "data/local/tickets.csv",
        "prompt": "text",
        "completion": "label",
    }
    YAML().dump(tree, presets)
    checkout.run("dvc", "add", "--quiet", "data/local/tickets.csv", "models/local/tiny-bert")
    (checkout.root / "classify/dvc.lock").unlink(missing_ok=True)
    set_params(checkout, SMALL)
    recipe = "description: A wider head.\noverrides:\n  model.hidden_dim: 24\n"
    (checkout.root / "classify/experiments/wider.yaml").write_text(recipe)
    checkout.commit()
    printed = checkout.run("dvc", "--cd", "classify", "repro")
    assert ran(printed)[-3:] == ["train", "evaluate", "export"]
    checkout.commit()
    return checkout


def test_every_output_is_there_and_says_what_was_measured(checkout):
    metrics = checkout.json("classify/metrics/metrics.json")
    assert {"best_val_score", "test_score", "accuracy", "macro_f1", "none_recall"} <= set(metrics)
    assert metrics["details"][0]["threshold"] is not None
    report = checkout.json("classify/metrics/evaluate/test.json")
    assert list(report) == ["classifier", "majority", "tfidf", "features"]
    assert report["classifier"]["accuracy"] > report["majority"]["accuracy"]
    proof = checkout.json("classify/metrics/freeze_proof.json")
    assert proof["trained_tensors"] == 0 < proof["frozen_tensors"]
    export = checkout.json("classify/metrics/export.json")
    assert export["same_labels"] == export["rows"] > 0
    for name in ("best_model", "final_model", "classifier_head", "onnx"):
        assert (checkout.root / f"classify/models/{name}/labels.json").exists()
    assert "loss" in (checkout.root / "classify/metrics/train.log").read_text()


def test_a_second_run_does_nothing_and_the_main_pipeline_is_another(checkout):
    again = lathe(checkout, "repro", "classify/dvc.yaml")
    assert ran(again) == []
    assert "TF-IDF + logistic regression" in again.stdout  # the scores come at the end of a run
    planned = checkout.run("dvc", "repro", "--dry", check=False)
    assert "classify" not in planned.stdout
    assert "fetch@model" in planned.stdout + planned.stderr


def test_a_wider_head_trains_again_without_computing_features_and_compare_tests_the_difference(checkout):
    refused = lathe(checkout, "run", "wider", "--temp", check=False)
    assert refused.returncode == 2
    assert "leave --temp and --queue out" in refused.stderr
    done = lathe(checkout, "run", "wider")
    assert "train" in done.stdout
    assert not {"features", "baselines", "prepare"} & set(ran(done))
    compared = lathe(checkout, "compare", "HEAD", "wider").stdout
    assert "model.hidden_dim" in compared
    assert "difference to HEAD" in compared
    assert "wider accuracy" in compared
    assert "warning" not in compared


def test_texts_are_classified_from_the_command_line_and_from_a_file(checkout):
    lines = (checkout.root / "classify/data/predictions/test.jsonl").read_text().splitlines()
    known = [json.loads(line) for line in lines]
    found = map(json.loads, lathe(checkout, "classify", *(row["text"] for row in known)).stdout.splitlines())
    for row, own in zip(found, known, strict=True):
        assert row["label"] == (own["predicted"][0] if own["predicted"] else None)
        assert row["label"] or row["nearest"] == own["top"]
        assert row["probability"] == pytest.approx(own["confidence"], abs=1e-4)
    tiny_bert.write_csv(checkout.root / "texts.csv", [(row["text"], "") for row in known])
    lathe(checkout, "classify", "--file", "texts.csv", "--out", "labels.jsonl")
    written = (checkout.root / "labels.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == [row["text"] for row in known]
    refusal = lathe(checkout, "classify", check=False)
    assert refusal.returncode == 2
    assert "no text" in refusal.stderr


def test_a_search_runs_trials_of_the_classifier_alone(checkout):
    plan = (checkout.root / "classify/search/default.yaml").read_text().replace("n_trials: 12", "n_trials: 1")
    (checkout.root / "classify/search/one.yaml").write_text(plan)
    checkout.commit()
    # A trial ends where the search is not its parent: it is not to be forked.
    done = lathe(checkout.without_preloading(), "search", "classify/search/one.yaml")
    assert "1 trials ended, 0 of them failed" in done.stdout
    assert "classifier.accuracy" in done.stdout
