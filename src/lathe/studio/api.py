"""HTTP API of the studio: the actions of the pages for programs, described by OpenAPI at /api/openapi.json.

A refusal is a JSON object with `code` and `message`, as `lathe.common.errors.InputError` has them.
"""

import asyncio
import json
import math
import shlex
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse

from lathe.experiments.compare import compare_either
from lathe.experiments.comparison import Comparison
from lathe.experiments.recipes import list_recipes, load_main_recipe
from lathe.experiments.results import RunResult
from lathe.provenance.trace import Trace
from lathe.studio import actions, data_files, experiment_table, parameter_form, run_facts, running, studies
from lathe.studio import started_commands as starting
from lathe.studio.running import RunningWork
from lathe.studio.started_commands import StartedCommand
from lathe.studio.studies import FineTuningRequest

SECONDS_BETWEEN_LOOKS = 2.0
MOST_POINTS = 2000  # of a curve

Curves = dict[str, list[tuple[int, float]]]


class ApiRefusal(BaseModel):
    """Why a request was refused."""

    code: str
    message: str


class CommandAnswer(BaseModel):
    """A command that was started or is known, by the words that a person would type."""

    identifier: str
    command: str
    started: str
    state: Literal["running", "ended", "failed", "lost"]
    code: int | None

    @staticmethod
    def of(command: StartedCommand) -> "CommandAnswer":
        """Return the answer about a command."""
        return CommandAnswer(
            identifier=command.identifier,
            command=command.text,
            started=command.started,
            state=command.state,
            code=command.code,
        )


class RunRequest(BaseModel):
    """A run of a recipe: now, queued, or in a temporary copy; `values` are parameters by their dotted keys."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(max_length=100)
    name: str | None = Field(None, max_length=100)
    values: dict[str, Any] = {}
    mode: actions.Mode = "now"


class SearchRequest(BaseModel):
    """A search by a file of experiments/search; `values` are parameters that every trial has."""

    model_config = ConfigDict(extra="forbid")

    file: str = Field(max_length=200)
    n_trials: Annotated[int, Field(ge=actions.FEWEST_TRIALS, le=actions.MOST_TRIALS)]
    jobs: Annotated[int, Field(ge=1, le=actions.MOST_JOBS)] = 1
    values: dict[str, Any] = {}


class ExperimentAction(BaseModel):
    """What is done with an experiment, in DVC's words; `target` is a branch or a remote."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["apply", "branch", "push", "pull"]
    target: str = Field("", max_length=100)


class RunCheck(BaseModel):
    """Whether a run would be accepted: the problems, one line each, and the command."""

    problems: list[str]
    command: str | None


class StudyStarted(BaseModel):
    """The name of the study, and the command that runs it."""

    study: str
    command: CommandAnswer


class RecipeAnswer(BaseModel):
    """A recipe, and its values of every parameter."""

    name: str
    description: str
    values: dict[str, Any]


class SavedFile(BaseModel):
    """A file that was uploaded, by its path from the top of the checkout."""

    path: str


# For the description alone: the guard before the application is what refuses.
_BEARER = HTTPBearer(auto_error=False, description="the token in LATHE_STUDIO_TOKEN; pages have their cookie")

router = APIRouter(
    prefix="/api",
    dependencies=[Depends(_BEARER)],
    responses={
        code: {"model": ApiRefusal, "description": meaning}
        for code, meaning in {
            400: "the request cannot be read",
            401: "without the session's cookie or the token",
            403: "from another site, or without the CSRF token",
            404: "no such thing",
            408: "the request took too long to come",
            409: "another command works here",
            413: "the request is too large",
            422: "the input cannot be used",
        }.items()
    },
)

RunName = Annotated[str, Path(max_length=200, description="an experiment, commit or branch, or `workspace`")]


@router.get("/runs")
def list_runs() -> list[RunResult]:
    """List the runs, as `lathe results --json`."""
    return experiment_table.read_runs()


