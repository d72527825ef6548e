"""Facts about a dataset that decide values of a recipe: rows, lengths and the kind of answers, read as `lathe data`."""

import json
import re
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lathe.common.errors import InputError
from lathe.config.held_out_checks import PROSE_WORDS
from lathe.config.load import Config
from lathe.config.presets import MixtureDataset
from lathe.data.check_file import check_datasets
from lathe.data.read_examples import ExampleFiles, add_system_prompt
from lathe.data.read_files import Fault
from lathe.data.split_files import require_data_files
from lathe.inference.generation_sizes import HELD_OUT
from lathe.models.document import is_document
from lathe.present_datasets import find_dataset_files

AnswerKind = Literal["json", "short", "prose", "calls", "documents"]

WANTED_HELD_OUT_ROWS = 100
HELD_OUT_FRACTIONS = (0.02, 0.1)
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
    documents: int = 0  # rows that are raw texts
    mixed_rows: int | None = None  # in a mixture, usable rows of the datasets whose splits are taken from training rows

    @property
    def rows(self) -> int:
        """All usable rows."""
        return sum(self.splits.values())

    @property
    def source_rows(self) -> int:
        """Usable rows that the source has for training, those that other splits take from them included."""
        if self.mixed_rows is not None:
            return self.mixed_rows
        return self.splits.get("train", 0) + sum(self.splits.get(split, 0) for split in self.lacking)

    def describe_answers(self) -> str:
        """Return the kind of the answers in words."""
        if self.kind == "documents":
            return "documents, which have no answers"
        shown = {"json": "are JSON", "short": "are short", "prose": "are prose", "calls": "call tools"}
        return f"answers {shown[self.kind]}"


def measure_data(config: Config) -> DataFacts:
    """Read the selected dataset, or those of a mixture, if they are on this machine.

    Raises InputError where one cannot be read.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = find_dataset_files(config.params.dataset, config.dataset, folder, seed=config.params.seed)
        if sources is None:
            return DataFacts(known=False, kind="prose")
        rows = _Rows()
        for part, (source, preset) in sources.items():
            raw = folder / "raw" / part
            raw.mkdir(parents=True)
            for file_name, file in require_data_files(source, str(source)).items():
                (raw / file_name).symlink_to(file.resolve())
            rows.read(ExampleFiles(raw, preset, NO_CONTROL_TOKENS))
        if not rows.characters and not rows.documents:
            shown = getattr(config.dataset, "path", config.params.dataset)
            raise InputError(f"{shown}: holds no row that can be used; `lathe data` says why", code="no-usable-rows")
        # How many rows a mixture takes of each dataset depends on those that are held out.
        fraction = choose_held_out_fraction(rows.usable_of_lacking)
        fractions = {f"{split}_fraction": fraction for split in rows.lacking}
        settings = config.params.preprocess.model_copy(update=fractions)
        found = check_datasets(sources, seed=config.params.seed, settings=settings)
    return DataFacts(
        known=True,
        kind=rows.choose_kind(),
        splits=found["splits"],
        lacking=tuple(rows.lacking),
        row_characters=sorted(rows.characters or rows.documents),
        answer_characters=sorted(rows.answers or rows.documents),
        pairs=rows.pairs,
        sample=rows.sample,
        refusals=found["refusals"],
        documents=len(rows.documents),
        mixed_rows=rows.usable_of_lacking if isinstance(config.dataset, MixtureDataset) else None,
    )


def choose_held_out_fraction(rows: int) -> float:
    """Return the share of so many rows that is held out in a split, about WANTED_HELD_OUT_ROWS of them."""
    low, high = HELD_OUT_FRACTIONS
    return round(min(high, max(low, WANTED_HELD_OUT_ROWS / max(rows, 1))), 2)


class _Rows:
    """Rows of one dataset, or of several, as far as they decide values of a recipe.

    Documents are cut to any length: they count only where there are no other rows.
    """

    def __init__(self) -> None:
        self.characters: list[int] = []
        self.answers: list[int] = []
        self.documents: list[int] = []
        self.words: list[int] = []
        self.sample: list[list[dict[str, Any]]] = []
        self.json_answers = self.pairs = self.with_tools = 0
        self.lacking: dict[str, None] = {}  # splits that are taken from training rows
        self.usable_of_lacking = 0  # usable rows of the datasets that lack one

    def read(self, files: ExampleFiles) -> None:
        """Read the rows of a dataset."""
        usable = 0
        for example in files:
            if isinstance(example.value, Fault):
                continue
            usable += 1
            self._add(example.value, files.system_prompt)
        present = {facts["split"] for facts in files.files.values()}
        lacking = [split for split in HELD_OUT if split not in present and not getattr(files.preset, "split", None)]
        self.lacking |= dict.fromkeys(lacking)
        self.usable_of_lacking += usable * bool(lacking)

    def _add(self, example: dict[str, Any], system_prompt: str | None) -> None:
        messages = example["messages"]
        if is_document(messages):
            self.documents.append(len(messages[0]["content"]))
            return
        add_system_prompt(messages, system_prompt)
        texts = [str(message.get("content") or "") for message in messages]
        answer = texts[-1] + "".join(map(json.dumps, messages[-1].get("tool_calls", [])))
        tools = json.dumps(example["tools"]) if "tools" in example else ""
        self.with_tools += bool(tools)
        self.characters.append(sum(map(len, texts)) - len(texts[-1]) + len(answer) + len(tools))
        self.answers.append(len(answer))
        self.words.append(len(answer.split()))
        self.json_answers += _is_json(answer)
        self.pairs += "rejected" in example
        if len(self.sample) < SAMPLE_ROWS:
            self.sample.append(messages)

    def choose_kind(self) -> AnswerKind:
        """Return the kind of most answers."""
        if not self.characters:
            return "documents"
        if 2 * self.with_tools > len(self.characters):
            return "calls"
        if 2 * self.json_answers > len(self.characters):
            return "json"
        return "prose" if statistics.median(self.words) > PROSE_WORDS else "short"


def _is_json(text: str) -> bool:
    """Tell whether an answer is an object or a list: a number alone is a label."""
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
