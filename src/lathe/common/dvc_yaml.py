"""DVC's YAML files, faster: dvc.lock is read and written by libyaml, and no text is parsed twice by one process.

DVC reads and writes dvc.lock after every stage with a parser in Python that keeps comments; a lock has none. For a lock
of 3,000 lines that takes 0.5 s a stage, more than most stages of a small model take. It parses params.yaml ten times a
stage. What is read and written is the same, byte for byte.
"""

import marshal
import re
from pathlib import Path
from typing import Any, TextIO

import yaml
from dvc.utils.serialize import _yaml

FLOAT = "tag:yaml.org,2002:float"
read_with_comments, write_with_comments = _yaml.parse_yaml_for_update, _yaml._dump


class LockDumper(yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper):  # type: ignore[misc]
    """Writes null as nothing and floats as Python does, as DVC does."""


LockDumper.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", ""))
LockDumper.add_representer(float, lambda dumper, value: dumper.represent_scalar(FLOAT, repr(value)))
LockDumper.add_implicit_resolver(FLOAT, re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+$"), list("-+0123456789"))


def is_lock(path: object) -> bool:
    """Tell whether a file is a lock, which holds no comments."""
    return Path(str(path)).name == "dvc.lock"


def copy_plain(data: Any) -> Any:
    """Return plain dicts, lists and values that are equal to the data. Raises ValueError if there is anything else."""
    if isinstance(data, dict):
        return {copy_plain(key): copy_plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [copy_plain(value) for value in data]
    if type(data) in (str, int, float, bool, type(None)):
        return data
    raise ValueError(type(data).__name__)


class Texts:
    """What the texts of files say, by the text."""

    def __init__(self) -> None:
        self._parsed: dict[str, bytes] = {}
        self._dumped: dict[bytes, str] = {}

    def parse(self, text: str, path: object, typ: str = "safe") -> Any:
        """Parse a text as DVC does, or copy what it said before."""
        if typ != "safe":
            return parse(text, path, typ)
        if text not in self._parsed:
            data = parse(text, path)
            try:
                self._parsed[text] = marshal.dumps(copy_plain(data))
            except ValueError:
                return data
        return marshal.loads(self._parsed[text])

    def dump_lock(self, data: dict[str, Any]) -> str:
        """Return the text of a lock, whose stages are mostly those of the time before."""
        plain = copy_plain(data)
        parts = []
        for key, value in plain.items():
            if key == "stages" and value:
                parts += ["stages:\n", *(self._dump_stage(name, stage) for name, stage in value.items())]
            else:
                parts.append(dump({key: value}))
        text = "".join(parts)
        self._parsed[text] = marshal.dumps(plain)
        return text

    def _dump_stage(self, name: str, stage: Any) -> str:
        key = marshal.dumps((name, stage))
        if key not in self._dumped:
            self._dumped[key] = dump({"stages": {name: stage}}).partition("\n")[2]
        return self._dumped[key]


def dump(data: Any) -> str:
    """Return the YAML of data without comments."""
    options: dict[str, Any] = {"sort_keys": False, "default_flow_style": False, "allow_unicode": True}
    return str(yaml.dump(data, Dumper=LockDumper, **options))


texts = Texts()
parse = _yaml.parse_yaml


def read(text: str, path: object) -> Any:
    """Read a YAML file to change it; a lock in which somebody has written a comment keeps it."""
    return texts.parse(text, path) if is_lock(path) and "#" not in text else read_with_comments(text, path)


def write(data: Any, stream: TextIO) -> None:
    """Write a YAML file."""
    if is_lock(getattr(stream, "name", "")) and type(data) is dict:
        stream.write(texts.dump_lock(data))
    else:
        write_with_comments(data, stream)


def use_libyaml() -> None:
    """Have DVC in this process read and write so, where PyYAML has been built with libyaml."""
    if not yaml.__with_libyaml__:
        return
    _yaml.parse_yaml_for_update, _yaml._dump, _yaml.parse_yaml = read, write, texts.parse
