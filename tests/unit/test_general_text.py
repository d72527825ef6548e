import pytest
from refusals import refused

from lathe.common import paths
from lathe.inference.general_text import read_paragraphs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n\ntwo\n", ["one", "two"]),
        ("\n\none\nstill one\n \t\n\n\n  two", ["one\nstill one", "  two"]),
        ("one\r\n\r\ntwo\r\n", ["one", "two"]),
        ("\ufeffодин\n\n二", ["один", "二"]),
    ],
)
def test_blank_lines_separate_paragraphs(tmp_path, text, expected):
    (tmp_path / "text").write_bytes(text.encode())
    assert read_paragraphs(tmp_path / "text") == expected


@pytest.mark.parametrize(
    ("content", "code", "part"),
    [
        (None, "missing-file", "no such file"),
        (b"", "no-text", ""),
        (b" \n\t\n\n", "no-text", ""),
        (b"caf\xe9", "not-utf-8", "byte 3"),
    ],
)
def test_a_file_without_text_is_refused_in_one_line(tmp_path, content, code, part):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with refused(code, part) as caught:
        read_paragraphs(tmp_path / "text")
    assert str(caught.value).startswith(f"evaluate.general_text: {tmp_path / 'text'}: ")
    assert "\n" not in str(caught.value)


def test_the_text_that_is_shipped_is_of_many_subjects_and_scripts():
    shipped = read_paragraphs(paths.ROOT / "data/general.txt")
    assert len(shipped) == len(set(shipped)) >= 40
    text = "".join(shipped)
    for first, last in (("a", "z"), ("а", "я"), ("一", "龥"), ("0", "9"), ("ß", "ß"), ("ç", "é")):
        assert any(first <= character <= last for character in text), first
    assert all(len(paragraph) < 1000 for paragraph in shipped)
