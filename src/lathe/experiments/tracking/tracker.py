"""Tracker: the interface of a mirror, one run at one tracker."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

from lathe.common.scratch import acquire_lock
from lathe.experiments.tracking.run_files import CurvePoints, MirroredRun
from lathe.experiments.tracking.start_mirror import SCRATCH
from lathe.experiments.tracking.targets import Target


class TrackerUnreachableError(Exception):
    """The tracker does not answer in time, or refuses; the message is one line. The call may be repeated."""


class Mirror(ABC):
    """One run at one tracker. Every method raises UnreachableError, after which it may be called again."""

    def __init__(self, target: Target, record: MirroredRun) -> None:
        self.target, self.record = target, record

    @property
    @abstractmethod
    def address(self) -> str | None:
        """The address of the run's page; None before it is created."""

    @abstractmethod
    def check(self) -> None:
        """Check whether the tracker would accept a run; nothing is created."""

    @abstractmethod
    def update(self, curves: CurvePoints) -> int:
        """Send the points that the tracker has not got yet; return how many. The first one creates the run."""

    @abstractmethod
    def finish(self, record: MirroredRun) -> int:
        """Send everything that the tracker has not got yet and end the run; return the number of points."""

    @abstractmethod
    def mark_interrupted(self) -> None:
        """Mark a run that was created as interrupted."""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other processes. Raises TrackerUnreachableError while one sends it."""
        key = hashlib.sha256(
            f"{self.target} {self.record.digest} {self.record.context.experiment}".encode()
        ).hexdigest()
        file = SCRATCH / f"locks/{key[:32]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if (lock := acquire_lock(file)) is None:
            raise TrackerUnreachableError("another process is sending this run")
        with lock:
            yield
