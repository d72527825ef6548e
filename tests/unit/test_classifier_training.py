"""The classifier's training on a BERT of two layers: what is frozen stays, what is trained moves."""

from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from refusals import refused

from lathe.classify import backbone, evaluate, export_onnx, features, freeze_proof
from lathe.classify.baselines import run_baselines
from lathe.classify.labels import read_labels, read_split
from lathe.classify.model import Architecture, Classifier, load_classifier_model, save_classifier
from lathe.classify.train import Trained, train
from lathe.common import json_files
from lathe.config.classifier_config import load_classifier
from lathe.config.classifier_params import ClassifierParams

pytestmark = pytest.mark.heavy

SPLITS = ("train", "validation", "test")


def changed(**changes: Any) -> ClassifierParams:
    tree = load_classifier().params.model_dump()
    small = {
        "model__hidden_dim": 16,
        "data__max_length": 16,
        "training__epochs": 3,
        "training__batch_size": 16,
        "training__learning_rate": 0.01,
        "training__encoder_learning_rate": 0.001,
        "training__mixed_precision": "fp32",
        "training__early_stopping_patience": None,
        "evaluate__bootstrap_samples": 50,
    }
    for key, value in {**small, **changes}.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return ClassifierParams.model_validate(tree)


FULL = {"training__tuning": "full", "training__freeze_backbone": False}
LORA = {"training__tuning": "lora", "training__freeze_backbone": False, "lora__r": 4}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, prepared rows, and their features."""
    base = tmp_path_factory.mktemp("classifier")
    rows = tiny_bert.make_rows()
    tiny_bert.make_backbone(base / "backbone", [text for text, _ in rows])
    tiny_bert.write_prepared(base / "prepared", rows)
    several = [(text, [label, "polite"] if "hall" in text else [label]) for text, label in rows]
    tiny_bert.write_prepared(base / "several", several, multi_label=True)
    for name in ("prepared", "several"):
        compute(base, name, changed())
    return base


def compute(base: Path, prepared: str, params: ClassifierParams, batch_size: int = 32) -> Path:
    out = base / f"features of {prepared}"
    out.mkdir(exist_ok=True)
    frozen = backbone.load_backbone(base / "backbone").requires_grad_(False)
    classifier = Classifier(frozen, torch.nn.Identity(), Architecture.of(params)).eval()
    tokenizer = backbone.load_tokenizer(base / "backbone")
    features.write_digests(out, freeze_proof.hash_backbone(frozen).frozen)
    for split in SPLITS:
        tokens = backbone.tokenize(tokenizer, read_split(base / prepared, split)[0], params.data.max_length)
        made = features.compute_features(classifier, tokens, padding=0, batch_size=batch_size, task=split)
        features.save_features(out, split, made)
    return out


def run(folder: Path, out: Path, params: ClassifierParams, prepared: str = "prepared") -> Trained:
    trained = train(
        folder / "backbone",
        folder / prepared,
        folder / f"features of {prepared}",
        out / "metrics",
        out / "train.log",
        params,
    )
    (out / "model").mkdir()
    save_classifier(out / "model", trained.best, trained.architecture, trained.labels)
    return trained


def test_a_frozen_backbone_keeps_every_digest_and_the_head_learns(folder, tmp_path):
    trained = run(folder, tmp_path, changed(training__epochs=60))
    assert trained.proof["frozen_tensors"] == len(trained.proof["tensors"]) > 30
    assert all(one["frozen"] and one["before"] == one["after"] for one in trained.proof["tensors"])
    assert {name.partition(".")[0] for name in trained.best} == {"head"}
    assert trained.summary["best_val_score"] > 0.9
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert '"loss"' in lines[0]
    assert '"peak_memory_bytes"' in lines[0]


def test_a_nudged_weight_fails_the_check(folder):
    model = backbone.load_backbone(folder / "backbone").requires_grad_(False)
    before = freeze_proof.hash_backbone(model)
    weight = model.encoder.layer[1].output.dense.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    with refused("frozen-tensor-moved", "1 frozen tensors", "encoder.layer.1.output.dense.weight"):
        freeze_proof.make_proof(before, freeze_proof.hash_backbone(model))


def test_features_of_another_backbone_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    tiny_bert.make_backbone(other, [text for text, _ in tiny_bert.make_rows()], seed=2)
    with refused("frozen-tensor-moved"):
        train(other, folder / "prepared", folder / "features of prepared", tmp_path / "m", tmp_path / "l", changed())


@pytest.mark.parametrize(("tuning", "frozen"), [(FULL, False), (LORA, True)], ids=["full", "lora"])
def test_what_is_trained_of_the_backbone_moves_and_the_rest_does_not(folder, tmp_path, tuning, frozen):
    trained = run(folder, tmp_path, changed(**tuning))
    proof = trained.proof
    assert (proof["frozen_tensors"] > 0) == frozen
    assert proof["trained_moved"] == proof["trained_tensors"] > 0
    for one in proof["tensors"]:
        assert (one["before"] == one["after"]) == one["frozen"], one["tensor"]


@pytest.mark.parametrize("tuning", [{}, FULL, LORA], ids=["head", "full", "lora"])
def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(folder, tmp_path, tuning):
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        params = changed(**tuning, training__epochs=1).model_copy(update={"seed": seed})
        run(folder, tmp_path / name, params)
        made[name] = (tmp_path / name / "model/model.safetensors").read_bytes()
    assert made["a"] == made["b"] != made["c"]


def test_accumulated_batches_make_the_steps_of_large_ones(folder, tmp_path):
    weights = []
    for name, size, accumulated in (("whole", 32, 1), ("parts", 8, 4)):
        (tmp_path / name).mkdir()
        params = changed(
            model__dropout=0.0,
            training__batch_size=size,
            training__gradient_accumulation_steps=accumulated,
            training__class_weights="balanced",
        )
        weights.append(run(folder, tmp_path / name, params).final["head.1.weight"])
    assert torch.allclose(weights[0], weights[1], atol=1e-5)


def test_validation_stops_early_and_the_best_epoch_is_kept(folder, tmp_path):
    params = changed(training__epochs=40, training__early_stopping_patience=2, training__learning_rate=0.05)
    trained = run(folder, tmp_path, params)
    assert trained.summary["epochs"] == trained.summary["best_epoch"] + 2 < 40
    best, final = (tensors["head.1.weight"] for tensors in (trained.best, trained.final))
    assert not torch.equal(best, final)


def test_a_loss_that_is_no_number_is_refused_and_nothing_is_written(folder, tmp_path):
    with refused("loss-not-finite", "training.learning_rate", kept=False):
        run(folder, tmp_path, changed(training__learning_rate=1e30, training__max_grad_norm=1e30, training__epochs=9))
    assert not (tmp_path / "train.log").exists()


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_padding_changes_no_feature(folder, pooling):
    params = changed(model__pooling=pooling)
    model = Classifier(backbone.load_backbone(folder / "backbone"), torch.nn.Identity(), Architecture.of(params)).eval()
    rows = [[2, 7, 8, 9, 10, 3], [2, 9, 3]]
    with torch.inference_mode():
        together = model.read_features(backbone.make_batch(rows, 0))
        alone = torch.cat([model.read_features(backbone.make_batch([row], 0)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


def test_texts_over_the_longest_are_cut_and_counted(folder):
    tokenizer = backbone.load_tokenizer(folder / "backbone")
    tokens = backbone.tokenize(tokenizer, ["open the hall gate please", "open"], 4)
    assert [len(row) for row in tokens.ids] == [4, 3]
    assert tokens.cut == 1
    with refused("length-too-long", "data.max_length is 99", "at most 32"):
        backbone.check_length(folder / "backbone", 99)


@pytest.mark.parametrize("tuning", [{}, FULL, LORA], ids=["head", "full", "lora"])
def test_a_saved_classifier_answers_as_the_one_that_was_trained(folder, tmp_path, tuning):
    trained = run(folder, tmp_path, changed(**tuning))
    params = changed(**tuning)
    found = evaluate.answer_splits(
        tmp_path / "model", folder / "backbone", folder / "prepared", folder / "features of prepared", params
    )
    right = [answer["labels"] == answer["predicted"] for answer in found.answers["validation"]]
    assert sum(right) / len(right) == pytest.approx(trained.summary["best_val_score"])


def test_weights_of_another_head_are_refused(folder, tmp_path):
    run(folder, tmp_path, changed())
    settings = tmp_path / "model/classifier.json"
    json_files.write_json(settings, {**json_files.read_json(settings), "hidden_dim": 8})
    with refused("other-backbone", "model.safetensors", kept=False):
        load_classifier_model(tmp_path / "model", folder / "backbone")


@pytest.mark.parametrize("prepared", ["prepared", "several"])
@pytest.mark.parametrize("tuning", [{}, LORA], ids=["head", "lora"])
def test_onnx_runtime_gives_torchs_labels_and_equal_weights_make_equal_files(folder, tmp_path, tuning, prepared):
    several = prepared == "several"
    params = changed(**tuning, **({"data__label_fields": None, "data__multi_label": True} if several else {}))
    run(folder, tmp_path, params, prepared)
    found = evaluate.answer_splits(
        tmp_path / "model", folder / "backbone", folder / prepared, folder / f"features of {prepared}", params
    )
    json_files.write_json(tmp_path / "calibration.json", vars(found.calibration))
    texts, _ = read_split(folder / prepared, "test")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        report, measured = export_onnx.export(
            tmp_path / "model", folder / "backbone", tmp_path / "calibration.json", texts, tmp_path / name, params
        )
    assert report["same_labels"] == report["rows"] == len(texts)
    assert measured["largest_difference"] < 1e-4
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "two/model.onnx").read_bytes()

    from lathe.classify.predict import TextClassifier

    answers = TextClassifier(tmp_path / "one").classify(texts)
    assert [answer["predicted"] for answer in answers] == [row["predicted"] for row in found.answers["test"]]
    assert read_labels(tmp_path / "one") == read_labels(folder / prepared)


def test_a_causal_language_model_is_a_backbone_by_its_last_token(folder, tmp_path):
    texts = [text for text, _ in tiny_bert.make_rows()]
    base = tmp_path / "causal"
    tiny_bert.make_backbone(base / "backbone", texts, causal=True)
    (base / "prepared").symlink_to(folder / "prepared")
    params = changed(model__pooling="last", **LORA)
    model = Classifier(backbone.load_backbone(base / "backbone"), torch.nn.Identity(), Architecture.of(params)).eval()
    rows = [[2, 7, 8, 9, 10, 3], [2, 9, 3]]
    with torch.inference_mode():
        together = model.read_features(backbone.make_batch(rows, 0))
        alone = torch.cat([model.read_features(backbone.make_batch([row], 0)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-6)
    compute(base, "prepared", params)
    run(base, tmp_path, params)
    json_files.write_json(tmp_path / "calibration.json", {"temperature": 1.0, "threshold": None})
    (tmp_path / "onnx").mkdir()
    report, measured = export_onnx.export(
        tmp_path / "model",
        base / "backbone",
        tmp_path / "calibration.json",
        read_split(folder / "prepared", "test")[0],
        tmp_path / "onnx",
        params,
    )
    assert report["same_labels"] == report["rows"]
    assert measured["largest_difference"] < 1e-4


def test_probabilities_that_differ_fail_the_export(folder, tmp_path):
    params = changed(export__max_difference=1e-12)
    run(folder, tmp_path, params)
    json_files.write_json(tmp_path / "calibration.json", {"temperature": 1.0, "threshold": None})
    (tmp_path / "onnx").mkdir()
    with refused("onnx-differs", "export.max_difference", kept=False):
        export_onnx.export(
            tmp_path / "model",
            folder / "backbone",
            tmp_path / "calibration.json",
            read_split(folder / "prepared", "test")[0],
            tmp_path / "onnx",
            params,
        )


@pytest.mark.parametrize("prepared", ["prepared", "several"])
def test_baselines_answer_every_row_and_words_are_enough_for_tfidf(folder, prepared):
    found = run_baselines(folder / prepared, folder / f"features of {prepared}", changed())
    accuracy = {
        name: sum(row["labels"] == row["predicted"] for row in one.answers["test"]) / len(one.answers["test"])
        for name, one in found.items()
    }
    assert accuracy["tfidf"] > 0.9
    assert accuracy["majority"] < 0.6
    assert {len(one.answers["validation"]) for one in found.values()} == {
        len(read_split(folder / prepared, "validation")[0])
    }
