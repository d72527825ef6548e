"""Tools and thoughts through the chat templates of real models: what is rendered, what is learnt, what is read back.

Most templates are those that TRL and llama.cpp ship; `tests/templates` has small copies of others.
"""

import itertools
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import trl
from refusals import refused
from transformers.utils.chat_template_utils import render_jinja_template

from lathe.common import paths
from lathe.models.answer_split import find_answer_prefix, split_answer
from lathe.models.answer_syntax import find_call_syntax, find_thought_syntax, list_calls
from lathe.models.chat_template import ChatTemplate
from lathe.models.loss_mask import encode
from lathe.models.template_error import TemplateError
from lathe.models.template_options import set_options
from lathe.models.tokenizer_template import read_chat_template

FOLDERS = (
    Path(trl.__file__).parent / "chat_templates",
    Path(__file__).parents[1] / "templates",
    paths.LLAMA_CPP / "models/templates",
)
GEMMA_4, COMMAND_R7B = "google-gemma-4-31B-it", "CohereForAI-c4ai-command-r7b-12-2024-tool_use"
KIMI_K2 = "moonshotai-Kimi-K2"
WRITES_TOOLS = (
    *("qwen3", "qwen2_5", "llama3_1", "llama3_2", "gptoss", "glm4moe", "qwen3_6", "mistral-tools", "smollm3"),
    *("gemma4", GEMMA_4, KIMI_K2, COMMAND_R7B, "lfm2_v2"),
    *("deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4"),
)
CALLS_ALONE = ("Kimi-K3", "MiniMax-M2", "Qwen3-Coder", "ibm-granite-granite-4.0")
WITHOUT_TOOLS = ("gemma3", "smollm2", "phi-4", "phi3_5", "deepseek_r1_distill", "deepseekv3", "qwen3-thinking")
ALL = (*WRITES_TOOLS, *WITHOUT_TOOLS)
ONE_CALL = {"llama3_1", "llama3_2", "gptoss"}  # a turn of these has one call
# These write no text beside calls.
NO_TEXT_BESIDE_CALLS = {"llama3_1", "llama3_2", "mistral-tools", COMMAND_R7B}
# Their generation prompt has an empty thought, unless they are told otherwise.
WITHOUT_THOUGHTS = {GEMMA_4, COMMAND_R7B, "deepseek-ai-DeepSeek-V3.2"}
END_TOKENS = {
    COMMAND_R7B: "<|END_OF_TURN_TOKEN|>",
    KIMI_K2: "<|im_end|>",
    **{f"deepseek-ai-DeepSeek-{name}": "<｜end▁of▁sentence｜>" for name in ("V3.2", "V4")},
}
OPENS_THOUGHT = {"deepseek_r1_distill", "deepseekv3", "qwen3-thinking", "qwen3_6"}

MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<|start|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|message|>",
        "<|channel|>",
    ),
    *(
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|observation|>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "[INST]",
        "[/INST]",
    ),
    *("<｜end▁of▁sentence｜>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("<turn|>", "<|tool_response>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"),
)


def define(name: str, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": f"the {key}"} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": [next(iter(types))]}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


def call(name: str, number: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": f"call_{number}", "function": {"name": name, "arguments": arguments}}


TOOLS = [define("get_weather", city="string", days="integer", metric="boolean"), define("get_time", zone="string")]
WEATHER = call("get_weather", city='Oslo "é" {x}', days=3, metric=True)
TIME = call("get_time", 2, zone="12")


def user(text: str = "How is it?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call_{number}", "name": "get_weather"}


SYSTEM = {"role": "system", "content": "Be kind."}
THOUGHT = "It is 4, as 2 and 2."
FORMS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "plain": ([user(), answer("Fine.")], False),
    "system": ([SYSTEM, user(), answer("Fine.")], False),
    "turns": ([user(), answer("Fine."), user("And now?"), answer("Bad.")], False),
    "tools that are not called": ([user(), answer("Fine.")], True),
    "call": ([user(), answer("", tool_calls=[WEATHER])], True),
    "text and call": ([user(), answer("Let me see.", tool_calls=[WEATHER])], True),
    "calls": ([SYSTEM, user(), answer("", tool_calls=[WEATHER, TIME])], True),
    "result": ([user(), answer("", tool_calls=[WEATHER]), result(1, "3 degrees"), answer("3.")], True),
    "results": (
        [user(), answer("", tool_calls=[WEATHER, TIME]), result(1, "3 degrees"), result(2, "noon"), answer("3.")],
        True,
    ),
    "thought": ([user(), answer("4", reasoning_content=THOUGHT)], False),
    "thought in the text": ([user(), answer(f"<think>\n{THOUGHT}\n</think>\n\n4")], False),
    "thoughts": (
        [user(), answer("4", reasoning_content=THOUGHT), user("Sure?"), answer("5", reasoning_content="No: 5.")],
        False,
    ),
    "thought and call": ([user(), answer("", reasoning_content=THOUGHT, tool_calls=[WEATHER])], True),
}


