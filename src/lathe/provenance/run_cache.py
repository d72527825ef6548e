"""Run cache: uploaded with every file that its runs made (`python -m lathe push-runs`).

`dvc push --run-cache` uploads which run made which hashes, but of the files only those that dvc.lock names now and that
DVC caches. A run that wrote a report into Git would not be found in another clone, and would run again.
"""

from collections.abc import Collection
from pathlib import Path

from lathe.common.dvc_api import DvcRepository
from lathe.common.errors import InputError
from lathe.config.yaml_files import read_yaml
from lathe.provenance import remotes
from lathe.provenance.dvc_lock import read_listing


def push_runs(root: Path, name: str | None) -> str:
    """Upload every run in the run cache, with all its files but those that dvc.yaml never pushes (`push: false`).

    `name` is one of the remotes of the checkout at `root`; None: the default one. Returns what was done, in a line.
    Raises InputError with one line.
    """
    with remotes.open_remote(root, name) as (repo, remote, settings):
        never_pushed = repo.unpushed_outputs()
        try:
            storage = repo.remote(remote)
            storage.exists(storage.root)  # or DVC would log the same error for every file
            runs = repo.push_run_cache(remote)
            outs = {out["md5"] for file in runs for out in read_yaml(file)["outs"] if out["path"] not in never_pushed}
            in_folders = {md5 for out in outs if out.endswith(".dir") for md5 in _list_hashes(repo, out)}
            pushed, failed = repo.push_files(outs | in_folders, remote)
        except Exception as error:
            raise remotes.explain_error(error, "write", remote, settings) from error
    where = remotes.describe_remote(remote, settings)
    if failed:
        raise InputError(
            f"{where}: {failed} files did not arrive; the same command again goes on", code="incomplete-push"
        )
    return f"{where}: {len(runs)} runs, and of their files the {pushed} that were not there"


def _list_hashes(repo: DvcRepository, folder: str) -> Collection[str]:
    # None if the cache no longer has the folder: such a run cannot be shared.
    return (read_listing(repo, folder) or {}).values()
