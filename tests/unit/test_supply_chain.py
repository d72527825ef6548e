"""Supply chain: a hash for everything that `make setup` installs, a bill of it all, and the audit of the workflow."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from lathe.common import paths

sys.path.insert(0, str(paths.ROOT / "tools"))
import sbom

WORKFLOW = yaml.safe_load((paths.ROOT / ".github/workflows/supply-chain.yaml").read_text())
PINS = sbom.find_pins("".join((paths.ROOT / name).read_text() for name in sbom.REQUIREMENTS))


@pytest.mark.parametrize("name", sbom.REQUIREMENTS)
def test_every_requirement_has_a_version_and_a_hash(name: str) -> None:
    text = re.sub(r" \\\n +", " ", (paths.ROOT / name).read_text())
    requirements = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert requirements
    for line in requirements:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==\S+.* --hash=sha256:[0-9a-f]{64}", line), line


def test_every_npm_package_has_a_hash() -> None:
    packages = json.loads((paths.ROOT / "tools/studio/package-lock.json").read_text())["packages"]
    assert packages.pop("")
    assert len(packages) > 10
    assert [name for name, package in packages.items() if not package["integrity"].startswith("sha512-")] == []


def test_the_scripts_of_the_pages_are_those_of_the_bill() -> None:
    listed = {part["bom-ref"]: part["hashes"][0]["content"] for part in sbom.list_scripts(sbom.SCRIPTS.read_text())}
    files = sbom.SCRIPTS.parent.glob("*.js")
    assert listed == {f"script-{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_pins_are_found_with_extras_markers_and_several_versions() -> None:
    text = "A_b[x,y]==1.0 \\\n    --hash=sha256:aa\nfork==1 ; python_version < '3.12'\nfork==2+cpu ; x\n"
    text += "# c==3\n    # via d==4\n"
    assert sbom.find_pins(text) == {("a-b", "1.0"), ("fork", "1"), ("fork", "2+cpu")}


@pytest.mark.slow
@pytest.mark.network
def test_the_bill_is_valid_and_lists_every_locked_package() -> None:
    done = subprocess.run(
        [sys.executable, "tools/sbom.py"], cwd=paths.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr  # cyclonedx-py validates what it made
    bill = json.loads(sbom.OUT.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert sbom.list_components(bill) >= PINS
    assert len(PINS) > 200
    for part in bill["components"]:
        hashes = [
            *part.get("hashes", []),
            *(one for link in part.get("externalReferences", []) for one in link["hashes"]),
        ]
        assert {one["alg"] for one in hashes} == {"SHA-256"}, part["name"]


def test_the_workflow_audits_what_is_locked_and_runs_its_tools_at_fixed_versions() -> None:
    commands = "\n".join(step["run"] for step in WORKFLOW["jobs"]["audit"]["steps"] if "run" in step)
    assert "pip-audit --disable-pip --require-hashes --requirement requirements.lock" in commands
    assert "npm audit" in commands
    assert "python tools/sbom.py" in commands
    assert re.findall(r"--from (\S+)", commands) == ["pip-audit==2.10.1"]
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    [uv] = [one for one in project["optional-dependencies"]["dev"] if one.startswith("uv==")]
    assert f"pipx install {uv}" in commands
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "==" in sbom.TOOL
