"""From raw files to validated splits of chat messages, with an account of every row."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.data.formats import Columns
from lathe.data.messages import RowFault
from lathe.data.read_files import Fault, read_rows
from lathe.data.split_files import SPLITS, split_files, suffix_of

if TYPE_CHECKING:
    from lathe.config.params import Preprocess
    from lathe.config.presets import DatasetPreset
    from lathe.data.report import Account
    from lathe.data.row_store import Rows
    from lathe.data.tokenization import Rules

ROWS_PER_UPDATE = 1000


@dataclass(frozen=True)
class Prepared:
    """The report on all rows that were read, and the tables of its plots by name."""

    report: dict[str, Any]
    tables: dict[str, list[dict[str, Any]]]


def prepare(
    raw: Path,
    preset: "DatasetPreset",
    out: Path,
    *,
    tokenizer: Any,
    seed: int,
    max_length: int,
    settings: "Preprocess",
    processes: int | None = None,
) -> Prepared:
    """Read the files of the folder `raw`; write `train.jsonl`, `validation.jsonl` and `test.jsonl` into `out`.

    Their rows are `{"messages": [{"role", "content"}, ...]}`, with `rejected` beside it where they come from preference
    pairs, and `tokenizer` reads each, with either answer, in at most `max_length` tokens.
    An unusable row is dropped and counted. Duplicates, prompts found in another split and rows over a limit of the
    preset are removed and counted, and are no fault. A row that is too long is dropped, or made shorter where
    `settings.too_long` says so: unasked, no answer is ever cut, because its end teaches the model to stop.

    Rows are in the order of their content's seeded digest: reordering the input, cutting it into shards or the number
    of `processes` (None: one per core) changes no byte of the output. Until then they lie in a scratch folder in `out`;
    memory holds some hundred bytes of each.

    Raises InputError for a file that cannot be read, missing columns, an empty split, and a share above its limit.
    """
    from lathe.data.report import Account
    from lathe.data.splits import divide
    from lathe.data.tokenization import Rules
    from lathe.models.special_tokens import compile_control_tokens

    scratch = out / ".scratch"
    scratch.mkdir()
    account = Account(settings)
    rows = _read(raw, preset, compile_control_tokens(tokenizer), seed, scratch / "rows", account)
    account.check_read()
    account.splits = divide(
        rows,
        given=account.given(),
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        limits={str(name): limit for name, limit in (preset.limits or {}).items()},
    )
    _measure(rows, Rules(tokenizer, max_length, settings.supervise, settings.too_long), out, account, processes)
    with rows.reader() as reader:
        account.check_measured(reader)
        report = account.report(reader)
    shutil.rmtree(scratch)
    return Prepared(report, account.tables())


def _read(
    raw: Path,
    preset: "DatasetPreset",
    control_tokens: re.Pattern[str],
    seed: int,
    spool_file: Path,
    account: "Account",
) -> "Rows":
    from lathe.common.progress import Progress
    from lathe.data.duplicates import digests
    from lathe.data.row_store import Spool

    files = split_files(raw)
    if "train" not in files:
        raise InputError(
            f"{next(iter(files.values()))[0].name}: there is no train split beside it; name the training file train.*"
        )
    columns: Columns | None = None
    with Spool(spool_file) as spool, Progress("reading") as progress:
        for split, shards in files.items():
            for file in shards:
                names: dict[str, None] = {}
                count = 0
                for raw_row in read_rows(file):
                    count += 1
                    if count % ROWS_PER_UPDATE == 0:
                        progress.add(ROWS_PER_UPDATE)
                    if isinstance(raw_row.value, Fault):
                        account.unusable(split, raw_row.at, raw_row.value)
                        continue
                    names.update(dict.fromkeys(raw_row.value))
                    columns = columns or Columns(preset, names, file.name, control_tokens)
                    try:
                        row = {"messages": columns.conversation(raw_row.value), **columns.extras(raw_row.value)}
                    except RowFault as error:
                        account.unusable(split, raw_row.at, error.fault)
                        continue
                    # The digests are those of the row as it was given: the system prompt moves none between splits.
                    found = digests(row, seed)
                    _add_system_prompt(row["messages"], preset.system_prompt)
                    spool.add(raw_row.at, row, found, SPLITS.index(split))
                if columns and names:
                    columns.require(names, file.name)
                account.files[file.name] = {"split": split, "format": (suffix_of(file) or "")[1:], "rows": count}
    if columns:
        account.columns = {**columns.description, "detected": columns.detected}
    return spool.rows()


def _add_system_prompt(messages: list[dict[str, str]], system_prompt: str | None) -> None:
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})


def _measure(rows: "Rows", rules: "Rules", out: Path, account: "Account", processes: int | None) -> None:
    """Write the splits, those first whose word sequences are sought in the next ones."""
    from lathe.common.progress import Progress
    from lathe.data.near_duplicates import Index
    from lathe.data.tokenization import measure

    indexes: dict[str, Index] = {}
    with Progress("preparing", sum(map(len, account.splits.rows.values()))) as progress:
        for name in ("test", "validation", "train"):
            account.measured[name] = measure(
                rows,
                account.splits.rows[name],
                rules,
                out / f"{name}.jsonl",
                held_out=list(indexes.values()),
                keep_sequences=name != "train",
                processes=processes,
                done=progress.add,
            )
            for other, index in indexes.items():
                account.compare(other, name, index)
            if name != "train":
                indexes[name] = Index.of(account.measured[name].sequences)
