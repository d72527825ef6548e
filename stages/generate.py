"""Answer the held-out rows with a GGUF, greedily, through the template of training that the file carries.

reads   models/gguf/, data/processed/{validation,test}.jsonl, params.yaml: generate
writes  data/generated/<ARTIFACT>/{validation,test}.jsonl, metrics/generate/<ARTIFACT>.json
items   base, merged and the types in quantize.types
"""

import os
import time
from typing import Any

import _path  # noqa: F401

from lathe import paths, stage, track
from lathe.params import Config
from lathe.stage import Speeds

UNQUANTIZED = ["base", "merged"]


def main(config: Config, item: str) -> Speeds:
    from lathe.answers import answer
    from lathe.generate import Generator
    from lathe.jsonl import read_jsonl, write_jsonl

    settings = config.params.generate
    file = paths.GGUF / (f"{item}-f16.gguf" if item in UNQUANTIZED else f"{item}.gguf")
    facts: dict[str, Any] = {"bytes": file.stat().st_size}
    started, tokens = time.perf_counter(), 0
    with (
        paths.whole_folder(paths.DATA_GENERATED / item) as folder,
        Generator(file, n_parallel=settings.n_parallel, n_ctx=settings.n_ctx, threads=os.cpu_count() or 1) as generator,
    ):
        for split in ("validation", "test"):
            rows = read_jsonl(paths.DATA_PROCESSED / f"{split}.jsonl")[: settings.max_rows]
            answers = answer(generator, [row["messages"] for row in rows], max_new_tokens=settings.max_new_tokens)
            write_jsonl(answers.rows, folder / f"{split}.jsonl")
            facts[split] = answers.facts
            tokens += answers.tokens
    track.write_json(paths.METRICS / f"generate/{item}.json", facts)
    return {"tokens_per_second": round(tokens / (time.perf_counter() - started), 1)}


if __name__ == "__main__":
    stage.run_items(main, lambda config: [*UNQUANTIZED, *config.params.quantize.types])
