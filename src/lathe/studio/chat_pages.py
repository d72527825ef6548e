"""Pages of the chat: a conversation with one or two GGUF files, and its last prompt kept as a test row."""

import shlex
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from lathe.common.errors import InputError
from lathe.studio import conversation, data_files
from lathe.studio.child_process import run_for_json
from lathe.studio.conversation import ChatAnswer, ChatTurn
from lathe.studio.form_data import FormTexts, read_form
from lathe.studio.rendering import render

router = APIRouter()


@router.get("/chat")
def show_chat(request: Request) -> Response:
    """Show the form of a conversation."""
    return render(request, "chat", title="Chat", ggufs=data_files.list_models(), **_describe([]))


@router.get("/chat/new")
def begin_conversation(request: Request) -> Response:
    """Show an empty conversation in the place of one."""
    return render(request, "_conversation", **_describe([]))


@router.post("/chat")
def ask_models(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Show the conversation with the answer of each chosen model to the next prompt."""
    turn = conversation.begin_turn(form.get("prompt", ""), form.get("role", "user"))
    turns = [*conversation.read_turns(form.get("conversation", "")), turn]
    if len(turns) > conversation.MOST_TURNS:
        raise InputError(
            f"the conversation has {conversation.MOST_TURNS} turns, which is the most; begin a new one",
            code="long-conversation",
        )
    system, tools = form.get("system", "").strip(), conversation.read_functions(form.get("tools", ""))
    chosen = list(dict.fromkeys(filter(None, (form.get("first"), form.get("second")))))
    if not chosen:
        raise InputError("no model is chosen; choose one or two GGUF files", code="no-model")
    files = {gguf: data_files.resolve_gguf(gguf) for gguf in chosen}
    if turn.role == "tool":  # those that called none have nothing to be answered
        files = {gguf: file for gguf, file in files.items() if conversation.called_tools(turns[:-1], gguf)}
        if not files:
            raise InputError("no model has called a tool; write as the user", code="no-call")
    wanted = {gguf: conversation.build_messages(turns, gguf, system) for gguf in files}
    results: dict[str, dict[str, Any]] = {}
    for gguf, messages in wanted.items():
        question = {"gguf": str(files[gguf]), "messages": messages, "tools": tools or None}
        result = run_for_json(["lathe.studio.helper", "answer"], question, codes=(0,))
        turn.answers[gguf] = ChatAnswer(**{key: result[key] for key in ChatAnswer.model_fields})
        results[gguf] = {**result, "command": _write_command(turns, gguf, system, has_tools=bool(tools))}
    return render(request, "_conversation", **_describe(turns, results))


@router.post("/chat/row")
def save_row(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Keep the last prompt of the conversation, with a reference, as a row of data/local/test-rows.jsonl."""
    turns = conversation.read_turns(form.get("conversation", ""))
    tools = conversation.read_functions(form.get("tools", ""))
    row = conversation.build_test_row(
        turns,
        form.get("of", ""),
        form.get("system", "").strip(),
        tools,
        form.get("reference", ""),
        is_calls=form.get("kind") == "calls",
    )
    line = conversation.save_test_row(row)
    path = conversation.show_test_rows()
    keeping, mixture = data_files.build_keeping(path), conversation.write_mixture()
    return render(request, "_saved_row", path=path, line=line, keeping=keeping, mixture=mixture)


def _describe(turns: Sequence[ChatTurn], results: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return what the template of a conversation shows; `results` are of its last turn."""
    ggufs = list(dict.fromkeys(gguf for turn in turns for gguf in turn.answers))
    return {
        "turns": turns,
        "chosen": ggufs,
        "results": results or {},
        "held": conversation.write_turns(turns),
        "calls": any(conversation.called_tools(turns, gguf) for gguf in ggufs),
        "path": conversation.show_test_rows(),
    }


def _write_command(turns: Sequence[ChatTurn], gguf: str, system: str, *, has_tools: bool) -> str | None:
    """Return the command that answers the same: of several prompts it reads one a line.

    None for what it cannot read: an answer of a tool, or several prompts of which one has several lines.
    """
    words = ["lathe", "chat", "--gguf", gguf, *(["--system", system] if system else [])]
    words += ["--tools", "FILE.json"] if has_tools else []
    asked = [turn for turn in turns if gguf in turn.answers]
    prompts = [turn.text for turn in asked]
    if len(prompts) == 1:
        return shlex.join([*words, "--prompt", prompts[0]])
    if any(turn.role == "tool" or "\n" in turn.text for turn in asked):
        return None
    return f"printf '%s\\n' {shlex.join(prompts)} | {shlex.join(words)}"
