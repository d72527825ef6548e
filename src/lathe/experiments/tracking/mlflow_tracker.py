"""A run on an MLflow server. What is there already is asked of the server, so that nothing is sent twice."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from lathe.experiments.tracking.run_files import Curves, Record, contradicts, missing
from lathe.experiments.tracking.targets import MlflowTarget
from lathe.experiments.tracking.tracker import Mirror, UnreachableError

POINTS_AT_ONCE, PARAMETERS_AT_ONCE = 1000, 100  # the server's own limits
LONGEST_VALUE = 6000  # characters of a parameter

# A request may hang for so long, and is repeated by whoever made it: the client would go on for minutes.
CLIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}

DIGEST, FILES, STUDY = "lathe.parameters", "lathe.files", "lathe.study"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # its pages are those of trainings, not of chats


class MlflowMirror(Mirror):
    """The run of `record` on the server; it is found by its parameters and its points, or made with the first point."""

    def __init__(self, target: MlflowTarget, record: Record) -> None:
        super().__init__(target, record)
        self.target: MlflowTarget = target
        self.run_id: str | None = None
        self._experiment = ""
        self.known: dict[str, dict[int, float]] = {}

    @property
    def address(self) -> str | None:
        """Where the run can be looked at; None before it is there."""
        return (
            f"{self.target.tracking_uri}/#/experiments/{self._experiment}/runs/{self.run_id}" if self.run_id else None
        )

    def ask(self) -> None:
        """Ask for the experiment, which may not be there yet."""
        with self._asking():
            self._client.get_experiment_by_name(self.target.experiment_name)

    def update(self, curves: Curves, *, whole: bool = False) -> int:
        """Send the points that are not there yet."""
        with self._asking():
            if self.run_id is None or contradicts(self.known, curves, whole=whole):
                self._find(curves, whole=whole)
            points = missing(self.known, curves)
            self._send(points)
            for name, step, value in points:
                self.known.setdefault(name, {})[step] = value
            return len(points)

    def finish(self, record: Record) -> int:
        """Send all that is not there yet, and end the run."""
        sent = self.update(record.curves, whole=True)
        assert self.run_id
        with self._asking():
            run = self._client.get_run(self.run_id)
            there = run.data.metrics
            scores = [
                (name, record.last_step, value) for name, value in record.scores.items() if there.get(name) != value
            ]
            self._send(scores)
            self._describe(record, run.data)
            if run.data.tags.get(FILES) != record.files_digest:
                for file in record.files:
                    folder = file.relative_to(record.folder).parent.as_posix()
                    self._client.log_artifact(self.run_id, str(file), None if folder == "." else folder)
                self._client.set_tag(self.run_id, FILES, record.files_digest)
            if run.info.status != "FINISHED":
                self._client.set_terminated(self.run_id, "FINISHED")
        return sent + len(scores)

    def interrupted(self) -> None:
        """Say of a run that has begun that it was cut short."""
        if self.run_id:
            with self._asking():
                self._client.set_terminated(self.run_id, "KILLED")

    @cached_property
    def _client(self) -> Any:
        for key, value in CLIENT.items():
            os.environ.setdefault(key, value)
        os.environ.update(QUIET)
        from mlflow import MlflowClient

        return MlflowClient(self.target.tracking_uri)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            # Whether it took what it was sent is unknown: it is asked again.
            self.run_id = None
            raise UnreachableError(_reason(error)) from None

    def _find(self, curves: Curves, *, whole: bool) -> None:
        self.run_id = None
        self._experiment = self._experiment_id()
        wanted = f"tags.`{DIGEST}` = '{self.record.digest}'"
        mine = self.record.context.experiment
        for run in self._client.search_runs([self._experiment], wanted, order_by=["attributes.start_time DESC"]):
            # One that was cut short is gone on with under any name: DVC gives each run a new one.
            if mine and run.data.tags.get("experiment") != mine and run.info.status != "KILLED":
                continue
            known = {
                name: {point.step: point.value for point in self._client.get_metric_history(run.info.run_id, name)}
                for name in run.data.metrics
                if not name.startswith("evaluate/")
            }
            if not contradicts(known, curves, whole=whole):
                self.run_id, self.known = run.info.run_id, known
                if not whole and run.info.status != "FINISHED":
                    self._client.update_run(self.run_id, "RUNNING", self.record.name)
                    self._describe(self.record, run.data)
                return
        self._create()

    def _create(self) -> None:
        record = self.record
        tags = {
            DIGEST: record.digest,
            "mlflow.source.name": "lathe",
            **record.tags,
        }
        if record.context.study:
            tags["mlflow.parentRunId"] = self._parent(record.context.study)
        run = self._client.create_run(self._experiment, tags=tags, run_name=record.name)
        if not run.info.run_id:
            raise UnreachableError("what answers there is not an MLflow server")
        self.run_id, self.known = run.info.run_id, {}
        self._describe(record, run.data)

    def _parent(self, study: str) -> str:
        """Return the run that stands for a study; of several, made at once on two machines, the oldest."""
        wanted = f"tags.`{STUDY}` = '{study}'"

        def found() -> list[str]:
            runs = self._client.search_runs([self._experiment], wanted, order_by=["attributes.start_time ASC"])
            return [run.info.run_id for run in runs]

        if not found():
            tags = {STUDY: study, "mlflow.source.name": "lathe"}
            made = self._client.create_run(self._experiment, tags=tags, run_name=study).info.run_id
            self._client.set_terminated(made, "FINISHED")
        return found()[0]

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.target.experiment_name
        if (there := self._client.get_experiment_by_name(name)) is None:
            try:
                return str(self._client.create_experiment(name, tags=KIND))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                there = self._client.get_experiment_by_name(name)
        return str(there.experiment_id)

    def _describe(self, record: Record, there: Any) -> None:
        from mlflow.entities import Param, RunTag

        wanted = dict(record.tags)
        if record.context.commit:
            wanted["mlflow.source.git.commit"] = record.context.commit
        tags = [RunTag(key, value) for key, value in wanted.items() if there.tags.get(key) != value]
        parameters = [
            Param(key, str(value)[:LONGEST_VALUE])
            for key, value in record.parameters.items()
            if key not in there.params
        ]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self.run_id, params=parameters[start : start + PARAMETERS_AT_ONCE])
        if tags:
            self._client.log_batch(self.run_id, tags=tags)

    def _send(self, points: list[tuple[str, int, float]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, step, value in points]
        for start in range(0, len(metrics), POINTS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + POINTS_AT_ONCE])


def _reason(error: Exception) -> str:
    """Return in one line why it failed; of a connection the cause alone, not the four layers around it."""
    text = " ".join(str(error).split())
    cause = re.search(r"\(Caused by \w+\((.*)\)\)", text)
    return cause[1].rpartition(": ")[2].strip("\"'") if cause else text[:300]
