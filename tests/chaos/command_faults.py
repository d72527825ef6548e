"""Faults of commands beside the pipeline's stages: runs, searches, mirrors, pushes, the studio, the queue, set-up."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml
from studio_server import Studio
from training_checkout import list_outputs
from wandb_files import read_records

from chaos.processes import MARK, VICTIMS, list_marked, wait_for_their_end, wait_until
from chaos.sites import DVC, LATHE, Site, Sites, remove
from chaos.state import State, describe_leftovers, read_state
from lathe.common import paths

SEARCH_FILE = "experiments/search/late.yaml"
SEARCH = """\
study: late
sampler: random
startup_trials: 1
seed: 3
n_trials: 2
timeout_seconds: null
objectives:
  - metric: merged.rouge_l
    direction: maximize
space:
  evaluate.bootstrap_samples: {type: int, low: 100, high: 5000}
"""
RUN = (*LATHE, "run", "longer")
MOST_ATTEMPTS = 6
SETUP_SECONDS = 1500.0


def run_as_told(site: Site, *words: str) -> None:
    """Run a command again, and before it what its refusal tells to type. Raises AssertionError if that is no help."""
    for _ in range(MOST_ATTEMPTS):
        before = site.log.stat().st_size
        if site.run(*words, check=False) == 0:
            return
        said = site.log.read_bytes()[before:].decode(errors="replace")
        if "has been run from this commit" in said:
            return
        if told := re.search(r"`(git switch[^`]*)` goes back", said):
            site.run("sh", "-c", told[1])
        elif "`lathe reset` first" in said:
            site.run(*LATHE, "reset", "--yes")
        elif told := re.search(r"`(dvc queue remove [^`]*)` takes it out", said):
            site.run("sh", "-c", f"{shutil.which('dvc')} {told[1].removeprefix('dvc ')}")
        else:
            raise AssertionError(f"{' '.join(words[-3:])}: {said[-600:]}")
    raise AssertionError(f"{' '.join(words[-3:])}: not after {MOST_ATTEMPTS} attempts")


def check_experiment(site: Site, name: str, expected: dict[str, list[str]]) -> None:
    """Raise AssertionError if an experiment's outputs are not those of the undisturbed run."""
    outputs = list_outputs(site.checkout, name)
    assert outputs == expected, f"{name}: outputs are not as an undisturbed run makes them"


def check_leftovers(site: Site, expected: State) -> None:
    """Raise AssertionError where something is left that an undisturbed run does not leave."""
    left = [f"still running: {line}" for line in wait_for_their_end(site.mark)]
    left += describe_leftovers(site.root, read_state(site.root), expected)
    left += site.describe_temporary_files()
    assert not left, "; ".join(left[:6])


