"""Write src/lathe/gguf/pre_tokenizers.py from llama.cpp's own source.

    python tools/list_pre_tokenizers.py .llama.cpp/src/llama-vocab.cpp > src/lathe/gguf/pre_tokenizers.py

A GGUF file names its pre-tokenizer, `tokenizer.ggml.pre`; what the name stands for is in llama.cpp's code alone.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

HEAD = '''"""Pre-tokenizers by their names in GGUF files, `tokenizer.ggml.pre`: how llama.cpp splits a text before BPE.

Written by tools/list_pre_tokenizers.py from llama.cpp's src/llama-vocab.cpp; a test compares the two.
"""

from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """Regular expressions that split a text, one after the other; whether a word that is a token skips the merges."""

    patterns: tuple[str, ...]
    ignore_merges: bool


'''
TYPE = r"LLAMA_VOCAB_PRE_TYPE_(\w+)"
# What llama.cpp splits by code instead: its pattern is only a name for it.
SPLIT_BY_CODE = {"KIMI_K2", "AFMOE", "SUPERBPE"}


class Named(NamedTuple):
    """A pre-tokenizer as llama.cpp's loader knows it."""

    name: str
    kind: str
    ignore_merges: bool


def read_patterns(source: str) -> dict[str, tuple[str, ...]]:
    """Return the regular expressions of every type that splits a text into words of bytes."""
    body = source[source.index("switch (vocab.get_pre_type())") : source.index("std::vector<std::string> regex_exprs;")]
    patterns: dict[str, tuple[str, ...]] = {}
    for block in body.split("break;"):
        kinds = re.findall(rf"case {TYPE}:", block) or (["DEFAULT"] if "default:" in block else [])
        if "byte_encode = false" in block or not kinds:
            continue
        code = re.sub(r"^\s*//.*$", "", block[block.index("{") :], flags=re.MULTILINE)
        literals = re.findall(r'^\s*("(?:[^"\\]|\\.)*"),', code, flags=re.MULTILINE)
        patterns |= dict.fromkeys(set(kinds) - SPLIT_BY_CODE, tuple(map(ast.literal_eval, literals)))
    return patterns


def read_names(source: str) -> list[Named]:
    """Return every name that llama.cpp's loader accepts."""
    start = source.index('tokenizer_pre == "default"')
    body = source[start : source.index("unknown pre-tokenizer type", start)]
    branches = re.findall(rf"((?:tokenizer_pre == \"[^\"]+\"[\s|]*)+)\) {{(.*?pre_type = {TYPE}.*?)}}", body, re.DOTALL)
    return [
        Named(name, kind, "ignore_merges = true" in branch)
        for condition, branch, kind in branches
        for name in re.findall(r'"([^"]+)"', condition)
    ]


def write_module(source: str) -> str:
    """Return the text of the module."""
    patterns = read_patterns(source)
    groups: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for named in read_names(source):
        if named.kind in patterns:
            groups.setdefault((patterns[named.kind], named.ignore_merges), []).append(named.name)
    lines = ["PRE_TOKENIZERS: dict[str, PreTokenizer] = {"]
    for (expressions, ignore_merges), names in groups.items():
        lines += ["    **dict.fromkeys(", "        ("]
        lines += [f'            "{name}",' for name in names]
        lines += ["        ),", "        PreTokenizer(", "            ("]
        lines += [f"                {expression!r}," for expression in expressions]
        lines += ["            ),", f"            ignore_merges={ignore_merges},", "        ),", "    ),"]
    return HEAD + "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    sys.stdout.write(write_module(Path(sys.argv[1]).read_text(encoding="utf-8")))
