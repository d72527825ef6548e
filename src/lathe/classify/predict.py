"""Command `lathe classify`: the labels of texts, in batches, by the ONNX file that the pipeline made."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lathe.common import json_files, paths
from lathe.common.errors import InputError

FOLDER = paths.CLASSIFIER / "models/onnx"
BATCH = 64
TEXT_COLUMN = "text"


class TextClassifier:
    """The exported classifier: texts to labels with their probabilities."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """Open what the stage export wrote. Raises InputError if it has not been run."""
        if not (folder / "model.onnx").is_file():
            shown = folder.relative_to(paths.ROOT) if folder.is_relative_to(paths.ROOT) else folder
            raise InputError(f"{shown}: holds no model.onnx; run `make classify` first", code="missing-file")
        from lathe.classify.backbone import load_tokenizer
        from lathe.classify.export_onnx import CALIBRATION, MODEL, open_session
        from lathe.classify.labels import read_labels
        from lathe.classify.model import SETTINGS

        self.session, self.tokenizer = open_session(folder / MODEL), load_tokenizer(folder)
        self.labels = read_labels(folder)
        self.max_length = json_files.read_json_object(folder / SETTINGS)["max_length"]
        self.threshold = json_files.read_json_object(folder / CALIBRATION)["threshold"]

    def classify(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Return the answer to each text: its labels, and the probability of that."""
        from lathe.classify.answers import describe_probabilities
        from lathe.classify.backbone import tokenize
        from lathe.classify.export_onnx import run_session

        tokens = tokenize(self.tokenizer, texts, self.max_length)
        probabilities = run_session(self.session, tokens, self.tokenizer.pad_token_id, BATCH)
        return describe_probabilities(probabilities.astype("float64"), self.labels, self.threshold)


def classify_texts(texts: Sequence[str], file: Path | None, out: Path | None, folder: Path = FOLDER) -> None:
    """Print the labels of texts, or of those of a file, as JSON Lines, or write them to `out`.

    Raises InputError if there is no text, or a file that is none.
    """
    if file is not None and texts:
        raise InputError("--file and TEXT: take one of them", code="exclusive-options")
    if file is None and not texts:
        raise InputError('classify: no text; give "TEXT", or --file FILE with one text a line', code="missing-option")
    rows = list(_read_texts(file)) if file is not None else list(texts)
    classifier = TextClassifier(folder)
    answers = classifier.classify(rows)
    lines = [
        json.dumps({TEXT_COLUMN: text, **_shown(answer)}, ensure_ascii=False) + "\n"
        for text, answer in zip(rows, answers, strict=True)
    ]
    if out is None:
        sys.stdout.writelines(lines)
        return
    with paths.replace_file(out) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def _shown(answer: dict[str, Any]) -> dict[str, Any]:
    predicted = answer["predicted"]
    if "top" not in answer:
        return {"labels": predicted, "probability": answer["confidence"]}
    label = predicted[0] if predicted else None
    return {"label": label, "probability": answer["confidence"], **({} if label else {"nearest": answer["top"]})}


def _read_texts(file: Path) -> Iterator[str]:
    """Yield the texts of a data file with a column `text`, or the lines of any other file; `-` is standard input."""
    from lathe.data.read_files import Fault, read_records
    from lathe.data.split_files import get_suffix

    if str(file) == "-":
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    if not file.is_file():
        raise InputError(
            f"--file {file}: no such file; give one text a line, or JSONL, CSV or Parquet", code="missing-file"
        )
    if not get_suffix(file):
        with file.open(encoding="utf-8") as lines:
            yield from (line.rstrip("\n") for line in lines if line.strip())
        return
    for record in read_records(file):
        if isinstance(record.value, Fault):
            raise InputError(f"{record.place}: {record.value}; mend it", code="unusable-row")
        text = record.value.get(TEXT_COLUMN)
        if not isinstance(text, str):
            raise InputError(
                f"{record.place}: {TEXT_COLUMN} is {text!r}; must be a text; name the column {TEXT_COLUMN!r}",
                code="unusable-row",
            )
        yield text
