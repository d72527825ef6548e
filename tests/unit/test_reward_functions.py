from pathlib import Path

import pytest

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.training_params import Reward
from lathe.training import reward_functions


def load(folder: Path, name: str):
    return reward_functions.load([Reward(name="function", weight=1.0, function=name)], folder)[name]


@pytest.fixture
def write(tmp_path):
    def written(text: str, name: str = "mine.py") -> Path:
        folder = tmp_path / "rewards"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        return folder

    return written


def test_the_example_that_ships_is_a_reward():
    brevity = load(paths.REWARDS, "example:brevity")
    assert brevity("ab", "abc", {}) == 1
    assert brevity("abcdef", "abc", {}) == 0.5
    assert reward_functions.source(brevity) == paths.REWARDS / "example.py"


def test_a_function_sees_completion_reference_and_row(write):
    folder = write("def same(completion, reference, row):\n    return completion == reference == row['wanted']\n")
    assert load(folder, "mine:same")("a", "a", {"wanted": "a"}) == 1.0
    assert load(folder, "mine:same")("a", "a", {"wanted": "b"}) == 0.0


def test_a_module_may_lie_deeper_and_define_dataclasses(write):
    text = "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(c, r, row):\n    return A(1).x\n"
    assert load(write(text, "deep/er.py"), "deep.er:f")("", "", {}) == 1


def test_an_edited_module_is_read_anew(write):
    load(write("def f(c, r, row):\n    return 0\n"), "mine:f")
    assert load(write("def f(c, r, row):\n    return 1  # edited\n"), "mine:f")("", "", {}) == 1


def test_an_installed_package_is_found_where_no_file_is(tmp_path):
    assert reward_functions.source(load(tmp_path, "difflib:get_close_matches")).name == "difflib.py"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "yours:f", "'yours:f': there is no rewards/yours.py and no installed package yours; add one of them"),
        ("def g(c, r, row):\n    return 1\n", "mine:gg", "mine.py has no function 'gg'; did you mean 'g'?"),
        ("g = 1\n", "mine:g", "mine.py has no function 'g'; write `def g(...)`"),
        ("def f(c):\n    return 1\n", "mine:f", r"mine.py has f(c); a reward takes (completion, reference, row)"),
        ("def f(:\n", "mine:f", "'mine:f' cannot be loaded: SyntaxError: invalid syntax (mine.py, line 1); mend it"),
        ("1 / 0\n", "mine:f", "'mine:f' cannot be loaded: ZeroDivisionError: division by zero; mend it"),
        ("import no_such_package\n", "mine:f", "cannot be loaded: No module named 'no_such_package'; install it"),
    ],
)
def test_a_function_that_is_not_there_is_refused_in_one_line(write, text, name, said):
    with pytest.raises(InputError) as caught:
        load(write(text), name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("row['none']", "mine:f raised KeyError in line 2: 'none' for 'an answer'; mend it"),
        ("None", "mine:f returned None for 'an answer'; a reward is a number from 0 to 1"),
        ("'1'", "mine:f returned '1'"),
        ("float('nan')", "mine:f returned nan"),
        ("-0.5", "mine:f returned -0.5"),
        ("2", "mine:f returned 2"),
    ],
)
def test_a_function_that_fails_or_returns_no_share_is_refused_in_one_line(write, body, said):
    with pytest.raises(InputError) as caught:
        load(write(f"def f(completion, reference, row):\n    return {body}\n"), "mine:f")("an answer", "", {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
