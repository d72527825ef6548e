"""How far long work is: a bar with the time left on a terminal, a line in the log now and then elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A count of what is done, towards `total` where that is known; a context manager.

    `done` were done before, by a run that was interrupted. `unit` is the name of one (`row`), and is written behind the
    numbers; bytes (`B`) get their prefixes.
    """

    def __init__(self, task: str, total: int | None = None, *, done: int = 0, unit: str = "row") -> None:
        self.task, self.total, self.unit = task, total, unit
        self.done = self.before = done
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=task,
            unit=unit,
            unit_scale=unit == "B",
            disable=not sys.stderr.isatty(),
        )
        self.started = self.said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.bar.close()

    def add(self, count: int = 1) -> None:
        """Count at least one that has been done since the last call."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if not self.bar.disable or now < self.said + SECONDS_BETWEEN_LINES:
            return
        self.said = now
        if self.total is None:
            logger.info("%s: %s", self.task, self._counted(self.done))
        else:
            since_start = self.done - self.before
            left = (now - self.started) / since_start * (self.total - self.done) if since_start else float("inf")
            logger.info(
                "%s: %s of %s, %.0f s left", self.task, self._number(self.done), self._counted(self.total), left
            )

    def _number(self, count: int) -> str:
        return str(tqdm.format_sizeof(count, "B", 1000)) if self.unit == "B" else f"{count:,}"

    def _counted(self, count: int) -> str:
        return self._number(count) if self.unit == "B" else f"{self._number(count)} {self.unit}s"