class CommandFaults:
    """The faults, each with a template of its own, of which an undisturbed copy is made once."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self.kinds: dict[str, Callable[[str, Random], str]] = {
            "lathe run": self.kill_run,
            "lathe run --temp": self.kill_temporary_run,
            "lathe search": self.kill_search,
            "lathe mirror": self.kill_mirror,
            "dvc push": self.kill_push,
            "lathe push-runs": self.kill_push_of_runs,
            "dvc pull": self.kill_pull,
            "studio": self.kill_studio,
            "queue": self.kill_queue,
            "make setup": self.kill_setup,
            "merge of two branches": self.merge_branches,
        }

    def inject(self, subject: str, name: str, rng: Random) -> str:
        """Do one, and return what was done."""
        return self.kinds[subject](name, rng)

    def kill_run(self, name: str, rng: Random) -> str:
        """A recipe in the workspace, killed and run again."""
        reference = self._trained()
        expected, seconds = list_outputs(_as_checkout(reference), "longer"), self._seconds("trained")
        with self.sites.copy(self.sites.training, name, rng) as site:
            detail = site.start(*RUN).kill_after(rng.uniform(0.5, seconds), rng.choice(VICTIMS), rng)
            site.check_after_fault()
            run_as_told(site, *RUN)
            check_experiment(site, "longer", expected)
            site.check_at_the_end(read_state(reference))
        return detail

    def kill_temporary_run(self, name: str, rng: Random) -> str:
        """A recipe in a copy of the checkout."""
        command = (*RUN, "--temp")
        undisturbed = self.sites.made_by(
            "trained-temp", self.sites.training, lambda site: self._timed("trained-temp", site, *command)
        )
        reference = self._trained()
        expected, seconds = list_outputs(_as_checkout(reference), "longer"), self._seconds("trained")
        with self.sites.copy(self.sites.training, name, rng) as site:
            detail = site.start(*command).kill_after(rng.uniform(0.5, seconds), rng.choice(VICTIMS), rng)
            site.check_after_fault()
            run_as_told(site, *command)
            check_experiment(site, "longer", expected)
            check_leftovers(site, read_state(undisturbed))
            assert site.read("git", "status", "--porcelain") == "", "the workspace is not as it was"
        return detail

    def kill_search(self, name: str, rng: Random) -> str:
        """A search of two trials; its driver, a worker, or all of it."""
        ready = self.sites.made_by("search-ready", self.sites.whole, _add_search)
        reference = self.sites.made_by("searched", ready, lambda site: self._timed("searched", site, *_search()))
        with self.sites.copy(ready, name, rng) as site:
            seconds = self._seconds("searched")
            detail = site.start(*_search()).kill_after(rng.uniform(0.5, seconds), rng.choice(VICTIMS), rng)
            site.check_after_fault()
            run_as_told(site, *_search())
            assert _read_trials(site.root) == _read_trials(reference), "other trials than undisturbed"
            assert _list_experiments(site.root) == _list_experiments(reference)
            check_leftovers(site, read_state(reference))
            assert list((site.root / ".dvc/tmp/search").iterdir()) == []
        return detail

    def kill_mirror(self, name: str, rng: Random) -> str:
        """A run copied to an offline folder of W&B."""
        command = (*LATHE, "mirror", "--wandb", "HEAD")
        reference = self.sites.made_by(
            "mirrored", self.sites.whole, lambda site: self._timed("mirrored", site, *command)
        )
        with self.sites.copy(self.sites.whole, name, rng) as site:
            seconds = self._seconds("mirrored")
            detail = site.start(*command).kill_after(rng.uniform(0.5, seconds), rng.choice(VICTIMS), rng)
            site.check_after_fault()
            run_as_told(site, *command)
            assert _read_mirrored(site.root) == _read_mirrored(reference), "the copy is not that of an undisturbed run"
            check_leftovers(site, read_state(reference))
        return detail

    def kill_push(self, name: str, rng: Random) -> str:
        """An upload to a remote, a folder."""
        return self._kill_upload("pushed", name, rng, *DVC, "push")

    def kill_push_of_runs(self, name: str, rng: Random) -> str:
        """An upload of all runs."""
        return self._kill_upload("pushed-runs", name, rng, *LATHE, "push-runs")

    def _kill_upload(self, reference_name: str, name: str, rng: Random, *command: str) -> str:
        reference = self.sites.made_by(
            reference_name, self.sites.whole, lambda site: self._timed(reference_name, site, *command)
        )
        with self.sites.copy(self.sites.whole, name, rng) as site:
            seconds = self._seconds(reference_name)
            detail = site.start(*command).kill_after(rng.uniform(0.3, seconds), rng.choice(VICTIMS), rng)
            site.check_after_fault()
            run_as_told(site, *command)
            assert _list_remote(site.root) == _list_remote(reference), "the remote is not as ever"
            check_leftovers(site, read_state(reference))
        return detail

    def kill_pull(self, name: str, rng: Random) -> str:
        """A download into a fresh clone."""
        pushed = self.sites.made_by("pushed", self.sites.whole, lambda site: self._timed("pushed", site, *DVC, "push"))
        with self.sites.copy(pushed, name, rng) as site:
            remote, clone = site.root / ".storage", site.folder / "clone"
            site.run("git", "clone", "--quiet", str(site.root), str(clone))
            (clone / ".llama.cpp").symlink_to(paths.LLAMA_CPP)  # what is not pushed is converted again
            there = Site(clone, site.folder, site.mark, site.expected, rng)
            there.run(*DVC, "remote", "modify", "--local", "local", "url", str(remote))
            pull = (*DVC, "pull", "--allow-missing")
            seconds = self._seconds("pushed")
            detail = there.start(*pull).kill_after(rng.uniform(0.3, seconds), rng.choice(VICTIMS), rng)
            assert not wait_for_their_end(site.mark)
            there.run(*pull)
            there.run(*LATHE, "repro")
            (clone / ".dvc/config.local").unlink()  # where the remote is, which the undisturbed run has not been told
            there.check_at_the_end(site.expected)
        return detail

    def kill_studio(self, name: str, rng: Random) -> str:
        """The studio while a run goes on that it has started: the run ends as ever."""
        reference = self._trained()
        expected, seconds = list_outputs(_as_checkout(reference), "longer"), self._seconds("trained")
        with self.sites.copy(self.sites.training, name, rng) as site:
            kept = {key: site.environment[key] for key in (MARK, "DVC_SITE_CACHE_DIR", "PYTHONPATH")}
            mode = rng.choice(["now", "temp"])
            with Studio(site.root, {**kept, "TMPDIR": str(site.temporary)}) as studio:
                studio.api("POST", "/api/runs", {"recipe": "longer", "values": {}, "mode": mode, "name": "longer"})
                moment = rng.uniform(0.0, seconds)
                try:
                    studio.process.wait(moment)
                except subprocess.TimeoutExpired:
                    studio.process.kill()
                    studio.process.wait()
            wait_until(lambda: not list_marked(site.mark), 4 * seconds + 60, "the end of what the studio has started")
            if "longer" not in _list_experiments(site.root):
                run_as_told(site, *RUN)
            check_experiment(site, "longer", expected)
            with Studio(site.root, kept) as studio:
                shown = [each["name"] for each in studio.api("GET", "/api/runs").json()]
            assert "longer" in shown, "the next studio does not show the run"
            wait_for_their_end(site.mark)
            extra = {path for path in read_state(site.root).paths if path.startswith(".scratch/studio")}
            expected_state = read_state(reference)
            check_leftovers(site, State({}, {}, expected_state.paths | extra))
        return f"mode {mode}, SIGKILL of the studio after {moment:.1f} s"

    def kill_queue(self, name: str, rng: Random) -> str:
        """DVC's queue: its worker, the experiment that it runs, or all of it."""
        reference = self._trained()
        expected, seconds = list_outputs(_as_checkout(reference), "longer"), self._seconds("trained")
        with self.sites.copy(self.sites.training, name, rng) as site:
            site.run(*RUN, "--queue")
            site.run(*DVC, "queue", "start")
            moment = rng.uniform(0.5, seconds + 5)
            wait_for_moment(site, moment)
            running = list_marked(site.mark)
            chosen = running if rng.random() < 0.5 else running[:1]
            for process in chosen:
                process.kill()
            wait_until(lambda: "Running" not in site.read(*DVC, "queue", "status"), 120, "the queue to know of it")
            wait_for_their_end(site.mark)
            if "longer" not in _list_experiments(site.root):
                run_as_told(site, *RUN, "--queue")
                site.run(*DVC, "queue", "start")
                wait_until(lambda: "longer" in _list_experiments(site.root), 6 * seconds + 60, "the queued run")
            site.run(*DVC, "queue", "stop")
            check_experiment(site, "longer", expected)
            assert not wait_for_their_end(site.mark), "the queue's worker goes on"
            assert site.read("git", "status", "--porcelain") == "", "the workspace is not as it was"
        return f"SIGKILL of {len(chosen)} of {len(running)} processes after {moment:.1f} s"

    def merge_branches(self, name: str, rng: Random) -> str:
        """Two branches with other parameters, both run: the merge leaves a conflict in dvc.lock and in metrics."""
        branches = self.sites.made_by("branches", self.sites.whole, _make_branches)
        expected = self.sites.made_by("both", self.sites.whole, _run_both)
        one, other = rng.sample(["main", "more"], 2)
        with self.sites.copy(branches, name, rng) as site:
            site.run("git", "checkout", "--quiet", one)
            site.run(*DVC, "checkout", "--quiet")
            if rng.random() < 0.5:
                remove(site.root / ".dvc/cache/runs")
            code = site.run("git", "merge", "--quiet", other, check=False)
            assert code != 0, "the merge was to end in a conflict"
            conflicts = site.read("git", "diff", "--name-only", "--diff-filter=U").split()
            assert "dvc.lock" in conflicts
            site.run(*LATHE, "repro")
            site.check_at_the_end(read_state(expected))
        return f"{other} into {one}: conflicts in {len(conflicts)} files"

    def kill_setup(self, name: str, rng: Random) -> str:
        """`make setup`, killed twice and run to its end."""
        folder = self.sites.work / "injections" / f"{name}-{os.getpid()}"
        with self.sites.copy(self.sites.training, name, rng) as site:
            setup = (sys.executable, "tools/install.py", "--extras", "dev")
            details = []
            for _ in range(2):
                command = site.start(*setup)
                details.append(
                    command.kill_after(rng.uniform(0.5, 40), rng.choice(["the whole group", "the command"]), rng)
                )
                venv = site.root / ".venv"
                assert not (venv / ".ready").exists() or (venv / ".installing").exists(), "half an environment is ready"
            command = site.start(*setup)
            assert command.wait(SETUP_SECONDS) == 0, site.tail()
            python = str(site.root / ".venv/bin/python")
            site.run(python, "-m", "lathe", "config", "model")
            assert not (site.root / ".venv/.installing").exists()
            assert not wait_for_their_end(site.mark)
        remove(folder)
        return "; ".join(details)

    def _trained(self) -> Path:
        return self.sites.made_by("trained", self.sites.training, lambda site: self._timed("trained", site, *RUN))

    def _timed(self, name: str, site: Site, *command: str) -> None:
        import time

        started = time.monotonic()
        site.run(*command)
        (self.sites.work / f"{name}.seconds").write_text(f"{time.monotonic() - started:.2f}")

    def _seconds(self, name: str) -> float:
        return float((self.sites.work / f"{name}.seconds").read_text())


