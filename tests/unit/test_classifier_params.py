"""The classifier's parameters: every key documented, every wrong value refused."""

import re

import pytest
from refusals import refused
from ruamel.yaml import YAML

from lathe.common import paths
from lathe.config import reference
from lathe.config.base import Section, section_of
from lathe.config.classifier_config import load_classifier
from lathe.config.classifier_params import ClassifierParams


def write(folder, changes):
    tree = YAML(typ="rt").load(paths.CLASSIFIER_PARAMS)
    for key, value in changes.items():
        *parents, last = key.split(".")
        part = tree
        for parent in parents:
            part = part[parent]
        part[last] = value
    (folder / "classify").mkdir()
    YAML().dump(tree, folder / "classify/params.yaml")
    return folder / "classify/params.yaml"


@pytest.mark.parametrize(
    ("changes", "code", "parts"),
    [
        ({"training.tuning": "lora"}, "invalid-value", ["freeze_backbone is true", "set freeze_backbone to false"]),
        (
            {"training.freeze_backbone": False},
            "invalid-value",
            ["freeze_backbone is false", "set freeze_backbone to true"],
        ),
        ({"training.tunin": "lora"}, "unknown-key", ["training.tunin", "did you mean 'tuning'?"]),
        ({"model.backbone": "minilmm"}, "unknown-preset", ["model.backbone is 'minilmm'", "did you mean 'minilm'?"]),
        ({"dataset": "nope-nope"}, "unknown-preset", ["dataset is 'nope-nope'"]),
        ({"dataset": "commands-and-paragraphs"}, "mixture", ["a mixture", "one of its parts"]),
        ({"model.pooling": "max"}, "invalid-value", ["model.pooling is 'max'", "mean, last, cls"]),
        ({"model.dropout": 1.0}, "invalid-value", ["model.dropout is 1.0"]),
        ({"data.label_separator": ";"}, "invalid-value", ["label_separator goes with multi_label"]),
        ({"data.multi_label": True}, "invalid-value", ["label_fields makes one label"]),
        (
            {"data.multi_label": True, "data.label_fields": None, "data.none_label": "x"},
            "invalid-value",
            ["none_label"],
        ),
        ({"export.opset": 9}, "invalid-value", ["export.opset is 9"]),
    ],
)
def test_a_wrong_parameter_is_refused_with_its_key_and_remedy(tmp_path, changes, code, parts):
    file = write(tmp_path, changes)
    with refused(code, "classify/params.yaml", *parts):
        load_classifier(file)


def leaves(section: type[Section], path=()):
    for key, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key), field


def test_every_key_of_the_file_carries_its_documented_meaning_and_unit():
    lines = paths.CLASSIFIER_PARAMS.read_text().splitlines()
    for path, field in leaves(ClassifierParams):
        written = [line for line in lines if re.match(rf"{'  ' * (len(path) - 1)}{path[-1]}:", line)]
        assert any(line.endswith(f" # {reference.format_comment(field)}") for line in written), (path, written)


def test_every_key_is_read_by_the_code():
    folders = ("classify/stages", "src/lathe/classify")
    code = "".join(file.read_text() for folder in folders for file in (paths.ROOT / folder).rglob("*.py"))
    for path, _ in leaves(ClassifierParams):
        assert path[0] == "lora" or re.search(rf"\.{path[-1]}\b", code) or path[-1] == "freeze_backbone", path
