"""JSON files with more than an array: rows under a key of one object, and what holds no rows; read item by item."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InputError
from lathe.data.json_text import Decode, JsonText, skip_item

# What the objects of a single conversation have; a list of them is one row, and no list of rows.
MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True)
class _Member:
    """What an object has under a key: how many items or keys (None: neither a list nor an object), and whether rows.

    `is_row`: an object whose keys are no numbers, as those of a column by row numbers are.
    """

    key: str
    length: int | None
    is_rows: bool
    is_row: bool = False


def find_rows_key(text: JsonText, file: str) -> str:
    """Return the key of the rows in the object that a JSON file is: that of its only list of objects.

    All of the text is read. Raises InputError where there are no rows, or more than one list of them.
    """
    members = list(_list_members(text, file))
    text.require_end()
    lists = [member.key for member in members if member.is_rows]
    if len(lists) == 1:
        return lists[0]
    if lists:
        raise InputError(
            f"{file}:1: has lists of objects under the keys {', '.join(map(repr, lists))}; choose one in the dataset's "
            f"preset (rows_key: {lists[0]})",
            code="several-lists",
        )
    if len(members) > 1 and all(member.is_row for member in members):
        raise InputError(
            f"{file}:1: holds rows under keys of their own ({_list_keys([member.key for member in members])}); "
            "expected an array of them: `jq -c '.[]' FILE > ROWS.jsonl` makes one per line",
            code="rows-under-keys",
        )
    lengths = {member.length for member in members}
    if len(members) > 1 and len(lengths) == 1 and None not in lengths:
        raise InputError(
            f"{file}:1: holds columns, one after another; expected rows: write it again with "
            "`to_json(FILE, orient='records', lines=True, force_ascii=False)` of pandas",
            code="columns-not-rows",
        )
    raise InputError(
        f"{file}:1: holds an object without a list of rows (keys {_list_keys([member.key for member in members])}); "
        "expected an array of objects, an object with one under a key (rows_key names a deeper one), or one object per "
        "line in a .jsonl",
        code="not-an-array",
    )


def iterate_rows(text: JsonText, key: str, file: str, choose_decoder: Callable[[int], Decode]) -> Iterator[Any]:
    """Yield the items of the list under a key of the object that a JSON file is; what follows it is read too.

    `key` may be a path, such as `result.items`, and each item is what the decoder makes of it that is chosen by its
    number, from 0. Raises InputError where the object has no such list, JSONDecodeError as `JsonText` does.
    """
    keys: list[str] = []
    found = yield from _iterate_path(text, key.split("."), file, choose_decoder, keys)
    text.require_end()
    if not found:
        raise InputError(
            f"{file}:1: has no list under the key {key!r}, which the dataset's preset names in rows_key; its keys: "
            f"{_list_keys(keys)}",
            code="no-such-key",
        )


def count_rows_under(text: JsonText, key: str, file: str) -> int:
    """Return how many rows there are under a key; raises as `iterate_rows` does."""
    return sum(1 for _ in iterate_rows(text, key, file, lambda _: skip_item))


def _iterate_path(
    text: JsonText, path: list[str], file: str, choose_decoder: Callable[[int], Decode], keys: list[str]
) -> Generator[Any, None, bool]:
    """Yield the items of the list at a path of keys and positions, and go on behind the value that begins here.

    Returns whether there is one; `keys` become those of the object that begins here.
    """
    begins = text.peek()
    if not path:
        if begins != "[":
            text.skip()
            return False
        for number in text.iterate_items():
            yield text.decode(choose_decoder(number))
        return True
    found = False
    if begins == "{":
        seen = set[str]()
        for key in text.iterate_members():
            keys.append(key)
            if key != path[0]:
                text.skip()
                continue
            _refuse_second(key, seen, file)
            found = yield from _iterate_path(text, path[1:], file, choose_decoder, [])
    elif begins == "[":
        for number in text.iterate_items():
            if path[0] == str(number):
                found = yield from _iterate_path(text, path[1:], file, choose_decoder, [])
            else:
                text.skip()
    else:
        text.skip()
    return found


def _list_members(text: JsonText, file: str) -> Iterator[_Member]:
    """Yield what the object that begins here has under each key; all of it is read."""
    seen = set[str]()
    text.peek()
    for key in text.iterate_members():
        _refuse_second(key, seen, file)
        begins = text.peek()
        length, is_rows, is_row = None, False, False
        if begins == "[":
            length, is_rows = 0, True
            for number in text.iterate_items():
                item = text.decode(skip_item)
                length = number + 1
                is_rows = is_rows and isinstance(item, dict) and not (number == 0 and name_messages([item]))
        elif begins == "{":
            length, is_row = 0, True
            for inner in text.iterate_members():
                text.skip()
                length += 1
                is_row = is_row and not inner.isdecimal()
        else:
            text.skip()
        yield _Member(key, length, is_rows and bool(length), is_row and bool(length))


def _refuse_second(key: str, seen: set[str], file: str) -> None:
    if key in seen:
        raise InputError(
            f"{file}:1: has the key {key!r} twice, of which one would be lost; rename one of them", code="duplicate-key"
        )
    seen.add(key)


def look_up(value: Any, path: str) -> Any:
    """Return what is at a path of keys and list positions, such as `data.text` or `answers.0.value`, or None."""
    for part in path.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def name_messages(value: Any) -> str | None:
    """Return the column that a list belongs into, if it is a conversation: a row may be nothing else."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return None
    for column, keys in zip(("messages", "conversations"), MESSAGE_KEYS, strict=True):
        if keys <= set(value[0]):
            return column
    return None


def _list_keys(keys: list[str]) -> str:
    names = [repr(key) for key in keys]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
