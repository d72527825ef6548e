"""MLflow mirror: a run on an MLflow server, which is queried first, so that nothing is sent twice."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from lathe.experiments.tracking.bounded_requests import bound_responses
from lathe.experiments.tracking.run_files import CurvePoints, MirroredRun, contradicts, find_unsent_points
from lathe.experiments.tracking.targets import MlflowTarget
from lathe.experiments.tracking.tracker import Mirror, TrackerUnreachableError

POINTS_AT_ONCE, PARAMETERS_AT_ONCE = 1000, 100  # the server's own limits
LONGEST_VALUE = 6000  # characters of a parameter

# The timeout of a request (seconds); the caller repeats it, because the client's own retries take minutes.
CLIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}

DIGEST, FILES, STUDY = "lathe.parameters", "lathe.files", "lathe.study"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow shows the pages of trainings, not those of chats


class MlflowMirror(Mirror):
    """The run of `record` on the server, found by its parameters and points, or created with the first point."""

    def __init__(self, target: MlflowTarget, record: MirroredRun) -> None:
        super().__init__(target, record)
        self.target: MlflowTarget = target
        self.run_id: str | None = None
        self._experiment = ""
        self.known: dict[str, dict[int, float]] = {}

    @property
    def address(self) -> str | None:
        """The address of the run's page; None before it is created."""
        return (
            f"{self.target.tracking_uri}/#/experiments/{self._experiment}/runs/{self.run_id}" if self.run_id else None
        )

    def check(self) -> None:
        """Query the experiment, which need not exist yet."""
        with self._translate_errors():
            self._client.get_experiment_by_name(self.target.experiment_name)

    def update(self, curves: CurvePoints, *, whole: bool = False) -> int:
        """Send the points that the server has not got yet."""
        with self._translate_errors():
            if self.run_id is None or contradicts(self.known, curves, whole=whole):
                self._find_run(curves, whole=whole)
            points = find_unsent_points(self.known, curves)
            self._send_points(points)
            for name, step, value in points:
                self.known.setdefault(name, {})[step] = value
            return len(points)

    def finish(self, record: MirroredRun) -> int:
        """Send everything that the server has not got yet, and end the run."""
        sent = self.update(record.curves, whole=True)
        assert self.run_id
        with self._translate_errors():
            run = self._client.get_run(self.run_id)
            there = run.data.metrics
            scores = [
                (name, record.last_step, value) for name, value in record.scores.items() if there.get(name) != value
            ]
            self._send_points(scores)
            self._log_description(record, run.data)
            if run.data.tags.get(FILES) != record.files_digest:
                for file in record.files:
                    folder = file.relative_to(record.folder).parent.as_posix()
                    self._client.log_artifact(self.run_id, str(file), None if folder == "." else folder)
                self._client.set_tag(self.run_id, FILES, record.files_digest)
            if run.info.status != "FINISHED":
                self._client.set_terminated(self.run_id, "FINISHED")
        return sent + len(scores)

    def mark_interrupted(self) -> None:
        """Mark a run that was created as interrupted."""
        if self.run_id:
            with self._translate_errors():
                self._client.set_terminated(self.run_id, "KILLED")

    @cached_property
    def _client(self) -> Any:
        for key, value in CLIENT.items():
            os.environ.setdefault(key, value)
        os.environ.update(QUIET)
        from mlflow import MlflowClient

        bound_responses()
        return MlflowClient(self.target.tracking_uri)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            # Whether the server stored what was sent is unknown: it is queried again.
            self.run_id = None
            raise TrackerUnreachableError(_format_error(error)) from None

    def _find_run(self, curves: CurvePoints, *, whole: bool) -> None:
        self.run_id = None
        self._experiment = self._require_experiment()
        wanted = f"tags.`{DIGEST}` = '{self.record.digest}'"
        own_name = self.record.context.experiment
        for run in self._client.search_runs([self._experiment], wanted, order_by=["attributes.start_time DESC"]):
            # An interrupted run is continued under any name: DVC gives each run a new one.
            if own_name and run.data.tags.get("experiment") != own_name and run.info.status != "KILLED":
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
                    self._log_description(self.record, run.data)
                return
        self._create_run()

    def _create_run(self) -> None:
        record = self.record
        tags = {
            DIGEST: record.digest,
            "mlflow.source.name": "lathe",
            **record.tags,
        }
        if record.context.study:
            tags["mlflow.parentRunId"] = self._find_parent(record.context.study)
        run = self._client.create_run(self._experiment, tags=tags, run_name=record.name)
        if not run.info.run_id:
            raise TrackerUnreachableError("what answers there is not an MLflow server")
        self.run_id, self.known = run.info.run_id, {}
        self._log_description(record, run.data)

    def _find_parent(self, study: str) -> str:
        """Return the run of a study; the oldest of several that two machines created at once."""
        wanted = f"tags.`{STUDY}` = '{study}'"

        def find_runs() -> list[str]:
            runs = self._client.search_runs([self._experiment], wanted, order_by=["attributes.start_time ASC"])
            return [run.info.run_id for run in runs]

        if not find_runs():
            tags = {STUDY: study, "mlflow.source.name": "lathe"}
            made = self._client.create_run(self._experiment, tags=tags, run_name=study).info.run_id
            self._client.set_terminated(made, "FINISHED")
        return find_runs()[0]

    def _require_experiment(self) -> str:
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

    def _log_description(self, record: MirroredRun, there: Any) -> None:
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

    def _send_points(self, points: list[tuple[str, int, float]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, step, value in points]
        for start in range(0, len(metrics), POINTS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + POINTS_AT_ONCE])


def _format_error(error: Exception) -> str:
    """Return an error in one line; of a connection error the innermost cause alone."""
    text = " ".join(str(error).split())
    cause = re.search(r"\(Caused by \w+\((.*)\)\)", text)
    return cause[1].rpartition(": ")[2].strip("\"'") if cause else text[:300]
