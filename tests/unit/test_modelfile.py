"""The template in the Modelfile, read as Go reads it, writes what the template of training writes."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lathe.models.chat_template import ChatTemplate
from lathe.models.templates.builtin_templates import BUILTIN as BUILTIN_NAMES
from lathe.models.templates.builtin_templates import read_template
from lathe.reports.modelfile import build_modelfile, find_stop_tokens, translate_template
from lathe.sources.builtin import tiny_model

SYSTEM = {"role": "system", "content": 'Be brief.\n\n"Very" brief {{ .Role }}'}
TURNS = [
    {"role": "user", "content": "Größe, 敏捷 🙂 <b>&amp;"},
    {"role": "assistant", "content": '{"a": 1}\n  two lines'},
    {"role": "user", "content": "and off?"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "x"},
]
CONVERSATIONS = [[*system, *TURNS[:count]] for system in ([], [SYSTEM]) for count in (1, 3, 5)]
BUILTIN = {
    **{name: read_template(name) for name in BUILTIN_NAMES},
    "the tiny model's": tiny_model.CHAT_TEMPLATE,
}
QWEN = (  # what Qwen 2.5 writes, tools aside
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen.\\nYou help.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class Go:
    """Go's text/template, as far as the Modelfile uses it; anything else in it fails."""

    def __init__(self, text: str) -> None:
        self.tokens = re.split(r"(\{\{.*?\}\})", text)
        self.at = 0
        self.body = self._block()
        assert self.at == len(self.tokens)

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        root = {"Messages": [_as_go(message) for message in messages], "Tools": [_as_go(tool) for tool in tools]}
        return "".join(self._run(self.body, {}, root))

    def _block(self) -> list:
        nodes: list = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            action = token[2:-2].strip() if token.startswith("{{") else None
            if action == "end" or (action or "").startswith("else"):
                return nodes
            self.at += 1
            if action is None:
                nodes.append(("text", token))
            elif action.startswith("range "):
                nodes.append(("range", action.removeprefix("range "), self._block()))
                self._end()
            elif action.startswith("if "):
                nodes.append(self._if(action))
                self._end()
            else:
                nodes.append(("do", action))
        return nodes

    def _if(self, action: str) -> tuple:
        condition = action.removeprefix("else ").removeprefix("if ")
        then: list = self._block()
        otherwise: list = []
        following = self.tokens[self.at][2:-2].strip()
        if following.startswith("else"):
            self.at += 1
            otherwise = self._block() if following == "else" else [self._if(following)]
        return ("if", condition, then, otherwise)

    def _end(self) -> None:
        assert self.tokens[self.at] == "{{ end }}"
        self.at += 1

    def _run(self, nodes: list, variables: dict[str, Any], dot: dict[str, Any]) -> Iterator[str]:
        for kind, *rest in nodes:
            if kind == "text":
                yield rest[0]
            elif kind == "range":
                match = re.fullmatch(r"(?:(\$\w+), \$_ := )?(\.\w+)", rest[0])
                assert match, rest[0]
                for index, item in enumerate(self._value(match[2], variables, dot)):
                    inner = {**variables, match[1]: index} if match[1] else variables
                    yield from self._run(rest[1], inner, item)
            elif kind == "if":
                yield from self._run(rest[1] if self._holds(rest[0], variables, dot) else rest[2], variables, dot)
            elif match := re.fullmatch(r"(\$\w+) :?= (.+)", rest[0]):
                variables[match[1]] = self._value(match[2], variables, dot)
            else:
                yield self._value(rest[0], variables, dot)

    def _holds(self, condition: str, variables: dict[str, Any], dot: dict[str, Any]) -> bool:
        if match := re.fullmatch(r'(eq|ne) (\.\w+) "(\w+)"', condition):
            return (self._value(match[2], variables, dot) == match[3]) == (match[1] == "eq")
        values = condition.removeprefix("or ").split()
        return any(self._value(value, variables, dot) for value in values)

    def _value(self, expression: str, variables: dict[str, Any], dot: dict[str, Any]) -> Any:
        if expression.startswith("$"):
            return variables[expression]
        if re.fullmatch(r"(\.\w+)+", expression):
            value: Any = dot
            for key in expression[1:].split("."):
                value = value[key]
            return value if isinstance(value, str | list) else value["text"]
        if match := re.fullmatch(r'printf "(.*)" \.Content', expression):
            return match[1].replace("\\n", "\n") % dot["Content"]
        assert expression == '""', expression
        return ""


def _as_go(item: dict[str, Any]) -> dict[str, Any]:
    """Return a message, a tool or a call with the names of Ollama's fields; JSON as Python writes it."""
    if "role" in item:
        calls = [_as_go(call) for call in item.get("tool_calls", [])]
        return {"Role": item["role"], "Content": item["content"], "ToolCalls": calls}
    function = item["function"]
    arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {"Function": {"Name": function["name"], "Arguments": arguments, "text": json.dumps(function)}}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("bos", ["<s>", ""])