def wait_for_moment(site: Site, seconds: float) -> None:
    """Wait so many seconds, or until nothing runs any more."""
    import time

    until = time.monotonic() + seconds
    while time.monotonic() < until and (list_marked(site.mark) or time.monotonic() < until - seconds + 3):
        time.sleep(0.05)


def _as_checkout(root: Path) -> Any:
    from conftest import Checkout

    return Checkout(root)


def _search() -> tuple[str, ...]:
    return (*LATHE, "search", SEARCH_FILE)


def _add_search(site: Site) -> None:
    (site.root / SEARCH_FILE).write_text(SEARCH)
    site.checkout.commit()


def _read_trials(root: Path) -> list[dict[str, Any]]:
    study = json.loads((root / "metrics/search/late/study.json").read_text())
    [study] = study if isinstance(study, list) else [study]
    return [{key: trial[key] for key in ("number", "state", "parameters", "scores")} for trial in study["trials"]]


def _list_experiments(root: Path) -> list[str]:
    listed = subprocess.run(
        ["git", "for-each-ref", "--format=%(refname)", "refs/exps"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(Path(ref).name for ref in listed.stdout.split() if ref.count("/") == 4)


def _read_mirrored(root: Path) -> list[Any]:
    """Return what the folders of W&B hold: one run, with all its points and files."""
    runs = []
    for folder in sorted((root / "wandb").glob("offline-run-*")):
        points: dict[str, list[Any]] = {}
        files: list[str] = []
        for record in (record for file in folder.glob("*.wandb") for record in read_records(file)):
            if record.HasField("history"):
                for item in record.history.item:
                    name = "/".join(item.nested_key) or item.key
                    if not name.startswith("_"):
                        points.setdefault(name, []).append(item.value_json)
            if record.HasField("artifact"):
                files += [entry.path for entry in record.artifact.manifest.contents]
        runs.append([points, sorted(files)])
    return runs


def _list_remote(root: Path) -> dict[str, int]:
    storage = root / ".storage"
    return {file.relative_to(storage).as_posix(): file.stat().st_size for file in storage.rglob("*") if file.is_file()}


def _make_branches(site: Site) -> None:
    checkout = site.checkout
    site.run("git", "checkout", "--quiet", "-b", "more")
    checkout.set({"quantize.types": ["Q8_0", "Q4_K_M", "Q4_0"]})
    site.run(*LATHE, "repro")
    checkout.commit()
    site.run("git", "checkout", "--quiet", "main")
    site.run(*DVC, "checkout", "--quiet")
    checkout.set({"evaluate.bootstrap_samples": 200})
    site.run(*LATHE, "repro")
    checkout.commit()


def _run_both(site: Site) -> None:
    site.checkout.set({"quantize.types": ["Q8_0", "Q4_K_M", "Q4_0"], "evaluate.bootstrap_samples": 200})
    site.run(*LATHE, "repro")
    yaml.safe_load((site.root / "dvc.lock").read_text())
