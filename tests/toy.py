"""The toy, which the tests run on: params.yaml with the values of the recipe tiny, whatever it selects itself."""

import os
import tempfile
from functools import cache
from pathlib import Path

from lathe.adopt.own_files import edit_params
from lathe.common import dotted_keys, paths
from lathe.config.load import Config, load
from lathe.config.yaml_files import read_yaml
from lathe.experiments.recipes import read_overrides

# For a program of the tests that calls `load_toy` in a process of its own.
PYTHONPATH = os.pathsep.join(str(paths.ROOT / folder) for folder in ("src", "tests"))


@cache
def toy_text() -> str:
    """Return the repository's params.yaml with the toy's values; comments and all other lines are as they are."""
    values = dotted_keys.flatten(read_yaml(paths.ROOT / "params.yaml"))
    toy = read_overrides(paths.ROOT / "experiments/tiny.yaml")
    different = {key: value for key, value in toy.items() if value != values[key]}
    return edit_params((paths.ROOT / "params.yaml").read_text(encoding="utf-8"), different)


def load_toy() -> Config:
    """Return the configuration of the toy."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        file.write_text(toy_text(), encoding="utf-8")
        return load(file)