@router.post("/runs", status_code=201)
def start_run(wanted: RunRequest) -> CommandAnswer:
    """Start a run, as `lathe run RECIPE -S KEY=VALUE`."""
    overrides = actions.write_overrides(wanted.values)
    words = actions.build_run(wanted.recipe, wanted.name, overrides, wanted.mode)
    return CommandAnswer.of(starting.start_command(words))


@router.post("/runs/check")
def check_run(wanted: RunRequest) -> RunCheck:
    """Say whether a run would be accepted; nothing is started."""
    overrides = actions.write_overrides(wanted.values)
    load_main_recipe(wanted.recipe)
    problems = parameter_form.check_overrides(wanted.recipe, overrides)
    if problems:
        return RunCheck(problems=problems, command=None)
    words = actions.build_run(wanted.recipe, wanted.name, overrides, wanted.mode)
    return RunCheck(problems=[], command=shlex.join(words))


@router.get("/runs/{name}/curves")
def read_curves(name: RunName) -> Curves:
    """Return the curves of a run's training: points of step and value by the curve's name."""
    return thin_curves(run_facts.read_run_curves(name))


@router.post("/runs/{name}/actions", status_code=201)
def act_on_run(name: RunName, wanted: ExperimentAction) -> CommandAnswer:
    """Apply, branch, push or pull an experiment, as `dvc exp`."""
    words = actions.build_experiment_action(wanted.action, name, wanted.target)
    return CommandAnswer.of(starting.start_command(words))


@router.get("/compare")
def compare(
    names: Annotated[list[str], Query(max_length=12)],
    split: Literal["validation", "test"] = "validation",
    artifact: Annotated[str | None, Query(max_length=60)] = None,
) -> Comparison:
    """Compare runs, as `lathe compare --json`."""
    return compare_either(names, split=split, artifact=artifact)


@router.get("/recipes")
def read_recipes() -> list[str]:
    """List the recipes, as `lathe experiments`."""
    return list_recipes()


@router.get("/recipes/{name}")
def read_recipe(name: Annotated[str, Path(max_length=100)]) -> RecipeAnswer:
    """Return a recipe with its values of every parameter."""
    loaded = load_main_recipe(name)
    values = parameter_form.read_values(name)
    return RecipeAnswer(name=name, description=loaded.recipe.description, values=values)


@router.get("/running")
def list_running() -> list[RunningWork]:
    """List what runs here now, whoever started it."""
    return running.find_running()


@router.get(
    "/running/{pid}/events",
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "object"}}}}},
)
async def follow_running(request: Request, pid: Annotated[int, Path(ge=0, le=2**31 - 1)]) -> EventSourceResponse:
    """Follow what runs: events `state` (as in /api/running) and `curves`, and `ended` when it is no longer there."""

    async def look() -> AsyncIterator[dict[str, str]]:
        sent: tuple[str, str] = ("", "")
        while not await request.is_disconnected():
            work, curves = await run_in_threadpool(_look_at, pid)
            if work is None:
                yield {"event": "ended", "data": "{}"}
                return
            now = json.dumps(asdict(work)), json.dumps(curves)
            for event, before, content in zip(("state", "curves"), sent, now, strict=True):
                if content != before:
                    yield {"event": event, "data": content}
            sent = now
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    return EventSourceResponse(look())


@router.get("/commands")
def list_commands() -> list[CommandAnswer]:
    """List the commands that were started here, the newest first."""
    return [CommandAnswer.of(command) for command in starting.list_commands()]


@router.get("/commands/{identifier}")
def read_command(identifier: Annotated[str, Path(max_length=60)]) -> CommandAnswer:
    """Return a command that was started here."""
    return CommandAnswer.of(starting.read_command(identifier))


@router.get("/commands/{identifier}/log")
def read_log(
    identifier: Annotated[str, Path(max_length=60)],
    search: Annotated[str, Query(max_length=200)] = "",
    lines: Annotated[int, Query(ge=1, le=5000)] = 200,
) -> list[str]:
    """Return the last lines of what a command printed, with `search` those that hold it."""
    return starting.read_tail(starting.read_command(identifier).log, search, lines)


