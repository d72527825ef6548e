"""Collect the importance matrix: what flows through each weight of the merged model while it reads training rows.

reads   models/merged/, models/gguf/merged-f16.gguf, data/processed/train.jsonl, params.yaml: seed, quantize
writes  models/imatrix/imatrix.gguf (nothing with quantize.imatrix: false), metrics/imatrix.json
"""

import random
from typing import Any

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config


def main(config: Config) -> None:
    facts: dict[str, Any] = {"rows": 0, "tokens": 0, "tensors": 0}
    with paths.replace_folder(paths.IMATRIX) as folder:
        if config.params.quantize.imatrix:
            from lathe.common.jsonl import read_jsonl
            from lathe.gguf import imatrix_file
            from lathe.gguf.collect_imatrix import collect
            from lathe.models.tokenizer import load_tokenizer
            from lathe.models.tokenizer_template import read_chat_template

            rows = read_jsonl(paths.DATA_PROCESSED / "train.jsonl")
            chosen = random.Random(config.params.seed).sample(rows, min(config.params.quantize.imatrix_rows, len(rows)))
            tokenizer = load_tokenizer(paths.MODEL_MERGED)
            template = read_chat_template(tokenizer)
            chats = [template.render(row["messages"], tools=row.get("tools")) for row in chosen]
            tokens = tokenizer(chats, add_special_tokens=False)["input_ids"]
            importance = collect(paths.MODEL_MERGED, paths.GGUF / "merged-f16.gguf", tokens)
            imatrix_file.write_importance(
                importance, folder / "imatrix.gguf", dataset="data/processed/train.jsonl", rows=len(chosen)
            )
            facts = {"rows": len(chosen), "tokens": sum(map(len, tokens)), "tensors": len(importance)}
    json_files.write_json(paths.METRICS / "imatrix.json", facts)


if __name__ == "__main__":
    stage.run(main)
