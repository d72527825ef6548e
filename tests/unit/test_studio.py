"""The studio without a server: its forms, its table, its texts, what it starts and how logs are read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.overrides import list_keys
from lathe.experiments.recipes import list_recipes
from lathe.experiments.results import RunResult
from lathe.studio import (
    actions,
    data_files,
    experiment_table,
    parameter_form,
    rendering,
    started_commands,
    studies,
    texts,
)
from lathe.studio.security import Session, list_hosts

HERE = paths.ROOT / "src/lathe/studio"


def make_result(name: str, **given: object) -> RunResult:
    fields: dict[str, Any] = {
        "name": name, "commit": name, "date": "", "changed": {}, "metric": "exact_match", "artifact": "Q8_0",
        "score": None, "low": None, "high": None, "gates_passed": None, "bytes": None, "seconds": None,
    }  # fmt: skip
    return RunResult(**{**fields, **given})


# The form


def test_the_form_has_every_parameter_once_with_its_meaning():
    main, sections = parameter_form.build_entries(parameter_form.read_params())
    entries = [*main, *(entry for section in sections for entry in section.entries)]
    assert sorted(entry.key for entry in entries) == sorted(list_keys())
    assert all(entry.meaning for entry in entries)


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", list_recipes())
def test_a_form_that_was_not_touched_changes_nothing(recipe):
    main, sections = parameter_form.build_entries(parameter_form.read_values(recipe))
    entries = [*main, *(entry for section in sections for entry in section.entries)]
    checked = parameter_form.check_form(recipe, {entry.key: entry.value for entry in entries})
    assert (checked.overrides, checked.problems) == ([], [])


@pytest.mark.parametrize(
    ("key", "text", "override"),
    [
        ("lora.r", "8", "lora.r=8"),
        ("training.learning_rate", "5e-4", "training.learning_rate=0.0005"),
        ("quantize.types", "[Q8_0]", "quantize.types=[Q8_0]"),
        ("training.max_steps", "20", "training.max_steps=20"),
    ],
)
def test_a_value_that_is_typed_becomes_the_override_of_a_terminal(key, text, override):
    checked = parameter_form.check_form("tiny", {key: text})
    assert checked.problems == []
    assert checked.overrides == [override]


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("lora.r", "eight", "lora.r is 'eight'; must be"),
        ("lora.r", "0", "lora.r is 0"),
        ("model", "tinny", "did you mean 'tiny'?"),
        ("quantize.types", "[", "is no YAML value"),
        ("lora.r", "${oc.env:HOME}", "DVC would fill in"),
        ("lora.rank", "8", "is no parameter"),
    ],
)
def test_a_value_that_cannot_be_is_refused_as_params_yaml_would(key, text, said):
    checked = parameter_form.check_form("tiny", {key: text})
    assert said in "\n".join(checked.problems)


# Commands


@pytest.mark.parametrize("name", ["--force", "-n", "a b", "a;b", "", "../x", "a\nb"])
def test_no_name_becomes_an_option_or_a_path(name):
    with pytest.raises(InputError) as caught:
        actions.check_name(name, "name")
    assert caught.value.code == "invalid-name"


@pytest.mark.parametrize("n_trials", [4, 101])
def test_a_search_has_from_5_to_100_trials(n_trials):
    with pytest.raises(InputError):
        actions.build_search("experiments/search/default.yaml", n_trials, 1, [])


def test_a_command_outlives_whoever_started_it_and_its_log_and_code_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(started_commands, "FOLDER", paths.SCRATCH / "studio/test-commands")
    folder = started_commands.FOLDER / "20260101-000000-abcdef"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command.json").write_text(
        json.dumps({"words": ["lathe", "--version"], "started": "2026-01-01T00:00:00+00:00"})
    )
    for name in ("process.json", "exit.json", "log.txt"):
        (folder / name).unlink(missing_ok=True)
    assert started_commands.read_command(folder.name).state == "lost"
    started_commands._run_beside(folder)
    ended = started_commands.read_command(folder.name)
    assert (ended.state, ended.code) == ("ended", 0)
    assert started_commands.read_tail(ended.log)[0].startswith("lathe ")
    with pytest.raises(InputError):
        started_commands.cancel_command(ended)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.parent.rmdir()


def test_a_second_command_runs_if_the_first_ends_well_and_both_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(started_commands, "FOLDER", tmp_path)
    folder = tmp_path / "20260101-000000-abcdef"
    folder.mkdir()
    codes = {}
    for first in ("--version", "--no-such-option"):
        words = ["lathe", first, "&&", "git", "--version"]
        (folder / "command.json").write_text(json.dumps({"words": words, "started": "2026-01-01T00:00:00+00:00"}))
        (folder / "log.txt").unlink(missing_ok=True)
        started_commands._run_beside(folder)
        ended = started_commands.read_command(folder.name)
        assert ended.text == f"lathe {first} && git --version"
        codes[first] = ended.code, "git version" in "".join(started_commands.read_tail(ended.log))
    assert codes == {"--version": (0, True), "--no-such-option": (2, False)}


@pytest.mark.parametrize("name", ["../../x", "20260101-000000-abcde", "", "20260101-000000-ABCDEF"])
def test_a_command_is_named_by_its_identifier_alone(name):
    with pytest.raises(InputError) as caught:
        started_commands.read_command(name)
    assert caught.value.code == "no-such-command"


def test_a_log_is_shown_as_a_terminal_leaves_it(tmp_path: Path):
    log = tmp_path / "log"
    log.write_bytes(b"\x1b[32mgreen\x1b[0m\n10 %\r50 %\r100 %\nbell \x07\n\xff bad\nlast\n\n")
    assert started_commands.read_tail(log) == ["green", "100 %", "bell \\u0007", "� bad", "last"]
    assert started_commands.read_tail(log, "LAST") == ["last"]
    assert started_commands.read_tail(tmp_path / "none") == []


# The table


def test_the_table_filters_by_name_and_by_changed_value_and_sorts_both_ways():
    runs = [
        make_result("a", changed={"lora.r": (16, 8)}, bytes=3, score=0.5, gates_passed=True),
        make_result("b", changed={"lora.r": (16, 4)}, bytes=1, score=0.9, gates_passed=False),
        make_result("c", bytes=2),
    ]

    def names(**chosen: Any) -> list[str]:
        return [run.name for run in experiment_table.build_table(runs, **chosen).rows]

    assert names() == ["a", "b", "c"]
    assert names(text="lora.r=8") == ["a"]
    assert names(sort="score") == ["b", "a", "c"]
    assert names(sort="size") == ["b", "c", "a"]
    assert names(sort="-size") == ["a", "c", "b"]
    assert names(gates="failed") == ["b"]
    assert experiment_table.build_table(runs).parameters == ["lora.r"]
    with pytest.raises(InputError):
        names(sort="nothing")


# Texts


def test_every_text_of_the_templates_has_its_russian():
    catalogue = texts.read_catalogue("ru")
    found = set()
    for file in (HERE / "templates").glob("*.jinja"):
        found |= set(re.findall(r'_\("((?:[^"\\]|\\.)*)"\)', file.read_text(encoding="utf-8")))
    found |= {name for _, name in rendering.PAGES} | {"running", "ended", "failed", "lost"}
    assert found - set(catalogue) == set()
    assert all(catalogue.values())


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [(None, "", "en"), (None, "ru-RU,ru;q=0.9,en;q=0.8", "ru"), ("en", "ru", "en"), ("xx", "de,en;q=0.5", "en")],
)
def test_the_language_is_the_one_chosen_or_the_browsers(cookie, accepted, language):
    assert texts.choose_language(cookie, accepted) == language


# The rest


def test_the_files_of_other_people_are_those_that_are_listed():
    import hashlib

    for folder in (HERE / "static/vendor", paths.ROOT / "tests/axe"):
        listed = dict(re.findall(r"\| `([\w.-]+)` \|.*\| `([0-9a-f]{64})` \|", (folder / "README.md").read_text()))
        files = {file.name: file for file in folder.glob("*.js")}
        assert files.keys() == listed.keys()
        for name, file in files.items():
            assert hashlib.sha256(file.read_bytes()).hexdigest() == listed[name]


def test_the_link_of_a_session_is_good_once():
    session = Session(list_hosts(1))
    token = session.link_token or ""
    assert not session.use_link(token + "x")
    assert session.use_link(token)
    assert not session.use_link(token)


def test_a_search_file_of_the_page_is_validated_by_the_rules_of_the_command():
    text = (paths.ROOT / "experiments/search/default.yaml").read_text(encoding="utf-8")
    assert studies.check_search_text(text).study == "learning"
    with pytest.raises(InputError) as caught:
        studies.check_search_text(text.replace("sampler: tpe", "sampler: tpx"))
    assert "sampler" in str(caught.value)


def test_a_chat_is_with_models_and_not_with_adapters_or_parts_that_read_images(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "GGUF", tmp_path / "models/gguf")
    monkeypatch.setattr(paths, "MODELS_LOCAL", tmp_path / "models/local")
    names = ["gguf/Q8_0.gguf", "gguf/adapter/adapter-f16.gguf", "gguf/mmproj/mmproj-f16.gguf", "local/mine/x.gguf"]
    for name in names:
        (tmp_path / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / name).touch()
    assert data_files.list_ggufs() == sorted(f"models/{name}" for name in names)
    assert data_files.list_models() == ["models/gguf/Q8_0.gguf", "models/local/mine/x.gguf"]
