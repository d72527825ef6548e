"""Facts about a dataset that decide values of a recipe: rows, lengths and the kind of answers, read as `lathe data`."""

import json
import re
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.jsonl import write_jsonl
from lathe.config.held_out_checks import PROSE_WORDS
from lathe.config.load import Config
from lathe.config.presets import BuiltinDataset, HubDataset, MixtureDataset, SingleDataset
from lathe.data.check_file import check_file
from lathe.data.read_examples import ExampleFiles, add_system_prompt
from lathe.data.read_files import Fault
from lathe.data.split_files import require_data_files
from lathe.inference.generation_sizes import HELD_OUT

AnswerKind = Literal["json", "short", "prose", "calls"]

SAMPLE_ROWS = 200  # whose texts a tokenizer counts
NO_CONTROL_TOKENS = re.compile("(?!)")  # those of the model make no difference to lengths


@dataclass(frozen=True)
class DataFacts:
    """What is known of a dataset; where it has not been fetched, what is assumed. Lengths are in characters, sorted."""

    known: bool
    kind: AnswerKind
    splits: dict[str, int] = field(default_factory=dict)  # usable rows
    lacking: tuple[str, ...] = HELD_OUT  # splits that the source lacks: they are taken from its training rows
    row_characters: list[int] = field(default_factory=list)
    answer_characters: list[int] = field(default_factory=list)
    pairs: int = 0  # rows with a worse answer
    sample: list[list[dict[str, Any]]] = field(default_factory=list)  # messages of some rows
    refusals: list[str] = field(default_factory=list)  # why preprocess would stop

    @property
    def rows(self) -> int:
        """All usable rows."""
        return sum(self.splits.values())

    @property
    def source_rows(self) -> int:
        """Usable rows that the source has for training, those that other splits take from them included."""
        return self.splits.get("train", 0) + sum(self.splits.get(split, 0) for split in self.lacking)

    def describe_answers(self) -> str:
        """Return the kind of the answers in words."""
        shown = {"json": "are JSON", "short": "are short", "prose": "are prose", "calls": "call tools"}
        return f"answers {shown[self.kind]}"


def measure_data(config: Config) -> DataFacts:
    """Read the selected dataset, if it is on this machine. Raises InputError where it cannot be read."""
    preset = config.dataset
    if isinstance(preset, MixtureDataset):
        raise InputError(
            f"{config.params.dataset}: is a mixture, for which no values are chosen; make the recipe for one of its "
            "datasets, and set `dataset` in it afterwards",
            code="mixture",
        )
    with tempfile.TemporaryDirectory() as folder:
        source = _find_source(config, Path(folder))
        if source is None:
            return DataFacts(known=False, kind="prose")
        found = check_file(source, preset, seed=config.params.seed, settings=config.params.preprocess)
        raw = Path(folder) / "raw"
        raw.mkdir()
        for name, file in require_data_files(source, str(source)).items():
            (raw / name).symlink_to(file.resolve())
        if not found["rows"]["usable"]:
            shown = getattr(preset, "path", config.params.dataset)
            raise InputError(f"{shown}: holds no row that can be used; `lathe data` says why", code="no-usable-rows")
        return _read_rows(raw, preset, found)


def _find_source(config: Config, folder: Path) -> Path | None:
    """Return the file or folder with the dataset's files; None for one of the Hub that `fetch` has not brought."""
    preset = config.dataset
    assert not isinstance(preset, MixtureDataset)
    if isinstance(preset, BuiltinDataset):
        from lathe.sources.builtin import household_commands

        made = folder / "made"
        made.mkdir()
        for split, rows in household_commands.make_rows(config.params.seed, errors=preset.errors).items():
            write_jsonl(rows, made / f"{split}.jsonl")
        return made
    if isinstance(preset, HubDataset):
        return paths.DATA_RAW if is_fetched("dataset", config.params.dataset, paths.DATA_RAW) else None
    if not (source := paths.ROOT / preset.path).exists():
        raise InputError(
            f"{preset.path}: no such file or folder, which presets.yaml names as {config.params.dataset}; put it there",
            code="no-such-file",
        )
    return source


def is_fetched(kind: str, name: str, folder: Path) -> bool:
    """Tell whether the folder holds what the preset of that name names."""
    file = paths.METRICS / f"fetch/{kind}.json"
    if not folder.is_dir() or not file.is_file():
        return False
    origin = read_json_object(file).get("origin")
    return bool(origin) and bool(origin[0].get("name") == name)


def _read_rows(raw: Path, preset: SingleDataset, found: dict[str, Any]) -> DataFacts:
    rows: list[int] = []
    answers: list[int] = []
    words: list[int] = []
    sample: list[list[dict[str, Any]]] = []
    json_answers = pairs = with_tools = 0
    files = ExampleFiles(raw, preset, NO_CONTROL_TOKENS)
    for example in files:
        if isinstance(example.value, Fault):
            continue
        messages = example.value["messages"]
        add_system_prompt(messages, files.system_prompt)
        texts = [str(message.get("content") or "") for message in messages]
        answer = texts[-1] + "".join(map(json.dumps, messages[-1].get("tool_calls", [])))
        tools = json.dumps(example.value["tools"]) if "tools" in example.value else ""
        with_tools += bool(tools)
        rows.append(sum(map(len, texts)) - len(texts[-1]) + len(answer) + len(tools))
        answers.append(len(answer))
        words.append(len(answer.split()))
        json_answers += _is_json(answer)
        pairs += "rejected" in example.value
        if len(sample) < SAMPLE_ROWS:
            sample.append(messages)
    kind: AnswerKind = "prose" if statistics.median(words or [0]) > PROSE_WORDS else "short"
    if 2 * json_answers > len(rows):
        kind = "json"
    if 2 * with_tools > len(rows):
        kind = "calls"
    return DataFacts(
        known=True,
        kind=kind,
        splits=found["splits"],
        lacking=tuple(split for split in HELD_OUT if split not in {facts["split"] for facts in files.files.values()}),
        row_characters=sorted(rows),
        answer_characters=sorted(answers),
        pairs=pairs,
        sample=sample,
        refusals=found["refusals"],
    )


def _is_json(text: str) -> bool:
    """Tell whether an answer is an object or a list: a number alone is a label."""
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
