"""Convert safetensors to a 16-bit GGUF with llama.cpp's own converter, and prove that it is the same model.

Token ids agree with the tokenizer's, and held-out answers are as likely as in the training. The file is of f16, or of
bf16 if f16 cannot hold a weight.

reads   models/{base,merged}/, data/processed/validation.jsonl, params.yaml: convert, preprocess.chat_template_kwargs;
        merged metrics/train/answers.json too; for the digests in the file all else that it comes from: metrics/fetch/,
        data/processed/, models/adapter/, params.yaml, presets.yaml
writes  models/gguf/{base,merged}-f16.gguf, metrics/convert/{base,merged}.json; base models/gguf/mmproj/ too: the part
        that reads images, which training leaves as it is, or a note where there is none
items   base, merged
"""

import logging
import os
from pathlib import Path
from typing import Any

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config

logger = logging.getLogger("lathe.convert")

VALIDATION = paths.DATA_PROCESSED / "validation.jsonl"


def main(config: Config, item: str) -> None:
    from lathe.gguf import tokenizer_parity
    from lathe.gguf.convert import convert
    from lathe.gguf.row_texts import RowTexts
    from lathe.models.chat_template import ChatTemplate
    from lathe.models.tokenizer import load_tokenizer
    from lathe.models.weight_range import find_beyond_f16
    from lathe.provenance import lineage

    model = paths.ROOT / "models" / item
    target = paths.GGUF / f"{item}-f16.gguf"
    settings = config.params.convert
    llama_cpp = paths.ROOT / settings.llama_cpp_dir if settings.llama_cpp_dir else paths.LLAMA_CPP
    # The merged model has the template of training already.
    options = config.params.preprocess.chat_template_kwargs if item == "base" else {}
    tokenizer = load_tokenizer(model, options)
    template = ChatTemplate.of_tokenizer(tokenizer)
    texts = RowTexts(template, {"validation": VALIDATION}, max_bytes=None)
    if beyond := find_beyond_f16(model):
        logger.warning("models/%s: %s holds %g, more than f16 can; the GGUF is of bf16", item, *beyond)
    outtype = "bf16" if beyond else "f16"
    with paths.replace_file(target) as partial:
        convert(
            model,
            partial,
            outtype=outtype,
            llama_cpp=llama_cpp,
            metadata=lineage.build_metadata(item) | ({"tokenizer.chat_template": template.text} if options else {}),
        )
        parity = tokenizer_parity.compare_tokenizers(
            model, partial, texts, samples=settings.tokenizer_parity, chat_template=template.text
        )
        if item == "base":
            _convert_projector(model, llama_cpp, lineage.build_metadata(item))
        answers = _compare_answers(config, tokenizer, partial) if item == "merged" else []
    json_files.write_json(
        paths.METRICS / f"convert/{item}.json",
        {
            "tokens_compared": parity.tokens,
            "differing_samples": list(parity.differing_samples),
            "type": [outtype],
            "answers": answers,
        },
    )


def _convert_projector(model: Path, llama_cpp: Path, metadata: dict[str, str]) -> None:
    from lathe.common.errors import InputError
    from lathe.gguf.convert import convert_projector
    from lathe.models.model_folder import read_config

    with paths.replace_folder(paths.GGUF / "mmproj") as folder:
        if not read_config(model).get("vision_config"):
            paths.mark_unused(folder, "the base has no part that reads images")
            return
        try:
            convert_projector(model, folder / "mmproj-f16.gguf", llama_cpp=llama_cpp, metadata=metadata)
        except InputError as error:
            logger.warning("no GGUF of the part that reads images: %s", error)
            paths.mark_unused(folder, f"llama.cpp's converter refuses the part that reads images: {error}")


def _compare_answers(config: Config, tokenizer: Any, gguf: Path) -> list[dict[str, float]]:
    """Hold the likelihood of held-out answers against that of the trained model; return both, none if not measured.

    In a list, of which DVC makes no columns.
    """
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
