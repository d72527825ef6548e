"""What a run needs, checked before anything is downloaded or run: `python -m lathe doctor`.

Each check answers in lines of `ok`, `warning` or `fail` with the remedy, and none stops the others. Only the standard
library is imported here: where packages are missing, this is what says so.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.doctor_checks import (
    Circumstances,
    Finding,
    Findings,
    check_converter,
    check_credentials,
    check_device,
    check_judge,
    check_links,
    check_llama,
    check_model,
    check_packages,
    check_python,
    check_remotes,
    check_repository,
    check_threads,
    check_tracking,
)

if TYPE_CHECKING:
    from lathe.config.load import Config

COLOURS = {"ok": "32", "warning": "33", "fail": "31"}


def run(load: Callable[[], "Config"], *, as_json: bool) -> int:
    """Check everything, print what was found, and return the exit code.

    0 without a fail, 1 with one, 2 where `load`, which reads the parameters, refuses them.
    """
    refused: list[InputError] = []

    def loaded() -> "Config":
        try:
            return load()
        except InputError as error:
            refused.append(error)
            raise

    findings = examine(loaded, Circumstances(paths.ROOT, os.environ))
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False) + "\n")
    else:
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        sys.stdout.writelines(lines(findings, coloured=coloured))
    failed = any(finding.status == "fail" for finding in findings)
    return 2 if refused else 1 if failed else 0


def examine(load: Callable[[], "Config"], here: Circumstances) -> list[Finding]:
    """Run every check; one that breaks is a fail that says how, and the next one goes on."""
    findings: list[Finding] = []
    findings += _guarded("python", lambda: check_python(sys.version_info[:3]))
    findings += _guarded("packages", lambda: check_packages(here.root / "pyproject.toml"))
    config: list[Config] = []

    def check_parameters() -> Findings:
        config.append(load())
        params = config[0].params
        yield Finding("parameters", "ok", f"model {params.model}, dataset {params.dataset}")

    findings += _guarded("parameters", check_parameters)
    findings += _guarded("repository", lambda: check_repository(here.root))
    findings += _guarded("device", lambda: check_device(config[0].params.training.precision if config else "auto"))
    findings += _guarded("threads", lambda: check_threads(here.environment))
    findings += _guarded("llama.cpp", check_llama)
    chosen = config[0].params.convert.llama_cpp_dir if config else None
    findings += _guarded("converter", lambda: check_converter(here.root, chosen))
    findings += _guarded("links", lambda: check_links(here.root))
    findings += _guarded("remotes", lambda: check_remotes(here.root, here.environment))
    if config:
        findings += _guarded("credentials", lambda: check_credentials(config[0], here.environment))
        findings += _guarded("judge", lambda: check_judge(config[0], here))
        findings += _guarded("tracking", lambda: check_tracking(config[0], here))
        findings += _guarded("memory", lambda: check_model(config[0], here))
    return findings


def lines(findings: Sequence[Finding], *, coloured: bool) -> Iterator[str]:
    """Yield one aligned line per finding, the remedy last."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        status = f"{finding.status:<8}"
        if coloured:
            status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
        yield f"{status} {finding.check:<{width}}  {finding.text}{finding.remedy and '; ' + finding.remedy}\n"


def _guarded(name: str, check: Callable[[], Findings]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except InputError as error:
        found += [Finding(name, "fail", line) for line in str(error).splitlines()]
    except ModuleNotFoundError as error:
        found.append(Finding(name, "fail", f"not checked: {error}", "`make setup`"))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        found.append(Finding(name, "fail", f"the check broke: {text}", "see to this first, and run the doctor again"))
    return found
