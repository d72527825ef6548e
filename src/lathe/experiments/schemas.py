"""JSON Schemas of params.yaml, presets.yaml and recipes, with which editors complete and check them.

They are made from the classes that validate the files. `make docs` writes them to `schemas/`, `lathe schema --json
KIND` prints one. Rules between keys are checked by Lathe alone.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lathe.common import paths
from lathe.common.paths import replace_file
from lathe.config.base import Section
from lathe.config.classifier_params import ClassifierParams
from lathe.config.params import Params
from lathe.config.presets import Presets
from lathe.experiments.recipes import Base, Recipe, list_keys

FOLDER = paths.ROOT / "schemas"

# Each kind of file with its class; a base is what recipes extend.
KINDS: dict[str, type[BaseModel]] = {
    "params": Params,
    "presets": Presets,
    "recipe": Recipe,
    "base": Base,
    "classifier-params": ClassifierParams,
    "classifier-recipe": Recipe,
}
# Those with overrides, and the parameters that these are of.
WITH_OVERRIDES: dict[str, type[Section]] = {"recipe": Params, "base": Params, "classifier-recipe": ClassifierParams}


def main() -> None:
    """Write all schemas to their folder."""
    for kind in KINDS:
        with replace_file(schema_file(kind)) as partial:
            partial.write_text(write_schema(kind), encoding="utf-8")


def schema_file(kind: str) -> Path:
    """Return the file of a kind's schema."""
    return FOLDER / f"{kind}.json"


def write_schema(kind: str) -> str:
    """Return the schema of a kind of file as JSON."""
    return json.dumps(build_schema(kind), indent=2, ensure_ascii=False) + "\n"


def build_schema(kind: str) -> dict[str, Any]:
    """Return the schema of a kind of file."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **KINDS[kind].model_json_schema(),
    }
    if section := WITH_OVERRIDES.get(kind):
        parameters = section.model_json_schema()
        schema["properties"]["overrides"] = {
            **schema["properties"]["overrides"],
            "properties": {key: _find_property(parameters, key) for key in list_keys(section)},
            "additionalProperties": False,
        }
        used = json.dumps(schema)
        schema["$defs"] = {name: part for name, part in parameters["$defs"].items() if f'"#/$defs/{name}"' in used}
    return dict(_drop_titles(schema))


def _find_property(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the schema of a key such as `training.learning_rate`."""
    section = schema
    *parents, last = key.split(".")
    for parent in parents:
        section = schema["$defs"][section["properties"][parent]["$ref"].rpartition("/")[2]]
    return dict(section["properties"][last])


def _drop_titles(node: Any) -> Any:
    """Return a schema without pydantic's titles, which repeat the names of the keys."""
    if isinstance(node, list):
        return [_drop_titles(item) for item in node]
    if isinstance(node, dict):
        return {key: _drop_titles(value) for key, value in node.items() if key != "title" or not isinstance(value, str)}
    return node


if __name__ == "__main__":
    main()
