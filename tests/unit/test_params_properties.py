"""Whatever stands in params.yaml or presets.yaml is taken as the documentation says, or refused in plain lines."""

import copy
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from toy import toy_text

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.load import Config, load

pytestmark = pytest.mark.heavy

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 2)
    | st.floats()
    | st.floats(0, 1)
    | st.text(max_size=8)
    | st.sampled_from(["auto", "null", "1", "5e-05", "all-linear", "Q8_0", "linear", "tiny", "commands"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
CHECKED_FURTHER = {
    "model",
    "dataset",
    "quantize.types",
    "export.formats",
    "sampling.files",
    "benchmark.tasks",
    "quantize.output_tensor_type",
    "quantize.token_embedding_type",
    "quantize.tensor_types",
    "bert_score.model",
    "evaluate.metrics",
    "evaluate.primary_metric",
    "evaluate.answer_pattern",
    "evaluate.gates",
    "generate.engine",
    "generate.servers",
    "generate.vllm_options",
    "training.tuning",
    "training.launcher",
    "dpo.label_smoothing",
    "grpo.per_device_train_batch_size",
    "grpo.num_generations",
    "grpo.vllm_mode",
    "grpo.vllm_server_base_url",
    "judge.base_url",
    "tracking.mlflow.tracking_uri",
}
MORE = 3 if os.environ.get("LATHE_ALL_TESTS") else 1  # times as many examples, as `make test-all` tries
QUICK = settings(max_examples=15 * MORE, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def documented() -> dict[str, dict[str, str]]:
    """Every key of params.yaml with the type and the range that docs/params.md gives for it."""
    page = (paths.ROOT / "docs/params.md").read_text().partition("# Presets")[0]
    found: dict[str, dict[str, str]] = {}
    section: str | None = ""
    for line in page.splitlines():
        if line.startswith("## "):
            section = "" if line == "## Top level" else line[3:] + "."
        if line.startswith("### "):  # entries of a list: none need be there, and each is checked as a whole
            section = None
        if section is None:
            continue
        if match := re.match(r"\| `(\w+)` \| (.*?) \|(?: .*?)?\| ?(.*?) ?\| .* \|$", line):
            found[section + match[1]] = {"type": match[2], "range": match[3]}
    return found


DOCUMENTED = documented()
TREE = YAML(typ="safe").load(toy_text())
PRESETS = YAML(typ="safe").load(paths.PRESETS.read_text())


def allowed(value: Any, kind: str, bounds: str) -> bool:
    """Whether the documentation allows the value; written from its words, not from the code that validates."""
    if kind.endswith(" by text"):  # a map, whose keys are names of a template's variables
        names = isinstance(value, dict) and all(re.fullmatch(r"[A-Za-z_]\w*", key) for key in value)
        return names and all(allowed(inner, kind.removesuffix(" by text"), bounds) for inner in value.values())
    if literals := re.findall(r"`(.*?)`", kind):
        named = [{"true": True, "false": False, "null": None}.get(name, name) for name in literals]
        if any(value is name or (isinstance(name, str) and value == name) for name in named):
            return True
    kinds = [name for name in re.sub(r"`.*?`", "", kind).replace(",", " or ").split(" or ") if name.strip()]
    return any(allowed_by_one(value, name.strip(), bounds) for name in kinds)


# Lists that say nothing when they are empty.
MAY_BE_EMPTY = ("preprocess.added_tokens", "sampling.files", "benchmark.tasks", "generate.servers", "export.formats")


def allowed_by_one(value: Any, kind: str, bounds: str) -> bool:
    if kind.startswith("list of "):
        return isinstance(value, list) and bool(value) and all(allowed(item, kind[8:], "") for item in value)
    if kind == "text":
        return isinstance(value, str) and bool(value)
    numeric = int if kind == "integer" else (int, float)
    if kind not in {"integer", "number"} or not isinstance(value, numeric) or isinstance(value, bool):
        return False
    return math.isfinite(value) and all(within(value, bound) for bound in bounds.split(", ") if bound)


def within(value: float, bound: str) -> bool:
    sign, limit = bound.split(" ")[0], float(bound.split(" ")[1].replace(",", ""))
    return {">": value > limit, "≥": value >= limit, "<": value < limit, "≤": value <= limit}[sign]


def load_files(folder: Path, tree: Any, presets: Any) -> Config | list[str]:
    """Write both files, and return what they are loaded as or the lines of the refusal."""
    for name, content in (("params.yaml", tree), ("presets.yaml", presets)):
        (folder / name).write_text(in_yaml(content), encoding="utf-8")
    try:
        return load(folder / "params.yaml", folder / "presets.yaml")
    except InputError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(re.match(r"(params|presets)\.yaml:(\d+:)? ", line) for line in lines), lines
        return lines


def in_yaml(value: Any) -> str:
    """Write as YAML 1.2; ruamel's own writer makes files of odd keys that it cannot read."""
    match value:
        case dict():
            return "{" + ", ".join(f"{in_yaml(key)}: {in_yaml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(in_yaml, value)) + "]"
        case str():
            return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08x}" for c in value) + '"'
        case float() if not math.isfinite(value):
            return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}[str(value)]
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(tree)
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return changed


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for step, inner in steps for found in ((*path, step), *nodes(inner, (*path, step)))]


