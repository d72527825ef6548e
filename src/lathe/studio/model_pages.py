"""Pages about data and models: data, chat, lineage, judge."""

import os
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from lathe.common import metric_files, paths
from lathe.common.errors import InputError
from lathe.common.json_files import read_json
from lathe.config.base import SPLITS
from lathe.config.load import load
from lathe.evaluation.judge import api_keys
from lathe.provenance.trace import trace
from lathe.studio import data_files, parameter_form
from lathe.studio import started_commands as starting
from lathe.studio.child_process import run_for_json
from lathe.studio.form_data import FormTexts, read_form
from lathe.studio.rendering import redirect, render

LONGEST_PROMPT = 20_000  # characters

router = APIRouter()


@router.get("/data")
def show_data(request: Request) -> Response:
    """Show the files of data, and the form that uploads one."""
    files = data_files.list_files()
    return render(
        request,
        "data",
        title="Data",
        files=files,
        suffixes=",".join(data_files.SUFFIXES),
        largest=request.app.state.session.largest_upload_bytes,
        splits=SPLITS,
    )


@router.get("/data/check")
def show_check(
    request: Request,
    path: Annotated[str, Query(max_length=300)],
    prompt: Annotated[str, Query(max_length=200)] = "",
    completion: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Show how a file is read, and its faults."""
    found = data_files.check_file(path, prompt, completion)
    words = data_files.build_check(path, prompt, completion)[:-1]
    is_named = any(file.presets for file in data_files.list_files() if file.path == path)
    return render(
        request,
        "_data_check",
        found=found,
        path=path,
        prompt=prompt,
        completion=completion,
        command=words,
        is_named=is_named,
        suggested=next(iter(found.get("preset") or {}), ""),
    )


@router.post("/data/preset")
def save_preset(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Add the file to presets.yaml, and let DVC keep it."""
    path = form.get("path", "")
    data_files.save_preset(
        form.get("name", "").strip(), path, form.get("prompt", "").strip(), form.get("completion", "").strip()
    )
    return redirect(f"/commands/{starting.start_command(['dvc', 'add', path]).identifier}")


@router.get("/data/rows")
def show_rows(
    request: Request,
    split: Annotated[str, Query(max_length=20)] = "train",
    rows: Annotated[int, Query(ge=1, le=data_files.MOST_ROWS)] = 3,
) -> Response:
    """Show processed rows as the model sees them."""
    marked = data_files.read_marked_rows(split, rows)
    command = ["lathe", "inspect", "--split", split, "--rows", str(rows)]
    return render(request, "_rows", rows=marked, command=command)


@router.get("/chat")
def show_chat(request: Request) -> Response:
    """Show the form of a question to two models."""
    return render(request, "chat", title="Chat", ggufs=data_files.list_models())


@router.post("/chat")
def ask_models(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Show the answer of each chosen model to a question."""
    text = form.get("prompt", "").replace("\r\n", "\n")
    if not text.strip() or len(text) > LONGEST_PROMPT:
        raise InputError(f"the prompt has {len(text)} characters; write from 1 to {LONGEST_PROMPT:,}", code="no-prompt")
    system = form.get("system", "").strip()
    tools = parameter_form.parse_back(form.get("tools", "")) or None
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    answers: list[dict[str, Any]] = []
    for gguf in dict.fromkeys(filter(None, (form.get("first"), form.get("second")))):
        file = data_files.resolve_gguf(gguf)
        request_of_model = {"gguf": str(file), "messages": messages, "tools": tools}
        result = run_for_json(["lathe.studio.helper", "answer"], request_of_model, codes=(0,))
        answers.append({**result, "gguf": gguf, "command": ["lathe", "chat", "--gguf", gguf, "--prompt", text]})
    if not answers:
        raise InputError("no model is chosen; choose one or two GGUF files", code="no-model")
    return render(request, "_chat_answers", answers=answers, has_system=bool(system))


@router.get("/lineage")
def show_lineage(request: Request, file: Annotated[str, Query(max_length=300)] = "") -> Response:
    """Show what a GGUF was made from, and what has changed since."""
    traced = trace(data_files.resolve_gguf(file)) if file else None
    return render(
        request,
        "lineage",
        title="Lineage",
        ggufs=data_files.list_ggufs(),
        chosen=file,
        traced=traced,
        command=["lathe", "trace", file or "models/gguf/Q4_K_M.gguf"],
    )


@router.put("/lineage/dropped")
async def trace_dropped(request: Request) -> Response:
    """Show what the GGUF that is sent was made from."""
    traced = await data_files.trace_upload(request.stream())
    return render(request, "_trace", traced=traced)


@router.get("/judge")
def show_judge(request: Request) -> Response:
    """Show the judge's settings, what it has cost, and the form of a trial call."""
    settings = load().params.judge
    variable = api_keys.VARIABLES.get(settings.provider)
    values = parameter_form.read_params()
    main, sections = parameter_form.build_entries(values)
    entries = [entry for entry in main if entry.key.startswith("judge.")]
    entries += [entry for section in sections if section.name == "judge" for entry in section.entries]
    return render(
        request,
        "judge",
        title="Judge",
        settings=settings,
        variable=variable,
        has_key=bool(variable and os.environ.get(variable)),
        spent=_read_spent(),
        entries=entries,
    )


@router.post("/judge/trial")
def try_judge(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Ask the judge about one answer."""
    given = {key[2:]: text for key, text in form.items() if key.startswith("p:judge.")}
    checked = parameter_form.check_params(given)
    if checked.problems:
        raise InputError("\n".join(checked.problems), code="invalid-form")
    texts = {key: form.get(key, "")[:LONGEST_PROMPT] for key in ("prompt", "reference", "answer")}
    verdict = run_for_json(["lathe.studio.helper", "judge"], {"overrides": checked.overrides, **texts}, codes=(0,))
    return render(request, "_verdict", verdict=verdict, overrides=checked.overrides)


def _read_spent() -> dict[str, Any]:
    """Return what the last run's judge did, as metrics/timings/judge.json has it; empty if there was none."""
    file = paths.METRICS / "timings/judge.json"
    if not file.is_file():
        return {}
    content = metric_files.unwrap_list(
        read_json(file, shown=str(file.relative_to(paths.ROOT)), remedy="`dvc repro judge`")
    )
    kept = ("verdicts_bought", "requests", "retries", "input_tokens", "output_tokens", "cost")
    return {key: content[key] for key in kept if key in content} if isinstance(content, dict) else {}
