"""Write sbom.cdx.json: a CycloneDX bill of all packages that `make setup` may install, as `make sbom` does.

Those of requirements.lock, with the hashes of their files; the packages that hold a model, and the source package that
llama.cpp's converter comes from; and the scripts of the studio's pages, out of npm packages. cyclonedx-py makes and
validates it, in an environment of its own that uv keeps: nothing of it is installed beside Lathe.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockfile import parse_name

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "sbom.cdx.json"
TOOL = "cyclonedx-bom==7.5.0"
REQUIREMENTS = ("requirements.lock", "requirements-models.txt", "requirements-converter.txt")
SCRIPTS = ROOT / "src/lathe/studio/static/vendor/README.md"


def main() -> None:
    """Make the bill, and refuse one that lacks a package."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("error: no uv on the PATH, which runs cyclonedx-py; install it with: make setup EXTRAS=dev")
    pins = "".join((ROOT / name).read_text(encoding="utf-8") for name in REQUIREMENTS)
    with tempfile.TemporaryDirectory() as name:
        requirements, made = Path(name) / "requirements.txt", Path(name) / "sbom.json"
        requirements.write_text(pins, encoding="utf-8")
        command = [uv, "tool", "run", "--from", TOOL, "cyclonedx-py", "requirements", str(requirements)]
        command += ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--validate"]
        command += ["--spec-version", "1.6", "--output-format", "JSON", "--output-file", str(made)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)
        bill = json.loads(made.read_text(encoding="utf-8"))
    bill["components"] += list_scripts(SCRIPTS.read_text(encoding="utf-8"))
    if lacking := sorted(find_pins(pins) - list_components(bill)):
        sys.exit(f"error: the bill lacks {', '.join(f'{name} {version}' for name, version in lacking)}")
    OUT.write_text(json.dumps(bill, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{OUT.name}: {len(bill['components'])} components")  # noqa: T201


def find_pins(requirements: str) -> set[tuple[str, str]]:
    """Return name and version of each package that requirements files pin; one may have several versions."""
    pins = re.findall(r"^([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", requirements, re.MULTILINE)
    return {(parse_name(name), version) for name, version in pins}


def list_components(bill: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return name and version of each component of a bill."""
    return {(parse_name(part["name"]), part["version"]) for part in bill["components"] if "version" in part}


def list_scripts(table: str) -> list[dict[str, Any]]:
    """Return the components of the scripts that the README beside them lists, by their npm packages."""
    rows = re.findall(r"^\| `([^`]+)` \| (\S+) (\S+) \| (\S+) \| `([0-9a-f]{64})` \|$", table, re.MULTILINE)
    return [
        {
            "bom-ref": f"script-{file}",
            "type": "file",
            "name": name,
            "version": version,
            "description": f"{file} of the npm package {name}, in the studio's pages",
            "licenses": [{"license": {"id": licence}}],
            "hashes": [{"alg": "SHA-256", "content": digest}],
            "purl": f"pkg:npm/{name}@{version}",
        }
        for file, name, version, licence, digest in rows
    ]


if __name__ == "__main__":
    main()
