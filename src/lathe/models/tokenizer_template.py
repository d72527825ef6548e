"""Chat template of a Hugging Face tokenizer."""

from typing import Any

from lathe.models.chat_template import ChatTemplate
from lathe.models.template_text import choose_template_text


def read_chat_template(tokenizer: Any) -> ChatTemplate:
    """Return the template of a Hugging Face tokenizer. Raises TemplateError if it has none."""
    bos = tokenizer.bos_token_id
    return ChatTemplate(
        text=choose_template_text(tokenizer),
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        adds_bos=bos is not None and tokenizer("text")["input_ids"][0] == bos,
    )
