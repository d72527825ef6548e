# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""A GGUF as a model of lm-evaluation-harness: the same numbers and answers as its own backend gives for the weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_models import Made, learnt, qwen  # noqa: F401 - fixtures
from refusals import refused

from lathe.inference.generate import Generator
from lathe.inference.harness_model import HarnessModel
from lathe.inference.journal import Journal, open_journal
from lathe.sources.builtin import household_commands

MAX_LENGTH = 128
# Of a log-likelihood: the GGUF is in f16, the backend computes in fp32.
RELATIVE, ABSOLUTE = 5e-3, 2e-2


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=RELATIVE, abs=ABSOLUTE)


def ask(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def open_backend(folder: Path) -> Any:
    """The harness's own backend, on the weights that the GGUF was made of."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, max_length=MAX_LENGTH)


def open_model(gguf: Path, journal: Journal, **options: Any) -> HarnessModel:
    arguments = {"max_length": MAX_LENGTH, "chooses_rows": True, **options}
    return HarnessModel(Generator(gguf, n_parallel=8, n_ctx=MAX_LENGTH, threads=1), journal, **arguments)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "journal", "a") as opened:
        yield opened


def make_questions() -> list[tuple[str, str]]:
    """Requests with choices of one token and of several, of one context, of many that begin alike, and of none."""
    rows = household_commands.make_rows(1)["validation"][:6]
    asked = [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows]
    examples = "".join(f"{request}\n{answer}\n\n" for request, answer in asked[:1])
    pairs = [(f"{request}\n", choice) for request, _ in asked[:3] for choice in (asked[0][1], " on", "off the lamp")]
    pairs += [(f"{examples}{request}\n", choice) for request, _ in asked for choice in (" a", " b", '{"action"')]
    return [*pairs, ("", "switch on the lamp"), ("please switch on the ", "lamp"), ("kitchen", " radio")]


@pytest.mark.parametrize("made", ["learnt", "qwen"])
def test_log_likelihoods_are_those_of_the_harness_own_backend(made, request, journal):
    made = request.getfixturevalue(made)
    questions = ask("loglikelihood", make_questions())
    model, backend = open_model(made.gguf, journal), open_backend(made.folder)
    assert model.prefix_token_id == backend.prefix_token_id
    ours, theirs = model.loglikelihood(questions), backend.loglikelihood(questions, disable_tqdm=True)
    for question, (likely, is_greedy), (expected, expected_greedy) in zip(questions, ours, theirs, strict=True):
        assert likely == near(expected), question.args
        assert is_greedy == expected_greedy, question.args
    assert model.cut == 0


def test_a_greedy_answer_is_known_as_such(learnt: Made, journal):
    model = open_model(learnt.gguf, journal)
    prompt = "please switch on the kitchen lamp ->"
    [answer] = model.generate_until(ask("generate_until", [(prompt, {"until": [], "max_gen_toks": 6})]))
    assert answer
    [(_, is_greedy), (_, other)] = model.loglikelihood(ask("loglikelihood", [(prompt, answer), (prompt, "zzz")]))
    assert (is_greedy, other) == (True, False)


def test_rolling_log_likelihoods_are_those_of_the_backend_for_texts_longer_than_the_context_too(learnt: Made, journal):
    text = "switch on the attic lamp at 9 o'clock -> action is on, device is light. "
    texts = ask("loglikelihood_rolling", [(text,), (text * 3,), (text * 20,), ("a",)])
    model, backend = open_model(learnt.gguf, journal), open_backend(learnt.folder)
    assert len(model.tok_encode(text * 20)) > 3 * MAX_LENGTH
    ours = model.loglikelihood_rolling(texts)
    assert ours == near(backend.loglikelihood_rolling(texts, disable_tqdm=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n"], "max_gen_toks": 24},
        {"until": ["is", ", d"], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0},
        {"until": [], "max_new_tokens": 9},
    ],
)
def test_answers_are_those_of_the_backend_up_to_what_stops_them(learnt: Made, journal, settings):
    rows = household_commands.make_rows(1)["validation"][:12]
    prompts = [f"{row['messages'][0]['content']} ->" for row in rows]
    requests = ask("generate_until", [(prompt, settings) for prompt in prompts])
    model, backend = open_model(learnt.gguf, journal), open_backend(learnt.folder)
    ours = model.generate_until(requests)
    assert ours == backend.generate_until(requests, disable_tqdm=True)
    assert len(set(ours)) > 1
    for stop in settings["until"]:
        assert all(stop not in answer for answer in ours)


def test_an_answer_ends_at_once_where_a_text_stops_it(learnt: Made, journal):
    model = open_model(learnt.gguf, journal)
    [whole] = model.generate_until(ask("generate_until", [("switch on", {"until": [], "max_gen_toks": 40})]))
    generated, stop = model.tokens, whole[4:7]
    [cut] = model.generate_until(ask("generate_until", [("switch on", {"until": [stop], "max_gen_toks": 40})]))
    assert cut == whole.split(stop)[0]
    assert model.tokens - generated < generated


@pytest.mark.parametrize("made", ["learnt", "qwen"])
def test_the_chat_template_is_that_of_the_backend(made, request, journal):
    made = request.getfixturevalue(made)
    model, backend = open_model(made.gguf, journal), open_backend(made.folder)
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "switch on the lamp"}]
    prompt = model.apply_chat_template(history)
    assert prompt == backend.apply_chat_template(history)
    assert model.tok_encode(prompt) == backend.tok_encode(prompt)
    begun = [*history, {"role": "assistant", "content": "It is"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == backend.apply_chat_template(begun, False)
    assert model.chat_template(True) == backend.chat_template(True)
    assert model.tokenizer_name
    questions = ask("loglikelihood", [(prompt, "on"), (prompt, '{"action":"on"}')])
    expected = backend.loglikelihood(questions, disable_tqdm=True)
    for (likely, greedy), (wanted, wanted_greedy) in zip(model.loglikelihood(questions), expected, strict=True):
        assert likely == near(wanted)
        assert greedy == wanted_greedy


def test_what_does_not_fit_is_cut_at_its_beginning_as_by_the_backend_and_counted(learnt: Made, journal, caplog):
    long = "switch on the attic lamp at 9 o'clock -> action is on, device is light. " * 10
    model, backend = open_model(learnt.gguf, journal), open_backend(learnt.folder)
    questions = ask("loglikelihood", [(long, " action is on"), ("short", " action is on")])
    ours = [likely for likely, _ in model.loglikelihood(questions)]
    expected = [likely for likely, _ in backend.loglikelihood(questions, disable_tqdm=True)]
    assert ours == near(expected)
    prompts = ask("generate_until", [(long, {"until": ["."], "max_gen_toks": 12})])
    assert model.generate_until(prompts) == backend.generate_until(prompts, disable_tqdm=True)
    assert model.cut == 2
    assert "1 prompts of tasks are longer than 128 tokens" in caplog.text


def test_an_interrupted_run_goes_on_with_the_same_numbers(learnt: Made, tmp_path, monkeypatch):
    questions = ask("loglikelihood", make_questions())
    settings = {"until": ["\n"], "max_gen_toks": 12}
    prompts = ask("generate_until", [(context, settings) for context, _ in make_questions() if context])
    with open_journal(tmp_path, "whole") as journal:
        model = open_model(learnt.gguf, journal)
        expected = model.loglikelihood(questions), model.generate_until(prompts)
    add = Journal.add
    for finished in (1, 5, 14, 30):
        with open_journal(tmp_path, f"after {finished}") as journal:
            monkeypatch.setattr(Journal, "add", _make_interrupted(add, finished))
            with pytest.raises(KeyboardInterrupt):
                _ask_both(open_model(learnt.gguf, journal), questions, prompts)
        monkeypatch.setattr(Journal, "add", add)
        with open_journal(tmp_path, f"after {finished}") as journal:
            assert len(journal) == finished
            assert _ask_both(open_model(learnt.gguf, journal), questions, prompts) == expected


def _make_interrupted(add: Any, finished: int) -> Any:
    def add_or_stop(journal: Journal, *row: Any) -> None:
        if len(journal) == finished:
            raise KeyboardInterrupt
        add(journal, *row)

    return add_or_stop


def _ask_both(model: HarnessModel, questions: list[Any], prompts: list[Any]) -> tuple[Any, Any]:
    return model.loglikelihood(questions), model.generate_until(prompts)


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"do_sample": True, "temperature": 0.8}, "generation-not-greedy", ["sampled answers", "do_sample to false"]),
        ({"temperature": 0.8}, "generation-not-greedy", ["sampled answers"]),
        ({"num_beams": 4}, "generation-not-greedy", ["num_beams", "greedy"]),
        ({"max_gen_toks": 500}, "answers-too-long", ["500 tokens", "128", "benchmark.max_length"]),
    ],
)
def test_what_cannot_be_asked_is_refused(learnt: Made, journal, settings, code, words):
    with refused(code, *words):
        open_model(learnt.gguf, journal).generate_until(ask("generate_until", [("switch on", settings)]))


def test_a_likelihood_of_no_text_and_a_continuation_that_does_not_fit_are_refused(learnt: Made, journal):
    model = open_model(learnt.gguf, journal)
    with refused("empty-continuation", "a choice is empty"):
        model.loglikelihood(ask("loglikelihood", [("switch on", "")]))
    with refused("continuation-too-long", "does not fit into 128", "benchmark.max_length"):
        model.loglikelihood(ask("loglikelihood", [("switch on", " the lamp" * 100)]))
