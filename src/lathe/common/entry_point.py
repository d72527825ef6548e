"""Entry point of every program: logging, exit codes, and bad input reported in one line."""

import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from typing import Any, NoReturn, cast

from lathe.common import launch
from lathe.common.errors import InputError, Interrupted, missing_extra
from lathe.common.operating_system import end_with_parent
from lathe.common.text import make_printable

# What Lathe itself writes to a terminal: a colour, and its end.
_COLOUR = re.compile("(\x1b\\[(?:0|3[1-6])m)")


class PrintableOutput:
    """Standard output on which no text of data, models or servers controls the terminal; else as the stream itself."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, printable."""
        parts = _COLOUR.split(text)
        parts[::2] = map(make_printable, parts[::2])
        self._stream.write("".join(parts))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each, as `write` does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PrintableFormatter(logging.Formatter):
    """A line of the log, printable."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return make_printable(super().format(record))


# Disk errors that the user can fix; any other OSError is a bug and keeps its traceback.
REMEDIES = {
    errno.ENOSPC: "free some space, `dvc gc --workspace` for one, and run again",
    errno.EDQUOT: "free some space, `dvc gc --workspace` for one, and run again",
    errno.EROFS: "the file system is read-only; run in a folder that can be written to",
    errno.EACCES: "make the file or folder readable and writable for this user",
}


def guard(action: Callable[[], object]) -> None:
    """Run `action`; report bad input, or a disk that cannot be written to, in one line with exit code 2.

    Ctrl-C ends with 130, another signal with 128 and its number.
    """
    _set_up_logging()
    # Only if run by DVC or a launcher: a script that is run by hand may outlive its terminal.
    if "DVC_STAGE" in os.environ or launch.is_worker():
        end_with_parent()
    try:
        with redirect_stdout(cast(Any, PrintableOutput(sys.stdout))):
            action()
    except InputError as error:
        _end(error, 2)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        where = error.filename2 or error.filename or "the disk"
        _end(InputError(f"{where}: {os.strerror(error.errno)}; {REMEDIES[error.errno]}", code="disk"), 2)
    except Interrupted as error:
        _end(error, 128 + error.signal)
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        _end(missing, 2)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Exception:
        if not launch.is_worker():
            raise
        launch.end_worker(traceback.format_exc(), 1)


def _end(reason: object, code: int) -> NoReturn:
    if launch.is_worker():
        launch.end_worker(str(reason), code)
    if isinstance(reason, InputError):
        sys.exit(_refuse(reason))
    print(make_printable(str(reason)), file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _refuse(error: InputError) -> int:
    print(make_printable(f"error: {error}").replace("\n", "\nerror: "), file=sys.stderr)  # noqa: T201
    return 2


def _set_up_logging() -> None:
    level = os.environ.get("LATHE_LOG_LEVEL", "INFO").upper()
    known = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    if level not in known:
        sys.exit(
            _refuse(
                InputError(f"LATHE_LOG_LEVEL is {level!r}; must be one of {', '.join(known)}", code="unknown-log-level")
            )
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("lathe").setLevel(level if launch.is_main() else logging.ERROR)
    if level != "DEBUG":  # warnings that the user can do nothing about
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
