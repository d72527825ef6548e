"""The classifier's scores: equal to scikit-learn's, calibrated, and with thresholds that validation chooses."""

import numpy as np
import pytest
import torch

from lathe.classify.answers import calibrate, describe_probabilities, join_answers
from lathe.classify.calibration import (
    choose_label_threshold,
    choose_none_threshold,
    compute_probabilities,
    fit_temperature,
)
from lathe.classify.labels import Labels
from lathe.classify.loss import compute_class_weights, sum_loss, sum_weights
from lathe.classify.quick_scores import score_validation
from lathe.classify.scores import compare_answers, score_answers, tabulate_confusion, tabulate_reliability

CLASSES = ("a", "b", "c")
SETTINGS = {"bins": 10, "samples": 200, "seed": 1}


def draw(rows: int, *, none: bool = False, seed: int = 1) -> list[dict]:
    rng = np.random.default_rng(seed)
    answers = []
    for number in range(rows):
        label = CLASSES[rng.choice(3, p=[0.6, 0.3, 0.1])]
        top = label if rng.random() < 0.7 else CLASSES[rng.integers(3)]
        own = [] if none and number % 5 == 0 else [label]
        predicted = [] if none and rng.random() < 0.3 else [top]
        answers.append({"labels": own, "predicted": predicted, "top": top, "confidence": float(rng.uniform(0.3, 1))})
    return answers


def test_accuracy_and_f1_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    answers = draw(400)
    actual, predicted = ([answer[key][0] for answer in answers] for key in ("labels", "predicted"))
    found = score_answers(answers, CLASSES, **SETTINGS)
    assert found["scores"]["accuracy"]["value"] == pytest.approx(accuracy_score(actual, predicted), abs=1e-6)
    assert found["scores"]["macro_f1"]["value"] == pytest.approx(f1_score(actual, predicted, average="macro"), abs=1e-6)
    precision, recall, f1, _ = precision_recall_fscore_support(actual, predicted, labels=list(CLASSES))
    for index, one in enumerate(found["classes"]):
        assert one["precision"] == pytest.approx(precision[index], abs=1e-6)
        assert one["recall"] == pytest.approx(recall[index], abs=1e-6)
        assert one["f1"]["value"] == pytest.approx(f1[index], abs=1e-6)
        assert one["f1"]["low"] < one["f1"]["value"] < one["f1"]["high"]


def test_f1_of_several_labels_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    rng = np.random.default_rng(3)
    answers = [
        {key: [name for name in CLASSES if rng.random() < 0.4] for key in ("labels", "predicted")} for _ in range(300)
    ]
    binary = MultiLabelBinarizer(classes=CLASSES)
    actual, predicted = (binary.fit_transform([answer[key] for answer in answers]) for key in ("labels", "predicted"))
    scores = score_answers(answers, CLASSES, **SETTINGS)["scores"]
    for average in ("macro", "micro"):
        assert scores[f"{average}_f1"]["value"] == pytest.approx(f1_score(actual, predicted, average=average), abs=1e-6)
    assert scores["accuracy"]["value"] == pytest.approx((actual == predicted).all(axis=1).mean(), abs=1e-6)


def test_scores_in_and_out_of_scope_are_shares_of_their_own_rows():
    answers = draw(500, none=True)
    scores = score_answers(answers, CLASSES, **SETTINGS)["scores"]
    inside = [answer for answer in answers if answer["labels"]]
    outside = [answer for answer in answers if not answer["labels"]]
    right = [answer["labels"] == answer["predicted"] for answer in inside]
    assert scores["in_scope_accuracy"]["value"] == pytest.approx(np.mean(right), abs=1e-6)
    assert scores["none_recall"]["value"] == pytest.approx(np.mean([not one["predicted"] for one in outside]), abs=1e-6)


def test_the_calibration_error_is_the_distance_of_confidence_and_accuracy():
    sure = [{"labels": ["a"], "predicted": ["a"], "top": "a", "confidence": 0.9}] * 9
    wrong = [{"labels": ["b"], "predicted": ["a"], "top": "a", "confidence": 0.9}]
    scores = score_answers(sure + wrong, CLASSES, **SETTINGS)["scores"]
    assert scores["calibration_error"]["value"] == pytest.approx(0.0, abs=1e-6)
    scores = score_answers(sure + wrong * 9, CLASSES, **SETTINGS)["scores"]
    assert scores["calibration_error"]["value"] == pytest.approx(0.4, abs=1e-6)
    assert tabulate_reliability(sure + wrong, 10) == [{"confidence": 0.9, "accuracy": 0.9, "rows": 10}]
    assert tabulate_confusion(wrong) == [{"actual": "b", "predicted": "a"}]


