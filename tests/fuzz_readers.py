"""Fuzzing of what reads files from outside: `python tests/fuzz_readers.py FORMATS CORPUS FIRST_SEED SECONDS LOG`.

For SECONDS each of the formats, joined by commas, is tried. Each seed takes a good file of CORPUS/FORMAT, breaks it and
gives it to the functions by which the commands read such files. They may read it, or raise InputError of one line.
Anything else is a finding: another exception, more than 10 s, more than 1 GB of memory, the end of the process. The LOG
has a line for each seed before it is tried and one for each finding; with 0 SECONDS one seed alone is tried. The same
seed makes the same file of the same corpus.
"""

import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError

MOST_SECONDS = 10
MOST_BYTES = 1 << 30
HEAD_BYTES = 1 << 14  # most changes are in the first bytes, where headers are, or the last, where Parquet's is
NUMBERS: tuple[int, ...] = (0, 1, 2, 7, 8, 9, 31, 32, 127, 128, 255, 256, 65535)
NUMBERS += (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
WORDS = (b"\x00", b"\xff\xfe", b"[" * 600, b'{"a":' * 600, b"-1", b"1e999", b'"', b"\\ud800", b"../" * 8, b"\x1b[2J")
STRANGE: tuple[Any, ...] = (None, True, -1, 2**31, 2**64, 1.5, "", "x", "\ud800", "a\0b", [], {}, [[]], "x" * 100_000)


def break_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return a file with one to five changes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 5)):
        _break_once(changed, chance)
    return bytes(changed)


def _break_once(data: bytearray, chance: random.Random) -> None:
    at = chance.randint(0, min(len(data), HEAD_BYTES) if chance.random() < 0.7 else len(data))
    if chance.random() < 0.2:
        at = max(0, len(data) - chance.randint(1, 400))
    match chance.randrange(8):
        case 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        case 1:
            size = chance.choice((1, 2, 4, 8))
            data[at : at + size] = struct.pack("<Q", chance.choice(NUMBERS))[:size]
        case 2:
            del data[at : at + chance.choice((1, 2, 8, 64, 1024))]
        case 3:
            data[at:at] = data[at : at + chance.choice((1, 8, 64, 512))]
        case 4:
            word = chance.choice(WORDS)
            data[at : at + (len(word) if chance.random() < 0.5 else 0)] = word
        case 5:
            del data[at:]
        case 6 if data:
            data[at : at + 1] = bytes([data[min(at, len(data) - 1)] ^ (1 << chance.randrange(8))])
        case _:
            other = chance.randint(0, len(data))
            size = chance.choice((4, 8, 32))
            data[at : at + size] = data[other : other + size]


def break_json(text: bytes, chance: random.Random) -> bytes:
    """Return a JSON file with one to three values that are others, or missing, or doubled."""
    tree = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        places = list(_list_places(tree))
        parent, key = chance.choice(places)
        match chance.randrange(4):
            case 0 if isinstance(parent, dict):
                del parent[key]
            case 1:
                parent[key] = copy.deepcopy(_get(*chance.choice(places)))
            case _:
                parent[key] = chance.choice(STRANGE)
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # a value that holds itself
        return text


def _list_places(tree: Any) -> Any:
    """Yield every place of a value; of a long list or mapping some alone."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    for key, value in items[:40]:
        yield tree, key
        yield from _list_places(value)


def _get(parent: Any, key: Any) -> Any:
    try:
        return parent[key]
    except (KeyError, IndexError):
        return None


# What the commands do with a file of each format; each gets the folder that it lies in.


def read_gguf(folder: Path) -> None:
    """As trace, verify and publish read it, then as chat, infer, serve and a judge, then as fetch and doctor."""
    from lathe.gguf.description import describe_gguf
    from lathe.gguf.llama_model import LlamaModel
    from lathe.gguf.tensor_list import list_tensors
    from lathe.sources import gguf_model

    file = folder / "model.gguf"
    _ask(lambda: describe_gguf(file))
    _ask(lambda: list_tensors(file))
    _ask(lambda: gguf_model.read_config(file))

    def load() -> None:
        with LlamaModel(file, vocab_only=True) as model:
            _ = (model.metadata, model.n_vocab, model.bos, model.eos, model.n_ctx_train)
            prompt = model.chat_template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
            for token in model.tokenize_prompt(prompt):
                model.get_token_bytes(token)

    _ask(load)
    _ask(lambda: LlamaModel(file).close())


def read_safetensors(folder: Path) -> None:
    """As merge and convert read a model."""
    from lathe.models import model_folder

    def read() -> None:
        weights = model_folder.open_model(folder)
        for name in list(weights.tensors)[:5]:
            weights.read(name)

    _ask(read)


def read_model(folder: Path) -> None:
    """As fetch and preprocess read a model's configuration and tokenizer."""
    from lathe.models.check_base import check_base
    from lathe.sources import model_files

    _ask(lambda: model_files.select_files([file.name for file in folder.iterdir()], folder.name))
    _ask(lambda: check_base(folder, "models/local/mine"))


