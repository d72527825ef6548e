"""Write the model card and Ollama's Modelfile from what the other stages measured.

reads   metrics/fetch/, metrics/preprocess/report.json, metrics/evaluate/{validation,test,benchmark}.json,
        metrics/generate/merged.json, metrics/quantize/, metrics/check_converted/merged.json (special tokens),
        models/base/ (its licence), models/gguf/merged-f16.gguf (its metadata), params.yaml
writes  models/gguf/README.md, models/gguf/Modelfile
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config


def main(config: Config) -> None:
    from lathe.evaluation.best_artifact import choose_best_artifact
    from lathe.gguf.header import read_metadata
    from lathe.models.chat_template import ChatTemplate
    from lathe.reports.model_card import read_card_facts, read_license, render_model_card
    from lathe.reports.modelfile import build_modelfile

    types = config.params.quantize.types
    metadata = read_metadata(paths.GGUF / "merged-f16.gguf")
    [special_tokens] = json_files.read_json(paths.METRICS / "check_converted/merged.json")["special_tokens"]
    template = ChatTemplate(metadata["tokenizer.chat_template"], **special_tokens)
    facts = read_card_facts(
        [*types, *config.params.export.formats],
        lineage={key.removeprefix("lathe."): text for key, text in metadata.items() if key.startswith("lathe.")},
        licence=read_license(paths.MODEL_BASE),
    )
    chosen = choose_best_artifact(facts.validation, types, config.params.evaluate.primary_metric)
    card = render_model_card(facts, config.params, chosen)
    with paths.replace_file(paths.GGUF / "README.md") as partial:
        partial.write_text(card, encoding="utf-8")
    with paths.replace_file(paths.GGUF / "Modelfile") as partial:
        text = build_modelfile(f"{chosen}.gguf", template, n_ctx=facts.n_ctx)
        partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    stage.run(main)
