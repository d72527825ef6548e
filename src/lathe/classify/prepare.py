"""Preparation: raw files become texts with labels in three splits, and every row is accounted for."""

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.classify.label_columns import parse_labels
from lathe.classify.label_faults import LabelledText, describe_labels, find_contradictions
from lathe.classify.labels import Labels, collect_labels
from lathe.common.errors import InputError
from lathe.common.jsonl import write_jsonl
from lathe.data.duplicates import compute_digests
from lathe.data.example_store import ExampleReader, ExampleWriter
from lathe.data.occurrences import MAX_SHOWN
from lathe.data.read_examples import ExampleFiles, ReadExample
from lathe.data.read_files import Fault
from lathe.data.row_checks import RowFault
from lathe.data.split_files import SPLITS, find_split_files
from lathe.data.splits import Splits, assign_splits

if TYPE_CHECKING:
    from lathe.config.classifier_params import ClassifierParams, Data
    from lathe.config.presets import SingleDataset

NO_CONTROL_TOKEN = re.compile(r"(?!)")  # a classifier has no turns that a text could end


class DroppedRows:
    """Rows that cannot be used: how many by split and reason, and the first of each."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.first: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)

    def add(self, split: str, place: str, fault: Fault) -> None:
        """Count a row."""
        self.counts[split][fault.reason] += 1
        if len(self.first[fault.reason]) < MAX_SHOWN:
            self.first[fault.reason].append({"at": place, "field": fault.field, "problem": fault.problem})

    @property
    def total(self) -> int:
        """The number of rows."""
        return sum(sum(counts.values()) for counts in self.counts.values())


def prepare(raw: Path, preset: "SingleDataset", out: Path, params: "ClassifierParams") -> dict[str, Any]:
    """Read the files of `raw`, write `train.jsonl`, `validation.jsonl`, `test.jsonl` and `labels.json` into `out`.

    A row is `{"text", "labels"}`; a text of none of the classes has no label. Returns the report. The splits are as
    the stage `preprocess` makes them: by content, without duplicates, and no text in two of them.

    Raises InputError for a file that cannot be read, missing columns, too many unusable rows, too few classes.
    """
    scratch = out / ".scratch"
    scratch.mkdir()
    dropped, read = DroppedRows(), 0
    files = ExampleFiles(raw, preset, NO_CONTROL_TOKEN, change=_encode_lists if params.data.multi_label else None)
    with ExampleWriter(scratch / "examples") as writer:
        for example in _read_examples(files, params.data):
            read += 1
            if isinstance(example.value, Fault):
                dropped.add(example.split, example.place, example.value)
                continue
            digests = compute_digests(example.value, params.seed)
            writer.add(example.place, example.value, digests, SPLITS.index(example.split))
    stored = writer.get_stored()
    _check_dropped(dropped, read, params.data.max_dropped_fraction)
    splits = assign_splits(
        stored,
        source_splits=set(find_split_files(raw)),
        validation_fraction=params.data.validation_fraction,
        test_fraction=params.data.test_fraction,
        limits={str(name): limit for name, limit in (preset.limits or {}).items()},
    )
    with stored.open_reader() as reader:
        rows = {split: _read_rows(splits, split, reader) for split in SPLITS}
    shutil.rmtree(scratch)
    for split, of_split in rows.items():
        if not of_split:
            raise InputError(f"the split {split} has no row that can be used; add some, or a file", code="empty-split")
        write_jsonl(({"text": row.text, "labels": list(row.labels)} for row in of_split), out / f"{split}.jsonl")
    classes = collect_labels((row.labels for row in rows["train"]), multi_label=params.data.multi_label)
    _check_none_label(rows, params.data)
    classes.write(out)
    return _make_report(rows, classes, splits, dropped, files.files, read)


def _read_examples(files: ExampleFiles, settings: "Data") -> Iterator[ReadExample]:
    """Yield each row as a text and its labels, or its fault.

    What a text is and what a label, the preset says as for the main pipeline: prompt and answer.
    """
    for example in files:
        if isinstance(example.value, Fault):
            yield example
            continue
        *texts, answer = example.value["messages"]
        try:
            if not texts or not isinstance(answer["content"], str):
                raise RowFault("no_label", None, "has no text with a label; name both columns in the dataset's preset")
            found = parse_labels(answer["content"], settings, "label")
        except RowFault as error:
            yield replace(example, value=error.fault)
            continue
        text = "\n".join(str(message["content"]) for message in texts if message["role"] != "system")
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": json.dumps(found)}]
        yield replace(example, value={"messages": messages})


def _encode_lists(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with lists of texts as JSON, as a column of text would hold them."""
    return {
        name: json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and all(isinstance(item, str) for item in value)
        else value
        for name, value in record.items()
    }


