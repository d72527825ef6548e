"""Outputs of an experiment, by the hashes that dvc.lock of its commit has: pushed to a remote, and brought from one."""

from lathe.common.dvc_api import DvcRepository
from lathe.common.errors import InputError
from lathe.provenance.dvc_lock import read_listing
from lathe.provenance.revisions import Revision


def push_outputs(repo: DvcRepository, commit: str, remote: str) -> int:
    """Upload what an experiment made; return how many files were not there. Raises InputError if some fail."""
    hashes = list_hashes(repo, commit)
    pushed, failed = repo.push_files(hashes | list_in_folders(repo, hashes), remote)
    if failed:
        raise InputError(
            f"{remote}: {failed} files did not arrive; the same command again goes on", code="incomplete-push"
        )
    return pushed


def fetch_outputs(repo: DvcRepository, commit: str, remote: str) -> int:
    """Download what an experiment made; return how many files were not here. Raises InputError if some fail."""
    hashes = list_hashes(repo, commit)
    listings, failed = repo.fetch_files(hashes, remote)
    fetched, failed_in_folders = repo.fetch_files(list_in_folders(repo, hashes), remote)
    if failed or failed_in_folders:
        raise InputError(
            f"{remote}: {failed + failed_in_folders} files did not arrive, or are not there; the same command "
            "again goes on",
            code="incomplete-fetch",
        )
    return listings + fetched


def list_hashes(repo: DvcRepository, commit: str) -> set[str]:
    """Return the hashes of an experiment's outputs: without those in Git, and those that dvc.yaml never pushes."""
    outputs = repo.list_committed_outputs()
    wanted = {path for path, is_cached in outputs.items() if is_cached} - repo.unpushed_outputs()
    stages = Revision(commit, commit).stages
    return {out["md5"] for stage in stages.values() for out in stage.get("outs", []) if out["path"] in wanted}


def list_in_folders(repo: DvcRepository, hashes: set[str]) -> set[str]:
    """Return the hashes of the files in those folders among `hashes` whose listings the cache has."""
    folders = [md5 for md5 in hashes if md5.endswith(".dir")]
    return {md5 for folder in folders for md5 in (read_listing(repo, folder) or {}).values()}
