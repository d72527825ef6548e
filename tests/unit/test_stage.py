import logging

import pytest

from lathe import stage
from lathe.errors import InputError


def test_bad_input_is_one_line_per_problem_and_exit_code_2(capsys):
    def refuse():
        raise InputError("params.yaml: a is 1; must be 2\nparams.yaml: b is 3; must be 4")

    with pytest.raises(SystemExit) as caught:
        stage.guard(refuse)
    assert caught.value.code == 2
    assert capsys.readouterr().err == ("error: params.yaml: a is 1; must be 2\nerror: params.yaml: b is 3; must be 4\n")


def test_ctrl_c_ends_with_130(capsys):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        stage.guard(interrupt)
    assert caught.value.code == 130


def test_the_log_level_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("LATHE_LOG_LEVEL", "debug")
    stage.guard(lambda: None)
    assert logging.getLogger("lathe").level == logging.DEBUG


def test_an_unknown_log_level_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("LATHE_LOG_LEVEL", "loud")
    with pytest.raises(SystemExit) as caught:
        stage.guard(lambda: None)
    assert caught.value.code == 2
    assert "LATHE_LOG_LEVEL is 'LOUD'; must be one of DEBUG, INFO" in capsys.readouterr().err
