"""Faults while an item of the pipeline is being made, and of what has been made, each before a plain rerun."""

import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from chaos.processes import VICTIMS
from chaos.sites import DVC, LATHE, Site, heed_modes, make_room

YEAR_SECONDS = 365 * 24 * 3600
STARTING_SECONDS = 3.5  # DVC, the stage's imports


def rerun(site: Site) -> None:
    """Run the pipeline as `make repro` does, and compare everything with the undisturbed run."""
    site.check_after_fault()
    site.run(*LATHE, "repro")
    site.check_at_the_end()


def choose_command(site: Site, item: str) -> tuple[str, ...]:
    """Return one of the commands that make an item."""
    return (*LATHE, "repro") if site.rng.random() < 0.4 else (*DVC, "repro", "--single-item", item)


def read_seconds(site: Site, item: str) -> float:
    """Return about how long an item takes, start included."""
    import json

    script = item.partition("@")[0]
    for file in (site.root / "metrics/timings").glob("*.json"):
        if script == file.stem or script.startswith(f"{file.stem}_"):
            [timings] = json.loads(file.read_text(encoding="utf-8"))
            return STARTING_SECONDS + max(
                [entry["seconds"] for entry in timings.get("items", [])] or [timings.get("seconds", 1.0)]
            )
    return STARTING_SECONDS + 1.0


def kill(site: Site, item: str, victim: str) -> str:
    """SIGKILL at a random moment."""
    site.forget(item)
    command = site.start(*choose_command(site, item))
    detail = command.kill_after(site.rng.uniform(0.4, read_seconds(site, item)), victim, site.rng)
    rerun(site)
    return detail


def kill_repeatedly(site: Site, item: str) -> str:
    """Three kills in a row, each at a moment of its own."""
    site.forget(item)
    details = []
    for victim in VICTIMS:
        command = site.start(*DVC, "repro", "--single-item", item)
        details.append(command.kill_after(site.rng.uniform(0.4, read_seconds(site, item)), victim, site.rng))
        site.check_after_fault()
    rerun(site)
    return "; ".join(details)


def fill_disk(site: Site, item: str) -> str:
    """A file system that is full before the item is whole; then there is room again."""
    site.forget(item)
    code = site.start(*choose_command(site, item)).wait()
    make_room(site.root.parent)
    rerun(site)
    return _say_code(code)


def room_for(item_bytes: int, fraction: float) -> int:
    """Return how many bytes are left on the file system: less than the item and its bookkeeping need."""
    return int((item_bytes + 300_000) * fraction)


def limit_file_size(site: Site, item: str) -> str:
    """No file may grow beyond a part of the item's largest, as on a full disk, but that each file has its own room."""
    largest = max([file.stat().st_size for file in site.outputs(item)] or [4096])
    site.forget(item)
    limit = int(max(largest, 4096) * site.rng.uniform(0.1, 0.9))
    code = site.start(*choose_command(site, item), limits={resource.RLIMIT_FSIZE: limit}).wait()
    rerun(site)
    return f"{limit:,} bytes a file: {_say_code(code)}"


def limit_memory(site: Site, item: str) -> str:
    """Less address space than the item needs."""
    site.forget(item)
    limit = int(site.rng.uniform(0.25, 2.5) * 2**30)
    code = site.start(*choose_command(site, item), limits={resource.RLIMIT_AS: limit}).wait()
    rerun(site)
    return f"{limit >> 20:,} MiB of address space: {_say_code(code)}"


def forbid_writing(site: Site, item: str) -> str:
    """A folder that the item writes to cannot be written to."""
    parents = {file.parent for file in site.outputs(item)} | {
        site.root / ".dvc/cache/files/md5",
        site.root / ".dvc/tmp",
    }
    tops = [site.root / out["path"] for out in site.expected.stages[item].get("outs", [])]
    parents |= {top.parent for top in tops}
    site.forget(item)
    there = sorted(path for path in parents if path.is_dir())
    folder = site.rng.choice(there)
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        code = site.start(*heed_modes(), *choose_command(site, item)).wait()
    finally:
        if folder.is_dir():
            folder.chmod(mode)
    rerun(site)
    return f"{folder.relative_to(site.root)} is read-only: {_say_code(code)}"


