"""What DVC remembers of runs, shared whole: `python -m lathe push-runs`.

`dvc push --run-cache` uploads which run came to which hashes, but the files only where dvc.lock names them now and DVC
keeps them. A run with a report in Git would not be found in another clone, and be run again.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.common.errors import InputError
from lathe.config.yaml_files import read_yaml
from lathe.provenance import remotes
from lathe.provenance.dvc_lock import cached_listing

if TYPE_CHECKING:
    from dvc.repo import Repo


def push(root: Path, name: str | None) -> str:
    """Upload every run that DVC remembers, with all its files but those that dvc.yaml keeps at home (`push: false`).

    `name` is one of the remotes of the checkout at `root`; None: the default one. Returns what was done, in a line.
    Raises InputError with one line.
    """
    from dvc_data.hashfile.hash_info import HashInfo

    with remotes.opened(root, name) as (repo, found, settings):
        at_home = {out.def_path for out in repo.index.outs if not out.can_push}
        try:
            there = repo.cloud.get_remote(found)
            there.fs.exists(there.path)  # or DVC would log the same refusal for every file
            remembered = repo.stage_cache.push(found)
            files = [Path(repo.stage_cache.cache_dir, key[:2], key, run) for key, run in remembered]
            outs = {out["md5"] for file in files for out in read_yaml(file)["outs"] if out["path"] not in at_home}
            within = {md5 for out in outs if out.endswith(".dir") for md5 in _files_within(repo, out)}
            pushed = repo.cloud.push([HashInfo("md5", md5) for md5 in outs | within], remote=found)
        except Exception as error:
            raise remotes.refusal(error, "write", found, settings) from error
    where = remotes.shown(found, settings)
    if pushed.failed:
        raise InputError(f"{where}: {len(pushed.failed)} files did not arrive; the same command again goes on")
    return f"{where}: {len(remembered)} runs, and of their files the {len(pushed.transferred)} that were not there"


def _files_within(repo: "Repo", folder: str) -> Collection[str]:
    # Nothing where the folder is in the cache no longer: such a run cannot be shared.
    return (cached_listing(repo, folder) or {}).values()
