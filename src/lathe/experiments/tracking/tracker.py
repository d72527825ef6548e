"""What every tracker does with a run."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

from lathe.common.scratch import locked
from lathe.experiments.tracking.run_files import Curves, Record
from lathe.experiments.tracking.start_mirror import SCRATCH
from lathe.experiments.tracking.targets import Target


class UnreachableError(Exception):
    """The tracker is away, too slow, or refuses; the message is one line. What was asked may be asked again."""


class Mirror(ABC):
    """One run at one tracker. Every method raises UnreachableError, after which it may be called again."""

    def __init__(self, target: Target, record: Record) -> None:
        self.target, self.record = target, record

    @property
    @abstractmethod
    def address(self) -> str | None:
        """Where the run can be looked at; None before it is there."""

    @abstractmethod
    def ask(self) -> None:
        """Ask whether it would take a run; nothing is made."""

    @abstractmethod
    def update(self, curves: Curves) -> int:
        """Send the points that are not there yet; return how many. The run begins with the first of them."""

    @abstractmethod
    def finish(self, record: Record) -> int:
        """Send all that is not there yet and end the run; return the number of points."""

    @abstractmethod
    def interrupted(self) -> None:
        """Say of a run that has begun that it was cut short."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from sending this run. Raises UnreachableError while one does."""
        key = hashlib.sha256(
            f"{self.target} {self.record.digest} {self.record.context.experiment}".encode()
        ).hexdigest()
        file = SCRATCH / f"locks/{key[:32]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if (lock := locked(file)) is None:
            raise UnreachableError("another process is sending this run")
        with lock:
            yield
