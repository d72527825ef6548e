"""Progress of long work: a bar with the time left on a terminal, elsewhere a line in the log now and then."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from lathe.common.text import readable_bytes

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
LEAST_KNOWN_FRACTION = 0.05  # of the work, before which a line does not say how long the rest will take


class Progress:
    """A count of what is done, towards `total` if that is known; a context manager.

    `done` were done by an earlier run that was interrupted. `unit` is the name of one (`row`); bytes (`B`) are shown in
    decimal units. `log_ends` adds a line at the start and at the end; `log` and `draw` set to False leave out the lines
    and the bar.
    """

    def __init__(
        self,
        task: str,
        total: int | None = None,
        *,
        done: int = 0,
        unit: str = "row",
        log: bool = True,
        log_ends: bool = False,
        draw: bool = True,
    ) -> None:
        self.task, self.total, self.unit = task, total, unit
        self.done = self.before = done
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=task,
            unit=unit,
            unit_scale=unit == "B",
            disable=not (draw and sys.stderr.isatty()),
        )
        self.started = self.logged = time.monotonic()
        self._log, self._log_ends = log and self.bar.disable, log_ends

    @property
    def is_drawn(self) -> bool:
        """Whether a bar is on the terminal, which lines of the log would break, and which `show` writes behind."""
        return not self.bar.disable

    def show(self, text: str) -> None:
        """Show a text behind the bar, such as a loss, until there is another."""
        self.bar.set_postfix_str(text)

    def __enter__(self) -> Self:
        if self._log_ends:
            self._write_line()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._log_ends:
            self._write_line()
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def add(self, count: int = 1) -> None:
        """Count what was done since the last call; less than nothing where work was lost and starts again."""
        self.done += count
        self.bar.update(count)
        if time.monotonic() >= self.logged + SECONDS_BETWEEN_LINES:
            self._write_line()

    def _write_line(self) -> None:
        if not self._log:
            return
        self.logged = time.monotonic()
        if self.total is None:
            logger.info("%s: %s", self.task, self._format(self.done, with_unit=True))
            return
        since_start = self.done - self.before
        # The first is often slow, such as the first of many answers, before which all prompts are decoded.
        is_known = since_start > LEAST_KNOWN_FRACTION * (self.total - self.before)
        left = (self.logged - self.started) / since_start * (self.total - self.done) if is_known else None
        logger.info(
            "%s: %s of %s, %s s left",
            self.task,
            self._format(self.done),
            self._format(self.total, with_unit=True),
            "?" if left is None else f"{left:.0f}",
        )

    def _format(self, count: int, *, with_unit: bool = False) -> str:
        if self.unit == "B":
            return readable_bytes(count)
        return f"{count:,} {self.unit}s" if with_unit else f"{count:,}"
