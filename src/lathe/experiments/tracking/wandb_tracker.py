"""W&B mirror: a run at Weights & Biases. Sent points are noted in .scratch, because an offline run has no server."""

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
from lathe.experiments.tracking.bounded_requests import bound_responses
from lathe.experiments.tracking.run_files import CurvePoints, MirroredRun, contradicts, find_unsent_points
from lathe.experiments.tracking.start_mirror import SCRATCH
from lathe.experiments.tracking.targets import WandbTarget
from lathe.experiments.tracking.tracker import Mirror, TrackerUnreachableError

FOLDER = paths.MAIN / "wandb"

# Only the run itself is sent: no errors of the client and nothing about the machine.
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
    """The run of `record`: among those with its parameters the one whose points it does not contradict."""

    def __init__(self, target: WandbTarget, record: MirroredRun) -> None:
        super().__init__(target, record)
        self.target: WandbTarget = target
        self.run: Any = None
        self.note: Path | None = None  # the file with the attributes below
        self.id = ""
        self.known: dict[str, dict[int, float]] = {}
        self.folder: str | None = None
        self.finished: str | None = None  # digest of everything, after all was sent

    @property
    def address(self) -> str | None:
        """The address of the run's page, or an offline run's folder."""
        return (self.run and self.run.url) or self.folder

    def check(self) -> None:
        """Look for the key: nothing else can be checked without creating a run."""
        if self.target.mode == "online" and not os.environ.get(KEY):
            raise TrackerUnreachableError(f"{KEY} is not set; set it, or tracking.wandb.mode to offline")

    def update(self, curves: CurvePoints) -> int:
        """Send the points that were not sent yet."""
        with self._translate_errors():
            if self.note is None or contradicts(self.known, curves, whole=False):
                self._find_run(curves, whole=False)
            return self._send_points(find_unsent_points(self.known, curves))

    def finish(self, record: MirroredRun) -> int:
        """Send everything that was not sent yet, and end the run."""
        everything = json.dumps([record.tags, record.scores, record.files_digest], sort_keys=True)
        digest = hashlib.sha256(everything.encode()).hexdigest()
        with self._translate_errors():
            if self.note is None or contradicts(self.known, record.curves, whole=True):
                self._find_run(record.curves, whole=True)
            if self.finished == digest and not find_unsent_points(self.known, record.curves):
                return 0
            self._open_run(record)
            sent = self._send_points(find_unsent_points(self.known, record.curves))
            self.run.summary.update(record.scores)
            self.run.config.update({"git_commit": record.context.commit})
            self.run.tags = _build_tags(record)
            self.run.log_artifact(self._build_artifact(record))
            self.run.finish()
            self.run, self.finished = None, digest
            self._write_note()
        return sent

    def mark_interrupted(self) -> None:
        """Mark a run that was created as interrupted."""
        with self._translate_errors():
            if self.run is not None:
                self.run.finish(exit_code=1)
                self.run = None

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        os.environ.update(ENVIRONMENT)
        for name, place in PLACES.items():
            os.environ.setdefault(name, place)
        import wandb

        bound_responses()  # of its part in Python; wandb-core is a program of its own
        try:
            yield
        except (wandb.errors.Error, OSError) as error:
            raise TrackerUnreachableError(" ".join(str(error).split())[:300]) from None

    def _find_run(self, curves: CurvePoints, *, whole: bool) -> None:
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

    def _open_run(self, record: MirroredRun) -> None:
        """Create the run, or resume it; an offline folder cannot be resumed and is written again."""
        if self.run is not None:
            return
        offline = self.target.mode == "offline"
        self.check()
        import wandb

        FOLDER.mkdir(exist_ok=True)
        if offline:
            # That of a mirror which was killed before it had noted it, too.
            for folder in FOLDER.glob(f"offline-run-*-{self.id}"):
                shutil.rmtree(folder, ignore_errors=True)
            self.known, self.finished = {}, None
        self.run = wandb.init(
            project=self.target.project,
            id=self.id,
            name=record.name,
            group=record.context.study,
            config=record.parameters,
            tags=_build_tags(record),
            mode="offline" if offline else "online",
            resume=None if offline else "allow",
            dir=str(FOLDER.parent),
            settings=wandb.Settings(**SETTINGS),
        )
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)
        self.folder = str(Path(self.run.dir).parent)
        self._write_note()

    def _send_points(self, points: list[tuple[str, int, float]]) -> int:
        if not points:
            return 0
        self._open_run(self.record)
        for step, of_step in itertools.groupby(points, key=lambda point: point[1]):
            row = {name: value for name, _, value in of_step}
            self.run.log({STEP: step, **row})
            for name, value in row.items():
                self.known.setdefault(name, {})[step] = value
        self._write_note()
        return len(points)

    def _build_artifact(self, record: MirroredRun) -> Any:
        import wandb

        artifact = wandb.Artifact(f"run-{self.id}", type="run")
        for file in record.files:
            artifact.add_file(str(file), file.relative_to(record.folder).as_posix())
        return artifact

    def _write_note(self) -> None:
        assert self.note
        kept = {"id": self.id, "folder": self.folder, "finished": self.finished, "points": self.known}
        write_json(self.note, kept)


def _build_tags(record: MirroredRun) -> list[str]:
    return [f"{key}:{value}"[:LONGEST_TAG] for key, value in record.tags.items()]
