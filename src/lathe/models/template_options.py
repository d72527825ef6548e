"""Options of a chat template, such as Qwen3's `enable_thinking`: set in its text, for all who render it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

from lathe.common.errors import InputError
from lathe.models.template_text import choose_template_text
from lathe.models.tokenizer import load_tokenizer

KEY = "preprocess.chat_template_kwargs"
# What a template gets from whoever renders it.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "strftime_now"}
_GIVEN |= {"raise_exception", "namespace", "range", "dict", "lipsum", "cycler", "joiner"}


def load_tokenizer_with_options(folder: Path, options: Mapping[str, Any]) -> Any:
    """Load a model folder's tokenizer; `options` (preprocess.chat_template_kwargs) are set in its chat template.

    Raises InputError if there is no template, or it does not read an option.
    """
    tokenizer = load_tokenizer(folder)
    if options:
        tokenizer.chat_template = set_options(choose_template_text(tokenizer), options)
    return tokenizer


def set_options(text: str, options: Mapping[str, Any]) -> str:
    """Return the text of a chat template in which the options have these values, unless a request sets another one.

    Raises InputError for an option that the template does not read.
    """
    if not options:
        return text
    read = _list_options(text)
    for name in options:
        if name not in read:
            known = f"its options: {', '.join(sorted(read))}" if read else "it has none"
            raise InputError(
                f"{KEY}: the model's chat template reads no {name!r}; {known}; name one of them, or take the key out",
                code="unknown-template-option",
            )
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_write_value(value)} %}}{{%- endif %}}"
        for name, value in options.items()
    ]
    # A newline after a block is taken away, with that of the text itself.
    return "".join(lines) + "\n" + text


def _list_options(text: str) -> set[str]:
    try:
        tree = _compile_jinja_template(text).environment.parse(text)
    except jinja2.TemplateError:
        return set()  # what is wrong with it is said where it is rendered
    tested = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    return meta.find_undeclared_variables(tree) - _GIVEN - (stored - tested)


def _write_value(value: Any) -> str:
    """Return a value as Jinja writes it, which is as JSON, but for null."""
    if isinstance(value, list):
        return f"[{', '.join(map(_write_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_write_value(str(key))}: {_write_value(inner)}" for key, inner in value.items()) + "}"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
