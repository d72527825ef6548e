# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""Tools and thoughts in real files: the token ids of llama.cpp are those of training, and the server knows tools."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gguf_models import Made, convert, made_with_gguf, qwen, tiny  # noqa: F401 - fixtures
from test_serve import ENGINES, IS_BUILT, serving

from lathe.gguf import tokenizer_parity
from lathe.gguf.build_llama_server import SERVER
from lathe.gguf.llama_model import LlamaModel
from lathe.inference.generate import Generator, find_marker_tokens
from lathe.inference.serve_tools import answer_with_calls
from lathe.models.answer_reading import read_answer, render_prompt
from lathe.models.chat_template import ChatTemplate
from lathe.models.loss_mask import encode
from lathe.models.template_options import load_tokenizer_with_options, set_options
from lathe.models.templates.builtin_templates import read_template
from lathe.models.tokenizer import load_tokenizer
from lathe.training.answer_text import AnswerDecoder

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather, 天气", "parameters": SCHEMA}}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": 'Oslo "é"'}}}
ASK = {"role": "user", "content": "How is it in Oslo?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": '{"t": 3}', "tool_call_id": "c1", "name": "weather"}
SAYS = {"role": "assistant", "content": "3 degrees."}
ROWS: dict[str, dict[str, Any]] = {
    "call": {"messages": [ASK, CALLS], "tools": [TOOL]},
    "result": {"messages": [ASK, CALLS, RESULT, SAYS], "tools": [TOOL]},
    "thought": {
        "messages": [ASK, {**SAYS, "reasoning_content": "So 3."}, ASK, {**SAYS, "reasoning_content": "3 again."}]
    },
    "thought and call": {"messages": [ASK, {**CALLS, "reasoning_content": "I ask."}], "tools": [TOOL]},
}


