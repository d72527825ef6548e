"""Worker processes: a list of shares of work, each done in a process of its own."""

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

# Called with the number of rows that were finished since the last call.
ReportRows = Callable[[int], None]

# More processes save little time, and each takes memory.
MAX_PROCESSES = 8


def run_in_processes(
    work: Callable[[Share, ReportRows], Result], shares: Sequence[Share], report_rows: ReportRows
) -> list[Result]:
    """Call `work(share, report_rows)` for each share, each in its own process, and return the results in order.

    A single share is worked on in this process. An exception in one process ends the others and is raised here;
    raises InputError if a process was killed. These are plain processes and no pool, because each of them checks that
    its parent is alive: a pool's workers would wait forever after their parent was killed.
    """
    with _disable_tokenizer_threads():
        if len(shares) == 1:
            return [work(shares[0], report_rows)]
        return _run_processes(work, shares, report_rows)


def _run_processes(
    work: Callable[[Share, ReportRows], Result], shares: Sequence[Share], report_rows: ReportRows
) -> list[Result]:
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    processes = []
    numbers: dict[Any, int] = {}
    results: dict[int, Result] = {}
    try:
        for number, share in enumerate(shares):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run_share, args=(work, share, sender, os.getpid()), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            numbers[receiver] = number
        while len(results) < len(shares):
            for receiver in wait([open_ for open_ in numbers if numbers[open_] not in results]):
                kind, value = _receive(receiver)
                if kind == "rows":
                    report_rows(value)
                elif kind == "result":
                    results[numbers[receiver]] = value
                else:
                    raise value
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return [results[number] for number in range(len(shares))]


def _receive(receiver: Any) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = receiver.recv()
    except EOFError:
        raise InputError(
            "a process that prepared rows was killed; free some memory and run again", code="process-killed"
        ) from None
    return message


def _run_share(work: Callable[[Share, ReportRows], Result], share: Share, sender: Connection, parent_pid: int) -> None:
    """Body of a worker process: send ("rows", count), and at last ("result", result) or ("error", exception)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    gc.freeze()  # do not scan the parent's objects in every collection
    gc.set_threshold(100_000)  # collect rarely: most objects of a batch are freed by reference counting

    def report_rows(rows: int) -> None:
        if os.getppid() != parent_pid:
            os._exit(1)
        sender.send(("rows", rows))

    try:
        message: tuple[str, Any] = ("result", work(share, report_rows))
    except Exception as error:
        message = ("error", error)
    sender.send(message)


@contextmanager
def _disable_tokenizer_threads() -> Iterator[None]:
    """Keep the tokenizers library from starting threads: a process with threads cannot be forked safely."""
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