@router.post("/commands/{identifier}/cancel")
def cancel_command(identifier: Annotated[str, Path(max_length=60)]) -> CommandAnswer:
    """End a command in good order; a training saves a checkpoint first."""
    starting.cancel_command(starting.read_command(identifier))
    return CommandAnswer.of(starting.read_command(identifier))


@router.post("/commands/{identifier}/resume", status_code=201)
def resume_command(identifier: Annotated[str, Path(max_length=60)]) -> CommandAnswer:
    """Start a command that was cancelled or failed again: it goes on where it was."""
    return CommandAnswer.of(starting.resume_command(starting.read_command(identifier)))


@router.post("/searches", status_code=201)
def start_search(wanted: SearchRequest) -> CommandAnswer:
    """Start a search, as `lathe search FILE --n-trials N`."""
    file = actions.resolve_inside(wanted.file, studies.FOLDER, suffixes=(".yaml",))
    overrides = actions.write_overrides(wanted.values)
    studies.check_search_text(file.read_text(encoding="utf-8"), overrides)
    words = actions.build_search(wanted.file, wanted.n_trials, wanted.jobs, overrides)
    return CommandAnswer.of(starting.start_command(words))


@router.get("/searches")
def list_studies() -> list[str]:
    """List the studies that have a journal here."""
    return studies.list_studies()


@router.get("/searches/{study}")
def read_study(study: Annotated[str, Path(max_length=100)]) -> dict[str, Any]:
    """Return a study with its trials as far as they are."""
    return studies.read_study(study)


@router.post("/fine-tuning", status_code=201)
def start_fine_tuning(wanted: FineTuningRequest) -> StudyStarted:
    """Search for the parameters of a fine-tuning; answers with the study's name while the search runs."""
    study, words = studies.prepare_fine_tuning(wanted)
    return StudyStarted(study=study, command=CommandAnswer.of(starting.start_command(words)))


@router.get("/data")
def list_data() -> list[data_files.LocalFile]:
    """List what is under data/local."""
    return data_files.list_files()


@router.put("/data/{name}", status_code=201)
async def upload_data(request: Request, name: Annotated[str, Path(max_length=130)], replace: bool = False) -> SavedFile:
    """Save the request's body as a file of data/local, with `replace` in place of the one that is there."""
    return SavedFile(path=await data_files.save_upload(name, request.stream(), replace=replace))


@router.get("/data/check")
def check_data(
    path: Annotated[str, Query(max_length=300)],
    prompt: Annotated[str, Query(max_length=200)] = "",
    completion: Annotated[str, Query(max_length=200)] = "",
) -> dict[str, Any]:
    """Say what a file of data holds and which rows would be dropped, as `lathe data FILE --json`."""
    return data_files.check_file(path, prompt, completion)


@router.put("/lineage")
async def trace_upload(request: Request) -> Trace:
    """Say what the GGUF in the request's body was made from, as `lathe trace FILE --json`; the file is not kept."""
    return await data_files.trace_upload(request.stream())


def thin_curves(curves: Curves) -> Curves:
    """Return the curves without what is no number, and with as many points as a picture can show."""
    thinned: Curves = {}
    for name, points in curves.items():
        known = [(step, value) for step, value in points if math.isfinite(value)]
        stride = -(-len(known) // MOST_POINTS) or 1
        thinned[name] = known[::stride] + (known[-1:] if len(known) % stride != 1 and stride > 1 else [])
    return thinned


def _look_at(pid: int) -> tuple[RunningWork | None, Curves]:
    work = next((work for work in running.find_running() if work.pid == pid), None)
    stage = running.find_stage_of(pid) if work else None
    curves = running.read_live_curves(stage.root, stage.since) if stage and stage.stage == "train" else {}
    return work, thin_curves(curves)
