"""Single chat template: of several places in a model folder, one is left that every program reads.

transformers takes chat_template.jinja before the one in tokenizer_config.json, and llama.cpp's converter the other way
round; chat_template.json, which processors of images read, is read by the converter and by no tokenizer.
"""

import logging
from pathlib import Path

from lathe.common.json_files import read_json_object, write_json

logger = logging.getLogger(__name__)

JINJA, PROCESSOR, TOKENIZER = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
REMEDY = "copy the whole folder again"


def leave_single_template(folder: Path, shown: str) -> None:
    """Leave the template that transformers reads, in a model folder called `shown` in messages; texts may be edited."""
    config = read_json_object(folder / TOKENIZER, remedy=REMEDY)
    if (folder / JINJA).is_file():
        written = config.get("chat_template")
        if written is not None:
            if written != (folder / JINJA).read_text(encoding="utf-8"):
                logger.warning("%s: %s is taken; the other chat template, in %s, is not", shown, JINJA, TOKENIZER)
            write_json(folder / TOKENIZER, {key: value for key, value in config.items() if key != "chat_template"})
    elif config.get("chat_template") is None and (folder / PROCESSOR).is_file():
        template = read_json_object(folder / PROCESSOR, remedy=REMEDY).get("chat_template")
        if isinstance(template, str):
            (folder / JINJA).write_text(template, encoding="utf-8")
