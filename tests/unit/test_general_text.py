import pytest

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.inference.general_text import paragraphs


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
    assert paragraphs(tmp_path / "text") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "holds no text"),
        (b" \n\t\n\n", "holds no text"),
        (b"caf\xe9", "byte 3 is not UTF-8"),
    ],
)
def test_a_file_without_text_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError) as caught:
        paragraphs(tmp_path / "text")
    assert str(caught.value).startswith(f"evaluate.general_text: {tmp_path / 'text'}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_text_that_is_shipped_is_of_many_subjects_and_scripts():
    shipped = paragraphs(paths.ROOT / "data/general.txt")
    assert len(shipped) == len(set(shipped)) >= 40
    text = "".join(shipped)
    for first, last in (("a", "z"), ("а", "я"), ("一", "龥"), ("0", "9"), ("ß", "ß"), ("ç", "é")):
        assert any(first <= character <= last for character in text), first
    assert all(len(paragraph) < 1000 for paragraph in shipped)
