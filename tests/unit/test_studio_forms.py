"""The studio's forms that write files: the space of a search, faulty rows, settings of params.yaml."""

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from lathe.common import paths
from lathe.config.load import load
from lathe.config.overrides import list_keys
from lathe.studio import model_pages, parameter_form, row_mending, search_plan, search_space, search_text
from lathe.studio.studies import check_search_text

DEFAULT = (paths.ROOT / "experiments/search/default.yaml").read_text(encoding="utf-8")


def read_rows(text: str) -> list[search_space.SpaceRow]:
    return search_space.read_rows(search_text.load_text(text))


def write_rows(text: str, form: dict[str, str]) -> str:
    tree = search_text.load_text(text)
    search_space.write_rows(tree, form)
    return search_text.dump_text(tree)


def read_plan(text: str) -> search_plan.PlanForm:
    return search_plan.read_plan(search_text.load_text(text))


def write_plan(text: str, form: dict[str, str]) -> str:
    tree = search_text.load_text(text)
    search_plan.write_plan(tree, form)
    return search_text.dump_text(tree)


def fill_in_plan(text: str) -> dict[str, str]:
    """The form of a text's study, sampler, objectives and pruner as the page sends it."""
    plan = read_plan(text)
    form = {f"plan:{field.name}": field.text for field in plan.fields}
    form |= {f"pruner:{field.name}": field.text for field in plan.pruner}
    for number, (metric, direction) in enumerate(plan.objectives):
        form |= {f"objective:{number}:metric": metric, f"objective:{number}:direction": direction}
    return {**form, "use_pruner": "true" if plan.pruner else "false", "add_objective": ""}


def fill_in(text: str, **changes: str) -> dict[str, str]:
    """The form of a text's space, with inputs changed: `lora.r.low` is named `lora__r__low`."""
    form: dict[str, str] = {}
    for number, row in enumerate(read_rows(text)):
        form |= {f"space:{number}:key": row.key, f"space:{number}:kind": row.kind}
        form |= {f"space:{number}:{field.name}": field.text for field in row.fields}
        for name, value in changes.items():
            key, _, field = name.replace("__", ".").rpartition(".")
            if key == row.key:
                form[f"space:{number}:{field}"] = value
    return form


# The space of a search


