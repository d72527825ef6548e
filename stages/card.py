"""Write the model card and Ollama's Modelfile from what the other stages measured.

reads   metrics/fetch/, metrics/preprocess/report.json, metrics/evaluate/{validation,test}.json, metrics/quantize/,
        models/base/ (its licence), models/gguf/merged-f16.gguf (its metadata), params.yaml
writes  models/gguf/README.md, models/gguf/Modelfile
"""

import json
from pathlib import Path
from typing import Any

import _path  # noqa: F401

from lathe import stage
from lathe.common import paths
from lathe.config.load import Config


def main(config: Config) -> None:
    from lathe.evaluation.best_artifact import choose_best_artifact
    from lathe.gguf.llama_model import Model
    from lathe.reports.model_card import Facts, license_of, model_card
    from lathe.reports.modelfile import Vocabulary, modelfile

    types = config.params.quantize.types
    with Model(paths.GGUF / "merged-f16.gguf", vocab_only=True) as merged:
        metadata, template = merged.metadata, merged.template
        vocabulary = Vocabulary(merged.text_of(merged.bos), merged.text_of(merged.eos), merged.adds_bos)
    facts = Facts(
        model=_read(paths.METRICS / "fetch/model.json")["origin"][0],
        dataset=_read(paths.METRICS / "fetch/dataset.json")["origin"][0],
        rows=_read(paths.METRICS / "preprocess/report.json"),
        validation=_read(paths.METRICS / "evaluate/validation.json"),
        test=_read(paths.METRICS / "evaluate/test.json"),
        quantized={name: _read(paths.METRICS / f"quantize/{name}.json") for name in types},
        lineage={key.removeprefix("lathe."): text for key, text in metadata.items() if key.startswith("lathe.")},
        license=license_of(paths.MODEL_BASE),
    )
    chosen = choose_best_artifact(facts.validation, types, config.params.evaluate.primary_metric)
    card = model_card(facts, config.params, chosen)
    with paths.whole_file(paths.GGUF / "README.md") as partial:
        partial.write_text(card, encoding="utf-8")
    with paths.whole_file(paths.GGUF / "Modelfile") as partial:
        text = modelfile(f"{chosen}.gguf", template, vocabulary, n_ctx=config.params.generate.n_ctx)
        partial.write_text(text, encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    stage.run(main)
