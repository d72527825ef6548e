"""Addresses of the pages, and of the parts of them that are loaded by themselves."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import try_git
from lathe.config.yaml_files import read_yaml
from lathe.experiments.compare import compare_either
from lathe.experiments.recipes import list_recipes, load_main_recipe
from lathe.studio import actions, experiment_table, parameter_form, run_facts, running
from lathe.studio import started_commands as starting
from lathe.studio.chat_pages import router as chat_router
from lathe.studio.child_process import run_for_json
from lathe.studio.form_data import FormTexts, read_form
from lathe.studio.model_pages import router as model_router
from lathe.studio.queue_pages import list_tasks
from lathe.studio.queue_pages import router as queue_router
from lathe.studio.rendering import redirect, render
from lathe.studio.search_pages import router as search_router
from lathe.studio.texts import COOKIE, LANGUAGES

QUICK_START = "baseline"  # the recipe of the defaults
FIRST_RECIPE = "tiny"

# Of the report alone, which is one file with its styles in it and no script.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; sandbox"

router = APIRouter()
router.include_router(search_router)
router.include_router(model_router)
router.include_router(chat_router)
router.include_router(queue_router)


@router.get("/")
def show_overview(
    request: Request,
    q: Annotated[str, Query(max_length=200)] = "",
    sort: Annotated[str, Query(max_length=40)] = "",
    gates: Annotated[str, Query(max_length=10)] = "",
    columns: Annotated[list[str], Query()] = [],  # noqa: B006 - FastAPI copies it
    parameters: Annotated[list[str], Query()] = [],  # noqa: B006
) -> Response:
    """Show what runs, and the table of the runs; its rows come by themselves where they have yet to be read."""
    table = None
    chosen = {"text": q, "sort": sort, "gates": gates, "columns": columns, "parameters": parameters}
    if experiment_table.is_warm():
        table = _read_table(**chosen)
    recipe = QUICK_START if QUICK_START in list_recipes() else None
    return render(
        request,
        "overview",
        title="Overview",
        table=table,
        gates=gates,
        query=request.url.query,
        works=running.find_running(),
        commands=starting.list_commands()[:8],
        quick_start=["lathe", "run", recipe] if recipe else None,
        has_waiting=_count_queued() > 0,
        remotes=actions.list_remotes(),
    )


@router.get("/overview/running")
def show_running(request: Request) -> Response:
    """Show what runs now."""
    return render(request, "_running", works=running.find_running(), commands=starting.list_commands()[:8])


@router.get("/overview/table")
def show_table(
    request: Request,
    q: Annotated[str, Query(max_length=200)] = "",
    sort: Annotated[str, Query(max_length=40)] = "",
    gates: Annotated[str, Query(max_length=10)] = "",
    columns: Annotated[list[str], Query()] = [],  # noqa: B006
    parameters: Annotated[list[str], Query()] = [],  # noqa: B006
) -> Response:
    """Show the table of the runs."""
    table = _read_table(text=q, sort=sort, gates=gates, columns=columns, parameters=parameters)
    return render(request, "_table", table=table, gates=gates)


def _read_table(**chosen: Any) -> experiment_table.OverviewTable:
    return experiment_table.build_table(experiment_table.read_runs(), **chosen)


def _count_queued() -> int:
    """Return how many experiments wait in DVC's queue: it keeps them as entries of a stash of its own."""
    listed = try_git("reflog", "show", "--format=%H", "refs/exps/celery/stash") or b""
    return len(listed.split())


@router.get("/overview/remote")
def show_remote_experiments(request: Request, remote: Annotated[str, Query(max_length=100)]) -> Response:
    """Show the experiments that a Git remote has, with those that are here told apart."""
    names = actions.list_remote_experiments(remote)
    known = {run.name for run in experiment_table.read_runs()}
    command = ["dvc", "exp", "list", remote, "--all-commits", "--name-only"]
    return render(request, "_remote_experiments", remote=remote, names=names, known=known, command=command)