@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_template_is_recognised_and_writes_the_same_in_go(name, bos, adds_bos):
    template = ChatTemplate(BUILTIN[name], bos, "</s>", adds_bos and bool(bos))
    translated = translate_template(template)
    assert translated
    assert translated.name == ("chatml" if name == "the tiny model's" else name)
    assert translated.system is None
    for conversation in CONVERSATIONS:
        expected = template.render(conversation, add_generation_prompt=True)
        if template.adds_bos:  # Ollama puts it there
            expected = expected.removeprefix(bos)
        assert Go(translated.text).render(conversation) == expected


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALLS = [{"type": "function", "function": {"name": name, "arguments": {"a": "x"}}} for name in ("f", "g")]
WITH_CALLS = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": CALLS[:1]},
    {"role": "tool", "content": "3 degrees"},
    {"role": "assistant", "content": "And now:", "tool_calls": CALLS},
    {"role": "tool", "content": "4 degrees"},
]


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_tools_and_calls_are_written_in_go_as_in_training(system):
    template = ChatTemplate(read_template("chatml-tools"), "", "<|im_end|>", adds_bos=False)
    translated = translate_template(template)
    assert translated
    conversation = [*system, *WITH_CALLS]
    expected = template.render(conversation, tools=[TOOL, TOOL], add_generation_prompt=True)
    assert Go(translated.text).render(conversation, [TOOL, TOOL]) == expected
    assert "Ollama writes the JSON of tools" in build_modelfile("Q8_0.gguf", template, n_ctx=64)


def test_a_template_whose_tools_are_not_in_the_modelfile_says_so():
    text = read_template("chatml-tools").replace("You may call", "You can call")
    modelfile = build_modelfile("Q8_0.gguf", ChatTemplate(text, "", "<|im_end|>", adds_bos=False), n_ctx=64)
    assert "chat template chatml, of training, in Go; without tools, which that of training writes." in modelfile


def test_a_system_message_that_the_template_writes_unasked_becomes_the_modelfile_s():
    template = ChatTemplate(QWEN, "", "<|im_end|>", adds_bos=False)
    translated = translate_template(template)
    assert translated
    assert (translated.name, translated.system) == ("chatml", "You are Qwen.\nYou help.")
    expected = template.render(TURNS[:3], add_generation_prompt=True)
    with_system = [{"role": "system", "content": translated.system}, *TURNS[:3]]
    assert Go(translated.text).render(with_system) == expected
    assert 'SYSTEM """You are Qwen.\nYou help."""' in build_modelfile("Q8_0.gguf", template, n_ctx=64)


@pytest.mark.parametrize(
    "template",
    [
        read_template("chatml").replace("<|im_end|>\\n", "<|im_end|>"),
        read_template("llama-3").replace("'ipython' if message.role == 'tool' else message.role", "'x'"),
        read_template("gemma").replace("<end_of_turn>\\n' }}\n        {%- set", "<end_of_turn>' }}\n        {%- set"),
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_writes_something_else_is_left_to_ollama(template):
    assert translate_template(ChatTemplate(template, "<s>", "</s>", adds_bos=False)) is None


def test_what_is_not_recognised_is_said_and_has_no_template():
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"  # noqa: E501
    text = build_modelfile("Q4_K_M.gguf", ChatTemplate(template, "<s>", "</s>", adds_bos=False), n_ctx=512)
    assert "\nTEMPLATE" not in text
    assert "\n# No TEMPLATE: " in text
    assert '\nPARAMETER stop "</s>"\n' in text


def test_a_modelfile_runs_the_file_as_it_was_measured():
    template = ChatTemplate(tiny_model.CHAT_TEMPLATE, "<s>", "<|im_end|>", adds_bos=True)
    text = build_modelfile("Q4_K_M.gguf", template, n_ctx=512)
    lines = text.splitlines()
    for line in (
        "FROM ./Q4_K_M.gguf",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 512",
    ):
        assert line in lines
    assert 'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}' in lines


@pytest.mark.parametrize(
    ("name", "eos", "expected"),
    [
        ("chatml", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
        ("llama-3", "<|eot_id|>", ["<|eot_id|>"]),
        ("gemma", "<eos>", ["<end_of_turn>", "<eos>"]),
        ("mistral", "</s>", ["</s>"]),
        ("plain", "</s>", ["</s>"]),
    ],
)
def test_an_answer_stops_at_the_end_of_its_turn(name, eos, expected):
    assert find_stop_tokens(ChatTemplate(read_template(name), "<s>", eos, adds_bos=False)) == expected