def read(name: str) -> str:
    return next(file for folder in FOLDERS if (file := folder / f"{name}.jinja").is_file()).read_text(encoding="utf-8")


def make_template(name: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(set_options(read(name), options), "<s>", END_TOKENS.get(name, "</s>"), adds_bos=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per byte, and one per marker."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=list(MARKERS)
    )


def is_refused(name: str, form: str) -> bool:
    """Tell whether the template cannot write the form, whatever it is given."""
    messages, has_tools = FORMS[form]
    if has_tools and name in WITHOUT_TOOLS:
        return True
    last = messages[-1]
    if form.startswith("thought") and name in WITHOUT_THOUGHTS:
        return True
    if last.get("tool_calls") and last["content"] and name in NO_TEXT_BESIDE_CALLS:
        return True
    if last.get("tool_calls") and last.get("reasoning_content") and name in NO_TEXT_BESIDE_CALLS:
        return True
    # gpt-oss writes the first call alone, and takes the results as that one's.
    return any(len(message.get("tool_calls", [])) > 1 for message in messages) and name in ONE_CALL


CASES = [(name, form) for name, form in itertools.product(ALL, FORMS)]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_learnt_part_is_the_answer_as_rendered_and_nothing_else(tokenizer, name, form):
    messages, has_tools = FORMS[form]
    tokenizer.chat_template, tokenizer.eos_token = read(name), END_TOKENS.get(name, "</s>")
    tools = TOOLS if has_tools else None
    if is_refused(name, form):
        with pytest.raises(TemplateError):
            encode(tokenizer, [messages], supervise="last", tools=[tools])
        return
    template = read_chat_template(tokenizer)
    prompt, written, _ = split_answer(template, messages, tools)
    [row] = encode(tokenizer, [messages], supervise="last", tools=[tools])
    start = row.supervised.index(True)
    assert all(row.supervised[start:])
    assert tokenizer.decode(row.input_ids[:start]) == prompt
    learnt = tokenizer.decode(row.input_ids[start:])
    assert learnt.startswith(written)
    end = learnt.removeprefix(written).strip().removeprefix("<|END_RESPONSE|>")
    assert end in (*MARKERS, "</s>")
    # Each part of the answer is learnt, and the parts of no other message.
    last = messages[-1]
    text = last["content"].rpartition("</think>")[2].strip()
    thought = last.get("reasoning_content") or (THOUGHT if "</think>" in last["content"] else "")
    assert text in written
    assert thought in written
    assert written.count(THOUGHT) == (thought == THOUGHT)
    for one in last.get("tool_calls", []):
        assert one["function"]["name"] in written
    assert "How is it?" not in learnt
    assert "degrees" not in learnt


@pytest.mark.parametrize("supervise", ["all", "last"])
@pytest.mark.parametrize("name", ["qwen3", "gptoss", "deepseek_r1_distill", "qwen2_5", "smollm3", "qwen3-thinking"])
def test_every_thought_is_learnt_once_whether_history_keeps_it_or_not(tokenizer, name, supervise):
    tokenizer.chat_template = read(name)
    rows = encode(tokenizer, [FORMS["thoughts"][0]], supervise=supervise)
    learnt = "".join(
        tokenizer.decode([token for token, kept in zip(row.input_ids, row.supervised, strict=True) if kept])
        for row in rows
    )
    assert learnt.count(THOUGHT) == (supervise == "all")
    assert learnt.count("No: 5.") == 1


LIKE_TRANSFORMERS = [
    (name, form)
    for name in ("qwen3", "qwen2_5", "llama3_1", "glm4moe", "qwen3_6", "gptoss", "smollm2", "gemma3", "phi-4")
    for form in FORMS
    # Lathe writes a thought into the text where a template reads none, and transformers leaves it out.
    if "thought" not in form or name in ("qwen3", "glm4moe", "qwen3_6", "gptoss")
    if form != "thought in the text" and not is_refused(name, form)
]


@pytest.mark.parametrize(("name", "form"), LIKE_TRANSFORMERS)
def test_the_rendering_is_that_of_transformers_byte_for_byte(tokenizer, name, form):
    messages, has_tools = FORMS[form]
    tokenizer.chat_template = read(name)
    ours = read_chat_template(tokenizer)
    tools = TOOLS if has_tools else None
    for chat, generation in ((messages, False), (messages[:-1], True)):
        theirs = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=generation)
        theirs = theirs.replace(_today(), "2024-07-26")
        assert ours.render(chat, add_generation_prompt=generation, tools=tools) == theirs