@pytest.fixture(scope="session")
def calling(tmp_path_factory, tiny: Made) -> Made:
    """The random Llama with a template that writes tools."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny.folder, folder)
        (folder / "chat_template.jinja").write_text(read_template("chatml-tools"), encoding="utf-8")

    return made_with_gguf(tmp_path_factory, "calling", make)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("model", ["qwen", "calling"])
def test_the_prompt_has_the_ids_of_training_in_llama_cpp(request, model, row):
    made: Made = request.getfixturevalue(model)
    tokenizer = load_tokenizer(made.folder)
    *_, sequence = encode(tokenizer, [row["messages"]], supervise="last", tools=[row.get("tools")])
    start = sequence.supervised.index(True)
    with LlamaModel(made.gguf, vocab_only=True) as vocabulary:
        held_out = render_prompt(vocabulary.chat_template, row["messages"], row.get("tools"))
        assert vocabulary.tokenize_prompt(held_out.prompt) == sequence.input_ids[:start]
        whole = vocabulary.tokenize_prompt(held_out.prompt + held_out.answer)
    assert whole == sequence.input_ids[: len(whole)]
    assert len(whole) == len(sequence.input_ids) - 1  # the end token


def test_options_of_the_template_are_in_the_file_and_in_every_prompt(qwen, tmp_path):
    options = {"enable_thinking": False}
    tokenizer = load_tokenizer_with_options(qwen.folder, options)
    text = tokenizer.chat_template
    assert text == set_options(load_tokenizer(qwen.folder).chat_template, options)
    file = convert(qwen.folder, tmp_path / "a.gguf", metadata={"tokenizer.chat_template": text})
    assert tokenizer_parity.check_tokens(qwen.folder, file, [], chat_template=text)
    row = [ASK, SAYS]
    [sequence] = encode(tokenizer, [row], supervise="last")
    with LlamaModel(file, vocab_only=True) as vocabulary:
        prompt, answer, *_ = render_prompt(vocabulary.chat_template, row)
        assert vocabulary.tokenize_prompt(prompt) == sequence.input_ids[: sequence.supervised.index(True)]
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert answer == "3 degrees."


def test_answers_are_read_for_what_they_say_and_call(qwen):
    with LlamaModel(qwen.gguf, vocab_only=True) as vocabulary:
        template = vocabulary.chat_template
    row = render_prompt(template, ROWS["call"]["messages"], [TOOL])
    expected = [{"name": "weather", "arguments": {"city": 'Oslo "é"'}}]
    assert read_answer(template, row, row.answer) == {"calls": expected, "reference_calls": expected}
    assert read_answer(template, row, "<think>\nWell.\n</think>\n\nNo.") == {
        "answer": "No.",
        "reference_answer": row.reference,
        "calls": [],
        "reference_calls": expected,
    }
    thoughtful = render_prompt(template, ROWS["thought"]["messages"])
    assert thoughtful.reference == "<think>\n3 again.\n</think>\n\n3 degrees."
    assert read_answer(template, thoughtful, "<think>\nIt is") == {"answer": "", "reference_answer": "3 degrees."}
    plain = render_prompt(template, [ASK, SAYS])
    assert read_answer(template, plain, plain.answer) == {}


def test_control_tokens_that_mark_calls_are_shown_and_the_end_is_not(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    text = read_template("chatml-tools").replace("<tool_call>", "<|im_start|>call").replace("</tool_call>", "")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    with Generator(convert(folder, tmp_path / "model.gguf"), n_parallel=1, n_ctx=64, threads=1) as generator:
        shown = find_marker_tokens(generator.model)
        [start] = generator.model.tokenize("<|im_start|>")
        [end] = generator.model.tokenize("<|im_end|>")
        assert shown == {start: b"<|im_start|>"}
        assert generator.get_token_bytes(start) == b"<|im_start|>"
        assert generator.get_token_bytes(end) == b""
        ids = [start, *generator.model.tokenize("now"), end]
        # So are sampled answers in training, of which the rewards are.
        decoder = AnswerDecoder(load_tokenizer(folder), generator.chat_template, [end])
        assert decoder.decode(ids).encode() == b"".join(map(generator.get_token_bytes, ids)) == b"<|im_start|>now"
    with Generator(tiny.gguf, n_parallel=1, n_ctx=64, threads=1) as generator:
        assert generator.get_token_bytes(start) == b""


@pytest.fixture(scope="module", params=ENGINES)
def served(calling, request) -> Iterator[str]:
    with serving(calling.gguf, "the key", request.param) as (address, _):
        yield address


def ask(address: str, **body: Any) -> httpx2.Response:
    request = {"messages": [ASK], "max_tokens": 8, **body}
    headers = {"Authorization": "Bearer the key"}
    return httpx2.post(f"{address}/chat/completions", json=request, headers=headers, timeout=60)


def test_a_request_with_tools_is_rendered_with_them(served, calling):
    history = [
        ASK,
        {
            **CALLS,
            "content": None,
            "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    with LlamaModel(calling.gguf, vocab_only=True) as vocabulary:
        for tools, choice in (([TOOL], "auto"), ([TOOL], "none"), (None, None)):
            chosen = {"tools": tools, "tool_choice": choice} if tools else {}
            answer = ask(served, messages=history, **chosen)
            assert answer.status_code == 200, answer.text
            given = tools if choice == "auto" else None
            arguments = {"role": "assistant", "content": "", "tool_calls": [
                {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}  # fmt: skip
            prompt = vocabulary.chat_template.render(
                [ASK, arguments, history[2]], add_generation_prompt=True, tools=given
            )
            assert answer.json()["usage"]["prompt_tokens"] == len(vocabulary.tokenize_prompt(prompt))
            assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_a_stream_with_tools_says_what_the_whole_answer_says(served):
    whole = ask(served, tools=[TOOL]).json()["choices"][0]
    lines = ask(served, tools=[TOOL], stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"tools": [{"type": "function", "function": {"name": "", "parameters": SCHEMA}}]}, "tools[0].name"),
        ({"messages": [{**RESULT, "content": "x"}, {"role": "assistant", "content": ""}]}, "messages[1].content"),
    ],
)
def test_a_request_that_is_none_is_answered_with_400_and_its_place(served, body, said):
    answer = ask(served, **body)
    assert answer.status_code == 400, answer.text
    assert said in answer.text


@IS_BUILT
@pytest.mark.parametrize("model", ["qwen", "calling"])
def test_llama_server_renders_as_training_and_answers_whatever_the_model_writes(request, model):
    made: Made = request.getfixturevalue(model)
    named = {"type": "function", "function": {"name": "weather"}}
    other = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    with serving(made.gguf, "the key", SERVER) as (address, _), LlamaModel(made.gguf, vocab_only=True) as vocabulary:
        template = vocabulary.chat_template

        def count(messages: list[dict[str, Any]], **more: Any) -> int:
            return len(vocabulary.tokenize_prompt(template.render(messages, add_generation_prompt=True, **more)))

        for row in ROWS.values():
            messages = row["messages"][:1] if len(row["messages"]) == 2 else row["messages"][:3]
            body = {"messages": messages, **({"tools": row["tools"]} if "tools" in row else {})}
            answer = ask(address, max_tokens=1, **body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["prompt_tokens"] == count(messages, tools=row.get("tools"))
        if model == "qwen":
            return
        for seed, choice in itertools.product(range(6), (named, "required", "auto")):
            body = {"tools": [TOOL, other], "tool_choice": choice, "max_tokens": 200, "temperature": 1.0, "seed": seed}
            answer = ask(address, **body)
            assert answer.status_code == 200, answer.text
            [said] = answer.json()["choices"]
            assert said["finish_reason"] in ("stop", "length", "tool_calls")
            assert said["message"]["content"] or said["message"]["tool_calls"]
            lines = ask(address, stream=True, **body).text.split("\n\n")
            assert lines[-2:] == ["data: [DONE]", ""]
            [last] = json.loads(lines[-3].removeprefix("data: "))["choices"]
            assert last["finish_reason"] in ("stop", "length", "tool_calls")


@IS_BUILT
def test_an_option_of_the_template_reaches_it(qwen):
    with serving(qwen.gguf, "the key", SERVER) as (address, _):
        counts = {
            thinking: ask(address, max_tokens=1, chat_template_kwargs={"enable_thinking": thinking}).json()["usage"][
                "prompt_tokens"
            ]
            for thinking in (True, False)
        }
    assert counts[False] > counts[True]  # a thought that is empty stands before the answer


def test_a_model_whose_template_writes_no_tools_says_so(tiny):
    with serving(tiny.gguf, "the key") as (address, _):
        answer = ask(address, tools=[TOOL])
        assert answer.status_code == 400
        assert "chat template writes none" in answer.text
        assert ask(address).status_code == 200


TEMPLATE = ChatTemplate(read_template("chatml-tools"), "", "<|im_end|>", adds_bos=False)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', None, ["Oslo"]),
        (
            'Well.\n<tool_call>\n{"name": "weather", "arguments": {"city": "A"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "weather", "arguments": {"city": "B"}}\n</tool_call>',
            "Well.",
            ["A", "B"],
        ),
        ("It is 3 degrees.", "It is 3 degrees.", []),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_text_of_calls_is_answered_as_calls(text, content, calls, stream):
    def complete(**_: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return {"id": "chatcmpl-7", "created": 1, "model": "m", "choices": choices}

    answer = answer_with_calls(complete, TEMPLATE, {})(llama=object(), messages=[ASK], tools=[TOOL], stream=stream)
    if stream:
        first, last = answer
        message, reason = first["choices"][0]["delta"], last["choices"][0]["finish_reason"]
    else:
        message, reason = answer["choices"][0]["message"], answer["choices"][0]["finish_reason"]
    assert message["content"] == content
    found = message.get("tool_calls", [])
    assert [json.loads(call["function"]["arguments"])["city"] for call in found] == calls
    assert [call["id"] for call in found] == [f"call_7_{number}" for number in range(len(calls))]
    assert reason == ("tool_calls" if calls else "stop")
