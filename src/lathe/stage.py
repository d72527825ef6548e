"""What every stage does around its own steps: arguments, parameters, refusals, timings."""

import argparse
import inspect
import os
import time
from collections.abc import Callable, Sequence

from lathe.common import launch, metric_files, operating_system
from lathe.common.entry_point import guard
from lathe.common.errors import InputError
from lathe.config.load import Config, load
from lathe.experiments.tracking import start_mirror

# What a stage measured besides seconds and memory, such as {"tokens_per_second": 812.5}.
Speeds = dict[str, float]


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
        start_mirror.begun(name, config.params.tracking)
    return config


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
            launch.hand_over({"peak_memory_bytes": operating_system.get_peak_memory_bytes(), **speeds})
        return
    metric_files.write_timings(name, item, seconds=time.perf_counter() - started, speeds=speeds, items=items)
