"""Export: backbone, head and temperature as one ONNX file, checked with ONNX Runtime on every row of test."""

import contextlib
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lathe.classify.backbone import TokenizedTexts, batch_by_length, load_tokenizer, make_batch, tokenize
from lathe.classify.calibration import Array
from lathe.classify.labels import Labels
from lathe.classify.model import SETTINGS, Classifier, load_classifier_model
from lathe.common import json_files
from lathe.common.errors import InputError

if TYPE_CHECKING:
    from lathe.config.classifier_params import ClassifierParams

MODEL, CALIBRATION = "model.onnx", "calibration.json"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "probabilities"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")


class WithProbabilities(torch.nn.Module):
    """Token ids to probabilities, by the temperature that was chosen on validation."""

    def __init__(self, classifier: Classifier, temperature: float, *, multi_label: bool) -> None:
        super().__init__()
        self.classifier, self.temperature, self.multi_label = classifier, temperature, multi_label

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of each text's classes."""
        scaled = self.classifier(input_ids, attention_mask) / self.temperature
        return torch.sigmoid(scaled) if self.multi_label else torch.softmax(scaled, dim=-1)


def export(
    model: Path, backbone: Path, calibration: Path, texts: Sequence[str], out: Path, params: "ClassifierParams"
) -> tuple[dict[str, Any], dict[str, float]]:
    """Write the ONNX file, and what is needed to answer texts with it, into the folder `out`.

    Returns what the check found, and the seconds of both for 1,000 texts. Raises InputError if ONNX Runtime gives
    another label for any of the texts, or another probability by more than export.max_difference.
    """
    classifier, labels = load_classifier_model(model, backbone)
    chosen = json_files.read_json_object(calibration)
    whole = WithProbabilities(classifier, chosen["temperature"], multi_label=labels.multi_label).eval()
    tokenizer = load_tokenizer(backbone)
    tokens = tokenize(tokenizer, texts, classifier.architecture.max_length)
    write_onnx(whole, out / MODEL, params.export.opset)
    for pattern in TOKENIZER_FILES:
        for file in sorted(backbone.glob(pattern)):
            shutil.copyfile(file, out / file.name)
    shutil.copyfile(model / SETTINGS, out / SETTINGS)
    shutil.copyfile(backbone / "config.json", out / "config.json")  # by which transformers finds the tokenizer's class
    shutil.copyfile(calibration, out / CALIBRATION)
    labels.write(out)
    return check(whole, open_session(out / MODEL), tokens, tokenizer.pad_token_id, labels, params)


def write_onnx(model: torch.nn.Module, file: Path, opset: int) -> None:
    """Write a module of token ids as one ONNX file, for any number of texts of any length.

    Equal weights make equal bytes.
    """
    import onnx

    example = make_batch([[5, 6, 7, 8, 9], [5, 6, 7]], 0)
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in INPUTS}
    with _quiet():
        program = torch.onnx.export(
            model,
            tuple(example[name] for name in INPUTS),
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
            opset_version=opset,
            verbose=False,
        )
        assert program is not None
        made = program.model_proto
    for graph in (made.graph, *made.functions):
        for node in graph.node:  # traces with the paths of this machine
            del node.metadata_props[:]
            node.ClearField("doc_string")
    del made.metadata_props[:]
    del made.graph.metadata_props[:]
    for value in (*made.graph.value_info, *made.graph.input, *made.graph.output):
        del value.metadata_props[:]
    onnx.save_model(made, str(file))


def open_session(file: Path) -> Any:
    """Open an ONNX file for the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run_session(session: Any, tokens: TokenizedTexts, padding: int, batch_size: int) -> Array:
    """Return the probabilities of every text by ONNX Runtime, in their order."""
    results: list[Array] = [np.empty(0)] * len(tokens.ids)
    for numbers in batch_by_length(tokens.ids, batch_size):
        batch = make_batch([tokens.ids[number] for number in numbers], padding)
        [made] = session.run([OUTPUT], {name: batch[name].numpy() for name in INPUTS})
        for number, row in zip(numbers, made, strict=True):
            results[number] = row
    return np.stack(results)


def check(
    whole: WithProbabilities,
    session: Any,
    tokens: TokenizedTexts,
    padding: int,
    labels: Labels,
    params: "ClassifierParams",
) -> tuple[dict[str, Any], dict[str, float]]:
    """Compare ONNX Runtime with torch on the same texts; see `export`."""
    from lathe.classify.features import run_batches

    size = params.features.batch_size
    started = time.perf_counter()
    expected = run_batches(lambda b: whole(**b), tokens, padding=padding, batch_size=size, task="checking").numpy()
    between = time.perf_counter()
    found = run_session(session, tokens, padding, size)
    ended = time.perf_counter()
    difference = float(np.abs(expected - found).max())
    if labels.multi_label:
        same = ((expected >= 0.5) == (found >= 0.5)).all(axis=1)
    else:
        same = expected.argmax(axis=1) == found.argmax(axis=1)
    if not same.all() or difference > params.export.max_difference:
        raise InputError(
            f"ONNX Runtime gives {int((~same).sum())} of {len(same)} texts of test another label than torch, and "
            f"probabilities that differ by up to {difference:.2g}; export.max_difference allows "
            f"{params.export.max_difference:g}; raise that, or try another export.opset",
            code="onnx-differs",
        )
    report = {"rows": len(same), "same_labels": int(same.sum()), "within": params.export.max_difference}
    per_1000 = 1000 / len(same)
    seconds = {
        "torch_seconds_per_1000": round((between - started) * per_1000, 4),
        "onnx_seconds_per_1000": round((ended - between) * per_1000, 4),
        "largest_difference": difference,
    }
    return report, seconds


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's notes to its developers off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
