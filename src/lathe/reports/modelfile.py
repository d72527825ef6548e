"""Ollama's Modelfile: the template of training in Go's template language, the stop tokens, how to sample.

Ollama renders with Go's text/template, not with the Jinja of the GGUF. A Jinja template is recognised by what it
writes: if it renders a few conversations as one of the built-in templates does, the Modelfile gets the translation of
that one. Any other is left to Ollama, which knows some templates itself. https://docs.ollama.com/modelfile
"""

import json
import re
from dataclasses import dataclass, replace

from lathe.models.chat_template import EXAMPLE_TOOL, ChatTemplate
from lathe.models.message_form import EXAMPLE_CALL
from lathe.models.template_error import TemplateError
from lathe.models.templates import builtin_templates

# The built-in templates as Go has them, without BOS; EOS is the end token. White space around a message, which
# two of the Jinja templates strip, is kept: Go cannot.
_SYSTEM_FIRST = '{{ if eq .Role "system" }}{{ $system = printf "%s\\n\\n" .Content }}{{ else if eq .Role "user" }}'
_GO = {
    "chatml-tools": '{{ $system := "" }}{{ range .Messages }}{{ if eq .Role "system" }}{{ $system = .Content }}'
    "{{ end }}{{ end }}{{ if or $system .Tools }}<|im_start|>system\n{{ $system }}{{ if .Tools }}{{ if $system }}\n\n"
    "{{ end }}You may call these functions, each call as JSON between <tool_call> tags:\n<tools>{{ range .Tools }}\n"
    "{{ .Function }}{{ end }}\n</tools>{{ end }}<|im_end|>\n{{ end }}{{ range .Messages }}"
    '{{ if eq .Role "tool" }}<|im_start|>user\n<tool_response>\n{{ .Content }}\n</tool_response><|im_end|>\n'
    '{{ else if ne .Role "system" }}<|im_start|>{{ .Role }}\n{{ $text := .Content }}{{ $text }}'
    "{{ range $index, $_ := .ToolCalls }}{{ if or $text $index }}\n{{ end }}<tool_call>\n"
    '{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}\n</tool_call>{{ end }}<|im_end|>\n'
    "{{ end }}{{ end }}<|im_start|>assistant\n",
    "chatml": "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n",
    "llama-3": "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
    "{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": '{{ $system := "" }}{{ range .Messages }}'
    + _SYSTEM_FIRST
    + '[INST] {{ $system }}{{ .Content }} [/INST]{{ $system = "" }}{{ else }} {{ .Content }}EOS{{ end }}{{ end }}',
    "gemma": '{{ $system := "" }}{{ range .Messages }}'
    + _SYSTEM_FIRST
    + '<start_of_turn>user\n{{ $system }}{{ .Content }}<end_of_turn>\n{{ $system = "" }}{{ else }}'
    "<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}<start_of_turn>model\n",
    "plain": '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}\n\n'
    '{{ else if eq .Role "user" }}User:\n{{ .Content }}\n\n{{ else }}Assistant:\n{{ .Content }}EOS\n\n'
    "{{ end }}{{ end }}Assistant:\n",
}

_WITH_TOOLS = "chatml-tools"
_SYSTEM = {"role": "system", "content": "Answer in one word."}
_TURNS = (
    {"role": "user", "content": "Is it 1 or 2?"},
    {"role": "assistant", "content": "Two.\nNot one."},
    {"role": "user", "content": "Why?"},
)
_CONVERSATIONS = (_TURNS[:1], _TURNS, (_SYSTEM, *_TURNS[:1]), (_SYSTEM, *_TURNS))


@dataclass(frozen=True)
class GoTemplate:
    """A built-in template by `name`, its text in Go, and the system message it writes if a request has none."""

    name: str
    text: str
    system: str | None


def translate_template(template: ChatTemplate) -> GoTemplate | None:
    """Translate a chat template that writes what a built-in one writes into Go; return None for any other.

    Ollama itself puts the BOS first if the GGUF asks for it, so the Go text has one only if it does not.
    """
    tokens = (template.bos_token, template.eos_token)
    if any(mark in token for token in tokens for mark in ("{{", '"""', "\n")):
        return None
    for name, go_text in _GO.items():
        for bos in dict.fromkeys([template.bos_token, ""]):
            builtin = replace(template, text=builtin_templates.read_template(name), bos_token=bos)
            system = _find_default_system(template, builtin)
            if system is not None:
                begin = "" if template.adds_bos else bos
                return GoTemplate(name, begin + go_text.replace("EOS", template.eos_token), system or None)
    return None


