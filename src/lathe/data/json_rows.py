"""JSON files with more than an array: rows under a key of one object, one object per line, and what holds no rows."""

from typing import Any

from lathe.common.errors import InputError

# What the objects of a single conversation have; a list of them is one row, and no list of rows.
MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})


def find_rows(value: dict[str, Any], key: str | None, file: str) -> list[Any]:
    """Return the rows in the object that a JSON file holds: the list under the named key, or its only list of objects.

    `key` may be a path, such as `result.items`. Raises InputError where there is none, or more than one.
    """
    if key:
        found = look_up(value, key)
        if not isinstance(found, list):
            raise InputError(
                f"{file}:1: has no list under the key {key!r}, which the dataset's preset names in rows_key; its keys: "
                f"{_list_keys(value)}",
                code="no-such-key",
            )
        return found
    lists = [name for name, inner in value.items() if _is_list_of_rows(inner)]
    if len(lists) == 1:
        rows: list[Any] = value[lists[0]]
        return rows
    if lists:
        raise InputError(
            f"{file}:1: has lists of objects under the keys {', '.join(map(repr, lists))}; choose one in the dataset's "
            f"preset (rows_key: {lists[0]})",
            code="several-lists",
        )
    inner = list(value.values())
    if len(inner) > 1 and all(isinstance(column, dict | list) and len(column) == len(inner[0]) for column in inner):
        raise InputError(
            f"{file}:1: holds columns, one after another; expected rows: write it again with "
            "`to_json(FILE, orient='records', lines=True, force_ascii=False)` of pandas",
            code="columns-not-rows",
        )
    raise InputError(
        f"{file}:1: holds an object without a list of rows (keys {_list_keys(value)}); expected an array of objects, "
        "an object with one under a key (rows_key names a deeper one), or one object per line in a .jsonl",
        code="not-an-array",
    )


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


def _is_list_of_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    return not name_messages(value)


def _list_keys(value: dict[str, Any]) -> str:
    names = [repr(name) for name in value]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