@router.post("/quick-start")
def quick_start(form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Start the recipe of the defaults."""
    command = starting.start_command(actions.build_run(QUICK_START, None, [], "now", force="force" in form))
    return redirect(f"/commands/{command.identifier}")


@router.post("/queue-start")
def start_queue() -> Response:
    """Let DVC run what waits in its queue."""
    return redirect(f"/commands/{starting.start_command(['dvc', 'queue', 'start']).identifier}")


@router.get("/new")
def show_new_run(
    request: Request,
    recipe: Annotated[str, Query(max_length=100)] = FIRST_RECIPE,
    dataset: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """Show the form of a run, perhaps with another dataset than the recipe's."""
    values = parameter_form.read_values(recipe)
    if dataset and dataset not in read_yaml(paths.PRESETS)["datasets"]:
        raise InputError(f"dataset {dataset!r}: presets.yaml has none of this name; see Data", code="no-such-dataset")
    values["dataset"] = dataset or values["dataset"]
    main, sections = parameter_form.build_entries(values)
    return render(
        request,
        "new",
        title="New run",
        recipe=recipe,
        recipes=list_recipes(),
        description=load_main_recipe(recipe).recipe.description,
        main=main,
        sections=sections,
        problems=[],
        command=["lathe", "run", recipe, *(["-S", f"dataset={dataset}"] if dataset else [])],
        dataset=dataset,
        changed=0,
    )


@router.post("/new/check")
def check_new_run(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Say what is wrong in the form, and what its command is."""
    checked = parameter_form.check_form(form.get("recipe", ""), _select_parameters(form))
    command, problems = None, list(checked.problems)
    if not problems:
        try:
            command = _build_run(form, checked.overrides)
        except InputError as error:
            problems = str(error).splitlines()
    return render(request, "_check", problems=problems, command=command, changed=len(checked.overrides))


@router.post("/new/estimate")
def estimate_new_run(request: Request, form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Show what `lathe doctor` says of the form's run: memory and disk first."""
    recipe = form.get("recipe", "")
    checked = parameter_form.check_form(recipe, _select_parameters(form))
    if checked.problems:
        raise InputError("\n".join(checked.problems), code="invalid-form")
    sets = [word for override in checked.overrides for word in ("-S", override)]
    words = ["lathe", "doctor", "--recipe", recipe, *sets]
    findings = run_for_json([*words, "--json"])
    first = [finding for finding in findings if finding["check"] in ("memory", "disk")]
    others = [finding for finding in findings if finding not in first and finding["status"] != "ok"]
    return render(request, "_estimate", findings=[*first, *others], command=words)


@router.post("/new/start")
def start_new_run(form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Start the form's run, queue it, or start it in a copy."""
    checked = parameter_form.check_form(form.get("recipe", ""), _select_parameters(form))
    if checked.problems:
        raise InputError("\n".join(checked.problems), code="invalid-form")
    command = starting.start_command(_build_run(form, checked.overrides))
    return redirect(f"/commands/{command.identifier}")


def _select_parameters(form: Mapping[str, str]) -> dict[str, str]:
    return {key[2:]: text for key, text in form.items() if key.startswith("p:")}


def _build_run(form: Mapping[str, str], overrides: list[str]) -> list[str]:
    mode = form.get("mode", "now")
    if mode not in ("now", "queue", "temp"):
        raise InputError(f"{mode[:20]!r}: must be now, queue or temp", code="no-such-mode")
    return actions.build_run(
        form.get("recipe", ""),
        form.get("experiment", "").strip() or None,
        overrides,
        mode,  # type: ignore[arg-type]
        force="force" in form,
    )


@router.get("/commands/{identifier}")
def show_command(request: Request, identifier: str) -> Response:
    """Show a command that was started here: its state, what runs, curves and log."""
    command = starting.read_command(identifier)
    work = next((work for work in running.find_running() if work.identifier == identifier), None)
    lines = starting.read_tail(command.log)
    return render(request, "command", title="Command", command=command, work=work, lines=lines, search="")


@router.get("/commands/{identifier}/state")
def show_state(request: Request, identifier: str) -> Response:
    """Show the state of a command."""
    command = starting.read_command(identifier)
    work = next((work for work in running.find_running() if work.identifier == identifier), None)
    return render(request, "_state", command=command, work=work)


@router.get("/commands/{identifier}/log")
def show_log(request: Request, identifier: str, search: Annotated[str, Query(max_length=200)] = "") -> Response:
    """Show the end of a command's log, or the lines of it that hold a text."""
    command = starting.read_command(identifier)
    return render(request, "_log", command=command, lines=starting.read_tail(command.log, search), search=search)


@router.post("/commands/{identifier}/cancel")
def cancel_command(request: Request, identifier: str) -> Response:
    """End a command in good order."""
    starting.cancel_command(starting.read_command(identifier))
    return redirect(f"/commands/{identifier}")


@router.post("/commands/{identifier}/resume")
def resume_command(identifier: str) -> Response:
    """Start a command again that stopped halfway."""
    command = starting.resume_command(starting.read_command(identifier))
    return redirect(f"/commands/{command.identifier}")


@router.get("/live/{pid}")
def show_live(request: Request, pid: int) -> Response:
    """Show what runs without the studio having started it."""
    work = next((work for work in running.find_running() if work.pid == pid), None)
    if work is None:
        raise InputError(f"process {pid}: runs nothing here any more; see the overview", code="no-such-command")
    task = next((task for task in list_tasks() if work.experiment and task.name == work.experiment), None)
    return render(request, "live", title="Running", work=work, task=task)


@router.get("/run")
def show_run(request: Request, name: Annotated[str, Query(max_length=200)]) -> Response:
    """Show what a run scored and took."""
    facts = run_facts.read_run(name)
    is_experiment = facts.result is not None and facts.result.name not in ("workspace",) and bool(facts.result.changed)
    remotes = actions.list_remotes()
    return render(
        request,
        "run",
        title=name,
        facts=facts,
        remotes=remotes,
        is_experiment=is_experiment,
        has_report=(paths.METRICS / "report/index.html").is_file(),
        sizes=_list_size_points(facts),
    )


def _list_size_points(facts: run_facts.RunFacts) -> list[dict[str, Any]]:
    """Return size and primary score of every file."""
    cells = facts.splits.get("validation", {}).get(facts.metric or "", {})
    return [
        {"name": artifact, "bytes": facts.sizes.get(artifact), "score": cell.value}
        for artifact, cell in cells.items()
        if cell.value is not None and facts.sizes.get(artifact)
    ]


@router.get("/run/answers")
def show_worst_answers(request: Request, name: Annotated[str, Query(max_length=200)]) -> Response:
    """Show the answers of a run's best file that scored worst."""
    artifact, answers = run_facts.read_worst_answers(name)
    return render(request, "_answers", artifact=artifact, answers=answers, names=[artifact or name])


@router.post("/run/action")
def act_on_run(form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Apply, branch, push or pull an experiment."""
    words = actions.build_experiment_action(
        form.get("action", ""), form.get("name", ""), form.get("target", "").strip()
    )
    return redirect(f"/commands/{starting.start_command(words).identifier}")


@router.post("/report")
def write_report() -> Response:
    """Write the report of the workspace."""
    return redirect(f"/commands/{starting.start_command(['lathe', 'report']).identifier}")


@router.get("/report")
def show_report() -> Response:
    """Show the report that `lathe report` has written."""
    file = paths.METRICS / "report/index.html"
    if not file.is_file():
        raise InputError("metrics/report/index.html: no such file; `lathe report` writes it", code="no-such-file")
    return FileResponse(file, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})


@router.get("/compare")
def show_comparison(
    request: Request,
    names: Annotated[list[str], Query(max_length=12)] = [],  # noqa: B006
    split: Annotated[str, Query(max_length=20)] = "validation",
) -> Response:
    """Show runs beside one another, or the form that chooses them."""
    if split not in ("validation", "test"):
        raise InputError(f"split {split!r}: must be validation or test", code="no-such-split")
    known = [run.name for run in experiment_table.read_runs()]
    comparison, counts = None, (0, 0)
    answers: list[run_facts.ShownAnswer] = []
    chosen = [name for name in names if name]
    if len(chosen) > 1:
        comparison = compare_either(chosen, split=split, artifact=None)
        artifacts = [side.artifact for side in comparison.sides[:2]]
        rows, differing, answers = run_facts.read_different_answers(chosen[0], chosen[1], artifacts, split)
        counts = rows, differing
    return render(
        request,
        "compare",
        title="Compare",
        known=known,
        chosen=chosen,
        split=split,
        comparison=comparison,
        counts=counts,
        answers=answers,
        command=["lathe", "compare", *(chosen or ["A", "B"]), *(["--split", "test"] if split == "test" else [])],
    )


@router.post("/language")
def choose_language(form: Annotated[FormTexts, Depends(read_form)]) -> Response:
    """Keep the language in the browser."""
    language = form.get("language", "")
    if language not in LANGUAGES:
        raise InputError(f"{language[:20]!r}: must be one of {', '.join(LANGUAGES)}", code="no-such-language")
    response = Response(headers={"HX-Refresh": "true"})
    response.set_cookie(COOKIE, language, max_age=31536000, samesite="strict", path="/")
    return response