def run_two_at_once(site: Site, item: str) -> str:
    """Two commands that make the same item, one a moment after the other."""
    site.forget(item)
    first = site.start(*choose_command(site, item))
    pause = site.rng.uniform(0.0, 2.0)
    time.sleep(pause)
    second = site.start(*choose_command(site, item))
    codes = [command.wait() for command in (first, second)]
    rerun(site)
    return f"{pause:.1f} s apart: exit codes {codes[0]} and {codes[1]}"


def damage_cache(site: Site, item: str) -> str:
    """An object of DVC's cache that lost its end, as after a loss of power; the output is a link to it."""
    file = _choose_cached(site, item)
    target, how = _find_object(site, file), site.rng.choice(["cut short", "emptied"])
    content = target.read_bytes()
    _replace(target, content[: len(content) // 2] if how == "cut short" else b"")
    linked = site.rng.random() < 0.5
    file.unlink()
    if linked:
        os.link(target, file)
    else:
        _remove_output(site, item, file)
    rerun(site)
    return f"object of {file.relative_to(site.root)} is {how}, {'linked' if linked else 'the output is gone'}"


def remove_cache_object(site: Site, item: str) -> str:
    """An object of DVC's cache and the output that is linked to it are gone."""
    file = _choose_cached(site, item)
    _find_object(site, file).unlink()
    _remove_output(site, item, file)
    rerun(site)
    return f"object and output {file.relative_to(site.root)} are gone"


def truncate_output(site: Site, item: str) -> str:
    """A file of an output, such as a shard of weights, that is shorter than it was."""
    file = site.rng.choice(site.outputs(item)[:3])
    content = file.read_bytes()
    kept = int(len(content) * site.rng.random())
    file.unlink()
    file.write_bytes(content[:kept])
    rerun(site)
    return f"{file.relative_to(site.root)}: {kept:,} of {len(content):,} bytes"


def date_files_ahead(site: Site, item: str) -> str:
    """The clock was a year ahead when all files were written, and has been set right."""
    site.forget(item)
    then = time.time() + YEAR_SECONDS
    for folder in ("src", "stages", "data", "models", "metrics", ".dvc/cache/files"):
        for file in (site.root / folder).rglob("*"):
            if file.is_file() and file.stat().st_mode & 0o222:  # what is read-only is linked to the template's
                os.utime(file, (then, then))
    for name in ("params.yaml", "presets.yaml", "dvc.lock", "dvc.yaml"):
        os.utime(site.root / name, (then, then))
    rerun(site)
    return "files a year ahead"


def set_clock_back(site: Site, item: str) -> str:
    """The item is made while the clock is two days slow (libfaketime), and the rerun has the right time."""
    site.forget(item)
    code = site.start("faketime", "-2d", *choose_command(site, item)).wait()
    rerun(site)
    return f"two days back: {_say_code(code)}"


def _choose_cached(site: Site, item: str) -> Path:
    cached = [file for file in site.outputs(item) if (target := _find_object(site, file)) and target.is_file()]
    return site.rng.choice(cached[:3])


def _find_object(site: Site, file: Path) -> Path:
    from lathe.provenance.lineage import hash_path

    md5 = hash_path(file)
    return site.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def _replace(target: Path, content: bytes) -> None:
    """Put a read-only file in the place of one that other checkouts are linked to as well."""
    target.unlink()
    target.write_bytes(content)
    target.chmod(0o444)


def _remove_output(site: Site, item: str, file: Path) -> None:
    for out in site.expected.stages[item]["outs"]:
        top = site.root / out["path"]
        if file == top or top in file.parents:
            if top.is_dir():
                shutil.rmtree(top)
            else:
                top.unlink(missing_ok=True)


def _say_code(code: int) -> str:
    return "ended well" if code == 0 else f"ended with {code}"


# By the name of the kind in the plan. SIGKILL of three victims is `kill` with the victim in its name.
FAULTS: dict[str, Callable[[Site, str], str]] = {
    **{f"SIGKILL of {victim}": lambda site, item, victim=victim: kill(site, item, victim) for victim in VICTIMS},  # type: ignore[misc]
    "three kills in a row": kill_repeatedly,
    "full disk": fill_disk,
    "file size limit": limit_file_size,
    "memory limit": limit_memory,
    "read-only folder": forbid_writing,
    "two at once": run_two_at_once,
    "damaged cache object": damage_cache,
    "lost cache object": remove_cache_object,
    "truncated output": truncate_output,
    "files from the future": date_files_ahead,
    "clock set back": set_clock_back,
}
