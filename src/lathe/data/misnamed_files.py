"""Misnamed files: text files by their name that begin as another kind of file does, such as an archive."""

from pathlib import Path

from lathe.common.errors import InputError
from lathe.data.split_files import get_suffix

_GZIP = b"\x1f\x8b"
# How a file of a kind begins, its name, and what to do.
_KINDS = (
    (_GZIP, "a gzip file", "name it {name}.gz"),
    (b"PAR1", "a Parquet file", "name it {stem}.parquet"),
    (b"ARROW1", "an Arrow file", "name it {stem}.arrow"),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", "unzip it, or save the sheet as CSV in UTF-8"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet of an older Excel", "save the sheet as CSV in UTF-8"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "decompress it: name it {name}.zst, then `zstd -d`"),
    (b"\xfd7zXZ", "an xz file", "decompress it: name it {name}.xz, then `xz -d`"),
    (b"BZh", "a bzip2 file", "decompress it: name it {name}.bz2, then `bzip2 -d`"),
    (b"SQLite format 3\x00", "an SQLite database", "export its table as JSON: `sqlite3 -json`"),
)


def refuse_misnamed(file: Path, shown: str) -> None:
    """Raise InputError if a text file is another kind of file by its first bytes; `shown` is its name."""
    suffix = get_suffix(file)
    if suffix in (None, ".parquet", ".arrow"):
        return
    with file.open("rb") as source:
        begins = source.read(16)
    if suffix.endswith(".gz"):
        if begins and not begins.startswith(_GZIP):
            raise InputError(
                f"{shown}: is no gzip file by its first bytes; name it {file.name[: -len('.gz')]} if it is not "
                "compressed",
                code="misnamed-file",
            )
        return
    for magic, kind, remedy in _KINDS:
        if begins.startswith(magic):
            stem = file.name[: -len(suffix)]
            raise InputError(
                f"{shown}: is {kind} by its first bytes; {remedy.format(name=file.name, stem=stem)}",
                code="misnamed-file",
            )
