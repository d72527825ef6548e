"""Entry point of every program: logging set up, bad input answered in one line, exit codes."""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from lathe.common import launch
from lathe.common.errors import InputError, Interrupted, missing_extra
from lathe.common.operating_system import end_with_parent

# What the user can mend about a disk; any other OSError is a fault of ours and keeps its traceback.
REMEDIES = {
    errno.ENOSPC: "free some space, `dvc gc --workspace` for one, and run again",
    errno.EDQUOT: "free some space, `dvc gc --workspace` for one, and run again",
    errno.EROFS: "the file system is read-only; run in a folder that can be written to",
    errno.EACCES: "make the file or folder readable and writable for this user",
}


def guard(action: Callable[[], object]) -> None:
    """Run `action`; answer bad input, or a disk that takes no more, in one line with exit code 2, Ctrl-C with 130."""
    _set_up_logging()
    # Run by DVC or a launcher; a script that is run by hand may outlive its terminal.
    if "DVC_STAGE" in os.environ or launch.is_worker():
        end_with_parent()
    try:
        action()
    except InputError as error:
        _end(error, 2)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        where = error.filename2 or error.filename or "the disk"
        _end(InputError(f"{where}: {os.strerror(error.errno)}; {REMEDIES[error.errno]}"), 2)
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
        launch.tell(traceback.format_exc(), 1)


def _end(reason: object, code: int) -> NoReturn:
    if launch.is_worker():
        launch.tell(str(reason), code)
    if isinstance(reason, InputError):
        sys.exit(_refuse(reason))
    print(reason, file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _refuse(error: InputError) -> int:
    print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr)  # noqa: T201
    return 2


def _set_up_logging() -> None:
    level = os.environ.get("LATHE_LOG_LEVEL", "INFO").upper()
    known = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    if level not in known:
        sys.exit(_refuse(InputError(f"LATHE_LOG_LEVEL is {level!r}; must be one of {', '.join(known)}")))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("lathe").setLevel(level if launch.is_main() else logging.ERROR)
    if level != "DEBUG":  # what the user can do nothing about
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
