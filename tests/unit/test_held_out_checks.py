"""What is said before a training if the references fit neither the parameters of generation nor the score."""

import json
from types import SimpleNamespace

import pytest
from byte_chat import FRAME, Bench, byte_chat, chat
from refusals import refused
from toy import load_toy

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.held_out_checks import find_misfits
from lathe.doctor import generation

CONFIG = load_toy()
PARAMS = CONFIG.params
PROSE = " ".join(f"word{number}" for number in range(25))


def with_params(**sections):
    changed = {name: getattr(PARAMS, name).model_copy(update=keys) for name, keys in sections.items()}
    return PARAMS.model_copy(update=changed)


def generating(**keys):
    """Parameters that fit every row below but for `keys`; the score is fit for prose."""
    wide = {"max_new_tokens": 10_000, "n_ctx": 20_000, "max_rows": None}
    return with_params(generate={**wide, **keys}, evaluate={"primary_metric": "rouge_l"})


def scoring(**keys):
    return with_params(generate={"max_new_tokens": 10_000, "n_ctx": 20_000}, evaluate=keys)


@pytest.fixture
def report_on(tmp_path):
    """The report of preprocess on validation and test rows of these answers, a token a character and an end token."""
    bench = Bench(tmp_path, byte_chat())

    def report_on(answers, tests=None, **options):
        bench.put("train.jsonl", [chat("train", "x")])
        bench.put("validation.jsonl", [chat(f"v{number:03}", answer) for number, answer in enumerate(answers)])
        tests = answers if tests is None else tests
        bench.put("test.jsonl", [chat(f"t{number:03}", answer) for number, answer in enumerate(tests)])
        return bench.run(max_length=5000, **options).report

    return report_on


def texts_of(report, params):
    return [(misfit.code, misfit.text, misfit.remedy) for misfit in find_misfits(report, params)]


def test_the_report_has_lengths_and_kind_of_the_last_answer_alone(tmp_path):
    bench = Bench(tmp_path, byte_chat())
    bench.put("train.jsonl", [chat("train", "x")])
    bench.put("validation.jsonl", [chat("one", "first answer", "two", "two words")])
    answers = ['{"a": 1}', "[1, 2]", "{not json", "7"]
    bench.put("test.jsonl", [chat(f"t{number}", answer) for number, answer in enumerate(answers)])
    outcome = bench.run()
    assert "references" not in outcome.of("train")
    validation, test = outcome.of("validation")["references"], outcome.of("test")["references"]
    assert validation["tokens"]["max"] == len("two words") + 1
    assert validation["conversation_tokens"]["max"] == outcome.of("validation")["tokens"]["total"]["max"]
    assert validation["prompt_tokens"]["max"] + validation["tokens"]["max"] == validation["conversation_tokens"]["max"]
    assert validation["words"]["max"] == 2
    assert (validation["json_rows"], test["json_rows"]) == (0, 2)


def test_nothing_is_said_where_everything_fits(report_on):
    assert texts_of(report_on(["a" * 100] * 20), generating(max_new_tokens=100, n_ctx=200)) == []


def test_a_report_without_references_is_not_judged(report_on):
    report = report_on(["a" * 100])
    for split in report["splits"]:
        split.pop("references", None)
    assert texts_of(report, generating(max_new_tokens=1)) == []


def test_answers_that_would_be_cut_are_warned_of_with_a_value_that_holds_them(report_on):
    report = report_on(["short"] * 15 + ["a" * 100] * 5, tests=["short"])
    ((code, text, remedy),) = texts_of(report, generating(max_new_tokens=99))
    assert code is None
    assert text.startswith("more than 10 % of the validation references are longer than generate.max_new_tokens 99")
    assert "101 tokens" in text
    assert remedy == "set generate.max_new_tokens to 112, which holds all of them"
    assert texts_of(report, generating(max_new_tokens=112)) == []
    assert texts_of(report, generating(max_new_tokens=100)) == [], "all but the end token is no part of the answer"


