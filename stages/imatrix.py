"""Collect the importance matrix: what flows through each weight of the merged model while it reads training rows.

reads   models/merged/, models/gguf/merged-f16.gguf, data/processed/train.jsonl, params.yaml: seed, quantize
writes  models/imatrix/imatrix.gguf (nothing with quantize.imatrix: false), metrics/imatrix.json
"""

import random
from typing import Any

import _path  # noqa: F401

from lathe import paths, stage, track
from lathe.params import Config


def main(config: Config) -> None:
    facts: dict[str, Any] = {"rows": 0, "tokens": 0, "tensors": 0}
    with paths.whole_folder(paths.IMATRIX) as folder:
        if config.params.quantize.imatrix:
            from lathe import imatrix
            from lathe.calibrate import collect
            from lathe.jsonl import read_jsonl
            from lathe.model import load_tokenizer
            from lathe.template import render_for

            rows = read_jsonl(paths.DATA_PROCESSED / "train.jsonl")
            chosen = random.Random(config.params.seed).sample(rows, min(config.params.quantize.imatrix_rows, len(rows)))
            tokenizer = load_tokenizer(paths.MODEL_MERGED)
            chats = [render_for(tokenizer, row["messages"]) for row in chosen]
            tokens = tokenizer(chats, add_special_tokens=False)["input_ids"]
            importance = collect(paths.MODEL_MERGED, paths.GGUF / "merged-f16.gguf", tokens)
            imatrix.write(importance, folder / "imatrix.gguf", dataset="data/processed/train.jsonl", rows=len(chosen))
            facts = {"rows": len(chosen), "tokens": sum(map(len, tokens)), "tensors": len(importance)}
    track.write_json(paths.METRICS / "imatrix.json", facts)


if __name__ == "__main__":
    stage.run(main)
