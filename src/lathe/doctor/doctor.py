"""Doctor: checks what a run needs before anything is downloaded or run (`lathe doctor`).

Each check gives lines of `ok`, `warning` or `fail` with the remedy, and none stops the others. Only the standard
library is imported here, so that it can name the packages that are missing.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import make_one_line
from lathe.doctor.checks import (
    Circumstances,
    Finding,
    Findings,
    check_converter,
    check_credentials,
    check_judge,
    check_links,
    check_llama,
    check_model,
    check_packages,
    check_python,
    check_remotes,
    check_repository,
    check_tracking,
)
from lathe.doctor.device import check_device, check_threads
from lathe.doctor.generation import check_answers, check_held_out
from lathe.doctor.model import check_base_model

if TYPE_CHECKING:
    from lathe.config.load import Config

COLOURS = {"ok": "32", "warning": "33", "fail": "31"}


def run(load: Callable[[], "Config"], *, as_json: bool) -> int:
    """Check everything, print the findings, and return the exit code.

    0 without a fail, 1 with one, 2 if `load`, which reads the parameters, refuses them.
    """
    refusals: list[InputError] = []

    def load_once() -> "Config":
        try:
            return load()
        except InputError as error:
            refusals.append(error)
            raise

    findings = examine(load_once, Circumstances(paths.ROOT, os.environ))
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False) + "\n")
    else:
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        sys.stdout.writelines(format_findings(findings, coloured=coloured))
    failed = any(finding.status == "fail" for finding in findings)
    return 2 if refusals else 1 if failed else 0


def examine(load: Callable[[], "Config"], here: Circumstances) -> list[Finding]:
    """Run every check; one that raises becomes a fail, and the others run."""
    findings: list[Finding] = []
    findings += _run_check("python", lambda: check_python(sys.version_info[:3]))
    findings += _run_check("packages", lambda: check_packages(here.root / "pyproject.toml"))
    config: list[Config] = []

    def check_parameters() -> Findings:
        config.append(load())
        params = config[0].params
        yield Finding("parameters", "ok", f"model {params.model}, dataset {params.dataset}")

    findings += _run_check("parameters", check_parameters)
    findings += _run_check("repository", lambda: check_repository(here.root))
    findings += _run_check("repository", lambda: check_head(here.root))
    findings += _run_check("device", lambda: check_device(config[0].params.training.precision if config else "auto"))
    findings += _run_check("threads", lambda: check_threads(here.environment))
    findings += _run_check("llama.cpp", check_llama)
    chosen = config[0].params.convert.llama_cpp_dir if config else None
    findings += _run_check("converter", lambda: check_converter(here.root, chosen))
    findings += _run_check("links", lambda: check_links(here.root))
    findings += _run_check("remotes", lambda: check_remotes(here.root, here.environment))
    if config:
        findings += _run_check("local files", lambda: check_local_files(config[0]))
        findings += _run_check("credentials", lambda: check_credentials(config[0], here.environment))
        findings += _run_check("judge", lambda: check_judge(config[0], here))
        findings += _run_check("tasks", lambda: check_tasks(config[0]))
        findings += check_later(config[0], here)
        findings += _run_check("tracking", lambda: check_tracking(config[0], here))
        findings += _run_check("held-out", lambda: check_held_out(config[0], here.root))
        findings += _run_check("answers", lambda: check_answers(config[0], here.root))
        findings += _run_check("base", lambda: check_base_model(config[0], here.root))
        findings += _run_check("memory", lambda: check_model(config[0], here))
    return findings


def check_head(root: Path) -> Findings:
    """Check that no interrupted experiment has left HEAD on no branch."""
    from lathe.experiments.interrupted import find_detached_head

    if (found := find_detached_head(root)) is None:
        return
    if found.by_experiment:
        yield Finding("repository", "fail", found.describe(), found.remedy)
    else:
        text = f"HEAD is on no branch: it was detached at the commit of {found.branch}"
        yield Finding("repository", "warning", text, f"{found.remedy} if that was not on purpose")


def check_tasks(config: "Config") -> Findings:
    """Check that lm-evaluation-harness is there and knows the tasks, if any are named."""
    from lathe.evaluation.benchmark import check_benchmark

    if tasks := config.params.benchmark.tasks:
        check_benchmark(config.params)
        yield Finding("tasks", "ok", f"lm-evaluation-harness knows {', '.join(tasks)}; their data are not looked at")


def check_later(config: "Config", here: Circumstances) -> list[Finding]:
    """Check what only stages after the training need, one by one; the judge's key has a check of its own."""
    from lathe.needs.later_stages import list_checks

    found: list[Finding] = []
    for check in list_checks(config.params, here.root / "models/base", here.environment):
        found += _run_check(
            "later",
            lambda check=check: (Finding("later", "warning", text) for text in check()),  # type: ignore[misc]
        )
    return found or [Finding("later", "ok", "files, programs and types that stages after the training need are there")]


def check_local_files(config: "Config") -> Findings:
    """Check that DVC or Git keeps the selected local data and models."""
    from lathe.provenance.local_files import find_untracked

    for path in find_untracked(config):
        yield Finding(
            "local files", "warning", f"{path} is in no cache: it cannot be restored", f"`dvc add {shlex.quote(path)}`"
        )


def format_findings(findings: Sequence[Finding], *, coloured: bool) -> Iterator[str]:
    """Yield one aligned line per finding, the remedy last."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        status = f"{finding.status:<8}"
        if coloured:
            status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
        text = make_one_line(f"{finding.text}{finding.remedy and '; ' + finding.remedy}")
        yield f"{status} {finding.check:<{width}}  {text}\n"


def _run_check(name: str, check: Callable[[], Findings]) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except InputError as error:
        findings += [Finding(name, "fail", line) for line in str(error).splitlines()]
    except ModuleNotFoundError as error:
        findings.append(Finding(name, "fail", f"not checked: {error}", "`make setup`"))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        findings.append(Finding(name, "fail", f"the check broke: {text}", "fix this first, and run the doctor again"))
    return findings
