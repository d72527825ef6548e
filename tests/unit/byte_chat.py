"""A chat tokenizer with one token per byte and per marker, and a way to prepare rows with it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common.jsonl import read_jsonl
from lathe.config.params import Preprocess
from lathe.config.presets import LocalDataset
from lathe.data.prepare import prepare

# <|im_start|> user \n . <|im_end|> \n <|im_start|> assistant \n . <|im_end|>
FRAME = 20

LENIENT = Preprocess(
    validation_fraction=0.1,
    test_fraction=0.1,
    max_dropped_fraction=1.0,
    normalize_unicode=False,
    too_long="drop",
    max_truncated_fraction=1.0,
    max_overlap_fraction=1.0,
    added_tokens=[],
    supervise="all",
    chat_template_kwargs={},
)


def byte_chat() -> Any:
    """Return the tokenizer: lengths can be counted by hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


@dataclass
class Outcome:
    """What the stage would leave: each split's rows and the bytes of its file, the report, the plots' tables."""

    splits: dict[str, list[dict[str, Any]]]
    files: dict[str, bytes]
    report: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]

    def of(self, split: str) -> dict[str, Any]:
        """What the report counts in a split."""
        return next(entry for entry in self.report["splits"] if entry["split"] == split)

    def examples(self, split: str) -> dict[str, Any]:
        """The rows of a split that the report names."""
        return next(entry for entry in self.report["examples"] if entry["split"] == split)

    def near(self, splits: str) -> dict[str, Any]:
        """What the report says of rows that are nearly in another split: `test_in_train`."""
        return next(entry for entry in self.report["near_overlap"] if entry["splits"] == splits)


class Bench:
    """A folder of raw files and what becomes of them."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer, self.runs = folder, tokenizer, 0
        self.raw = folder / "raw"
        self.raw.mkdir()

    def put(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write one JSONL file of raw rows."""
        (self.raw / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *, max_length: int = 1000, seed: int = 42, processes: int | None = None, **changes: Any) -> Outcome:
        """Prepare the folder with lenient settings; `changes` are made to them."""
        self.runs += 1
        out = self.folder / f"out{self.runs}"
        out.mkdir()
        prepared = prepare(
            self.raw,
            LocalDataset(source="local", path="raw"),
            out,
            tokenizer=self.tokenizer,
            seed=seed,
            max_length=max_length,
            settings=LENIENT.model_copy(update=changes),
            processes=processes,
        )
        files = {file.stem: file.read_bytes() for file in sorted(out.iterdir())}
        splits = {name: read_jsonl(out / f"{name}.jsonl") for name in files}
        return Outcome(splits, files, prepared.report, prepared.tables)


def chat(*texts: str, system: str | None = None) -> dict[str, Any]:
    """Return a row of messages that user and assistant say in turn."""
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}
