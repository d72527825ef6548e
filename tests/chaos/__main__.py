"""Faults survived: `make chaos` injects more than a hundred faults into the pipeline and the commands.

Each is followed by the same command again, and ends with the outputs of an undisturbed run, nothing half-written taken
for a result, and no process, lock or temporary folder left. Results are kept in a file of JSON lines: a run that was
cut goes on, and what has failed is tried again.

    python -m chaos [--seed 1] [--take 15] [--part 1/2] [--only WORD] [--work FOLDER] [--fresh] [--write docs/faults.md]

Exit code 1: a fault was not survived. 3: injections are left to do.
"""

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from chaos.command_faults import CommandFaults
from chaos.pipeline_faults import FAULTS, fill_disk, room_for
from chaos.plan import Injection, make_plan
from chaos.sites import Sites, can_mount, remove
from chaos.table import write_table
from lathe.common import paths

CODE = ("src", "stages", "data", "models", "experiments", "rewards")


def main() -> int:
    """Inject what is left to do, print a table, and return the exit code."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what runs is ended, mounts are undone
    work = arguments.work or Path("/tmp") / f"lathe-chaos-{hash_code()}"
    results = arguments.results or work / "results.jsonl"
    if arguments.fresh:
        remove(results)
    results.parent.mkdir(parents=True, exist_ok=True)
    plan = make_plan(arguments.seed)
    done = read_results(results)
    waiting = [each for each in plan if done.get(each.seed, {}).get("outcome") not in ("survived", "not run")]
    if arguments.only:
        waiting = [each for each in waiting if arguments.only in f"{each.number} {each.kind} {each.subject}"]
    part, parts = map(int, arguments.part.split("/"))
    chosen = [each for each in waiting if each.number % parts == part % parts][: arguments.take]
    sites = Sites(work)
    commands = CommandFaults(sites)
    if chosen:
        assert sites.whole
        assert sites.training  # of the code as it is now
    for injection in chosen:
        record = inject(injection, sites, commands)
        done[injection.seed] = record
        with results.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        where = f"{injection.number:3} of {len(plan)}  {injection.kind:22} {injection.subject:24}"
        print(f"{where} {record['outcome']:9} {record['seconds']:5.1f} s  {record['detail']}", flush=True)
    found = [done[each.seed] for each in plan if each.seed in done]
    if arguments.write:
        write_table(arguments.write, found, len(plan), arguments.seed)
    failed = [record for record in found if record["outcome"] == "failed"]
    print(f"{len(found)} of {len(plan)} injected, {len(failed)} failed; results: {results}")
    if failed:
        return 1
    return 0 if len(found) == len(plan) or arguments.take is not None or arguments.only else 3


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=1, help="of the plan (default 1)")
    parser.add_argument("--take", type=int, help="how many injections at most")
    parser.add_argument("--part", default="1/1", help="2/3: every third from the second on, for several at a time")
    parser.add_argument("--only", help="those whose number, kind and subject hold this text")
    parser.add_argument("--work", type=Path, help="folder of the checkouts (default: one in /tmp for this code)")
    parser.add_argument("--results", type=Path, help="file of JSON lines (default: results.jsonl in that folder)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--write", type=Path, help="page whose table is to be written")
    return parser.parse_args()


def inject(injection: Injection, sites: Sites, commands: CommandFaults) -> dict[str, Any]:
    """Inject a fault; return its record: what was done, whether it was survived, and how long that took."""
    started, rng, name = time.monotonic(), injection.random, f"{injection.number:03}"
    outcome = "survived"
    try:
        detail = inject_into_item(injection, sites, name) if injection.of_item else None
        if detail is None:
            detail = commands.inject(injection.subject, name, rng)
    except AssertionError as error:
        outcome, detail = "failed", str(error) or traceback.format_exc()[-600:]
    except Exception:  # of the program itself, or of a file that is not what it was: shown, and the others go on
        outcome, detail = "failed", traceback.format_exc()[-900:]
    if detail.startswith("not run: "):
        outcome = "not run"
    return {
        "seed": injection.seed,
        "number": injection.number,
        "kind": injection.kind,
        "subject": injection.subject,
        "outcome": outcome,
        "detail": " ".join(detail.split()),
        "seconds": round(time.monotonic() - started, 1),
    }


def inject_into_item(injection: Injection, sites: Sites, name: str) -> str:
    """Inject a fault into an item of the pipeline; return what was done."""
    fault, rng, room = FAULTS[injection.kind], injection.random, None
    if injection.kind == "clock set back" and not shutil.which("faketime"):
        return "not run: faketime is not installed"
    if fault is fill_disk:
        if not can_mount():
            return "not run: this user may mount no file system"
        with sites.copy(sites.whole, name, rng) as site:
            item_bytes = sum(file.stat().st_size for file in site.outputs(injection.subject))
        room = room_for(item_bytes, rng.random())
    with sites.copy(sites.whole, name, rng, room) as site:
        detail = fault(site, injection.subject)
    return detail if room is None else f"{room:,} bytes left: {detail}"


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each injection, by its seed; a line that was cut short is none."""
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["seed"]] = record
    return found


def hash_code() -> str:
    """Return a short hash of what the checkouts are made from: another state of the code needs others."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *CODE, "*.yaml"],
        cwd=paths.ROOT,
        capture_output=True,
        check=True,
    )
    digest = hashlib.sha256()
    for name in sorted(filter(None, listed.stdout.decode().split("\0"))):
        file = paths.ROOT / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:10]


if __name__ == "__main__":
    sys.exit(main())
