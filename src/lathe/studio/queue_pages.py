"""Pages of DVC's queue: its experiments with their states, and the log of each."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from lathe.common import paths
from lathe.common.dvc_api import QueueTask, open_repository
from lathe.common.errors import InputError
from lathe.studio import started_commands as starting
from lathe.studio.rendering import render

router = APIRouter()


@router.get("/queue")
def show_queue(request: Request) -> Response:
    """Show the experiments of the queue."""
    return render(request, "queue", title="Queue", tasks=list_tasks())


@router.get("/queue/tasks")
def show_tasks(request: Request) -> Response:
    """Show the table of the queue."""
    return render(request, "_queue", tasks=list_tasks())


@router.get("/queue/{task}")
def show_task(request: Request, task: str) -> Response:
    """Show an experiment of the queue with its log."""
    found = find_task(task)
    return render(request, "queue_task", title=found.name or "Queue", task=found, lines=_read(found), search="")


@router.get("/queue/{task}/log")
def show_task_log(request: Request, task: str, search: Annotated[str, Query(max_length=200)] = "") -> Response:
    """Show the end of its log, or the lines of it that hold a text."""
    found = find_task(task)
    return render(request, "_queue_log", task=found, lines=_read(found, search), search=search)


def list_tasks() -> list[QueueTask]:
    """Return the experiments of DVC's queue; none where it was never used."""
    if not (paths.ROOT / ".dvc/tmp/exps/celery").is_dir():
        return []
    with open_repository(paths.ROOT) as repo:
        return repo.list_queue()


def find_task(identifier: str) -> QueueTask:
    """Return an experiment of the queue by its commit. Raises InputError if there is none."""
    found = next((task for task in list_tasks() if task.identifier == identifier), None)
    if found is None:
        raise InputError(
            f"{identifier[:80]!r}: is not in DVC's queue any more; see `dvc queue status`", code="no-such-command"
        )
    return found


def _read(task: QueueTask, search: str = "") -> list[str]:
    return starting.read_tail(task.log, search) if task.log else []
