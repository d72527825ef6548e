"""Pages about data and models: data, lineage, judge."""

import os
import re
from collections.abc import Mapping
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
from lathe.studio import data_files, parameter_form, row_mending
from lathe.studio import started_commands as starting
from lathe.studio.child_process import run_for_json
from lathe.studio.conversation import LONGEST_PROMPT
from lathe.studio.form_data import FormTexts, read_form
from lathe.studio.rendering import redirect, render

KEY_FORM = re.compile(r"\bsk-[\w-]{16,}|\bAIza[\w-]{30,}")  # as OpenAI and Google write keys

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
    return _render_check(request, path, prompt, completion)


def _render_check(request: Request, path: str, prompt: str = "", completion: str = "", mended: int = 0) -> Response:
    try:
        found = data_files.check_file(path, prompt, completion)
    except InputError as error:
        if error.code != "command-failed":
            raise
        # The columns may have to be named before the file can be read.
        lines = str(error).splitlines()
        return render(request, "_data_refused", lines=lines, path=path, prompt=prompt, completion=completion)
    words = data_files.build_check(path, prompt, completion)[:-1]
    file = next((file for file in data_files.list_files() if file.path == path), None)
    return render(
        request,
        "_data_check",
        found=found,
        path=path,
        prompt=prompt,
        completion=completion,
        command=words,
        presets=file.presets if file else [],
        is_versioned=bool(file and file.is_versioned),
        suggested=next(iter(found.get("preset") or {}), ""),
        keeping=data_files.build_keeping(path),
        faulty=row_mending.read_faulty_rows(path, found),
        mended=mended,
    )


@router.post("/data/mend")
def mend_rows(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Replace lines of a file, and show how it is read now."""
    path = form.get("path", "")
    texts = {int(key[5:]): text for key, text in form.items() if re.fullmatch(r"line:\d{1,12}", key)}
    mended = row_mending.replace_lines(path, form.get("version", ""), texts)
    return _render_check(request, path, form.get("prompt", ""), form.get("completion", ""), mended)


@router.post("/data/keep")
def keep_file(form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Let DVC keep a file as it is now."""
    words = data_files.build_keeping(form.get("path", ""))
    return redirect(f"/commands/{starting.start_command(words).identifier}")


@router.post("/data/preset")
def save_preset(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Add the file to presets.yaml, and let DVC keep it."""
    path = form.get("path", "")
    data_files.save_preset(
        form.get("name", "").strip(), path, form.get("prompt", "").strip(), form.get("completion", "").strip()
    )
    return redirect(f"/commands/{starting.start_command(data_files.build_keeping(path)).identifier}")


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


@router.post("/judge/save")
def save_judge(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Write the judge's settings that differ into params.yaml; no key is among them."""
    checked = _check_judge(form)
    if not checked.values:
        raise InputError("every setting is as in params.yaml; nothing to save", code="nothing-to-save")
    refuse_keys(checked.values)
    parameter_form.save_params(checked.values)
    return render(request, "_saved_judge", overrides=checked.overrides)


def refuse_keys(values: Mapping[str, Any]) -> None:
    """Raise InputError if one of the values is a key of a judge, or looks like one: params.yaml is committed."""
    keys = [key for variable in api_keys.VARIABLES.values() if (key := os.environ.get(variable, "").strip())]
    for name, value in values.items():
        if isinstance(value, str) and (KEY_FORM.search(value) or any(key in value for key in keys)):
            raise InputError(
                f"{name}: looks like a key, and params.yaml is committed; set the provider's variable instead",
                code="key-in-params",
            )


def _check_judge(form: FormTexts) -> parameter_form.CheckedForm:
    given = {key[2:]: text for key, text in form.items() if key.startswith("p:judge.")}
    checked = parameter_form.check_params(given)
    if checked.problems:
        raise InputError("\n".join(checked.problems), code="invalid-form")
    return checked


@router.post("/judge/trial")
def try_judge(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Ask the judge about one answer."""
    checked = _check_judge(form)
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
