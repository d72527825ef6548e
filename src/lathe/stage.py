"""What every stage does around its own steps: arguments, parameters, refusals, timings."""

import argparse
import ctypes
import errno
import inspect
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from lathe import launch, track
from lathe.errors import InputError, Interrupted, missing_extra
from lathe.params import Config, load
from lathe.tracking import start

# What a stage measured besides seconds and memory, such as {"tokens_per_second": 812.5}.
Speeds = dict[str, float]

# What the user can mend about a disk; any other OSError is a fault of ours and keeps its traceback.
REMEDIES = {
    errno.ENOSPC: "free some space, `dvc gc --workspace` for one, and run again",
    errno.EDQUOT: "free some space, `dvc gc --workspace` for one, and run again",
    errno.EROFS: "the file system is read-only; run in a folder that can be written to",
    errno.EACCES: "make the file or folder readable and writable for this user",
}


def run(main: Callable[[Config], Speeds | None]) -> None:
    """Run a stage that does one thing; its script's docstring is the help text."""
    name, parser = _parser(main)
    parser.parse_args()
    guard(lambda: _timed(name, None, lambda: main(_loaded(name))))


def run_on_machines(main: Callable[[Config, int | None], Speeds | None]) -> None:
    """Run a stage that several machines may share; which of them this is may be said on the command line."""
    name, parser = _parser(main)
    parser.add_argument(
        "--machine_rank",
        type=int,
        metavar="N",
        help="this machine's number where several take part, from 0 (default: as training.launcher says)",
    )
    machine_rank = parser.parse_args().machine_rank
    if machine_rank:  # the first machine writes the timings
        guard(lambda: main(load(), machine_rank))
    else:
        guard(lambda: _timed(name, None, lambda: main(_loaded(name), machine_rank)))


def run_items(main: Callable[[Config, str], Speeds | None], items: Callable[[Config], list[str]]) -> None:
    """Run a stage once per item named on the command line; without one, for all of `items`.

    An item is what `dvc.yaml` runs the stage's script for: an artifact, a quantization type.
    """
    name, parser = _parser(main)
    parser.add_argument("items", nargs="*", metavar="ITEM", help="what to run it for (default: all)")
    chosen = parser.parse_args().items

    def each() -> None:
        config = _loaded(name)
        known = items(config)
        for item in chosen:
            if item not in known:
                raise InputError(f"{name} {item}: no such item; known: {', '.join(known)}")
        for item in chosen or known:
            _timed(name, item, lambda item=item: main(config, item), known)  # type: ignore[misc]

    guard(each)


def _loaded(name: str) -> Config:
    """Return the parameters, and let what mirrors the run know that this stage of it has begun."""
    config = load()
    if "DVC_STAGE" in os.environ and not launch.is_worker():
        start.begun(name, config.params.tracking)
    return config


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


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent is gone: a killed `dvc repro` leaves nothing running."""
    _ask_for_signal(signal.SIGTERM)


def outlive_parent() -> None:
    """Take that back: of a parent with threads each one's end is a signal, and the second may come too soon."""
    _ask_for_signal(0)


def _ask_for_signal(number: int) -> None:
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)


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


def _parser(main: Callable[..., object]) -> tuple[str, argparse.ArgumentParser]:
    module = inspect.getmodule(main)
    assert module is not None
    assert module.__file__ is not None
    name = os.path.splitext(os.path.basename(module.__file__))[0]
    parser = argparse.ArgumentParser(
        prog=f"python stages/{name}.py",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return name, parser


def _timed(name: str, item: str | None, action: Callable[[], Speeds | None], items: Sequence[str] = ()) -> None:
    started = time.perf_counter()
    speeds = action() or {}
    if launch.is_worker():
        if launch.is_main():
            launch.hand_over({"peak_memory_bytes": track.peak_memory_bytes(), **speeds})
        return
    track.write_timings(name, item, seconds=time.perf_counter() - started, speeds=speeds, items=items)


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
