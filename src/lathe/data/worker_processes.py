"""One piece of work cut into shares, each done by a process of its own."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from lathe.common.errors import InputError

Share = TypeVar("Share")
Result = TypeVar("Result")

Done = Callable[[int], None]

# More of them gain little, and each takes memory.
MOST_PROCESSES = 8


def each(work: Callable[[Share, Done], Result], shares: Sequence[Share], done: Done) -> list[Result]:
    """Return `work(share, done)` of each share, in their order; `done` is told how many rows are behind.

    One share alone is worked on here. What a share raises is raised here, and ends the others. A plain process per
    share, and not a pool: one whose parent is killed notices and ends, where a pool's would wait for ever.
    """
    with _tokenizers_alone():
        if len(shares) == 1:
            return [work(shares[0], done)]
        return _in_processes(work, shares, done)


def _in_processes(work: Callable[[Share, Done], Result], shares: Sequence[Share], done: Done) -> list[Result]:
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    processes = []
    numbers: dict[Any, int] = {}
    results: dict[int, Result] = {}
    try:
        for number, share in enumerate(shares):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(work, share, sender, os.getpid()), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            numbers[receiver] = number
        while len(results) < len(shares):
            for receiver in wait([waited for waited in numbers if numbers[waited] not in results]):
                kind, value = _received(receiver)
                if kind == "done":
                    done(value)
                elif kind == "result":
                    results[numbers[receiver]] = value
                else:
                    raise value
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return [results[number] for number in range(len(shares))]


def _received(receiver: Any) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = receiver.recv()
    except EOFError:
        raise InputError("a process that prepared rows was killed; free some memory and run again") from None
    return message


def _child(work: Callable[[Share, Done], Result], share: Share, sender: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    gc.freeze()  # what the parent made is not looked through again and again,
    gc.set_threshold(100_000)  # and what a batch makes goes without being looked for

    def done(rows: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        sender.send(("done", rows))

    try:
        message: tuple[str, Any] = ("result", work(share, done))
    except Exception as error:
        message = ("error", error)
    sender.send(message)


@contextmanager
def _tokenizers_alone() -> Iterator[None]:
    """Keep the tokenizers library from threads of its own, which no process survives to be forked with."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