def test_equal_answers_differ_in_nothing_and_better_ones_significantly():
    worse = draw(300)
    better = [{**answer, "predicted": answer["labels"], "top": answer["labels"][0]} for answer in worse]
    same = compare_answers(worse, worse, CLASSES, **SETTINGS)
    assert {name: (one["value"], one["p"]) for name, one in same.items()} == dict.fromkeys(same, (0.0, 1.0))
    differences = compare_answers(worse, better, CLASSES, **SETTINGS)
    accuracy = np.mean([answer["labels"] == answer["predicted"] for answer in worse])
    assert differences["accuracy"]["value"] == pytest.approx(1 - accuracy, abs=1e-6)
    assert differences["accuracy"]["low"] > 0
    assert differences["accuracy"]["p"] < 0.01
    assert compare_answers(better, worse, CLASSES, **SETTINGS)["accuracy"]["value"] < 0


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_is_the_one_that_the_labels_were_drawn_with(temperature, multi_label):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(6000, 3)) * 4
    probabilities = compute_probabilities(logits, temperature, multi_label=multi_label)
    if multi_label:
        targets = (rng.random(probabilities.shape) < probabilities).astype(np.float64)
    else:
        targets = np.array([rng.choice(3, p=row) for row in probabilities], dtype=np.float64)
    assert fit_temperature(logits, targets) == pytest.approx(temperature, rel=0.1)


def test_the_threshold_for_none_parts_the_sure_from_the_unsure():
    confidence = np.array([0.9, 0.8, 0.95, 0.7, 0.3, 0.4])
    is_none = np.array([False, False, False, False, True, True])
    correct = np.array([True, True, True, True, False, False])
    threshold = choose_none_threshold(confidence, correct, is_none)
    assert 0.4 < threshold < 0.7


def test_without_texts_of_none_there_is_no_threshold_and_every_text_has_a_class():
    logits, labels = np.array([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 0.1]]), Labels(CLASSES, multi_label=False)
    calibration = calibrate(logits, [["a"], ["b"], ["c"]], labels)
    assert calibration.threshold is None
    with_none = calibrate(logits, [["a"], ["b"], []], labels)
    assert with_none.threshold is not None
    probabilities = compute_probabilities(logits, 1.0, multi_label=False)
    answers = describe_probabilities(probabilities, labels, 0.5)
    assert [answer["predicted"] for answer in answers] == [["a"], ["b"], []]
    assert answers[2]["top"] == "c"
    joined = join_answers(["x"], [["a"]], answers[:1])
    assert joined[0] | {"confidence": 0} == {
        "text": "x",
        "labels": ["a"],
        "predicted": ["a"],
        "top": "a",
        "confidence": 0,
    }


def test_the_threshold_of_several_labels_is_the_best_on_validation():
    probabilities = np.array([[0.35, 0.1], [0.3, 0.32], [0.05, 0.4]])
    assert 0.1 < choose_label_threshold(probabilities, (probabilities > 0.2).astype(float)) <= 0.3


def test_scores_in_training_are_those_of_the_report():
    torch.manual_seed(0)
    logits, targets = torch.randn(200, 3), torch.randint(0, 3, (200,))
    quick = score_validation(logits, targets)
    rows = [
        {"labels": [CLASSES[t]], "predicted": [CLASSES[p]], "top": CLASSES[p]}
        for t, p in zip(targets.tolist(), logits.argmax(1).tolist(), strict=True)
    ]
    scores = score_answers(rows, CLASSES, **SETTINGS)["scores"]
    assert quick["accuracy"] == pytest.approx(scores["accuracy"]["value"], abs=1e-6)
    assert quick["macro_f1"] == pytest.approx(scores["macro_f1"]["value"], abs=1e-6)


def test_balanced_weights_are_those_of_scikit_learn_and_the_loss_is_torchs():
    from sklearn.utils.class_weight import compute_class_weight

    targets = torch.tensor([0] * 7 + [1] * 2 + [2])
    weights = compute_class_weights(targets, 3, "balanced")
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets.numpy())
    assert weights.tolist() == pytest.approx(expected.tolist())
    assert compute_class_weights(targets, 3, "none") is None
    logits = torch.randn(10, 3)
    mean = sum_loss(logits, targets, weights, 0.0) / sum_weights(targets, weights)
    assert mean.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets, weight=weights).item())
    several = torch.eye(3)[targets]
    mean = sum_loss(logits, several, None, 0.0) / sum_weights(several, None)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, several).item()
    assert mean.item() == pytest.approx(wanted, rel=1e-5)
