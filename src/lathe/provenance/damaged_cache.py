"""Damaged objects of DVC's cache: outputs that lost their end when the power went, or a disk filled up.

DVC takes an object that is read-only for what its name says. It would link a file that was cut short as an output, and
write the hash of that into dvc.lock. The sizes that dvc.lock has of each output tell without reading them.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lathe.common import paths
from lathe.common.dvc_api import DvcRepository, open_repository, read_lock
from lathe.provenance.dvc_lock import read_listing
from lathe.provenance.lineage import hash_path

logger = logging.getLogger(__name__)


def remove_damaged_objects(root: Path = paths.ROOT) -> None:
    """Remove the cached outputs of dvc.lock that are not as large as it says, so that they are made again, or pulled.

    Outputs of which the cache has only a part are not looked at, but for empty files.
    """
    stages = read_lock(root / "dvc.lock").get("stages", {})
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    sizes = {str(out["md5"]): int(out["size"]) for out in outs if "md5" in out and "size" in out}
    names = {str(out["md5"]): str(out["path"]) for out in outs if "md5" in out}
    if not sizes:
        return
    with open_repository(root) as repo:
        damaged = {file: names[md5] for md5, size in sizes.items() for file in _find_damaged(repo, md5, size)}
    for file, name in damaged.items():
        file.unlink()
        logger.warning(
            "%s: DVC's copy was damaged, of another size than dvc.lock has, and is removed (%s): it is made again; "
            "`dvc pull` brings it from a remote",
            name,
            os.path.relpath(file, root),
        )


def _find_damaged(repo: DvcRepository, md5: str, size: int) -> Iterator[Path]:
    file = repo.cached_file(md5)
    if not file.is_file():
        return
    if not md5.endswith(".dir"):
        if file.stat().st_size != size:
            yield file
        return
    listing = read_listing(repo, md5)
    if listing is None:
        yield file
        return
    objects = {each: repo.cached_file(each) for each in listing.values()}
    found = {each: path.stat().st_size for each, path in objects.items() if path.is_file()}
    if len(found) == len(objects) and sum(found[each] for each in listing.values()) == size:
        return
    for each, length in found.items():
        if (len(found) == len(objects) or not length) and hash_path(objects[each]) != each:
            yield objects[each]
