"""Pages of searches: the form that starts one, and a study with its trials as they come."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.overrides import format_override
from lathe.config.yaml_files import read_yaml
from lathe.experiments.recipes import list_recipes
from lathe.studio import actions, search_plan, search_space, studies
from lathe.studio import started_commands as starting
from lathe.studio.form_data import FormTexts, read_form
from lathe.studio.rendering import arrange_bars, redirect, render
from lathe.studio.search_text import dump_text, load_text

router = APIRouter()


@router.get("/searches")
def show_searches(request: Request, file: Annotated[str, Query(max_length=200)] = "") -> Response:
    """Show the studies, and the form of a search."""
    files = studies.list_search_files()
    chosen = file if file in files else (files[0] if files else "")
    text = (paths.ROOT / chosen).read_text(encoding="utf-8") if chosen else ""
    return render(
        request,
        "searches",
        title="Search",
        studies=studies.list_studies(),
        files=files,
        chosen=chosen,
        text=text,
        models=list(read_yaml(paths.PRESETS)["models"]),
        providers=["openai", "gemini", "gigachat", "gguf"],
        fewest=actions.FEWEST_TRIALS,
        most=actions.MOST_TRIALS,
        most_jobs=actions.MOST_JOBS,
        problems=[],
        command=["lathe", "search", chosen, "--n-trials", "20"] if chosen else None,
        changed=0,
        recipes=list_recipes(),
        writes_text=False,
        **_read_form(text),
    )


@router.post("/searches/space")
def show_space(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Show the rows of the space by the text, or, where they were changed, the text by the rows."""
    text = _read_text(form)
    of_rows = form.get("source") == "rows"
    if of_rows:
        tree = load_text(text)
        search_plan.write_plan(tree, form)
        search_space.write_rows(tree, form)
        text = dump_text(tree)
    response = render(request, "_space", text=text, writes_text=of_rows, **_read_form(text))
    response.headers["HX-Trigger-After-Swap"] = "checks-search"
    return response


def _read_form(text: str) -> dict[str, Any]:
    """Return the form of a text, empty where that cannot be read, and what may be added."""
    plan, rows, problem = None, [], ""
    try:
        tree = load_text(text)
        plan, rows = search_plan.read_plan(tree), search_space.read_rows(tree)
    except InputError as error:
        problem = str(error)
    return {
        "plan": plan,
        "rows": rows,
        "problem": problem,
        "free": search_space.list_free_keys(rows),
        "metrics": search_plan.list_metrics(),
        "directions": search_plan.DIRECTIONS,
        "most_objectives": search_plan.MOST_OBJECTIVES,
    }


@router.post("/searches/check")
def check_search(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Say what is wrong in the form of a search, and what its command is."""
    problems: list[str] = []
    command = None
    try:
        command = _build(form, _find_file(form)[0])
    except InputError as error:
        problems = str(error).splitlines()
    return render(request, "_check", problems=problems, command=command, changed=0)


@router.post("/searches/start")
def start_search(form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Save the search file if it is new, and start the search."""
    file, is_saved = _find_file(form)
    words = _build(form, file)  # refused before anything is written
    if not is_saved:
        studies.save_search_text(_read_text(form), _read_overrides(form))
    return redirect(f"/commands/{starting.start_command(words).identifier}")


@router.get("/searches/{study}")
def show_study(request: Request, study: str) -> Response:
    """Show a study."""
    return render(request, "study", title=study, **_describe(study))


@router.get("/searches/{study}/trials")
def show_trials(request: Request, study: str) -> Response:
    """Show a study's trials as far as they are."""
    return render(request, "_trials", **_describe(study))


def _describe(name: str) -> dict[str, Any]:
    study = studies.read_study(name)
    scored = [trial for trial in study["trials"] if trial["scores"]]
    history = [
        {"number": trial["number"], "score": trial["scores"][0], "name": trial["experiment"]} for trial in scored
    ]
    front = [
        {"x": trial["scores"][0], "y": trial["scores"][1], "name": trial["experiment"], "best": trial["best"]}
        for trial in scored
        if len(trial["scores"]) > 1
    ]
    keys = list(dict.fromkeys(key for trial in study["trials"] for key in trial["parameters"]))
    return {
        "study": study,
        "history": history,
        "front": front,
        "importance": arrange_bars(study["importance"]),
        "keys": keys,
        "is_running": any(trial["state"] == "running" for trial in study["trials"]),
    }


def _find_file(form: FormTexts) -> tuple[str, bool]:
    """Return the search file of the form, and whether it is there with this text. Raises InputError."""
    text, file = _read_text(form), form.get("file", "")
    plan = studies.check_search_text(text, _read_overrides(form))
    if file in studies.list_search_files() and (paths.ROOT / file).read_text(encoding="utf-8").strip() == text.strip():
        return file, True
    return f"experiments/search/{plan.study}.yaml", False


def _read_text(form: FormTexts) -> str:
    """Return the text of the search file: browsers send lines with other ends."""
    return form.get("text", "").replace("\r\n", "\n")


def _read_overrides(form: FormTexts) -> list[str]:
    """Return what every trial has beside params.yaml."""
    values: dict[str, Any] = {}
    if model := form.get("model"):
        values["model"] = model
    if form.get("judge") in ("true", "false"):
        values["judge.enabled"] = form["judge"] == "true"
    if form.get("judge") == "true" and form.get("provider"):
        values["judge.provider"] = form["provider"]
        if form.get("judge_model"):
            values["judge.model"] = form["judge_model"]
    return [format_override(key, value) for key, value in values.items()]


def _build(form: FormTexts, file: str) -> list[str]:
    trials, jobs = (_read_number(form, key) for key in ("n_trials", "jobs"))
    return actions.build_search(file, trials, jobs, _read_overrides(form))


def _read_number(form: FormTexts, key: str) -> int:
    text = form.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise InputError(f"{key} {text[:40]!r}: must be a whole number; give one", code="no-number")
    return int(text)
