"""Tokenizer of a model folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError


def load_tokenizer(folder: Path, options: Mapping[str, Any] | None = None) -> Any:
    """Load a model folder's tokenizer; its chat template is the one of training, evaluation and the GGUF.

    `options` of the template (preprocess.chat_template_kwargs) are set in its text. Raises InputError if there is no
    template, or it does not read an option.
    """
    from transformers import AutoTokenizer

    from lathe.models.chat_template import ChatTemplate
    from lathe.models.template_options import set_options

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise InputError(
            f"{folder.name}: the model has no chat template; choose an instruction-tuned model, or give its preset one "
            "(template: chatml)",
            code="no-chat-template",
        )
    if options:
        tokenizer.chat_template = set_options(ChatTemplate.of_tokenizer(tokenizer).text, options)
    return tokenizer
