"""Tokenizer of a model folder."""

from pathlib import Path
from typing import Any

from lathe.common.errors import InputError


def load_tokenizer(folder: Path) -> Any:
    """Load a model folder's tokenizer; its chat template is the one of training, evaluation and the GGUF.

    Raises InputError if there is none.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise InputError(
            f"{folder.name}: the model has no chat template; choose an instruction-tuned model, or give its preset one "
            "(template: chatml)",
            code="no-chat-template",
        )
    return tokenizer
