"""Bring the selected base model, the dataset and the encoder of BERTScore into the pipeline.

reads   params.yaml: model, dataset, seed, preprocess.added_tokens; their entries in presets.yaml; models/local/,
        data/local/, the hub;
        for the encoder params.yaml: bert_score.model, evaluate.metrics; presets.yaml: encoders
writes  models/base/, data/raw/, models/encoder/ (a note where evaluate.metrics does not list bert_score),
        metrics/fetch/{model,dataset,encoder}.json
items   model, dataset, encoder
"""

from pathlib import Path

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config
from lathe.models import added_tokens, check_base, weight_range
from lathe.sources import fetch

TARGETS = {"model": paths.MODEL_BASE, "dataset": paths.DATA_RAW, "encoder": paths.MODEL_ENCODER}


def main(config: Config, item: str) -> None:
    with paths.replace_folder(TARGETS[item]) as folder:
        origin = _fetch(config, item, folder)
    # A list, of which DVC makes no columns: its parameters say the same.
    origins = [{**origin, **_measure(TARGETS[item])}] if origin else None
    json_files.write_json(paths.METRICS / "fetch" / f"{item}.json", {"origin": origins})


def _fetch(config: Config, item: str, folder: Path) -> fetch.Origin | None:
    params = config.params
    if item == "model":
        origin = fetch.fetch_model(config.model, folder, seed=params.seed)
        added_tokens.add_tokens(folder, params.preprocess.added_tokens, f"model {params.model}")
        check_base.check_base(folder, f"model {params.model}")
        weight_range.check_finite(folder, f"model {params.model}")
        _check_conversion(config, folder)
        return {"name": params.model, "source": config.model.source, **origin}
    if item == "dataset":
        origin = fetch.fetch_dataset(config.dataset, folder, seed=params.seed)
        return {"name": params.dataset, "source": config.dataset.source, **origin}
    if "bert_score" not in params.evaluate.metrics or config.encoder is None:
        paths.mark_unused(folder, "evaluate.metrics does not list bert_score: no encoder is needed")
        return None
    origin = fetch.fetch_encoder(config.encoder, folder)
    weight_range.check_finite(folder, f"encoder {params.bert_score.model}")
    return {"name": params.bert_score.model, "source": config.encoder.source, **origin}


def _check_conversion(config: Config, folder: Path) -> None:
    """Ask llama.cpp's converter and vocabulary what `convert` would ask hours later; rows are compared when there are.

    Without a converter nothing is asked.
    """
    from lathe.gguf import install_converter, tokenizer_parity
    from lathe.gguf.check_template import check_template
    from lathe.gguf.vocabulary import get_vocabulary
    from lathe.models.tokenizer import load_tokenizer
    from lathe.models.tokenizer_template import read_chat_template

    settings, shown = config.params.convert, f"model {config.params.model}"
    llama_cpp, state = install_converter.find_converter(paths.ROOT, settings.llama_cpp_dir)
    if state != "missing":
        vocabulary = get_vocabulary(folder, llama_cpp=llama_cpp, shown=shown)
        tokenizer_parity.compare_tokenizers(folder, vocabulary, [], samples=settings.tokenizer_parity, shown=shown)
        template = read_chat_template(load_tokenizer(folder))
        check_template(template, llama_cpp=llama_cpp, shown=shown)


def _measure(folder: Path) -> dict[str, int]:
    sizes = [
        file.stat().st_size for file in folder.rglob("*") if file.is_file()
    ]  # a mixture has a folder for each part
    return {"files": len(sizes), "bytes": sum(sizes)}


if __name__ == "__main__":
    stage.run_items(main, lambda _: list(TARGETS))
