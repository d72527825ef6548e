"""A run at Weights & Biases. What was written is kept in .scratch: a folder of an offline run asks nobody."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.json_files import read_json, write_json
from lathe.experiments.tracking.run_files import Curves, Record, contradicts, missing
from lathe.experiments.tracking.start_mirror import SCRATCH
from lathe.experiments.tracking.targets import WandbTarget
from lathe.experiments.tracking.tracker import Mirror, UnreachableError

FOLDER = paths.MAIN / "wandb"

# Nothing but the run itself is sent: neither errors of the client's own nor what it finds on the machine.
ENVIRONMENT = {"WANDB_ERROR_REPORTING": "false"}
PLACES = {name: str(FOLDER / "data") for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR")}
SETTINGS = {
    "console": "off",
    "silent": True,
    "disable_git": True,
    "save_code": False,
    "x_disable_stats": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}

KEY = "WANDB_API_KEY"
STEP = "optimizer_step"
LONGEST_TAG = 64  # characters


class WandbMirror(Mirror):
    """The run of `record`; of runs with its parameters the one whose points it does not contradict."""

    def __init__(self, target: WandbTarget, record: Record) -> None:
        super().__init__(target, record)
        self.target: WandbTarget = target
        self.run: Any = None
        self.note: Path | None = None  # what follows is kept here
        self.id = ""
        self.known: dict[str, dict[int, float]] = {}
        self.folder: str | None = None
        self.finished: str | None = None  # digest of everything, once all was sent

    @property
    def address(self) -> str | None:
        """Where the run can be looked at: a page, or an offline run's folder."""
        return (self.run and self.run.url) or self.folder

    def ask(self) -> None:
        """Look for the key, which is all that can be said without making a run."""
        if self.target.mode == "online" and not os.environ.get(KEY):
            raise UnreachableError(f"{KEY} is not set; set it, or tracking.wandb.mode to offline")

    def update(self, curves: Curves) -> int:
        """Send the points that are not there yet."""
        with self._asking():
            if self.note is None or contradicts(self.known, curves, whole=False):
                self._find(curves, whole=False)
            return self._send(missing(self.known, curves))

    def finish(self, record: Record) -> int:
        """Send all that is not there yet, and end the run."""
        everything = json.dumps([record.tags, record.scores, record.files_digest], sort_keys=True)
        digest = hashlib.sha256(everything.encode()).hexdigest()
        with self._asking():
            if self.note is None or contradicts(self.known, record.curves, whole=True):
                self._find(record.curves, whole=True)
            if self.finished == digest and not missing(self.known, record.curves):
                return 0
            self._open(record)
            sent = self._send(missing(self.known, record.curves))
            self.run.summary.update(record.scores)
            self.run.config.update({"git_commit": record.context.commit})
            self.run.tags = _tags(record)
            self.run.log_artifact(self._artifact(record))
            self.run.finish()
            self.run, self.finished = None, digest
            self._keep()
        return sent

    def interrupted(self) -> None:
        """Say of a run that has begun that it was cut short."""
        with self._asking():
            if self.run is not None:
                self.run.finish(exit_code=1)
                self.run = None

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        os.environ.update(ENVIRONMENT)
        for name, place in PLACES.items():
            os.environ.setdefault(name, place)
        import wandb

        try:
            yield
        except (wandb.errors.Error, OSError) as error:
            raise UnreachableError(" ".join(str(error).split())[:300]) from None

    def _find(self, curves: Curves, *, whole: bool) -> None:
        if self.run is not None:
            self.run.finish(exit_code=1)
            self.run = None
        key = f"{self.target.project} {self.record.digest} {self.record.context.experiment}"
        first = hashlib.sha256(key.encode()).hexdigest()[:12]
        for number in itertools.count(1):
            self.id = first if number == 1 else f"{first}-{number}"
            self.note = SCRATCH / f"wandb/{self.target.mode}-{self.id}.json"
            kept = read_json(self.note) if self.note.exists() else {}
            self.known = {
                name: {int(step): value for step, value in points.items()}
                for name, points in kept.get("points", {}).items()
            }
            self.folder, self.finished = kept.get("folder"), kept.get("finished")
            if not contradicts(self.known, curves, whole=whole):
                return

    def _open(self, record: Record) -> None:
        """Begin the run, or go on with it; an offline folder cannot be gone on with, and is written anew."""
        if self.run is not None:
            return
        offline = self.target.mode == "offline"
        self.ask()
        import wandb

        FOLDER.mkdir(exist_ok=True)
        if offline and self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        if offline:
            self.known, self.finished = {}, None
        self.run = wandb.init(
            project=self.target.project,
            id=self.id,
            name=record.name,
            group=record.context.study,
            config=record.parameters,
            tags=_tags(record),
            mode="offline" if offline else "online",
            resume=None if offline else "allow",
            dir=str(FOLDER.parent),
            settings=wandb.Settings(**SETTINGS),
        )
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)
        self.folder = str(Path(self.run.dir).parent)
        self._keep()

    def _send(self, points: list[tuple[str, int, float]]) -> int:
        if not points:
            return 0
        self._open(self.record)
        for step, of_step in itertools.groupby(points, key=lambda point: point[1]):
            row = {name: value for name, _, value in of_step}
            self.run.log({STEP: step, **row})
            for name, value in row.items():
                self.known.setdefault(name, {})[step] = value
        self._keep()
        return len(points)

    def _artifact(self, record: Record) -> Any:
        import wandb

        artifact = wandb.Artifact(f"run-{self.id}", type="run")
        for file in record.files:
            artifact.add_file(str(file), file.relative_to(record.folder).as_posix())
        return artifact

    def _keep(self) -> None:
        assert self.note
        kept = {"id": self.id, "folder": self.folder, "finished": self.finished, "points": self.known}
        write_json(self.note, kept)


def _tags(record: Record) -> list[str]:
    return [f"{key}:{value}"[:LONGEST_TAG] for key, value in record.tags.items()]
