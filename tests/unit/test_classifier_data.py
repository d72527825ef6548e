"""The classifier's data: labels in every form, unusable rows counted, contradictions and imbalance named."""

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from lathe.classify.label_columns import parse_labels
from lathe.classify.label_faults import LabelledText, describe_labels, find_contradictions
from lathe.classify.labels import read_labels, read_split
from lathe.classify.prepare import list_warnings, prepare
from lathe.config.classifier_config import load_classifier
from lathe.config.classifier_params import ClassifierParams
from lathe.config.presets import LocalDataset
from lathe.data.row_checks import RowFault


def changed(**changes: Any) -> ClassifierParams:
    tree = load_classifier().params.model_dump()
    tree["data"]["label_fields"] = None
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    return ClassifierParams.model_validate(tree)


def prepared(
    folder: Path, rows: list[dict[str, Any]], preset: dict[str, Any] | None = None, **changes: Any
) -> tuple[dict[str, Any], Path]:
    raw, out = folder / "raw", folder / "prepared"
    raw.mkdir()
    out.mkdir()
    (raw / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = LocalDataset(source="local", path="data/local/x", **(preset or {}))
    return prepare(raw, entry, out, changed(**changes)), out


def texts(count: int, label: str, name: str = "text") -> list[dict[str, Any]]:
    return [{name: f"{label} number {index} of many", "label": label} for index in range(count)]


@pytest.mark.parametrize(
    ("value", "settings", "labels"),
    [
        ("refund", {}, ["refund"]),
        (" refund ", {}, ["refund"]),
        ("oos", {"data__none_label": "oos"}, []),
        ('["b","a","b"]', {"data__multi_label": True}, ["a", "b"]),
        ("[]", {"data__multi_label": True}, []),
        ("b; a;", {"data__multi_label": True, "data__label_separator": ";"}, ["a", "b"]),
        ('{"action":"on","device":"lamp","room":"hall"}', {"data__label_fields": ["action", "device"]}, ["on lamp"]),
        ('{"intent":null}', {"data__label_fields": ["intent"], "data__none_label": "oos"}, []),
        ('{"intent":"oos"}', {"data__label_fields": ["intent"], "data__none_label": "oos"}, []),
    ],
)
def test_a_label_column_means_these_labels(value, settings, labels):
    assert parse_labels(value, changed(**settings).data, "label") == labels


@pytest.mark.parametrize(
    ("value", "settings", "reason"),
    [
        ("  ", {}, "empty_label"),
        ("red", {"data__multi_label": True}, "not_a_list"),
        ("[1]", {"data__multi_label": True}, "not_a_list"),
        ("red", {"data__label_fields": ["intent"]}, "not_an_object"),
        ('{"x":1}', {"data__label_fields": ["intent"]}, "missing_label_field"),
        ('{"intent":null}', {"data__label_fields": ["intent"]}, "not_a_label"),
        ('{"intent":3}', {"data__label_fields": ["intent"]}, "not_a_label"),
    ],
)
def test_a_label_that_cannot_be_read_is_a_fault_with_its_reason(value, settings, reason):
    with pytest.raises(RowFault) as caught:
        parse_labels(value, changed(**settings).data, "label")
    assert caught.value.fault.reason == reason


def test_splits_are_disjoint_and_hold_every_row_once(tmp_path):
    report, out = prepared(tmp_path, [*texts(40, "red"), *texts(40, "blue"), *texts(3, "red")])
    splits = {split: read_split(out, split)[0] for split in ("train", "validation", "test")}
    everything = [text for of_split in splits.values() for text in of_split]
    assert len(everything) == len(set(everything)) == 80
    assert report["removed"]["train"] == {"duplicate": 3}
    assert read_labels(out).names == ("blue", "red")


def test_the_order_of_the_rows_makes_no_difference(tmp_path):
    rows = [*texts(20, "red"), *texts(20, "blue")]
    for name, given in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        prepared(tmp_path / name, given)
    for file in ("train.jsonl", "validation.jsonl", "test.jsonl", "labels.json"):
        assert (tmp_path / "a/prepared" / file).read_bytes() == (tmp_path / "b/prepared" / file).read_bytes()


def test_several_labels_are_read_from_lists(tmp_path):
    rows = [{"text": f"row {n} says", "label": ["x", "y"] if n % 2 else []} for n in range(40)]
    _, out = prepared(tmp_path, rows, {"prompt": "text", "completion": "label"}, data__multi_label=True)
    _, labels = read_split(out, "train")
    assert {tuple(row) for row in labels} == {("x", "y"), ()}
    assert read_labels(out).multi_label


def test_unusable_rows_are_counted_with_file_line_and_field(tmp_path):
    rows = [*texts(30, "red"), *texts(30, "blue"), {"text": "no label", "label": ""}, {"text": 7, "label": "red"}]
    report, _ = prepared(tmp_path, rows, data__max_dropped_fraction=0.1)
    assert report["rows"] == {"read": 62, "kept": 60, "unusable": 2}
    places = {reason: [case["at"] for case in cases] for reason, cases in report["unusable_examples"].items()}
    assert places == {"empty_answer": ["train.jsonl:61"], "not_text": ["train.jsonl:62"]}
    assert {case["field"] for cases in report["unusable_examples"].values() for case in cases} == {"label", "text"}


def test_too_many_unusable_rows_are_refused_with_the_first_of_them(tmp_path):
    with refused("too-many-dropped", "1 of 21 rows", "train.jsonl:21", "data.max_dropped_fraction"):
        prepared(tmp_path, [*texts(10, "red"), *texts(10, "blue"), {"text": "x", "label": ""}])


def test_one_class_is_refused(tmp_path):
    with refused("too-few-labels", "'red'"):
        prepared(tmp_path, texts(30, "red"))


def test_a_label_for_none_that_no_validation_row_has_is_refused(tmp_path):
    with refused("none-label-unused", "data.none_label is 'oos'"):
        prepared(tmp_path, [*texts(20, "red"), *texts(20, "blue")], data__none_label="oos")


def test_imbalance_and_classes_with_few_rows_are_named():
    rows = [LabelledText(str(n), str(n), ("often",)) for n in range(40)] + [LabelledText("x", "x", ("seldom",))]
    found = describe_labels(rows)
    assert (found["imbalance"], found["few"]) == (40.0, ["seldom"])
    report = {
        "splits": [found],
        "labels_without_training_rows": {"test": ["new"]},
        "contradictions": find_contradictions([]),
    }
    lines = list_warnings(report)
    assert "40 times fewer" in lines[0]
    assert "seldom" in lines[1]
    assert "'new'" in lines[2] or "new" in lines[2]


def labelled(*rows: tuple[str, str]) -> list[LabelledText]:
    return [LabelledText(f"rows.jsonl:{number}", text, (label,)) for number, (text, label) in enumerate(rows, start=1)]


@pytest.mark.parametrize(
    ("other", "equal", "near"),
    [
        ("Where is my NEW card, please?", 1, 0),
        ("where is my old card please", 0, 1),
        ("where is my new card please now", 0, 1),
        ("where is my card please", 0, 1),
        ("tell me where my card may be", 0, 0),
    ],
)
def test_texts_that_say_the_same_or_differ_in_one_word_and_have_other_labels_are_found(other, equal, near):
    rows = labelled(("where is my new card please", "arrival"), (other, "lost"))
    found = find_contradictions(rows)
    assert (found["equal_texts"], found["near_duplicates"]) == (equal, near)
    same = find_contradictions([rows[0], LabelledText(rows[1].place, other, ("arrival",))])
    assert (same["equal_texts"], same["near_duplicates"]) == (0, 0)


def test_short_texts_that_differ_in_one_word_are_no_contradiction():
    assert (
        find_contradictions(labelled(("lock the door", "lock"), ("unlock the door", "unlock")))["near_duplicates"] == 0
    )
