"""Put a task of lm-evaluation-harness to a GGUF, in this process: log-likelihoods and greedy answers by llama.cpp.

reads   models/gguf/, the folder benchmark.include_path, params.yaml: benchmark, generate.n_parallel,
        generate.n_gpu_layers; data of tasks of the Hub from there
writes  data/benchmark/<ARTIFACT>/<TASK>/tasks.json and, for each task that it consists of, <PART>.jsonl (each document
        with its scores), metrics/benchmark/<ARTIFACT>/<TASK>.json
items   ARTIFACT/TASK: base, merged and the types in quantize.types, each with the tasks in benchmark.tasks

Answers are kept in .scratch/benchmark as they are made: after an interruption, the next run goes on from there.
"""

import os

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config import artifacts
from lathe.config.load import Config
from lathe.stage import Throughput

# What determines an answer, besides data and parameters.
PACKAGES = ("llama-cpp-python", "numpy", "lm_eval", "datasets", "Jinja2")


def main(config: Config, item: str) -> Throughput:
    from lathe.evaluation import benchmark

    artifact, task = item.split("/")
    settings = config.params.benchmark.model_copy(update={"tasks": [task]})
    os.chdir(paths.ROOT)  # which the paths in task files start from
    tasks = benchmark.load_tasks(settings)  # refuses, before anything else is loaded

    from lathe.common.code_closure import code_closure
    from lathe.common.jsonl import write_jsonl
    from lathe.common.scratch import compute_fingerprint
    from lathe.inference.generate import Generator
    from lathe.inference.harness_model import HarnessModel
    from lathe.inference.journal import open_journal

    gguf, threads = paths.GGUF / artifacts.get_file_name(artifact), os.cpu_count() or 1
    generate = config.params.generate
    fingerprint = compute_fingerprint(
        {
            "benchmark": settings.model_dump(exclude={"cluster_by"}),
            "n_parallel": generate.n_parallel,
            "threads": threads,
        },
        files={"gguf": gguf},
        packages=PACKAGES,
        code=code_closure(paths.ROOT / "stages/benchmark.py"),
    )
    with open_journal(paths.SCRATCH / "benchmark", fingerprint) as journal:
        with Generator(
            gguf,
            n_parallel=generate.n_parallel,
            n_ctx=settings.max_length or 16,
            threads=threads,
            n_gpu_layers=generate.n_gpu_layers,
        ) as generator:
            max_length = min(settings.max_length or generator.model.n_ctx_train, generator.model.n_ctx_train)
            model = HarnessModel(generator, journal, max_length=max_length, chooses_rows=generate.n_parallel == "auto")
            results = benchmark.run_tasks(model, tasks, settings)
        with paths.replace_folder(paths.DATA_BENCHMARK / artifact / task) as partial:
            described = {"asked": results.asked, "tasks": results.tasks, "groups": results.groups}
            json_files.write_json(partial / "tasks.json", described)
            for part, rows in results.rows.items():
                write_jsonl(rows, partial / f"{part}.jsonl")
        json_files.write_json(paths.METRICS / f"benchmark/{artifact}/{task}.json", results.summarize(cut=model.cut))
        journal.remove()
    return {}


def list_items(config: Config) -> list[str]:
    measured = artifacts.list_benchmarked(config.params.quantize.types)
    return [f"{artifact}/{task}" for task in config.params.benchmark.tasks for artifact in measured]


if __name__ == "__main__":
    stage.run_items(main, list_items, options=("artifact", "task"))