def read_rows(folder: Path) -> None:
    """As `lathe data`, fetch and preprocess read a dataset."""
    from lathe.config.load import load
    from lathe.config.presets import LocalDataset
    from lathe.data.check_file import check_file

    [file] = folder.iterdir()
    preset = LocalDataset(source="local", path=f"data/local/{file.name}")
    _ask(lambda: check_file(file, preset, seed=1, settings=load().params.preprocess))


READERS: dict[str, Callable[[Path], None]] = {
    "gguf": read_gguf,
    "safetensors": read_safetensors,
    "tokenizer": read_model,
    "config": read_model,
    "parquet": read_rows,
    "arrow": read_rows,
    "jsonl": read_rows,
    "csv": read_rows,
}
# The file of the corpus's folder that is broken, where it is not the only one.
BROKEN = {"safetensors": "model.safetensors", "tokenizer": "tokenizer*.json", "config": "*config.json"}


def _ask(action: Callable[[], object]) -> None:
    """Run what may refuse in one line."""
    try:
        action()
    except InputError as refusal:
        if "\n" in str(refusal) and not all(line.strip() for line in str(refusal).split("\n")):
            raise AssertionError(f"a refusal with an empty line: {refusal!r}") from refusal


def try_seed(kind: str, corpus: Path, seed: int) -> str | None:
    """Break a file as the seed says and read it; return what went wrong."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        chosen = chance.choice(sorted(path for path in corpus.iterdir() if path.is_dir()))
        shutil.copytree(chosen, folder)
        file = chance.choice(sorted(folder.glob(BROKEN.get(kind, "*"))))
        data = file.read_bytes()
        by_value = file.suffix == ".json" and chance.random() < 0.7
        file.unlink()
        file.write_bytes(break_json(data, chance) if by_value else break_bytes(data, chance))
        began, before = time.perf_counter(), _get_peak_bytes()
        signal.alarm(2 * MOST_SECONDS)  # ends the process, whatever C code it is in
        try:
            READERS[kind](folder)
        except BaseException:
            return f"{file.name}: {traceback.format_exc().strip()}"
        finally:
            signal.alarm(0)
        if (seconds := time.perf_counter() - began) > MOST_SECONDS:
            return f"{file.name}: took {seconds:.0f} s"
        if (grown := _get_peak_bytes() - before) > MOST_BYTES:
            return f"{file.name}: took {grown:,} bytes"
    return None


def _get_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(kinds: str, corpus: str, first: str, seconds: str, log: str) -> None:
    """Try seeds of each format until its time is up."""
    for kind in kinds.split(","):
        files = Path(corpus) / kind
        with tempfile.TemporaryDirectory() as name:  # what is good; imports take time once
            for chosen in (path for path in files.iterdir() if path.is_dir()):
                good = Path(name) / chosen.name
                shutil.copytree(chosen, good)
                READERS[kind](good)
        end, seed = time.monotonic() + float(seconds), int(first)
        with open(log, "a", encoding="utf-8", buffering=1) as lines:
            while True:
                lines.write(json.dumps({"kind": kind, "seed": seed}) + "\n")
                if problem := try_seed(kind, files, seed):
                    lines.write(json.dumps({"kind": kind, "seed": seed, "problem": problem}) + "\n")
                seed += 1
                if time.monotonic() >= end:
                    lines.write(json.dumps({"kind": kind, "done": seed}) + "\n")
                    break


if __name__ == "__main__":
    main(*sys.argv[1:])
