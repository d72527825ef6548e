"""Repair of DVC's files that a kill has cut short: dvc.lock, and the list of what running commands use."""

import json
import logging
import time

from lathe.common import paths
from lathe.common.dvc_api import is_complete_lock
from lathe.common.errors import InputError
from lathe.common.git import try_git
from lathe.config.yaml_files import parse_yaml

logger = logging.getLogger(__name__)


def restore_truncated_lock() -> None:
    """Bring the committed dvc.lock back where DVC was killed while it wrote it. Raises InputError if there is none."""
    lock = paths.ROOT / "dvc.lock"
    # DVC does not write it atomically, and refuses a truncated one.
    if not lock.exists() or _is_complete(lock.read_text(encoding="utf-8", errors="replace")):
        return
    committed = try_git("show", "HEAD:./dvc.lock")
    if committed is None:
        raise InputError(
            "dvc.lock: cut short while DVC wrote it, and Git has none; remove it and run again", code="truncated-lock"
        )
    with paths.replace_file(lock) as partial:
        partial.write_bytes(committed)
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


def _is_complete(lock: str) -> bool:
    if "<<<<<<<" in lock:
        return True  # a merge conflict is the user's to resolve
    try:
        return is_complete_lock(parse_yaml(lock, "dvc.lock"))
    except InputError:
        return False
