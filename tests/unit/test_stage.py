import errno
import logging
import os
import signal

import pytest

from lathe import stage
from lathe.common import entry_point, paths
from lathe.common.errors import InputError, Interrupted
from lathe.config.params import Convert


def test_bad_input_is_one_line_per_problem_and_exit_code_2(capsys):
    def refuse():
        raise InputError("params.yaml: a is 1; must be 2\nparams.yaml: b is 3; must be 4")

    with pytest.raises(SystemExit) as caught:
        entry_point.guard(refuse)
    assert caught.value.code == 2
    assert capsys.readouterr().err == ("error: params.yaml: a is 1; must be 2\nerror: params.yaml: b is 3; must be 4\n")


def test_a_full_disk_is_one_line_with_a_remedy(capsys):
    def fill():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "models/merged/model.safetensors")

    with pytest.raises(SystemExit) as caught:
        entry_point.guard(fill)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: models/merged/model.safetensors: No space left on device; free some space"
    )


def test_another_fault_of_the_system_keeps_its_traceback():
    def fail():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        entry_point.guard(fail)


def test_ctrl_c_ends_with_130(capsys):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        entry_point.guard(interrupt)
    assert caught.value.code == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_work_stopped_in_good_order_says_how_to_go_on(capsys, number, code):
    def stop():
        raise Interrupted("interrupted at step 3", number)

    with pytest.raises(SystemExit) as caught:
        entry_point.guard(stop)
    assert caught.value.code == code
    assert capsys.readouterr().err == "interrupted at step 3\n"


def test_the_log_level_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("LATHE_LOG_LEVEL", "debug")
    entry_point.guard(lambda: None)
    assert logging.getLogger("lathe").level == logging.DEBUG


def test_an_unknown_log_level_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("LATHE_LOG_LEVEL", "loud")
    with pytest.raises(SystemExit) as caught:
        entry_point.guard(lambda: None)
    assert caught.value.code == 2
    assert "LATHE_LOG_LEVEL is 'LOUD'; must be one of DEBUG, INFO" in capsys.readouterr().err


def test_a_training_without_the_converter_begins_with_a_warning(tmp_path, monkeypatch, caplog):
    stage.warn_without_converter(Convert(llama_cpp_dir=None, tokenizer_parity="rows"))
    assert not caplog.records
    monkeypatch.setattr(paths, "LLAMA_CPP", tmp_path / ".llama.cpp")
    stage.warn_without_converter(Convert(llama_cpp_dir=None, tokenizer_parity="rows"))
    stage.warn_without_converter(Convert(llama_cpp_dir=str(tmp_path), tokenizer_parity="rows"))
    missing, chosen = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / ".llama.cpp") in missing
    assert "make setup" in missing
    assert "convert.llama_cpp_dir" in chosen
