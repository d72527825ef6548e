"""How far the work on rows is: a bar with an ETA on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A count of rows, towards `total` where that is known; a context manager."""

    def __init__(self, task: str, total: int | None = None) -> None:
        self.task, self.total = task, total
        self.bar = tqdm(total=total, desc=task, unit="row", disable=not sys.stderr.isatty())
        self.rows = 0
        self.started = self.said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.bar.close()

    def add(self, rows: int) -> None:
        """Count rows that are done."""
        self.rows += rows
        self.bar.update(rows)
        now = time.monotonic()
        if not self.bar.disable or now < self.said + SECONDS_BETWEEN_LINES:
            return
        self.said = now
        if self.total is None:
            logger.info("%s: %s rows", self.task, f"{self.rows:,}")
        else:
            left = (now - self.started) / self.rows * (self.total - self.rows)
            logger.info("%s: %s of %s rows, %.0f s left", self.task, f"{self.rows:,}", f"{self.total:,}", left)
