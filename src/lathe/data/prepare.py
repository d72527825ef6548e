"""Preparation: raw files become validated splits of chat messages, and every row is accounted for."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config.presets import list_datasets
from lathe.data.read_examples import ExampleFiles, add_system_prompt
from lathe.data.read_files import Fault
from lathe.data.split_files import SPLITS

if TYPE_CHECKING:
    from lathe.config.params import Preprocess
    from lathe.config.presets import DatasetPreset, SingleDataset
    from lathe.data.example_store import StoredExamples
    from lathe.data.report import Account
    from lathe.data.splits import Splits
    from lathe.data.tokenization import TokenizationRules
    from lathe.models.chat_template import ChatTemplate

ROWS_PER_UPDATE = 1000  # of the progress bar


class UnusableRowsError(InputError):
    """The rows that were read cannot be used; `report` is what is known of each of them."""

    def __init__(self, message: str, *, code: str, report: dict[str, Any]) -> None:
        super().__init__(message, code=code)
        self.report = report


@dataclass(frozen=True)
class PreparedDataset:
    """The report on all rows that were read, and the tables for its plots by name."""

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
    cluster_by: str | None = None,
    processes: int | None = None,
) -> PreparedDataset:
    """Read the files of the folder `raw`, and write `train.jsonl`, `validation.jsonl` and `test.jsonl` into `out`.

    Examples are `{"messages": [{"role", "content"}, ...]}`, with `rejected` beside them if they come from preference
    pairs, and `tools` if the row has definitions of functions. Each of them, with either answer, has at most
    `max_length` tokens; a document is kept whole. The datasets of a mixture are in folders of their names, and their
    examples have the name as `dataset`. With `cluster_by`, a column of the files, its value is the `cluster` of an
    example.

    - An unusable row is dropped and counted as a fault.
    - Duplicates, prompts of another split and rows over a limit of the preset are removed and counted; they are no
      fault.
    - A row that is too long is dropped, or truncated if `settings.too_long` says so. By default no answer is
      truncated, because its end teaches the model to stop.

    Examples are ordered by the seeded digest of their content, so that the output does not depend on the order of the
    input, on how it is divided into shards, or on the number of `processes` (None: one per core). Until the end they
    are in a scratch folder in `out`; memory holds a few hundred bytes of each.

    Raises InputError for a file that cannot be read, missing columns (that of `cluster_by` too, where no file has
    it), and tools that the template ignores, and
    UnusableRowsError for an empty split and a share above its limit.
    """
    from lathe.data.report import Account
    from lathe.data.tokenization import TokenizationRules
    from lathe.models.answer_syntax import find_call_syntax
    from lathe.models.special_tokens import compile_control_tokens
    from lathe.models.tokenizer_template import read_chat_template
    from lathe.models.unicode_form import UnicodeRule, find_unicode_form

    scratch = out / ".scratch"
    scratch.mkdir()
    account = Account(settings)
    form = find_unicode_form(tokenizer)
    datasets = list_datasets(preset)
    sources = [
        ExampleFiles(
            raw / name,
            dataset,
            compile_control_tokens(tokenizer),
            UnicodeRule(form, settings.normalize_unicode) if form else None,
            name,
            cluster_by=cluster_by,
        )
        for name, dataset in datasets.items()
    ]
    template = read_chat_template(tokenizer)
    stored = _read_examples(sources, seed, scratch / "examples", account, template)
    if cluster_by:
        _require_column(sources, cluster_by)
    try:
        account.check_records()
        account.splits = _assign_splits(stored, datasets, account)
        rules = TokenizationRules(tokenizer, max_length, settings.supervise, settings.too_long)
        _write_splits(stored, rules, out, account, processes)
        with stored.open_reader() as reader:
            account.check_splits(reader)
            report = account.make_report(reader)
        if any(split.get("references", {}).get("tool_rows") for split in report["splits"]):
            report |= {} if find_call_syntax(template) else {"unread_calls": True}
    except InputError as error:
        with stored.open_reader() as reader:
            known = account.make_partial_report(reader)
        raise UnusableRowsError(str(error), code=error.code, report=known) from error
    shutil.rmtree(scratch)
    return PreparedDataset(report, account.make_tables())


def _require_column(sources: list[ExampleFiles], cluster_by: str) -> None:
    names = list(dict.fromkeys(name for examples in sources for name in examples.names))
    if cluster_by not in names:
        raise InputError(
            f"evaluate.cluster_by is {cluster_by!r}: the dataset has no such column; {did_you_mean(cluster_by, names)}",
            code="no-such-column",
        )


def _assign_splits(stored: "StoredExamples", datasets: "dict[str, SingleDataset]", account: "Account") -> "Splits":
    from lathe.data.mixture import assign_all_splits

    return assign_all_splits(
        stored,
        datasets,
        source_splits={name: account.get_source_splits(name) for name in datasets},
        validation_fraction=account.settings.validation_fraction,
        test_fraction=account.settings.test_fraction,
    )


def _read_examples(
    sources: list[ExampleFiles],
    seed: int,
    store_file: Path,
    account: "Account",
    template: "ChatTemplate",
) -> "StoredExamples":
    from lathe.common.progress import Progress
    from lathe.data.duplicates import compute_digests
    from lathe.data.example_store import ExampleWriter

    with ExampleWriter(store_file) as writer, Progress("reading") as progress:
        count = 0
        for number, examples in enumerate(sources):
            for example in examples:
                count += 1
                if count % ROWS_PER_UPDATE == 0:
                    progress.add(ROWS_PER_UPDATE)
                if isinstance(example.value, Fault):
                    account.add_fault(example.split, example.place, example.value)
                    continue
                if "tools" in example.value and not template.writes_tools:
                    raise InputError(
                        f"{example.place}: the row has tools, and the model's chat template writes none; choose a "
                        "model or a template that does (template: chatml-tools in the model's preset), or take the "
                        "column out",
                        code="template-ignores-tools",
                    )
                # Digests come before the system prompt is added, so that it moves no example to another split; nor does
                # the name of its dataset.
                digests = compute_digests(example.value, seed)
                add_system_prompt(example.value["messages"], examples.system_prompt)
                if examples.name:
                    example.value["dataset"] = examples.name
                if example.cluster is not None:
                    example.value["cluster"] = example.cluster
                writer.add(example.place, example.value, digests, SPLITS.index(example.split), number)
            account.add_dataset(examples)
    return writer.get_stored()


def _write_splits(
    stored: "StoredExamples", rules: "TokenizationRules", out: Path, account: "Account", processes: int | None
) -> None:
    """Tokenise and write the splits."""
    from lathe.common.progress import Progress
    from lathe.data.near_duplicates import NGramIndex
    from lathe.data.split_overlap import ORDER
    from lathe.data.tokenization import tokenize_split

    indexes: dict[str, NGramIndex] = {}
    with Progress("preparing", sum(map(len, account.splits.rows.values()))) as progress:
        for name in ORDER:
            account.tokenized[name] = tokenize_split(
                stored,
                account.splits.rows[name],
                rules,
                out / f"{name}.jsonl",
                held_out=list(indexes.values()),
                keep_ngrams=name != "train",
                processes=processes,
                report_rows=progress.add,
            )
            for held_out, index in indexes.items():
                account.add_near_duplicates(held_out, name, index)
            if name != "train":
                indexes[name] = NGramIndex.build(account.tokenized[name].ngrams)
