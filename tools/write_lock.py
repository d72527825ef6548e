"""Write requirements.lock from pyproject.toml: what `make lock` runs, after an edit of pyproject.toml.

Everything else keeps its version. Options are uv's: `python tools/write_lock.py --upgrade-package urllib3` takes a
newer version of what some package pulls in.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from lockfile import SOURCE_ONLY, Lock

ROOT = Path(__file__).resolve().parents[1]


def add_hashes(text: str, added: dict[str, list[str]]) -> str:
    """Return the text of a lock in which further files are accepted for some packages."""
    for package, digests in added.items():
        known = Lock(text).hashes(package)
        lines = [f"    --hash=sha256:{digest}" for digest in sorted({*known, *digests})]
        pin = re.compile(rf"(^{re.escape(package)}==.*?)((?: \\\n    --hash=sha256:[0-9a-f]+)+)", re.MULTILINE)
        text = pin.sub(lambda match, lines=lines: " \\\n".join([match[1], *lines]), text, count=1)  # type: ignore[misc]
    return text


def main() -> None:
    """Let uv resolve all extras for every Python and platform at once, and keep the versions that the lock has."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("error: no uv on the PATH, which resolves the versions; install it with: make setup EXTRAS=dev")
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version=3.11", "--generate-hashes"]
    # What setup installs: wheels, llama.cpp that it compiles, and the few packages that have only a source package.
    command += ["--only-binary=:all:", *(f"--no-binary={name}" for name in sorted({"llama-cpp-python", *SOURCE_ONLY}))]
    command += ["--all-extras", "--output-file=requirements.lock", *sys.argv[1:], "pyproject.toml"]
    header = {"UV_CUSTOM_COMPILE_COMMAND": "make lock"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **header}, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    lock = ROOT / "requirements.lock"
    added = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["lathe"]["hashes"]
    lock.write_text(add_hashes(lock.read_text(encoding="utf-8"), added), encoding="utf-8")


if __name__ == "__main__":
    main()
