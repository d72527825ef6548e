"""Prove that a converted GGUF is the same model: same token ids, and held-out answers as likely as in the training.

reads   models/{base,merged}/ (tokenizer), models/gguf/{base,merged}-f16.gguf, data/processed/validation.jsonl;
        merged metrics/train/answers.json too; params.yaml: convert.tokenizer_parity, preprocess.chat_template_kwargs,
        merged training.tuning, quantization.load_in_4bit
writes  metrics/check_converted/{base,merged}.json, with the special tokens that llama.cpp finds in the file
items   base, merged
"""

import os
from pathlib import Path
from typing import Any

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config

VALIDATION = paths.DATA_PROCESSED / "validation.jsonl"


def main(config: Config, item: str) -> None:
    from lathe.gguf import tokenizer_parity
    from lathe.gguf.llama_model import LlamaModel
    from lathe.gguf.row_texts import RowTexts
    from lathe.models.template_options import load_tokenizer_with_options
    from lathe.models.tokenizer_template import read_chat_template

    model, file = paths.ROOT / "models" / item, paths.GGUF / f"{item}-f16.gguf"
    # The merged model has the template of training already.
    options = config.params.preprocess.chat_template_kwargs if item == "base" else {}
    tokenizer = load_tokenizer_with_options(model, options)
    template = read_chat_template(tokenizer)
    parity = tokenizer_parity.compare_tokenizers(
        model,
        file,
        RowTexts(template, {"validation": VALIDATION}, max_bytes=None),
        samples=config.params.convert.tokenizer_parity,
        chat_template=template.text,
    )
    with LlamaModel(file, vocab_only=True) as converted:
        of_file = converted.chat_template
    # In lists, of which DVC makes no columns.
    json_files.write_json(
        paths.METRICS / f"check_converted/{item}.json",
        {
            "tokens_compared": parity.tokens,
            "differing_samples": list(parity.differing_samples),
            "special_tokens": [
                {"bos_token": of_file.bos_token, "eos_token": of_file.eos_token, "adds_bos": of_file.adds_bos}
            ],
            "answers": _compare_answers(config, tokenizer, file) if item == "merged" else [],
        },
    )


def _compare_answers(config: Config, tokenizer: Any, gguf: Path) -> list[dict[str, float]]:
    """Hold the likelihood of held-out answers against that of the trained model; return both, none if not measured."""
    from lathe.common.jsonl import iterate_jsonl
    from lathe.inference.score_answers import score_answers
    from lathe.models.measured_answers import choose_answers
    from lathe.models.same_model import check_same_model

    measured = json_files.read_json(paths.METRICS / "train/answers.json")["answers"]
    if not measured:
        return []
    chosen = choose_answers(tokenizer, iterate_jsonl(VALIDATION))
    scored = score_answers(gguf, chosen, threads=os.cpu_count() or 1)
    trained, shipped = measured[0]["nats_per_token"], scored.describe()["nats_per_token"]
    params = config.params
    check_same_model(
        "models/gguf/merged-f16.gguf",
        trained=trained,
        shipped=shipped,
        tokens=scored.tokens,
        load_in_4bit=params.training.tuning == "lora" and params.quantization.load_in_4bit,
    )
    return [{"trained_nats_per_token": trained, "nats_per_token": shipped, "tokens": scored.tokens}]


if __name__ == "__main__":
    stage.run_items(main, lambda _: ["base", "merged"])
