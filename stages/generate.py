"""Answer the held-out rows with a GGUF, greedily, through the template of training that the file carries.

With generate.engine, a server or vLLM answers in its place; the likelihood of the references is the file's.

reads   models/gguf/, data/processed/{validation,test}.jsonl, metrics/preprocess/report.json (for sizes that are auto),
        params.yaml: generate, and the file evaluate.general_text; with the engine vllm models/base or models/merged;
        base_few_shot in its place data/processed/train.jsonl, params.yaml: seed
writes  data/generated/<ARTIFACT>/{validation,test,general}.jsonl, metrics/generate/<ARTIFACT>.json
items   base, base_few_shot, merged and the types in quantize.types
"""

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config import artifacts, engines
from lathe.config.artifacts import FEW_SHOT, MERGED, UNQUANTIZED
from lathe.config.load import Config
from lathe.stage import Throughput

if TYPE_CHECKING:
    from lathe.inference.generation_sizes import GenerationSizes
    from lathe.inference.held_out import HeldOutRun

SPLITS = {name: paths.DATA_PROCESSED / f"{name}.jsonl" for name in ("validation", "test")}
TRAIN = paths.DATA_PROCESSED / "train.jsonl"


def main(config: Config, item: str) -> Throughput:
    from lathe.inference.answer_engines import connect_engine
    from lathe.inference.general_text import read_paragraphs
    from lathe.inference.generate import Generator
    from lathe.inference.generation_sizes import choose_sizes
    from lathe.inference.held_out import HeldOutRun, compute_fingerprint
    from lathe.inference.journal import open_journal

    settings, seed = config.params.generate, config.params.seed
    report = json_files.read_json(paths.METRICS / "preprocess/report.json")
    sizes = choose_sizes(settings, report, examples=settings.few_shot if item == FEW_SHOT else 0)
    file, threads = paths.GGUF / artifacts.get_file_name(item), os.cpu_count() or 1
    read = {"gguf": file, **SPLITS}
    engine = connect_engine(
        settings,
        item,
        weights=paths.MODEL_MERGED if item == MERGED else paths.MODEL_BASE,
        scratch=paths.SCRATCH / "vllm",
        environment=os.environ,
    )
    determines = {
        **settings.model_dump(exclude={"few_shot", "engine", "servers", "vllm_python", *engines.PATIENCE}),
        **vars(sizes),
        "threads": threads,
        "engine": engine and engine.describe(),
    }
    if item == FEW_SHOT:
        determines |= {"few_shot": settings.few_shot, "seed": seed}
        read["train"] = TRAIN
    else:
        read["general"] = paths.ROOT / config.params.evaluate.general_text
        read_paragraphs(read["general"])  # refused before anything is loaded
    if item not in UNQUANTIZED:
        read["against"] = paths.GGUF / artifacts.get_file_name(MERGED)

    with open_journal(paths.SCRATCH / "generate", compute_fingerprint(read, determines)) as journal:
        with ExitStack() as stack:
            folder = stack.enter_context(paths.replace_folder(paths.DATA_GENERATED / item))
            generator, *against = [
                stack.enter_context(
                    Generator(
                        read[name],
                        n_parallel=settings.n_parallel,
                        n_ctx=sizes.n_ctx,
                        threads=threads,
                        n_gpu_layers=settings.n_gpu_layers,
                    )
                )
                for name in ("gguf", "against")
                if name in read
            ]
            if settings.n_ctx == "auto":
                for each in (generator, *against):
                    each.n_ctx = min(sizes.n_ctx, generator.model.n_ctx_train)
            run = HeldOutRun(generator, journal, against[0] if against else None, engine)
            metrics = _measure(run, config, folder, sizes, gguf=file, general=read.get("general"))
            # A list, of which DVC makes no columns.
            chosen = {"max_new_tokens": sizes.max_new_tokens, "n_ctx": generator.n_ctx}
            metrics["sizes"] = [{**chosen, "n_parallel": generator.n_parallel}]
            if engine:
                metrics["engine"] = [engine.describe()]
        json_files.write_json(paths.METRICS / f"generate/{item}.json", metrics)
        journal.remove()
    if engine:
        return {f"{engine.name}_tokens_per_second": round(engine.tokens / engine.seconds, 1)} if engine.tokens else {}
    return {"tokens_per_second": round(run.tokens / run.seconds, 1)} if run.tokens else {}


def _measure(
    run: "HeldOutRun", config: Config, folder: Path, sizes: "GenerationSizes", *, gguf: Path, general: Path | None
) -> dict[str, Any]:
    """Generate and score everything; return the stage's metrics. Without `general`, examples are in each prompt."""
    from lathe.inference import few_shot
    from lathe.inference.held_out import iterate_rows

    settings = config.params.generate
    metrics: dict[str, Any] = {}
    splits = {name: partial(iterate_rows, file, max_rows=settings.max_rows) for name, file in SPLITS.items()}
    if general is None:
        train = iterate_rows(TRAIN, max_rows=None)
        examples = few_shot.draw_examples(train, settings.few_shot, seed=config.params.seed)
        metrics["few_shot_examples"], prompts = few_shot.store_prompts(
            run, examples, splits, max_new_tokens=sizes.max_new_tokens
        )
    else:
        prompts = {name: run.store_prompts(name, rows()) for name, rows in splits.items()}
    # Lists, of which DVC makes no columns: all of these figures are columns of the scores already.
    metrics["splits"] = []
    for name, stored in prompts.items():
        measured = run.measure_split(name, stored, folder / f"{name}.jsonl", max_new_tokens=sizes.max_new_tokens)
        metrics["splits"].append({"split": name, **measured})
    perplexity = None if general is None else run.measure_general_text(general, folder / "general.jsonl")
    metrics["file"] = [{"bytes": gguf.stat().st_size, "general_perplexity": perplexity}]
    return metrics


if __name__ == "__main__":
    stage.run_items(main, lambda config: artifacts.list_artifacts(config.params.quantize.types))