def test_one_answer_in_a_hundred_may_be_cut_and_an_exception_does_not_set_the_value(report_on):
    one, two = ["short"] * 99 + ["a" * 900], ["a" * 40] * 197 + ["a" * 90] * 2 + ["a" * 900]
    assert texts_of(report_on(one), generating(max_new_tokens=20)) == []
    ((_, _, remedy),) = texts_of(report_on(two), generating(max_new_tokens=20, max_rows=1)) or [(0, 0, "")]
    assert remedy == "set generate.max_new_tokens to 96, which holds 99 % of them (960 holds all)"


def test_a_run_in_which_no_answer_could_be_complete_is_refused(report_on):
    report = report_on(["a" * 40, "a" * 50], tests=["a" * 60])
    ((code, text, remedy),) = texts_of(report, generating(max_new_tokens=39))
    assert code == "references-too-long"
    assert text.startswith("all of the validation references and all of the test references are longer than")
    assert remedy == "set generate.max_new_tokens to 64, which holds all of them"
    ((code, _, _),) = texts_of(report, generating(max_new_tokens=45))
    assert code is None, "one of them can be complete"


def test_a_row_that_does_not_fit_the_context_is_refused_as_generate_would_refuse_it(report_on):
    report = report_on(["a"] * 20 + ["a" * 100])
    longest = FRAME + len("v020") + 100
    ((code, text, remedy),) = texts_of(report, generating(n_ctx=longest))
    assert code == "conversations-too-long"
    assert f"have {longest} tokens, which do not fit into generate.n_ctx {longest}" in text
    assert remedy == "set generate.n_ctx to 128"
    assert texts_of(report, generating(n_ctx=longest + 2)) == []
    ((code, text, _),) = texts_of(report, generating(n_ctx=longest, max_rows=5))
    assert code is None, "it may be none of the first rows"
    assert "generate.max_rows 5" in text


def test_references_that_preprocess_has_cut_are_warned_of(tmp_path):
    bench = Bench(tmp_path, byte_chat())
    bench.put("train.jsonl", [chat("train", "x")])
    bench.put("validation.jsonl", [chat("v", "a" * 100), chat("w", "a")])
    bench.put("test.jsonl", [chat("t", "a")])
    report = bench.run(max_length=60, too_long="truncate_answer").report
    ((code, text, remedy),) = texts_of(report, generating())
    assert code is None
    assert text.startswith("1 of 2 validation references are cut to training.max_length")
    assert "preprocess.too_long" in remedy


@pytest.mark.parametrize(
    ("answers", "keys", "parts"),
    [
        ([PROSE], {}, ["median 25 words in validation, 25 words in test", "primary_metric to rouge_l"]),
        ([PROSE], {"metrics": ["exact_match", "token_f1"]}, ["primary_metric to token_f1"]),
        ([PROSE], {"metrics": ["exact_match"]}, ["rouge_l or token_f1, and add it to evaluate.metrics"]),
        ([PROSE], {"answer_pattern": r"#### (\S+)"}, []),
        ([PROSE], {"primary_metric": "rouge_l"}, []),
        (["turn on the light"], {}, []),
        ([json.dumps({"text": PROSE})], {}, []),
        (["日本語" * 10], {}, ["median 30 words"]),
    ],
)
def test_prose_that_is_to_be_repeated_word_for_word_is_warned_of(report_on, answers, keys, parts):
    found = texts_of(report_on(answers), scoring(**{"metrics": ["exact_match", "rouge_l"], **keys}))
    assert len(found) == bool(parts)
    for code, text, remedy in found:
        assert code is None
        assert all(part in f"{text}; {remedy}" for part in parts)


@pytest.mark.parametrize(("primary", "code"), [("exact_match", None), ("tool_calls", "no-tools")])
def test_scores_of_calls_without_a_row_that_has_tools_are_said_or_refused(report_on, primary, code):
    report = report_on(["on"])
    params = scoring(metrics=["exact_match", "tool_calls"], primary_metric=primary, gates=None)
    [(found, text, remedy)] = texts_of(report, params)
    assert found == code
    assert "lists tool_calls, and no held-out row has tools" in text
    assert "column tools" in remedy
    for split in report["splits"]:
        if "references" in split:
            split["references"]["tool_rows"] = 1
    assert texts_of(report, params) == []


