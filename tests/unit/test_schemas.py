"""JSON Schemas: as the models say, named by the files that they are for, and met by them."""

import json
import os
import re
import shutil

import pytest
from ruamel.yaml import YAML

from lathe.common import paths
from lathe.experiments import schemas

RECIPES = paths.ROOT / "experiments"
FILES = [
    *((paths.ROOT / f"{kind}.yaml", kind) for kind in ("params", "presets")),
    *((file, "recipe") for file in sorted(RECIPES.glob("*.yaml"))),
    *((file, "base") for file in sorted((RECIPES / "base").glob("*.yaml"))),
    (paths.CLASSIFIER_PARAMS, "classifier-params"),
    *((file, "classifier-recipe") for file in sorted((paths.CLASSIFIER / "experiments").glob("*.yaml"))),
]


@pytest.mark.parametrize("kind", schemas.KINDS)
def test_the_committed_schema_is_that_of_the_models(kind):
    assert schemas.schema_file(kind).read_text() == schemas.write_schema(kind), "run `make docs`"


@pytest.mark.parametrize(("file", "kind"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_the_first_line_of_a_file_names_its_schema(file, kind):
    first = file.read_text().splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match
    assert (file.parent / match[1]).resolve() == schemas.schema_file(kind)


@pytest.mark.parametrize(("file", "kind"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_a_file_that_ships_meets_its_schema(file, kind):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schemas.schema_file(kind).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(YAML(typ="safe").load(file))


@pytest.mark.parametrize(
    ("kind", "tree"),
    [
        ("params", {"sed": 1}),
        ("presets", {"models": {"mine": {"source": "magic"}}, "datasets": {}}),
        ("recipe", {"description": "a", "hypothesis": "b", "expect": "c", "overrides": {"lora.rank": 8}}),
        ("recipe", {"description": "a", "hypothesis": "b", "expect": "c", "overrides": {"lora.r": "8"}}),
        ("recipe", {"overrides": {"lora.r": 8}}),
        ("base", {"overrides": {}}),
        ("classifier-recipe", {"description": "a", "overrides": {"lora.lora_dropout": 2}}),
        ("classifier-recipe", {"description": "a", "overrides": {"training.method": "sft"}}),
        ("classifier-params", {"seed": 1}),
    ],
)
def test_a_schema_refuses_what_lathe_refuses(kind, tree):
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schemas.build_schema(kind)).validate(tree)


def test_the_line_and_the_comments_outlive_an_override_that_dvc_writes(tmp_path):
    from dvc.utils.hydra import apply_overrides

    file = tmp_path / "params.yaml"
    shutil.copy(paths.PARAMS, file)
    apply_overrides(file, ["training.learning_rate=5e-5"])
    before, after = paths.PARAMS.read_text(), file.read_text()
    assert after.splitlines()[0] == before.splitlines()[0]
    comments = re.compile(r"(?<= )#.*|^#.*", re.MULTILINE)
    assert comments.findall(after) == comments.findall(before)


def test_the_folder_holds_nothing_else():
    assert set(os.listdir(schemas.FOLDER)) == {f"{kind}.json" for kind in schemas.KINDS}