def find_stop_tokens(template: ChatTemplate) -> list[str]:
    """Return the tokens that end an answer: the marker that the template writes after one, and the end token."""
    written = template.render(_TURNS[:2])
    _, _, rest = written.rpartition(_TURNS[1]["content"])
    marker = builtin_templates.MARKER.match(rest.lstrip())
    return list(dict.fromkeys(token for token in (marker and marker[0], template.eos_token) if token))


def build_modelfile(file: str, template: ChatTemplate, *, n_ctx: int) -> str:
    """Return the text of a Modelfile for the GGUF `file` in the same folder; `n_ctx` is the context in tokens."""
    lines = ["# Made by the stage `card`: ollama create NAME -f Modelfile", f"FROM ./{file}"]
    translated = translate_template(template)
    if translated:
        tools = _describe_tools(translated, template)
        lines += [f"# The chat template {translated.name}, of training, in Go; {tools}."]
        lines += [f'TEMPLATE """{translated.text}"""']
        if translated.system:
            lines += ["# What the template of training writes where a request has no system message.",
                      f'SYSTEM """{translated.system}"""']  # fmt: skip
    else:
        lines += [
            "# No TEMPLATE: the chat template of training is none that Lathe can write in Go. Ollama goes by the one",
            "# in the GGUF, if it knows it; compare `ollama show --template NAME` before you rely on the answers.",
        ]
    for token in find_stop_tokens(template):  # one with a quote or a new line would add instructions
        fits = token.isprintable() and '"' not in token
        lines += [
            f'PARAMETER stop "{token}"' if fits else f"# No Modelfile can hold the stop token {json.dumps(token)}"
        ]
    lines += [
        "# As the model was measured: the likeliest token, no penalty.",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {n_ctx}",
    ]
    return "\n".join(lines) + "\n"


def _describe_tools(translated: GoTemplate, template: ChatTemplate) -> str:
    if translated.name == _WITH_TOOLS:
        return "Ollama writes the JSON of tools without spaces, and its keys in an order of its own"
    return "without tools, which that of training writes" if template.writes_tools else "without tool calls"


def _find_default_system(template: ChatTemplate, builtin: ChatTemplate) -> str | None:
    """Return the system message that `template` writes if a request has none, where it renders as `builtin` does.

    Empty if it writes none; None if it renders anything else.
    """
    default = ""
    for conversation in _CONVERSATIONS:
        try:
            text = template.render(conversation, add_generation_prompt=True)
        except TemplateError:
            if conversation[0] is _SYSTEM:
                continue  # some families' own templates refuse a system message
            return None
        if len(conversation) == 1 and text != builtin.render(conversation, add_generation_prompt=True):
            with_system = builtin.render((_SYSTEM, *conversation), add_generation_prompt=True)
            before, _, after = with_system.partition(_SYSTEM["content"])
            match = re.fullmatch(f"{re.escape(before)}(.+){re.escape(after)}", text, re.DOTALL)
            if not match or '"""' in match[1]:
                return None
            default = match[1]
        if default and conversation[0] is not _SYSTEM:
            conversation = ({"role": "system", "content": default}, *conversation)
        if text != builtin.render(conversation, add_generation_prompt=True):
            return None
    return default if not builtin.writes_tools or _write_tools_alike(template, builtin) else None


def _write_tools_alike(template: ChatTemplate, builtin: ChatTemplate) -> bool:
    result = {"role": "tool", "content": "a result", "tool_call_id": "call_1", "name": "first_function"}
    conversation = [*EXAMPLE_CALL, result]
    try:
        text = template.render(conversation, tools=[EXAMPLE_TOOL], add_generation_prompt=True)
    except TemplateError:
        return False
    return text == builtin.render(conversation, tools=[EXAMPLE_TOOL], add_generation_prompt=True)