def _read_rows(splits: Splits, split: str, reader: ExampleReader) -> list[LabelledText]:
    rows = []
    for number in splits.rows[split]:
        text, answer = (message["content"] for message in reader.read(number)["messages"])
        rows.append(LabelledText(reader.read_place(number), text, tuple(json.loads(answer))))
    return rows


def _check_dropped(dropped: DroppedRows, read: int, allowed: float) -> None:
    if dropped.total <= allowed * read:
        return
    reason, cases = max(dropped.first.items(), key=lambda item: sum(c[item[0]] for c in dropped.counts.values()))
    case = cases[0]
    raise InputError(
        f"{dropped.total} of {read} rows are unusable, more than data.max_dropped_fraction {allowed} allows; the first "
        f"for {reason.replace('_', ' ')}: {case['at']}: {case['field'] or 'row'} {case['problem']}; correct them "
        "or raise it",
        code="too-many-dropped",
    )


def _check_none_label(rows: dict[str, list[LabelledText]], settings: "Data") -> None:
    if settings.none_label and not any(not row.labels for row in rows["validation"]):
        raise InputError(
            f"data.none_label is {settings.none_label!r}; no row of the split validation has this label, from which "
            "the threshold is chosen; name the label as the data has it, or set it to null",
            code="none-label-unused",
        )


def _make_report(
    rows: dict[str, list[LabelledText]],
    classes: Labels,
    splits: Splits,
    dropped: DroppedRows,
    files: dict[str, Any],
    read: int,
) -> dict[str, Any]:
    removed = {
        split: {reason: removed.count for reason, removed in reasons.items()}
        for split, reasons in splits.removed.items()
    }
    unknown = {
        split: sorted({label for row in rows[split] for label in row.labels if classes.number(label) is None})
        for split in ("validation", "test")
    }
    everything = [row for split in SPLITS for row in rows[split]]
    return {
        "rows": {"read": read, "kept": len(everything), "unusable": dropped.total},
        "files": [{"file": name, **about} for name, about in files.items()],
        "splits": [{"split": split, **describe_labels(rows[split])} for split in SPLITS],
        "unusable": [
            {"split": split, "reason": reason, "rows": count}
            for split, counts in dropped.counts.items()
            for reason, count in counts.items()
        ],
        "unusable_examples": dict(dropped.first),
        "removed": removed,
        "taken_from_train": splits.taken_from_train,
        "labels_without_training_rows": unknown,
        "contradictions": find_contradictions(everything),
    }


def list_warnings(report: dict[str, Any]) -> list[str]:
    """Return a line for everything in a report that the user should look at."""
    lines = []
    train = report["splits"][0]
    if train["imbalance"] and train["imbalance"] >= 10:
        smallest = train["counts"][-1]
        lines.append(
            f"labels are unequal: {train['counts'][0]['label']!r} has {train['largest']} training rows, "
            f"{smallest['label']!r} {smallest['rows']}, {train['imbalance']:g} times fewer; look at macro_f1, and try "
            "training.class_weights: balanced"
        )
    if train["few"]:
        lines.append(
            f"{len(train['few'])} labels have fewer than 8 training rows ({', '.join(train['few'][:5])}); add rows, or "
            "join them with others"
        )
    for split, names in report["labels_without_training_rows"].items():
        if names:
            lines.append(
                f"{split}: {len(names)} labels have no training row ({', '.join(names[:5])}), so that their rows count "
                "as wrong; add rows"
            )
    found = report["contradictions"]
    for kind, title in (("equal", "equal_texts"), ("near", "near_duplicates")):
        if found[title]:
            example = found[f"{kind}_examples"][0]
            names = " and ".join(", ".join(labels) or "none" for labels in example["labels"])
            lines.append(
                f"{found[title]} {title.replace('_', ' ')} have different labels, such as "
                f"{' and '.join(example['at'])} ({names}); look at them in metrics/prepare/report.json"
            )
    return lines
