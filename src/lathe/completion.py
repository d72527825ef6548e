"""Completion of `lathe` in a shell: subcommands, options, files, recipes and experiments, by shtab."""

import argparse
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError

SHELLS = ("bash", "zsh", "fish")

# Shell words that complete an argument, by shell; shtab reads them from an argument's `complete`.
FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "fish": "(__fish_complete_path (commandline -ct))"}
FOLDER = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "fish": "(__fish_complete_directories)"}
RECIPES = {"bash": "_lathe_recipes", "zsh": "_lathe_recipes", "fish": "(_lathe_recipes)"}
EXPERIMENTS = {"bash": "_lathe_experiments", "zsh": "_lathe_experiments", "fish": "(_lathe_experiments)"}

# Names are listed by the shell itself: starting Python for each Tab would take longer than one waits for.
LIST_RECIPES = """\
folder=$PWD
while [ -n "$folder" ] && [ ! -f "$folder/dvc.yaml" ]; do folder=${folder%/*}; done
for file in $(command ls "$folder/experiments" "$folder/classify/experiments" 2>/dev/null); do
  case $file in *.yaml) echo "${file%.yaml}";; esac
done"""
LIST_EXPERIMENTS = "git for-each-ref --format='%(refname:lstrip=4)' refs/exps 2>/dev/null; echo workspace"

FUNCTIONS = {
    "bash": """\
_lathe_recipes() {{ compgen -W "$({recipes})" -- "$1"; }}
_lathe_experiments() {{ compgen -W "$({experiments})" -- "$1"; }}
""",
    "zsh": """\
_lathe_recipes() {{ compadd -- $({recipes}) }}
_lathe_experiments() {{ compadd -- $({experiments}) }}
""",
    "fish": """\
function _lathe_recipes
  sh -c '{recipes}'
end
function _lathe_experiments
  git for-each-ref --format="%(refname:lstrip=4)" refs/exps 2>/dev/null
  echo workspace
end
""",
}


def add_search_file(command: Any) -> None:
    """Add the argument FILE of a search to a command's parser."""
    command.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=paths.ROOT / "experiments/search/default.yaml",
        metavar="FILE",
        help="what to search (default: experiments/search/default.yaml)",
    ).complete = FILE


def write_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes the parser's commands in a shell; `source` it, or put it where the shell looks.

    Raises InputError where the installed shtab does not know the shell.
    """
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise InputError(
            f"completion {shell}: shtab {shtab.__version__} writes none for it; it has "
            f"{', '.join(name for name in SHELLS if name in shtab.SUPPORTED_SHELLS)}",
            code="unknown-shell",
        )
    functions = FUNCTIONS[shell].format(recipes=LIST_RECIPES, experiments=LIST_EXPERIMENTS)
    return str(shtab.complete(parser, shell=shell, root_prefix="lathe", preamble=functions)) + "\n"
