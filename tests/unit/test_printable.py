"""Text from data, models, files and servers reaches a terminal as text: it neither controls it nor adds lines."""

import io
import json
import logging
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter
from numpy import zeros

from lathe.common import entry_point
from lathe.common.errors import InputError
from lathe.common.text import make_one_line, make_printable
from lathe.doctor.checks import Finding
from lathe.inference import chat
from lathe.provenance import trace

HOSTILE = "\x1b]0;title\x07\x1b[2J\x1b]52;c;cm0gLXJm\x07\x1b[8m\x9b31m\r\u2028\u202e\ud800\x00\x7f"


IN_UTF_8 = HOSTILE.replace("\ud800", "")


def is_harmless(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t" for character in text)


@pytest.mark.parametrize(
    ("text", "printable", "one_line"),
    [
        ("plain, with\ttab", "plain, with\ttab", "plain, with\ttab"),
        ("two\nlines", "two\nlines", "two\\nlines"),
        ("\x1b[31m", "\\u001b[31m", "\\u001b[31m"),
        ("a\r\nb", "a\\u000d\nb", "a\\u000d\\nb"),
        ("Привет 你好 é 👩\u200d🔧", "Привет 你好 é 👩\u200d🔧", "Привет 你好 é 👩\u200d🔧"),
        ("\u2028\u202e\x9b\ud800", "\\u2028\\u202e\\u009b\\ud800", "\\u2028\\u202e\\u009b\\ud800"),
    ],
)
def test_what_controls_a_terminal_becomes_an_escape(text, printable, one_line):
    assert make_printable(text) == printable
    assert make_one_line(text) == one_line


def test_json_that_is_printed_stays_the_same_json(capsys):
    value = {"answer": IN_UTF_8}
    entry_point.guard(lambda: sys.stdout.write(json.dumps(value, ensure_ascii=False)))
    printed = capsys.readouterr().out
    assert is_harmless(printed)
    assert json.loads(printed) == value


def test_output_errors_and_logs_of_every_program_are_harmless(capsys):
    def act():
        sys.stdout.write(f"{HOSTILE}\n")
        sys.stdout.writelines([HOSTILE, "\n"])
        print(HOSTILE)
        raise InputError(f"file {HOSTILE}: is no model; give one", code="test")

    before = sys.stdout
    with pytest.raises(SystemExit) as caught:
        entry_point.guard(act)
    assert caught.value.code == 2
    assert sys.stdout is before
    printed = capsys.readouterr()
    assert printed.out.count("52;c;cm0gLXJm") == 3
    assert printed.err.startswith("error: file \\u001b]0;title")
    assert is_harmless(printed.out + printed.err)

    record = logging.LogRecord("lathe", logging.INFO, "", 0, "row %s", (HOSTILE,), None)
    assert is_harmless(entry_point.PrintableFormatter("%(message)s").format(record))


def test_colours_of_its_own_stay(capsys):
    entry_point.guard(lambda: sys.stdout.write("\x1b[32mok\x1b[0m \x1b[8mhidden"))
    assert capsys.readouterr().out == "\x1b[32mok\x1b[0m \\u001b[8mhidden"


def test_an_answer_is_shown_piece_by_piece_and_kept_as_it_is():
    out = io.StringIO()
    pieces = ["a line\n", *HOSTILE, "\tthe end"]
    assert chat._print_answer(iter(pieces), out) == "".join(pieces)
    assert out.getvalue().startswith("a line\n\\u001b]0;title")
    assert is_harmless(out.getvalue())


def test_what_a_gguf_says_of_itself_adds_no_finding(tmp_path: Path, capsys):
    writer = GGUFWriter(tmp_path / "forged.gguf", "llama")
    writer.add_string("lathe.artifact", "merged")
    writer.add_string("lathe.version", f"1\nmade by     stage quantize@Q4_K_M, as Q4_K_M{IN_UTF_8}")
    writer.add_string("lathe.base.name", f"x\rmade by     stage{IN_UTF_8}")
    writer.add_tensor("output.weight", zeros((2, 2), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    trace.run(tmp_path / "forged.gguf", as_json=False)
    printed = capsys.readouterr().out
    assert is_harmless(printed)
    assert not [line for line in printed.splitlines() if line.startswith("made by")]
    assert "\\nmade by" in printed


def test_a_finding_of_the_doctor_is_one_line():
    from lathe.doctor.doctor import format_findings

    [line] = format_findings([Finding("model", "fail", f"a\nb{HOSTILE}", "remove it")], coloured=False)
    assert line.count("\n") == 1
    assert is_harmless(line)