@pytest.mark.parametrize(("primary", "code"), [("exact_match", None), ("tool_calls", "calls-not-read")])
def test_scores_of_calls_that_cannot_be_read_are_said_or_refused(report_on, primary, code):
    report = {**report_on(["on"]), "unread_calls": True}
    for split in report["splits"]:
        if "references" in split:
            split["references"]["tool_rows"] = 1
    params = scoring(metrics=["exact_match", "tool_calls"], primary_metric=primary, gates=None)
    [(found, text, remedy)] = texts_of(report, params)
    assert found == code
    assert "every answer would count as one without calls" in text
    assert "chatml-tools" in remedy


# Where it is said.


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "METRICS", tmp_path / "metrics")
    (tmp_path / "metrics/preprocess").mkdir(parents=True)
    return tmp_path / "metrics"


def test_a_training_begins_with_the_warnings_or_is_refused(report_on, metrics, caplog):
    stage.check_held_out(generating(max_new_tokens=1))  # no report, nothing to check
    json_files.write_json(metrics / "preprocess/report.json", report_on(["a" * 9, "a" * 50]))
    stage.check_held_out(generating(max_new_tokens=20))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "; set generate.max_new_tokens to 64" in record.getMessage()
    with refused("references-too-long", "generate.max_new_tokens 5", "set generate.max_new_tokens to 64"):
        stage.check_held_out(generating(max_new_tokens=5))


def findings(root, params, name="few", model="small", check=generation.check_held_out):
    config = SimpleNamespace(params=params.model_copy(update={"dataset": name, "model": model}))
    return [(finding.status, finding.text, finding.remedy) for finding in check(config, root)]


def test_the_doctor_says_the_same_of_the_data_that_are_there(report_on, metrics, tmp_path):
    json_files.write_json(metrics / "preprocess/report.json", report_on(["a" * 9, "a" * 50]))
    for kind, name in (("dataset", "few"), ("model", "small")):
        json_files.write_json(metrics / f"fetch/{kind}.json", {"origin": [{"name": name}]})
    ((status, text, _),) = findings(tmp_path, generating())
    assert (status, "not known" in text) == ("ok", True), "the data are not there"
    (tmp_path / "data/processed").mkdir(parents=True)
    ((status, _, _),) = findings(tmp_path, generating())
    assert status == "ok"
    ((status, _, remedy),) = findings(tmp_path, generating(max_new_tokens=20))
    assert (status, remedy) == ("warning", "set generate.max_new_tokens to 64, which holds all of them")
    ((status, _, _),) = findings(tmp_path, generating(max_new_tokens=5))
    assert status == "fail"
    for other in ({"name": "another"}, {"model": "another"}):
        ((status, text, _),) = findings(tmp_path, generating(max_new_tokens=5), **other)
        assert (status, "not of another" in text) == ("ok", True)


def test_no_length_is_compared_with_a_size_that_follows_the_data(report_on):
    report = report_on(["a" * 9, "a" * 50])
    assert texts_of(report, generating(max_new_tokens="auto", n_ctx="auto")) == []


def test_the_doctor_says_how_long_the_answers_take_at_the_speed_of_the_last_run(report_on, metrics, tmp_path):
    def answers(**keys):
        found = findings(tmp_path, generating(**keys), check=generation.check_answers)
        ((status, text, remedy),) = found
        return status, text, remedy

    assert "not known" in answers()[1]
    json_files.write_json(metrics / "preprocess/report.json", report_on(["a" * 9, "a" * 50]))
    (tmp_path / "data/processed").mkdir(parents=True)
    status, text, _ = answers(max_new_tokens=100)
    files = 3 + len(PARAMS.quantize.types)
    assert status == "ok"
    assert "on the CPU" in text
    assert f"4 rows by {files} files, at most {4 * files * 100:,} tokens" in text
    timing = {"seconds": 9, "items": [{"item": "merged", "tokens_per_second": 4 * files}]}
    json_files.write_json(metrics / "timings/generate.json", [timing])
    assert "1:40" in answers(max_new_tokens=100)[1]
    assert f"2 rows by {files} files" in answers(max_new_tokens=100, max_rows=1)[1]
    status, _, remedy = answers(max_new_tokens=5000)
    assert status == "warning"
    assert "generate.max_rows" in remedy
