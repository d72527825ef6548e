"""Answer the held-out rows with an exported model, greedily, by its own runtime; measure it as the GGUFs are.

reads   models/exported/<FORMAT>/, models/gguf/merged-f16.gguf (vocabulary, template; its KL divergence is from this),
        data/processed/{validation,test}.jsonl, metrics/preprocess/report.json (for sizes that are auto),
        params.yaml: export, generate, and the file evaluate.general_text
writes  data/generated/<FORMAT>/{validation,test,general}.jsonl, metrics/generate/<FORMAT>.json
items   the names in export.formats

Answers are kept in .scratch/generate as they are made: after an interruption, the next run goes on from there.
"""

import os
from contextlib import ExitStack
from functools import partial

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.artifacts import MERGED, get_file_name
from lathe.config.load import Config
from lathe.stage import Throughput

SPLITS = {name: paths.DATA_PROCESSED / f"{name}.jsonl" for name in ("validation", "test")}


def main(config: Config, item: str) -> Throughput:
    from lathe.common.code_closure import code_closure
    from lathe.common.scratch import compute_fingerprint
    from lathe.export.environments import PACKAGES, find_python, read_versions
    from lathe.export.runtime import ExportedGenerator, RuntimeProcess, compare_token_ids, mark_answers
    from lathe.export.weights import count_bytes
    from lathe.inference.general_text import read_paragraphs
    from lathe.inference.generate import Generator
    from lathe.inference.generation_sizes import choose_sizes
    from lathe.inference.held_out import PACKAGES as OWN_PACKAGES
    from lathe.inference.held_out import HeldOutRun, iterate_rows
    from lathe.inference.journal import open_journal
    from lathe.models.answer_reading import HeldOutPrompt

    settings, folder = config.params.generate, paths.MODELS_EXPORTED / item
    sizes = choose_sizes(settings, json_files.read_json(paths.METRICS / "preprocess/report.json"))
    python = find_python(item, config.params.export)
    versions = read_versions(item, python)
    mark = f"{PACKAGES[item][0]} {versions[PACKAGES[item][0]]}"
    general, threads = paths.ROOT / config.params.evaluate.general_text, os.cpu_count() or 1
    read_paragraphs(general)  # refused before anything is loaded
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    against = paths.GGUF / get_file_name(MERGED)
    determines = {
        **settings.model_dump(include={"max_new_tokens", "n_ctx", "max_rows"}),
        **vars(sizes),
        "versions": versions,
        "threads": threads,
        "format": item,
    }
    fingerprint = compute_fingerprint(
        determines,
        files={**files, "general": general, "against": against, **SPLITS},
        packages=OWN_PACKAGES,
        code=code_closure(paths.ROOT / "stages/generate_exported.py"),
    )
    with open_journal(paths.SCRATCH / "generate", fingerprint) as journal:
        with ExitStack() as stack:
            out = stack.enter_context(paths.replace_folder(paths.DATA_GENERATED / item))
            merged = stack.enter_context(
                Generator(against, n_parallel=1, n_ctx=sizes.n_ctx, threads=threads, n_gpu_layers=settings.n_gpu_layers)
            )
            if settings.n_ctx == "auto":
                merged.n_ctx = min(sizes.n_ctx, merged.model.n_ctx_train)
            log = paths.SCRATCH / f"export/{item}-runtime.log"
            process = stack.enter_context(RuntimeProcess(item, python, folder, n_ctx=merged.n_ctx, log=log))
            exported = ExportedGenerator(merged, process)
            run = HeldOutRun(exported, journal, merged)
            splits, token_ids = [], []
            for name, file in SPLITS.items():
                rows = partial(iterate_rows, file, max_rows=settings.max_rows)
                prompts, answers = run.store_prompts(name, rows()), out / f"{name}.jsonl"
                measured = run.measure_split(name, prompts, answers, max_new_tokens=sizes.max_new_tokens)
                mark_answers(answers, mark)
                splits.append({"split": name, **measured})
                texts = (row.prompt + (row.answer or row.reference) for row in (HeldOutPrompt(*row) for row in prompts))
                token_ids.append({"split": name, **compare_token_ids(exported, texts)})
            perplexity = run.measure_general_text(general, out / "general.jsonl")
        # Lists, of which DVC makes no columns.
        metrics = {
            "splits": splits,
            "token_ids": token_ids,
            "file": [{"bytes": count_bytes(folder), "general_perplexity": perplexity}],
            "sizes": [{"max_new_tokens": sizes.max_new_tokens, "n_ctx": merged.n_ctx, "n_parallel": 1}],
            "engine": [{"name": mark, **versions}],
        }
        json_files.write_json(paths.METRICS / f"generate/{item}.json", metrics)
        journal.remove()
    return {"tokens_per_second": round(run.tokens / run.seconds, 1)} if run.tokens else {}


if __name__ == "__main__":
    stage.run_items(main, lambda config: config.params.export.formats, options=("format",))