@pytest.mark.parametrize("file", sorted((paths.ROOT / "experiments/search").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_form_that_was_not_touched_leaves_the_text_as_it_is(file: Path):
    text = file.read_text(encoding="utf-8")
    assert write_rows(text, fill_in(text)) == text
    assert write_plan(text, fill_in_plan(text)) == text


def test_a_row_has_the_inputs_of_its_distributions_class():
    rows = {row.key: row for row in read_rows(DEFAULT)}
    assert [field.name for field in rows["lora.r"].fields] == ["low", "high", "log", "step"]
    assert [field.name for field in rows["training.lr_scheduler_type"].fields] == ["choices"]
    assert rows["lora.r"].kinds == ["int", "categorical"]
    assert rows["training.learning_rate"].kinds == ["float", "categorical"]
    assert rows["training.lr_scheduler_type"].kinds == ["categorical"]
    assert "rank" in rows["lora.r"].help


def test_what_is_typed_into_a_row_is_what_the_search_reads_and_all_other_lines_stay():
    form = fill_in(DEFAULT, training__learning_rate__low="1e-4", lora__r__log="false", lora__r__step="4")
    text = write_rows(DEFAULT, form)
    space = check_search_text(text).space
    assert space["training.learning_rate"].low == 0.0001
    assert (space["lora.r"].log, space["lora.r"].step) == (False, 4)
    changed = [line for line in text.splitlines() if line not in DEFAULT.splitlines()]
    assert [line.strip().partition(":")[0] for line in changed] == ["training.learning_rate", "lora.r"]


def test_rows_are_added_removed_and_given_another_distribution():
    text = write_rows(DEFAULT, {**fill_in(DEFAULT), "remove": "1", "add": "training.tuning"})
    space = check_search_text(text, ["dataset=commands"]).space
    assert "lora.r" not in space
    assert set(space["training.tuning"].choices) == {"lora", "full"}
    other = write_rows(DEFAULT, fill_in(DEFAULT, lora__r__kind="categorical"))
    assert check_search_text(other).space["lora.r"].choices == [load().params.lora.r]
    assert set(search_space.list_free_keys(read_rows(DEFAULT))) == set(list_keys()) - set(
        check_search_text(DEFAULT).space
    )


def test_study_sampler_and_objectives_are_what_the_search_reads():
    form = {**fill_in_plan(DEFAULT), "plan:study": "mine", "plan:sampler": "random", "plan:timeout_seconds": "3600"}
    form |= {"objective:0:metric": "merged.exact_match", "add_objective": "quantized.bytes", "use_pruner": "false"}
    plan = check_search_text(write_plan(DEFAULT, form))
    assert (plan.study, plan.sampler, plan.timeout_seconds) == ("mine", "random", 3600)
    assert plan.directions == {"merged.exact_match": "maximize", "quantized.bytes": "minimize"}
    emptied = write_plan(write_plan(DEFAULT, form), {"plan:timeout_seconds": "", "remove_objective": "0"})
    assert check_search_text(emptied).timeout_seconds is None
    assert list(check_search_text(emptied).directions) == ["quantized.bytes"]


def test_a_pruner_is_switched_on_and_off():
    text = write_plan(DEFAULT, {**fill_in_plan(DEFAULT), "use_pruner": "true"})
    assert [field.name for field in read_plan(text).pruner] == ["min_steps", "reduction"]
    changed = check_search_text(write_plan(text, {**fill_in_plan(text), "pruner:reduction": "4"})).pruner
    assert changed is not None
    assert changed.reduction == 4
    assert write_plan(text, {**fill_in_plan(text), "use_pruner": "false"}) == DEFAULT


def test_every_score_that_is_offered_can_be_an_objective():
    for metric in search_plan.list_metrics():
        check_search_text(write_plan(DEFAULT, {"objective:0:metric": metric}))


@pytest.mark.parametrize("value", ["", "grid search", "1"])
def test_a_sampler_that_is_none_is_told_by_the_check_of_the_text(value):
    with refused("invalid-search-file", "sampler", kept=False):
        check_search_text(write_plan(DEFAULT, {"plan:sampler": value}))


@pytest.mark.parametrize(("value", "said"), [("abc", "space.lora.r.low is 'abc'"), ("100", "low must be below high")])
def test_a_value_that_cannot_be_is_told_by_the_check_of_the_text(value, said):
    with refused("invalid-search-file", said, kept=False):
        check_search_text(write_rows(DEFAULT, fill_in(DEFAULT, lora__r__low=value)))


def test_a_form_that_is_not_of_the_text_is_refused():
    for text in ("space: [", "study: x", "- 1"):
        with refused("no-yaml" if "[" in text else "no-space", kept=False):
            read_rows(text)
    with refused("other-objectives", "'3'"):
        write_plan(DEFAULT, {"remove_objective": "3"})
    with refused("other-space", "lora.rank"):
        write_rows(DEFAULT, {"space:0:key": "lora.rank", "space:0:kind": "int"})
    with refused("no-such-type", "float, int, categorical"):
        write_rows(DEFAULT, {"space:0:key": "lora.r", "space:0:kind": "normal"})
    with refused("no-such-key", "lora.rank"):
        write_rows(DEFAULT, {"add": "lora.rank"})


# Faulty rows


ROWS = [
    '{"prompt": "a", "completion": "b"}',
    '{"prompt": "c", "completion": ""}',
    '{"prompt": "d"',
    '{"prompt": "e", "completion": "f"}',
]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file under data/local of another checkout; its second and third lines would be dropped."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "DATA_LOCAL", tmp_path / "data/local")
    file = tmp_path / "data/local/rows.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes("\r\n".join(ROWS).encode() + b"\r\n")
    return file


def find_faults(*lines: int, **facts: str) -> dict[str, Any]:
    cases = [{"at": f"rows.jsonl:{line}", "field": "completion", "problem": "is empty"} for line in lines]
    return {"files": [{"file": "rows.jsonl", **facts}], "faults": {"empty_answer": {"rows": 2, "first": cases}}}


def test_lines_are_mended_or_removed_and_all_others_stay_byte_for_byte(faulty: Path):
    found = row_mending.read_faulty_rows("data/local/rows.jsonl", find_faults(2, 3, encoding="UTF-8"))
    assert found is not None
    assert [(row.line, row.text) for row in found.rows] == [(2, ROWS[1]), (3, ROWS[2])]
    inode = faulty.stat().st_ino
    texts = {2: '{"prompt": "c",\n "completion": "ж"}', 3: ""}
    assert row_mending.replace_lines("data/local/rows.jsonl", found.version, texts) == 2
    assert faulty.stat().st_ino != inode, "a file that DVC's cache may hold is not written into"
    lines = faulty.read_bytes().split(b"\n")
    assert lines[0] == ROWS[0].encode() + b"\r"
    assert json.loads(lines[1]) == {"prompt": "c", "completion": "ж"}
    assert lines[2:] == [ROWS[3].encode() + b"\r", b""]
    with refused("file-changed", "check it again"):
        row_mending.replace_lines("data/local/rows.jsonl", found.version, texts)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "null"])