def _today() -> str:
    from datetime import datetime

    return datetime.now().strftime("%Y-%m-%d")


@pytest.mark.parametrize("name", ALL)
def test_a_template_that_ignores_tools_is_known(name):
    assert make_template(name).writes_tools == (name in WRITES_TOOLS)


READ_BACK = [
    (name, calls, text)
    for name in (*WRITES_TOOLS, *CALLS_ALONE)
    for calls in ([WEATHER], [TIME], [WEATHER, TIME], [TIME, WEATHER])
    for text in ("", "Let me see.")
    if (len(calls) == 1 or name not in ONE_CALL) and not (text and name in NO_TEXT_BESIDE_CALLS)
]


@pytest.mark.parametrize(("name", "calls", "text"), READ_BACK)
def test_calls_are_read_back_as_they_were_written(name, calls, text):
    template = make_template(name)
    written = split_answer(template, [user(), answer(text, tool_calls=calls)], TOOLS).answer
    syntax = find_call_syntax(template)
    assert syntax
    found = syntax.read(written.removeprefix(find_answer_prefix(template)), TOOLS)
    assert found.calls == list_calls({"tool_calls": calls})
    assert text in found.content


@pytest.mark.parametrize("name", WRITES_TOOLS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is 3 degrees.",
        '{"a": 1}',
        "[1, 2]",
        "{",
        "<tool_call>",
        "<tool_call>\n{",
        "[TOOL_CALLS][",
        '{"name": "x"}',
    ],
)
def test_a_text_without_a_whole_call_has_none(name, text):
    syntax = find_call_syntax(make_template(name))
    assert syntax
    assert syntax.read(text, TOOLS) == (text, [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('city:<|"|>a, b: {c}<|"|>,days:-3.5', {"city": "a, b: {c}", "days": -3.5}),
        ('in:{deep:[1,<|"|>x<|"|>,{a:true}],<|"|>b<|"|>:None}', {"in": {"deep": [1, "x", {"a": True}], "b": None}}),
        ("", {}),
        ("city: 3 , days : []", {"city": 3, "days": []}),
        ("city:", None),
        ("city:1 days:2", None),
        ("city:oslo", None),
        ('city:<|"|>never ends', None),
        ("{" * 5000, None),
        ("a:" + "[" * 5000, None),
    ],
)
def test_objects_with_bare_keys_are_read_or_are_a_text(arguments, expected):
    syntax = find_call_syntax(make_template(GEMMA_4))
    assert syntax
    text = f"<|tool_call>call:get_time{{{arguments}}}<tool_call|>"
    calls = [] if expected is None else [{"name": "get_time", "arguments": expected}]
    assert syntax.read(text, TOOLS) == ("" if calls else text, calls)


def test_a_text_after_the_calls_is_kept():
    syntax = find_call_syntax(make_template(KIMI_K2))
    assert syntax
    one = "<|tool_call_begin|>functions.get_time:12<|tool_call_argument_begin|>{}<|tool_call_end|>"
    calls = f"<|tool_calls_section_begin|>{one * 2}<|tool_calls_section_end|>"
    expected = [{"name": "get_time", "arguments": {}}] * 2
    assert syntax.read(f"Before. {calls} After.") == ("Before.\nAfter.", expected)


