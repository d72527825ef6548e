"""Text of a tokenizer's chat template."""

from typing import Any

from lathe.models.template_error import TemplateError


def choose_template_text(tokenizer: Any) -> str:
    """Return the Jinja text of a Hugging Face tokenizer's chat template. Raises TemplateError if it has none.

    Of several by name it is the one called default, which llama.cpp's converter makes that of the file.
    """
    text = tokenizer.chat_template
    if not text:
        raise TemplateError(
            "the tokenizer has no chat template; choose an instruction-tuned model", code="no-chat-template"
        )
    if isinstance(text, str):
        return text
    if "default" not in text:
        raise TemplateError(
            f"the tokenizer has chat templates named {', '.join(text)}, none of them default; call one of them default "
            "in tokenizer_config.json",
            code="no-default-template",
        )
    return str(text["default"])
