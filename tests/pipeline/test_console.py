"""The command `lathe` acts on the checkout that it is called in, with that checkout's own code."""

import os
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import Checkout, make_checkout

from lathe.common import paths

# As pip writes it from [project.scripts].
SCRIPT = """\
#!{python}
import sys
from lathe.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, Checkout]:
    """Two checkouts that differ, with one environment: the first is installed in it."""
    folder = tmp_path_factory.mktemp("checkouts")
    first, second = (make_checkout(folder / name) for name in ("first", "second"))
    script = folder / "lathe"
    script.write_text(SCRIPT.format(python=sys.executable))
    script.chmod(0o755)
    for number, checkout in enumerate((first, second), start=1):
        checkout.environment |= {"PYTHONPATH": str(first.root / "src"), "PATH": f"{folder}:{os.environ['PATH']}"}
        checkout.set({"seed": number})
        version = checkout.root / "src/lathe/__init__.py"
        version.write_text(version.read_text().replace("0.1.0", f"{number}.0.0"))
    return first, second


COMMANDS = pytest.mark.parametrize(
    "command", [("lathe",), (sys.executable, "-m", "lathe")], ids=["lathe", "python -m lathe"]
)


def run_in(folder: Path, checkout: Checkout, *command: str, **variables: str):
    return Checkout(folder, checkout.environment).run(*command, check=False, env=variables)


def test_the_console_command_is_the_launcher():
    scripts = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"lathe": "lathe.__main__:main"}


@COMMANDS
@pytest.mark.parametrize("folder", [".", "src/lathe/config", "data/local"])
def test_a_command_acts_on_the_checkout_around_the_current_folder(checkouts, command, folder):
    for number, checkout in enumerate(checkouts, start=1):
        seed = run_in(checkout.root / folder, checkout, *command, "config", "seed")
        assert (seed.returncode, seed.stdout) == (0, f"{number}\n"), seed.stderr
        version = run_in(checkout.root / folder, checkout, *command, "--version")
        assert version.stdout == f"lathe {number}.0.0 ({checkout.root})\n"


@COMMANDS
def test_a_command_runs_the_code_of_its_checkout_in_processes_that_it_starts_too(checkouts, command):
    _, second = checkouts
    program = (
        "def main():\n"
        "    import subprocess, sys\n"
        "    print(__file__, flush=True)\n"
        "    subprocess.run([sys.executable, '-c', 'import lathe.cli; print(lathe.cli.__file__)'], check=True)\n"
    )
    file = second.root / "src/lathe/cli.py"
    original = file.read_text()
    file.write_text(program)
    try:
        done = run_in(second.root / "docs", second, *command, "config")
    finally:
        file.write_text(original)
    assert done.stdout.splitlines() == [str(file)] * 2, done.stderr


@COMMANDS
def test_a_nested_checkout_is_the_one_that_is_acted_on(checkouts, command):
    """Such as that of a temporary experiment, below .dvc/tmp/exps."""
    first, _ = checkouts
    nested = make_checkout(first.root / f".dvc/tmp/exps/{len(command)}")
    nested.set({"seed": 3})
    done = run_in(nested.root / "stages", first, *command, "config", "seed")
    assert done.stdout == "3\n", done.stderr


@COMMANDS
def test_outside_of_a_checkout_a_command_says_so_in_one_line(checkouts, command, tmp_path):
    first, second = checkouts
    done = run_in(tmp_path, first, *command, "config", "seed")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for part in (f"error: {tmp_path}: ", "dvc.yaml", "lathe init DIR"):
        assert part in done.stderr
    named = run_in(tmp_path, first, *command, "config", "seed", LATHE_CHECKOUT=str(second.root))
    assert named.stdout == "2\n"


@COMMANDS
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--version"], "lathe 1.0.0"),
        (["--help"], "remote-check"),
        (["config", "--help"], "--stage"),
        (["completion", "bash"], "_shtab_lathe"),
    ],
)
def test_what_acts_on_no_checkout_works_anywhere(checkouts, command, words, part, tmp_path):
    done = run_in(tmp_path, checkouts[0], *command, *words)
    assert done.returncode == 0, done.stderr
    assert part in done.stdout