def test_a_form_of_calls_that_does_not_read_the_examples_back_is_none():
    text = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}({% for k, v in "
        "c.function.arguments.items() %}{{ k }}={{ '\"' ~ v ~ '\"' }}{{ ', ' if not loop.last }}{% endfor %})"
        "{% endfor %}{{ m.content }}</s>{% endfor %}"
    )
    assert find_call_syntax(ChatTemplate(text, "<s>", "</s>", adds_bos=False)) is None  # it escapes no quote


def test_a_template_that_transformers_would_not_run_is_refused():
    messages, _ = FORMS["call"]
    with refused("template-forbidden", "'append' of 'list'"):
        make_template("Kimi-K2-Instruct").render(messages, tools=TOOLS)
    with pytest.raises(jinja2.sandbox.SecurityError):
        render_jinja_template([messages], tools=TOOLS, chat_template=read("Kimi-K2-Instruct"))


def test_white_space_between_markers_does_not_count_and_more_after_bare_json_does():
    qwen, llama = find_call_syntax(make_template("qwen3")), find_call_syntax(make_template("llama3_1"))
    assert qwen
    assert llama
    loose = '<tool_call> {"name":"get_time","arguments":{"zone":"12"}} </tool_call>'
    expected = [{"name": "get_time", "arguments": {"zone": "12"}}]
    assert qwen.read(loose).calls == expected
    assert qwen.read(f"So:\n{loose}\n\n{loose}") == ("So:", expected * 2)
    bare = '{"name": "get_time", "parameters": {"zone": "12"}}'
    assert llama.read(bare).calls == expected
    assert llama.read(f"{bare} is what I would call").calls == []


@pytest.mark.parametrize("name", [name for name in ALL if name not in WITHOUT_THOUGHTS])
def test_what_is_said_after_a_thought_is_found(name):
    template = make_template(name)
    syntax = find_thought_syntax(template)
    prompt, written, _ = split_answer(template, FORMS["thought"][0])
    said = written.removeprefix(find_answer_prefix(template))
    assert syntax.strip(said, prompt=prompt) == "4"
    assert syntax.strip(said.partition(THOUGHT)[0] + "It is 4, as", prompt=prompt) == ""  # it never ended
    plain_prompt, plain, _ = split_answer(template, FORMS["plain"][0])
    assert syntax.strip(plain, prompt=plain_prompt).removeprefix(find_answer_prefix(template)) == "Fine."


@pytest.mark.parametrize("name", sorted(OPENS_THOUGHT))
def test_an_answer_begins_within_the_thought_that_the_prompt_opens(name):
    prompt, written, _ = split_answer(make_template(name), FORMS["thought"][0])
    assert prompt.endswith("<think>\n")
    assert written == f"{THOUGHT}\n</think>\n\n4"
    assert split_answer(make_template(name), FORMS["plain"][0]).answer == "\n</think>\n\nFine."


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("qwen3", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ("gptoss", {"reasoning_effort": "high", "model_identity": 'I am "x"\n é 🍎'}, "Reasoning: high"),
        ("smollm3", {"enable_thinking": False}, "Reasoning Mode: /no_think"),
        ("llama3_1", {"date_string": "1 May 2026", "tools_in_user_message": False}, "1 May 2026"),
    ],
)
def test_options_in_the_text_of_a_template_do_what_they_do_when_given(tokenizer, name, options, shown):
    messages = [SYSTEM, user()]
    tokenizer.chat_template = read(name)
    given = tokenizer.apply_chat_template(
        messages, tools=TOOLS, tokenize=False, add_generation_prompt=True, **options
    ).replace(_today(), "2024-07-26")
    assert shown in given
    assert make_template(name, **options).render(messages, tools=TOOLS, add_generation_prompt=True) == given
    # A request may still ask for something else.
    tokenizer.chat_template = set_options(read(name), options)
    other = dict.fromkeys(options, "another")
    ours = tokenizer.apply_chat_template(messages, tokenize=False, **other)
    tokenizer.chat_template = read(name)
    assert ours == tokenizer.apply_chat_template(messages, tokenize=False, **other)


def test_an_option_that_no_template_reads_is_refused():
    with refused("unknown-template-option", "'enable_thinkin'", "its options: enable_thinking"):
        make_template("qwen3", enable_thinkin=False)
    with refused("unknown-template-option", "reads no 'messages'"):
        make_template("qwen3", messages=[])
    with refused("unknown-template-option", "it has none"):
        make_template("phi-4", enable_thinking=False)


def test_a_thought_where_the_template_is_told_to_write_none_is_refused():
    with pytest.raises(TemplateError, match="the answer has a thought"):
        split_answer(make_template("qwen3", enable_thinking=False), FORMS["thought"][0])


def test_ids_are_made_short_where_a_template_demands_it_and_results_keep_theirs():
    text = make_template("mistral-tools").render(FORMS["results"][0], tools=TOOLS)
    assert text.count("call00001") == text.count("call00002") == 2
    without = [{key: value for key, value in m.items() if key != "tool_call_id"} for m in FORMS["results"][0]]
    assert make_template("mistral-tools").render(without, tools=TOOLS) == text
