"""Copy the scripts that the studio's pages load out of npm packages, into src/lathe/studio/static/vendor.

`make studio-files` runs it, after an edit of tools/studio/package.json. `npm ci` compares every package with its hash
in package-lock.json. The files are in Git, so that the studio needs neither npm nor a network.
"""

import hashlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tools/studio"
PAGES = ROOT / "src/lathe/studio/static/vendor"
TESTS = ROOT / "tests/axe"

# File in its package, and the folder that it is copied to.
FILES = {
    "htmx.org/dist/htmx.min.js": PAGES,
    "vega/build/vega.min.js": PAGES,
    "vega-lite/build/vega-lite.min.js": PAGES,
    "vega-embed/build/vega-embed.min.js": PAGES,
    "axe-core/axe.min.js": TESTS,
}


def main() -> None:
    """Install the packages into a folder that is removed again, and copy their files with licences and versions."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCE / name, folder)
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True)
        packages = Path(folder) / "node_modules"
        listed: dict[Path, list[str]] = {}
        for name, target in FILES.items():
            listed.setdefault(target, []).append(copy_file(packages, name, target))
        for target, lines in listed.items():
            heading = "# Files of other people's\n\nWritten by `make studio-files`, by tools/studio/package.json.\n"
            table = "\n| file | package | licence | SHA-256 |\n| --- | --- | --- | --- |\n"
            (target / "README.md").write_text(heading + table + "".join(lines), encoding="utf-8")


def copy_file(packages: Path, name: str, target: Path) -> str:
    """Copy a file and its package's licence; return its line of the table."""
    package = packages / name.partition("/")[0]
    about = json.loads((package / "package.json").read_text(encoding="utf-8"))
    file = target / Path(name).name
    target.mkdir(parents=True, exist_ok=True)
    # Without the line that names a source map, which is not shipped: developers' tools would ask for it in vain.
    lines = (packages / name).read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith("//# sourceMappingURL=")) + "\n", "utf-8")
    shutil.copy(package / "LICENSE", target / f"{package.name}.LICENSE.txt")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"| `{file.name}` | {about['name']} {about['version']} | {about['license']} | `{digest}` |\n"


if __name__ == "__main__":
    main()
