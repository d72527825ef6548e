"""Ollama's Modelfile: the template of training in Go's template language, the stop tokens, how to sample.

Ollama renders with Go's text/template, not with the Jinja of the GGUF. A Jinja template is recognised by what it
writes: where it renders a few conversations as one of the built-in templates does, that one's translation is the
Modelfile's. Any other is left to Ollama, which knows some by heart. https://docs.ollama.com/modelfile
"""

import re
from dataclasses import dataclass

from lathe.models.chat_template import TemplateError, prompt_and_answer, render
from lathe.models.templates import builtin_templates

# The built-in templates as Go has them, without BOS; EOS stands for the end token. White space around a message, which
# two of the Jinja templates strip, is kept: Go cannot.
_SYSTEM_FIRST = '{{ if eq .Role "system" }}{{ $system = printf "%s\\n\\n" .Content }}{{ else if eq .Role "user" }}'
_GO = {
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

_SYSTEM = {"role": "system", "content": "Answer in one word."}
_TURNS = (
    {"role": "user", "content": "Is it 1 or 2?"},
    {"role": "assistant", "content": "Two.\nNot one."},
    {"role": "user", "content": "Why?"},
)
_CONVERSATIONS = (_TURNS[:1], _TURNS, (_SYSTEM, *_TURNS[:1]), (_SYSTEM, *_TURNS))


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its special tokens: their text, empty where there is none, and whether a BOS is put first."""

    bos_token: str
    eos_token: str
    adds_bos: bool


@dataclass(frozen=True)
class GoTemplate:
    """A built-in template by `name`, its text in Go, and the system message it writes where a request has none."""

    name: str
    text: str
    system: str | None


def go_template(chat_template: str, vocabulary: Vocabulary) -> GoTemplate | None:
    """Translate a Jinja chat template that writes what a built-in one does; None where there is no such one.

    Ollama itself puts the BOS first where the GGUF asks for it, so that the text has one only where it does not.
    """
    tokens = (vocabulary.bos_token, vocabulary.eos_token)
    if any(mark in token for token in tokens for mark in ("{{", '"""', "\n")):
        return None
    for name, go in _GO.items():
        for bos in dict.fromkeys([vocabulary.bos_token, ""]):
            system = _matches(chat_template, builtin_templates.read_template(name), vocabulary, bos)
            if system is not None:
                begin = "" if vocabulary.adds_bos else bos
                return GoTemplate(name, begin + go.replace("EOS", vocabulary.eos_token), system or None)
    return None


def stop_tokens(chat_template: str, vocabulary: Vocabulary) -> list[str]:
    """Return what ends an answer: what the template writes behind one, and the vocabulary's end token."""
    _, _, behind = prompt_and_answer(
        chat_template, _TURNS[:2], bos_token=vocabulary.bos_token, eos_token=vocabulary.eos_token
    )
    marker = builtin_templates.MARKER.match(behind.lstrip())
    return list(dict.fromkeys(token for token in (marker and marker[0], vocabulary.eos_token) if token))


def modelfile(file: str, chat_template: str, vocabulary: Vocabulary, *, n_ctx: int) -> str:
    """Return the text of a Modelfile for the GGUF `file` beside it; `n_ctx` is the context in tokens."""
    lines = ["# Made by the stage `card`: ollama create NAME -f Modelfile", f"FROM ./{file}"]
    translated = go_template(chat_template, vocabulary)
    if translated:
        lines += [f"# The chat template {translated.name}, of training, in Go; without tool calls."]
        lines += [f'TEMPLATE """{translated.text}"""']
        if translated.system:
            lines += ["# What the template of training writes where a request has no system message.",
                      f'SYSTEM """{translated.system}"""']  # fmt: skip
    else:
        lines += [
            "# No TEMPLATE: the chat template of training is none that Lathe can write in Go. Ollama goes by the one"
        ]
        lines += [
            "# in the GGUF, if it knows it; compare `ollama show --template NAME` before you rely on the answers."
        ]
    lines += [f'PARAMETER stop "{token}"' for token in stop_tokens(chat_template, vocabulary)]
    lines += [
        "# As the model was measured: the likeliest token, no penalty.",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {n_ctx}",
    ]
    return "\n".join(lines) + "\n"


def _matches(ours: str, builtin: str, vocabulary: Vocabulary, bos: str) -> str | None:
    """The system message that `ours` writes unasked, empty for none, where it renders as `builtin` does; else None."""

    def theirs(conversation: tuple[dict[str, str], ...]) -> str:
        return rendered(builtin, conversation, bos)

    def rendered(template: str, conversation: tuple[dict[str, str], ...], bos_token: str) -> str:
        eos_token = vocabulary.eos_token
        return render(template, conversation, bos_token=bos_token, eos_token=eos_token, add_generation_prompt=True)

    unasked = ""
    for conversation in _CONVERSATIONS:
        try:
            written = rendered(ours, conversation, vocabulary.bos_token)
        except TemplateError:
            if conversation[0] is _SYSTEM:
                continue  # some families' own templates refuse a system message
            return None
        if len(conversation) == 1 and written != theirs(conversation):
            before, _, behind = theirs((_SYSTEM, *conversation)).partition(_SYSTEM["content"])
            found = re.fullmatch(f"{re.escape(before)}(.+){re.escape(behind)}", written, re.DOTALL)
            if not found or '"""' in found[1]:
                return None
            unasked = found[1]
        if unasked and conversation[0] is not _SYSTEM:
            conversation = ({"role": "system", "content": unasked}, *conversation)
        if written != theirs(conversation):
            return None
    return unasked
