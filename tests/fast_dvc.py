"""`dvc` as the tests' checkouts run it: DVC itself, but dvc.lock is read and written by libyaml.

DVC reads and writes dvc.lock after every stage with a parser in Python that keeps comments; a lock has none. For a lock
of 3,000 lines that takes 0.5 s a stage, more than most stages of a small model take. What is written is the same.
"""

import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, TextIO

import yaml
from dvc.utils.serialize import _yaml

FLOAT = "tag:yaml.org,2002:float"
read_with_comments, write_with_comments = _yaml.parse_yaml_for_update, _yaml._dump


class LockDumper(yaml.CSafeDumper):
    """Writes null as nothing and floats as Python does, as DVC does."""


LockDumper.add_representer(type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", ""))
LockDumper.add_representer(OrderedDict, lambda dumper, data: dumper.represent_dict(data.items()))
LockDumper.add_representer(float, lambda dumper, value: dumper.represent_scalar(FLOAT, repr(value)))
LockDumper.add_implicit_resolver(FLOAT, re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+$"), list("-+0123456789"))


def is_lock(path: object) -> bool:
    """Tell whether a file is a lock, which holds no comments."""
    return Path(str(path)).name == "dvc.lock"


def read(text: str, path: object) -> Any:
    """Read a YAML file to change it."""
    return _yaml.parse_yaml(text, path) if is_lock(path) else read_with_comments(text, path)


def write(data: Any, stream: TextIO) -> None:
    """Write a YAML file."""
    if is_lock(getattr(stream, "name", "")) and type(data) is dict:
        options: dict[str, Any] = {"sort_keys": False, "default_flow_style": False, "allow_unicode": True}
        yaml.dump(data, stream, Dumper=LockDumper, **options)
    else:
        write_with_comments(data, stream)


def use() -> None:
    """Have DVC in this process use them."""
    _yaml.parse_yaml_for_update, _yaml._dump = read, write


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file: no module of the tests can be imported by accident
    sys.argv[0] = "dvc"
    use()
    from dvc.cli import main

    sys.exit(main())
