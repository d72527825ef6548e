"""Repair of DVC's files: dvc.lock, cut short by a kill or with conflicts of a merge; the list of running commands."""

import json
import logging
import re
import time

from lathe.common import paths
from lathe.common.dvc_api import is_complete_lock
from lathe.common.errors import InputError
from lathe.common.git import try_git
from lathe.config.yaml_files import parse_yaml

logger = logging.getLogger(__name__)

# In a lock as DVC writes it.
STAGE = re.compile(r"^  (\S.*):$", re.MULTILINE)
OUTS = "\n    outs:\n"

# What Git puts around each side of a conflict.
CONFLICT = re.compile(r"^(<{7} .*|={7}|>{7} .*)$", re.MULTILINE)


def restore_truncated_lock() -> None:
    """Bring the committed dvc.lock back where DVC was killed while it wrote it, or a merge has left conflicts in it.

    Raises InputError if there is none.
    """
    lock = paths.ROOT / "dvc.lock"
    if not lock.exists():
        return
    text = lock.read_text(encoding="utf-8", errors="replace")
    is_conflict = CONFLICT.search(text) is not None
    committed = try_git("show", "HEAD:./dvc.lock")
    if committed is not None and text.encode() == committed:
        return
    # DVC does not write it atomically, and refuses a truncated one, if that is none by its form.
    is_whole = _is_complete(text) and not _lacks_its_end(text, (committed or b"").decode(errors="replace"))
    if not is_conflict and is_whole:
        return
    if committed is None:
        raise InputError(
            "dvc.lock: cut short while DVC wrote it, and Git has none; remove it and run again", code="truncated-lock"
        )
    with paths.replace_file(lock) as partial:
        partial.write_bytes(committed)
    if is_conflict:
        logger.warning(
            "dvc.lock had conflicts of a merge: that of HEAD is back; what the merge has changed runs, or comes from "
            "DVC's cache; then `git add dvc.lock metrics`"
        )
        return
    logger.warning(
        "dvc.lock was cut short while DVC wrote it: the committed one is back; what ran since comes from cache"
    )


def remove_truncated_rwlock() -> None:
    """Remove DVC's list of what running commands read and write where it is no JSON: DVC refuses to run with it."""
    listing = paths.ROOT / ".dvc/tmp/rwlock"
    for pause in (0.0, 0.5):  # another DVC may be writing it
        time.sleep(pause)
        try:
            json.loads(listing.read_text(encoding="utf-8"))
            return
        except FileNotFoundError:
            return
        except ValueError:
            continue
    listing.unlink(missing_ok=True)
    logger.warning(".dvc/tmp/rwlock was cut short while DVC wrote it: it is removed")


def _lacks_its_end(lock: str, committed: str) -> bool:
    """Tell whether a lock has the first stages of the committed one, in their order, and then ends.

    Cut at the end of a stage, or before the outputs of the last one, it is a lock that DVC takes for whole. DVC keeps
    the order of the entries, and those of stages that dvc.yaml no longer has.
    """
    ours, theirs = _split_stages(lock), _split_stages(committed)
    if not ours or list(ours) != list(theirs)[: len(ours)]:
        return False
    last = list(ours)[-1]
    cut_within = OUTS in theirs[last] and OUTS not in ours[last]
    return len(ours) < len(theirs) or cut_within


def _split_stages(lock: str) -> dict[str, str]:
    """Return the text of each stage, as DVC lays a lock out: parsing the committed one too would take a second."""
    parts = STAGE.split(lock)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _is_complete(lock: str) -> bool:
    try:
        return is_complete_lock(parse_yaml(lock, "dvc.lock"))
    except InputError:
        return False
