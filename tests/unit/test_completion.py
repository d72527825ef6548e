"""`lathe completion`: bash sources the script and completes; the other shells get one that names what they need."""

import subprocess

import pytest

from lathe import cli, completion
from lathe.common import paths

COMPLETE = """\
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_lathe lathe "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "lathe.bash"
    file.write_text(completion.write_script(cli.build_parser(), "bash"))
    return file


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["co"], {"completion", "config", "compare"}),
        (["run", "qwen"], {"qwen3-600m"}),
        (["run", "--qu"], {"--queue"}),
        (["doctor", "--recipe", "vi"], {"vikhr-8b"}),
        (["compare", "work"], {"workspace"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["inspect", "--split", "t"], {"train", "test"}),
    ],
)
def test_bash_completes_commands_options_and_names(script, words, expected):
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "lathe", *words]
    done = subprocess.run(command, cwd=paths.ROOT / "src/lathe", capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("shell", "part"), [("zsh", "#compdef lathe"), ("fish", "complete -c lathe"), ("bash", "-F _shtab_lathe lathe")]
)
def test_each_shell_gets_a_script_with_every_command(shell, part):
    text = completion.write_script(cli.build_parser(), shell)
    assert part in text
    assert "_lathe_recipes" in text
    for name in ("config", "init", "remote-check"):
        assert name in text
