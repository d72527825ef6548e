"""Draw several answers to each held-out row from a GGUF, at a temperature, beside the greedy ones of `generate`.

reads   models/gguf/, data/processed/{validation,test}.jsonl, metrics/preprocess/report.json (for sizes that are auto),
        params.yaml: seed, sampling, generate
writes  data/sampled/<FILE>/{validation,test}.jsonl, metrics/sample/<FILE>/rows.json
items   the names in sampling.files
"""

import os

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config
from lathe.stage import Throughput

SPLITS = {name: paths.DATA_PROCESSED / f"{name}.jsonl" for name in ("validation", "test")}


def main(config: Config, item: str) -> Throughput:
    from lathe.common.code_closure import code_closure
    from lathe.common.scratch import compute_fingerprint
    from lathe.inference.generate import Generator
    from lathe.inference.generation_sizes import choose_sizes
    from lathe.inference.held_out import PACKAGES, HeldOutRun, iterate_rows
    from lathe.inference.journal import open_journal
    from lathe.inference.sampling import SampledRun, TokenSampler

    settings, sampling, seed = config.params.generate, config.params.sampling, config.params.seed
    sizes = choose_sizes(settings, json_files.read_json(paths.METRICS / "preprocess/report.json"))
    gguf, threads = paths.GGUF / f"{item}.gguf", os.cpu_count() or 1
    fingerprint = compute_fingerprint(
        {
            **settings.model_dump(exclude={"few_shot"}),
            **vars(sizes),
            **sampling.model_dump(exclude={"files"}),
            "seed": seed,
            "threads": threads,
        },
        files={"gguf": gguf, **SPLITS},
        packages=PACKAGES,
        code=code_closure(paths.ROOT / "stages/sample.py"),
    )
    with open_journal(paths.SCRATCH / "sample", fingerprint) as journal:
        with (
            paths.replace_folder(paths.DATA_SAMPLED / item) as folder,
            Generator(
                gguf,
                n_parallel=settings.n_parallel,
                n_ctx=sizes.n_ctx,
                threads=threads,
                n_gpu_layers=settings.n_gpu_layers,
            ) as generator,
        ):
            if settings.n_ctx == "auto":
                generator.n_ctx = min(sizes.n_ctx, generator.model.n_ctx_train)
            sampler = TokenSampler(seed, sampling.temperature, sampling.top_p)
            run = SampledRun(generator, journal, sampler, sampling.samples)
            prompts = HeldOutRun(generator, journal)
            splits = []
            for name, file in SPLITS.items():
                stored = prompts.store_prompts(name, iterate_rows(file, max_rows=settings.max_rows))
                rows = run.sample_split(name, stored, folder / f"{name}.jsonl", max_new_tokens=sizes.max_new_tokens)
                splits.append({"split": name, "rows": rows, "samples": sampling.samples})
        json_files.write_json(paths.METRICS / f"sample/{item}/rows.json", {"splits": splits})
        journal.remove()
    return {"tokens_per_second": round(run.tokens / run.seconds, 1)} if run.tokens else {}


if __name__ == "__main__":
    stage.run_items(main, lambda config: config.params.sampling.files, options=("file",))
