"""Chat template of a base model that has none: a built-in one or a file, installed in the model's folder."""

from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.outside_files import translate_errors
from lathe.common.text import summarize_error
from lathe.models.model_folder import read_json, write_json
from lathe.models.templates.builtin_templates import MARKER
from lathe.models.templates.find_template import find_template

QUESTION, ANSWER = "a question", "an answer"


def install_template(template: str, model: Path) -> str:
    """Make `template`, a built-in's name or a file under models/local, the chat template of the model in `model`.

    It becomes the folder's only one. The token that ends an answer becomes the model's end token wherever one is
    named: `eos_token` of the tokenizer, which llama.cpp's converter reads too, `eos_token_id` of the configuration and
    the first of the generation configuration, whose others stay. Files are replaced, never changed in place: they may
    be links to the user's own. Returns the end token. Raises InputError for an unknown template, one that is no valid
    Jinja, and one whose markers are no single tokens of the vocabulary.
    """
    from transformers import AutoTokenizer

    text = find_template(template)
    with translate_errors(model.name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    end = _find_end_token(template, text, tokenizer)
    for name in ("chat_template.json", "chat_template.jinja"):
        (model / name).unlink(missing_ok=True)
    (model / "chat_template.jinja").write_text(text, encoding="utf-8")
    differs = end != tokenizer.eos_token
    _update_json(model / "tokenizer_config.json", {"eos_token": end} if differs else {}, without="chat_template")
    if differs:
        token = int(tokenizer.convert_tokens_to_ids(end))
        _update_json(model / "special_tokens_map.json", {"eos_token": end})
        _update_json(model / "config.json", {"eos_token_id": token})
        generation = model / "generation_config.json"
        before = read_json(generation).get("eos_token_id") if generation.exists() else None
        others = before if isinstance(before, list) else [before]
        _update_json(generation, {"eos_token_id": [token, *(other for other in others if other not in (None, token))]})
    return end


def _find_end_token(template: str, text: str, tokenizer: Any) -> str:
    """Return the token that ends an answer; raises InputError if the vocabulary lacks it or another marker."""
    before, answer, after = _render_question(template, text, tokenizer).partition(ANSWER)
    if not answer:
        raise InputError(
            f"template {template}: does not write the assistant's answer; write message.content",
            code="answer-not-written",
        )
    for marker in dict.fromkeys(MARKER.findall(before + after)):
        if not _is_one_token(tokenizer, marker):
            raise InputError(
                f"template {template}: {marker!r} is no single token of the model's vocabulary, so the model has never "
                "seen it; choose a template of the model's family, or plain, which needs no marker",
                code="marker-not-in-vocabulary",
            )
    if not tokenizer.eos_token:
        raise InputError(
            f"template {template}: the tokenizer has no eos_token; set it in tokenizer_config.json", code="no-end-token"
        )
    after = after.lstrip()
    if not after:
        return str(tokenizer.eos_token)  # appended to every answer in training
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in sorted({*special, tokenizer.eos_token, *MARKER.findall(after)}, key=len, reverse=True):
        if after.startswith(token):
            return str(token)
    raise InputError(
        f"template {template}: ends an answer with {after[:20]!r}, which is no token that could stop the model; "
        "write eos_token after message.content",
        code="answer-without-end",
    )


def _render_question(template: str, text: str, tokenizer: Any) -> str:
    """Render a question and its answer; raises InputError if the template cannot.

    Within limits, but not by ChatTemplate: each edit of its module would fetch the models again.
    """
    import jinja2

    from lathe.common import bounded_jinja

    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": False}
    try:
        compiled = bounded_jinja.compile_template(text)
        return bounded_jinja.render(compiled, {**compiled.globals, **variables, "messages": chat})
    except jinja2.TemplateSyntaxError as error:
        code, problem = "template-syntax", f"line {error.lineno} is not valid Jinja: {error.message}"
    except Exception as error:  # a template is a program: it may fail in any way
        code, problem = "template-refuses", f"cannot write a question and its answer: {summarize_error(error)}"
    raise InputError(f"template {template}: {problem.rstrip('.')}; mend the file", code=code)


def _is_one_token(tokenizer: Any, marker: str) -> bool:
    ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def _update_json(file: Path, values: dict[str, Any], *, without: str | None = None) -> None:
    if not file.exists():
        return
    content = read_json(file)
    changed = {key: value for key, value in {**content, **values}.items() if key != without}
    if isinstance(content.get("text_config"), dict) and "eos_token_id" in content["text_config"]:
        changed["text_config"] = {**content["text_config"], **values}
    if changed != content:
        file.unlink()
        write_json(file, changed)
