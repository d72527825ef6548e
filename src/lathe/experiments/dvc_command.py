"""Commands of DVC that work in the workspace: under its lock, stopped in good order, and with Git's state kept.

DVC unwinds after Ctrl-C alone: it puts HEAD back on its branch, and the workspace out of Git's stash. SIGTERM and
SIGHUP, which a closed terminal sends, would end it at once; here they end it as Ctrl-C does.
"""

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lathe.common import dvc_api, operating_system, paths
from lathe.common.errors import Interrupted
from lathe.common.git import try_git
from lathe.experiments.interrupted import switch_back

_log = logging.getLogger(__name__)

INTERRUPTED_BY_USER = 252  # DVC's exit code


def run_dvc(arguments: Sequence[str], root: Path = paths.ROOT) -> int:
    """Run a command of DVC in this process, whose current folder is `root`; return its exit code.

    SIGINT, SIGTERM and SIGHUP end the stage that runs, and then DVC. Raises Interrupted after one. What was staged in
    Git before is staged after it, where DVC has reset it.
    """
    received: list[int] = []
    sys.stderr.flush()
    with keep_staged(root):
        try:
            with _stopped_in_order(received):
                code = dvc_api.run_command(arguments)
        except KeyboardInterrupt:
            code = INTERRUPTED_BY_USER
        finally:
            branch = switch_back(root)  # where DVC could not: a second Ctrl-C stops its clearing up
    if branch:
        _log.warning("HEAD is back on %s", branch)
    if code == INTERRUPTED_BY_USER and not received:
        received.append(signal.SIGINT)
    if received:
        name = signal.Signals(received[0]).name
        back = "; `lathe reset` brings the committed parameters and outputs back" if "exp" in arguments[:3] else ""
        raise Interrupted(f"stopped by {name}; the same command goes on where it was{back}", received[0])
    return code


@contextmanager
def keep_staged(root: Path = paths.ROOT) -> Iterator[None]:
    """Stage again after the block what was staged before it and no longer is: DVC's experiments reset the index."""
    before = _list_staged(root)
    try:
        yield
    finally:
        after = _list_staged(root) if before else {}
        lost = {path: entry for path, entry in before.items() if path not in after}
        if lost:
            lines = "".join(f"{mode} {blob}\t{path}\0" for path, (mode, blob) in lost.items())
            try_git("update-index", "-z", "--add", "--index-info", root=root, stdin=lines)


def _list_staged(root: Path) -> dict[str, tuple[str, str]]:
    """Return the paths that are staged otherwise than committed, each with mode and hash; of a removed one all 0."""
    listed = try_git("diff-index", "--cached", "--no-renames", "-z", "HEAD", root=root) or b""
    words = listed.decode().split("\0")[:-1]
    entries = zip(words[::2], words[1::2], strict=True)  # `:old-mode new-mode old-hash new-hash status`, path
    staged = {path: (fields.split()[1], fields.split()[3]) for fields, path in entries}
    # A conflict has no hash to be staged.
    return {path: (mode, blob) for path, (mode, blob) in staged.items() if mode == "000000" or blob.strip("0")}


@contextmanager
def _stopped_in_order(received: list[int]) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP during the block into KeyboardInterrupt, once the stage that runs has ended."""
    stopping = [number for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number]
    # Under nohup SIGHUP is ignored, and stays so.
    stopping = [number for number in stopping if signal.getsignal(number) is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in (*stopping, signal.SIGINT):  # nothing disturbs what follows
            signal.signal(each, signal.SIG_IGN)
        if number == getattr(signal, "SIGHUP", None):
            operating_system.leave_terminal()
        operating_system.end_children()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in stopping}
    try:
        yield
    finally:
        if not received:
            for number, handler in before.items():
                signal.signal(number, handler)
