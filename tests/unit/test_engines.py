"""Engines: which one answers for an artifact, what params.yaml may not ask, and scores of two that are not mixed."""

from typing import Any

import pytest
from refusals import refused
from toy import load_toy

from lathe.config import engines
from lathe.config.load import refuse_problems, validate_tree
from lathe.config.params import Params
from lathe.evaluation.mixed_engines import check_engines, find_engines, mark_engines
from lathe.reports.run_summary import describe_engines

PARAMS = load_toy().params
TYPES = ["Q8_0", "Q4_K_M"]


def served(*artifacts: str) -> list[dict[str, str]]:
    return [{"artifact": name, "url": "http://127.0.0.1:8001/v1", "model": name} for name in artifacts]


def params(*, allow: bool = False, **changes: Any) -> Params:
    tree = PARAMS.model_dump()
    tree["quantize"]["types"] = TYPES
    tree["generate"] |= changes
    tree["evaluate"]["allow_mixed_engines"] = allow
    refuse_problems(validate_tree(Params, tree, "params.yaml"))
    return Params.model_validate(tree)


def test_every_artifact_has_its_engine_and_few_shot_that_of_base():
    both = params(engine="server", servers=served("base", "merged"), allow=True).generate
    names = ["base", "base_few_shot", "merged", *TYPES]
    assert [engines.choose_engine(both, name) for name in names] == ["server"] * 3 + ["llama.cpp"] * 2
    in_vllm = params(engine="vllm", allow=True).generate
    assert [engines.choose_engine(in_vllm, name) for name in names] == ["vllm"] * 3 + ["llama.cpp"] * 2
    unused = params(servers=served("base")).generate
    assert {engines.choose_engine(unused, name) for name in names} == {"llama.cpp"}
    own = engines.find_server(params(servers=served("base", "base_few_shot")).generate, "base_few_shot")
    assert own
    assert own.artifact == "base_few_shot"
    assert params(engine="server", servers=served("base", "merged", *TYPES))


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no server for a file": (
        {"engine": "server", "servers": served("base", "merged", "Q8_0")},
        ("answers for none of Q4_K_M", "add what serves it", "evaluate.allow_mixed_engines"),
    ),
    "no server at all": ({"engine": "server", "allow": True}, ("generate.servers lists none",)),
    "vllm has no GGUF": ({"engine": "vllm"}, ("answers for none of Q8_0, Q4_K_M", "evaluate.allow_mixed_engines")),
    "an artifact that is not made": ({"servers": served("Q4_K")}, ("'Q4_K', which is not made", "Q4_K_M")),
    "one twice": ({"servers": served("base", "base")}, ("lists base twice",)),
    "a key in the address": (
        {"servers": [{"artifact": "base", "url": "http://user:sk-1@host/v1", "model": "base"}]},
        ("is not a plain address", "generate.servers.0.url"),
    ),
    "an option that is Lathe's": ({"vllm_options": {"trust_remote_code": True}}, ("trust_remote_code",)),
    "an engine that is none": ({"engine": "tgi"}, ("must be one of llama.cpp, server, vllm",)),
}


@pytest.mark.parametrize(("changes", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_parameters_that_could_not_be_answered_with_are_refused(changes, parts):
    with refused("invalid-value", "params.yaml", *parts) as caught:
        params(**changes)
    assert "sk-1" not in str(caught.value)


def rows(*marks: str | None) -> list[dict[str, Any]]:
    return [{"finish_reason": "stop", **({"engine": mark} if mark else {})} for mark in marks]


def test_answers_without_a_mark_are_of_llama_cpp_and_documents_are_of_none():
    document = {"finish_reason": None}
    found = find_engines({"base": rows(None, None), "merged": rows("vllm", "vllm"), "Q8_0": [document], "old": rows()})
    assert found == {"base": "llama.cpp", "merged": "vllm", "Q8_0": "llama.cpp", "old": "llama.cpp"}


def test_scores_of_two_engines_are_set_side_by_side_only_if_that_is_asked_for():
    assert check_engines({"base": "vllm", "merged": "vllm"}, allowed=False) is None
    mixed = {"base": "server (vllm)", "merged": "server (vllm)", "Q8_0": "llama.cpp"}
    with refused("mixed-engines", "server (vllm) for base, merged; llama.cpp for Q8_0", "generate.engine"):
        check_engines(mixed, allowed=False)
    warning = check_engines(mixed, allowed=True)
    assert warning
    assert "differences are of engines as well as of weights" in warning
    within = find_engines({"merged": rows("vllm", None)})
    with refused("mixed-engines", "vllm and llama.cpp for merged"):
        check_engines(within, allowed=False)


def test_a_report_names_the_engine_of_those_alone_that_llama_cpp_did_not_answer_for():
    report: dict[str, dict[str, Any]] = {"merged": {"exact_match": 1.0}, "Q8_0": {"exact_match": 0.5}}
    assert mark_engines(report, {"merged": "llama.cpp", "Q8_0": "llama.cpp"}) == report
    assert describe_engines(report) is None
    marked = mark_engines(report, {"merged": "vllm", "Q8_0": "llama.cpp"})
    assert marked == {"merged": {"exact_match": 1.0, "engine": "vllm"}, "Q8_0": {"exact_match": 0.5}}
    assert describe_engines(marked) == "vllm for merged; llama.cpp for Q8_0"
