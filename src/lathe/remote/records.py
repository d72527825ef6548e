"""Records of what was started elsewhere, in the scratch folder: where it runs, and as which job."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.remote.job import Job

FOLDER = paths.SCRATCH / "remote"


@dataclass(frozen=True)
class Record:
    """What was started under a name.

    `by` is ssh, slurm or sky. `place` is what that knows it by: a host and its folder, the number of a job of Slurm, or
    the name of one of SkyPilot. `jobs` are the runs, several in a sweep; none of a worker of the search `study`.
    """

    name: str
    by: str
    place: dict[str, str]
    started: str
    jobs: list[Job] = field(default_factory=list)
    study: str | None = None


def write_record(record: Record) -> None:
    """Keep a record."""
    with paths.replace_file(FOLDER / f"{record.name}.json") as partial:
        partial.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def read_record(name: str) -> Record:
    """Return the record of a name. Raises InputError if nothing was started under it."""
    file = FOLDER / f"{name}.json"
    if name not in (known := list_names()):
        raise _make_unknown(name, known)
    try:
        return _read(file)
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{file}: damaged; remove it, and start the run again", code="damaged-record") from None


def find_records(name: str) -> list[Record]:
    """Return the record of a name, or of each host that works on a study of it. Raises InputError if there is none."""
    if name not in (known := list_names()):
        of_study = [record for record in map(read_record, known) if record.study == name]
        if of_study:
            return of_study
    return [read_record(name)]


def list_names() -> list[str]:
    """Return the names under which something was started, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def _read(file: Path) -> Record:
    content: Any = json.loads(file.read_text(encoding="utf-8"))
    return Record(**{**content, "jobs": [Job(**job) for job in content["jobs"]]})


def forget_record(name: str) -> None:
    """Remove a record. Raises InputError if there is none."""
    if name not in (known := list_names()):
        raise _make_unknown(name, known)
    (FOLDER / f"{name}.json").unlink()


def _make_unknown(name: str, known: list[str]) -> InputError:
    near = did_you_mean(name, known) if known else "nothing was; `lathe remote run` starts a run"
    return InputError(f"{name}: not started from here; {near}", code="no-remote-run")