def test_a_line_that_is_no_object_is_refused_and_nothing_is_written(faulty: Path, text: str):
    before = faulty.read_bytes()
    version = row_mending.read_faulty_rows("data/local/rows.jsonl", find_faults(2)).version  # type: ignore[union-attr]
    with refused("invalid-row", "rows.jsonl:2", kept=False):
        row_mending.replace_lines("data/local/rows.jsonl", version, {2: text})
    assert faulty.read_bytes() == before
    assert [each.name for each in faulty.parent.iterdir()] == ["rows.jsonl"]


def test_only_jsonl_in_utf_8_is_mended_line_by_line_and_no_line_that_is_too_long(faulty: Path):
    assert row_mending.read_faulty_rows("data/local/rows.jsonl", find_faults(2, encoding="UTF-16")) is None
    faulty.with_suffix(".csv").write_text("a,b\n")
    assert row_mending.read_faulty_rows("data/local/rows.csv", find_faults(1)) is None
    faulty.write_text("x" * 30_000 + "\n")
    assert row_mending.read_faulty_rows("data/local/rows.jsonl", find_faults(1)).rows == []  # type: ignore[union-attr]
    with refused("outside-checkout", kept=False):
        row_mending.replace_lines("data/local/../rows.jsonl", "", {})


# Settings


def test_settings_are_written_into_params_yaml_with_its_comments(toy_params: Path):
    before = toy_params.read_text()
    checked = parameter_form.check_params({"judge.model": "gpt-5", "judge.max_cost": "2.5", "judge.max_rows": ""})
    assert checked.problems == []
    parameter_form.save_params(checked.values)
    assert load(toy_params).params.judge.model == "gpt-5"
    after = toy_params.read_text()
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert sorted(checked.values) == ["judge.max_cost", "judge.max_rows", "judge.model"]
    assert [line.split()[0] for line in changed] == ["model:", "max_rows:", "max_cost:"]
    assert all(" #" in line for line in changed)
    assert len(after.splitlines()) == len(before.splitlines())


def test_no_key_is_written(monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "of-the-environment")
    for value in ("sk-abcdefghijklmnop0123", "x-of-the-environment-x", "AIza" + "x" * 35):
        with refused("key-in-params", "set the provider's variable", kept=False):
            model_pages.refuse_keys({"judge.model": value})
    model_pages.refuse_keys({"judge.model": "gpt-4o-mini", "judge.max_cost": 1.0})