def test_the_documentation_covers_every_key():
    leaves = {".".join(path) for path in nodes(TREE) if all(isinstance(step, str) for step in path)}
    assert set(DOCUMENTED) == {leaf for leaf in leaves if not any(other.startswith(f"{leaf}.") for other in leaves)}


@pytest.mark.parametrize("key", DOCUMENTED)
@given(value=VALUES)
@QUICK
def test_a_value_is_taken_exactly_where_the_documentation_allows_it(tmp_path, key, value):
    """What must fit something else is checked further: there a refusal is right too."""
    loaded = load_files(tmp_path, put(TREE, tuple(key.split(".")), value), PRESETS)
    fits = allowed(value, DOCUMENTED[key]["type"], DOCUMENTED[key]["range"])
    if isinstance(loaded, Config):
        assert fits or (value == [] and key in MAY_BE_EMPTY), f"{value!r} was taken"
        taken: Any = loaded.params
        for name in key.split("."):
            taken = getattr(taken, name)
        assert taken == value
    else:
        assert not fits or key in CHECKED_FURTHER, loaded
        assert any(key in line for line in loaded), loaded


@given(data=st.data())
@settings(QUICK, max_examples=100 * MORE)
def test_any_part_of_either_file_may_be_anything(tmp_path, data):
    trees = {"params": TREE, "presets": PRESETS}
    for name in data.draw(st.lists(st.sampled_from(sorted(trees)), min_size=1, max_size=3)):
        found = nodes(trees[name])
        if found:
            trees[name] = put(trees[name], data.draw(st.sampled_from(found)), data.draw(VALUES))
    load_files(tmp_path, trees["params"], trees["presets"])


@given(tree=VALUES, presets=VALUES)
@settings(QUICK, max_examples=100 * MORE)
def test_a_whole_file_of_something_else_is_refused(tmp_path, tree, presets):
    assert isinstance(load_files(tmp_path, tree, PRESETS), list)
    assert isinstance(load_files(tmp_path, TREE, presets), list)


@given(content=st.binary(max_size=200))
@settings(QUICK, max_examples=100 * MORE)
def test_bytes_that_are_no_parameters_are_refused(tmp_path, content):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(InputError):
        load(tmp_path / "params.yaml", paths.PRESETS)


@pytest.mark.parametrize("key", DOCUMENTED)
def test_a_key_that_is_missing_is_named(tmp_path, key):
    tree = copy.deepcopy(TREE)
    *parents, last = key.split(".")
    section = tree
    for parent in parents:
        section = section[parent]
    del section[last]
    assert load_files(tmp_path, tree, PRESETS) == [
        f"params.yaml: {key} is missing; add it (`lathe schema` says what it means)"
    ]
