"""What pruning saves on the default search: optimizer steps, and the best score, with the pruner and without.

    python benchmarks/pruning.py [--seeds 5] [--min-steps 50] [--reduction 3] [--work DIR]

For each seed two studies of the search file, one after the other: as it is, and with the pruner. Sampler, pruner and
what is compared at which step are those of `lathe search`, and a trial is trained, merged, converted, quantized and
scored by the functions of the stages. In place of DVC a process of this program does it, on one core. The model is the
toy of the recipe `tiny`; the seed is that of the suggestions and of the training. The trials of a study run one after
another, two studies at a time (`--jobs`).

A training is the same whoever started it, so a point of the search space that both studies of a seed try is trained
once, and counted in both. Counted are the steps up to the evaluation at which a trial was pruned. Prints a Markdown
table. What has been trained is kept in `--work`, and a run that was ended goes on there.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import machine
import torch
from scipy import stats

import lathe.training.sft  # noqa: F401 - TRL is imported once
from lathe.common import paths
from lathe.common.json_files import read_json, write_json
from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.config.overrides import read_key
from lathe.config.params import Params
from lathe.config.yaml_files import read_yaml
from lathe.evaluation.text_metrics import exact_match
from lathe.experiments.recipes import load_main_recipe
from lathe.experiments.search import command
from lathe.experiments.search.pruning import Losses
from lathe.experiments.search.search_file import Plan, Pruner
from lathe.experiments.search.study import Study
from lathe.gguf import imatrix_file, run_converter
from lathe.gguf.collect_imatrix import collect
from lathe.gguf.quantize import quantize
from lathe.inference.generate import Generator
from lathe.models.answer_split import split_answer
from lathe.models.merge.merge import merge
from lathe.models.tokenizer import load_tokenizer
from lathe.models.tokenizer_template import read_chat_template
from lathe.sources.builtin import household_commands
from lathe.training.train import train

FORK = multiprocessing.get_context("fork")  # each training begins with everything imported
CURVE = "metrics/plots/metrics/eval/loss.tsv"
ROWS = {"train": 1200, "validation": 100}  # of the dataset's 2,400 and 500
SCORED_ROWS = 250  # of validation, those of the loss among them
# 300 steps as the recipe has them, each of an eighth of its rows.
SMALLER = ("training.per_device_train_batch_size=4", "training.num_train_epochs=1")
Look = Callable[[Sequence[tuple[int, float]]], tuple[int, float] | None]


@dataclass(frozen=True)
class Point:
    """A training of one point of the space: its evaluation losses by steps, and its score where it ran to the end."""

    losses: list[tuple[int, float]]
    score: float | None


@dataclass(frozen=True)
class Found:
    """What a study found: the steps of each trial, its score, or None where it was pruned."""

    steps: list[int]
    scores: list[float | None]

    @property
    def best(self) -> float:
        """The best score of all."""
        return max(score for score in self.scores if score is not None)

    def best_within(self, steps: int) -> float:
        """Return the best score of the trials that end within so many steps of the study."""
        best, sum_of_steps = -math.inf, 0
        for own, score in zip(self.steps, self.scores, strict=True):
            sum_of_steps += own
            if sum_of_steps <= steps and score is not None:
                best = max(best, score)
        return best


def main() -> None:
    """Run the studies, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=paths.ROOT / "experiments/search/default.yaml")
    parser.add_argument("--recipe", default="tiny", help="the parameters of every trial (default: tiny)")
    parser.add_argument("-S", dest="overrides", action="append", default=[], help="further ones: KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--min-steps", type=int, default=50)
    parser.add_argument("--reduction", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="studies at a time (default: 2)")
    parser.add_argument("--work", type=Path, help="folder for what has been trained (default: a temporary one)")
    chosen = parser.parse_args()
    prepared = _prepare(chosen.file, chosen.recipe, chosen.overrides)
    pruner = Pruner(min_steps=chosen.min_steps, reduction=chosen.reduction)
    with tempfile.TemporaryDirectory(prefix="bench-pruning-") as temporary:
        work = (chosen.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        base = work / "base"
        if not (base / "config.json").exists():
            _in_a_process(_make_model, base, prepared.params.seed)
        queue = FORK.Queue()
        for seed in range(1, chosen.seeds + 1):
            queue.put(seed)
        workers = [
            FORK.Process(target=_run_seeds, args=(queue, work, prepared.plan, prepared.params, pruner))
            for _ in range(chosen.jobs)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("error: a study ended before its end; see above")
        found = [_read_found(work, seed, pruner) for seed in range(1, chosen.seeds + 1)]
    print("\n".join(_describe(found, prepared.plan, prepared.params, pruner)))


def _prepare(file: Path, recipe: str, further: Sequence[str]) -> command.Prepared:
    """Read the search file with the values of a recipe, but for those that are searched."""
    searched = read_yaml(file)["space"]
    given = load_main_recipe(recipe).build_overrides([*SMALLER, *further])
    return command.prepare(file, [text for text in given if read_key(text) not in searched])


def _make_model(folder: Path, seed: int) -> None:
    from lathe.sources.builtin import tiny_model

    partial = folder.with_name("base.partial")
    partial.mkdir(exist_ok=True)
    tiny_model.build(partial, seed)
    partial.rename(folder)


def _run_seeds(queue: Any, work: Path, plan: Plan, params: Params, pruner: Pruner) -> None:
    from queue import Empty

    while True:
        try:
            seed = queue.get(timeout=1)
        except Empty:
            return
        own = params.model_copy(update={"seed": seed})
        points = Points(work, seed, own)
        for used in (None, pruner):
            chosen = plan.model_copy(update={"seed": seed, "pruner": used, "study": f"bench-{os.getpid()}"})
            began = time.monotonic()
            result = run_study(chosen, own, points)
            write_json(_name_found(work, seed, used), {"steps": result.steps, "scores": result.scores})
            print(
                f"seed {seed}, {'pruned' if used else 'whole'}: {sum(result.steps):,} steps, best {result.best:.4f}, "
                f"{time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def _name_found(work: Path, seed: int, pruner: Pruner | None) -> Path:
    how = f"pruned-{pruner.min_steps}-{pruner.reduction}" if pruner else "whole"
    return work / f"{seed}-{how}.json"


def _read_found(work: Path, seed: int, pruner: Pruner) -> tuple[Found, Found]:
    whole, pruned = (Found(**read_json(_name_found(work, seed, used))) for used in (None, pruner))
    return whole, pruned


def run_study(plan: Plan, params: Params, points: "Points") -> Found:
    """Run all trials of a study, one after another."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = Study(plan, optuna.storages.InMemoryStorage(), params.model_dump(), is_local=True)
    found = Found([], [])
    while (trial := study.take_trial(plan.n_trials, may_begin=True)) is not None:
        values = study.choose_values(trial)
        point, pruned = points.run(values, lambda losses, trial=trial: study.find_hopeless_step(trial, losses))
        if pruned:
            study.prune(trial, *pruned, commit="")
        else:
            assert point.score is not None
            study.finish(trial, [point.score], "")
        found.steps.append(pruned[0] if pruned else point.losses[-1][0])
        found.scores.append(None if pruned else point.score)
    return found


class Points:
    """The points that have been trained with one seed, kept in a file."""

    def __init__(self, work: Path, seed: int, params: Params) -> None:
        self.work, self.folder, self.params = work, work / str(seed), params
        self._file = work / f"{seed}-points.jsonl"
        self._known = {}
        for row in read_jsonl(self._file) if self._file.exists() else []:
            self._known[row["values"]] = Point([tuple(each) for each in row["losses"]], row["score"])

    def run(self, values: dict[str, Any], look: Look) -> tuple[Point, tuple[int, float] | None]:
        """Train a point, until `look` at its losses returns a step at which it is pruned; return it, and that."""
        name = json.dumps(values, sort_keys=True)
        known = self._known.get(name)
        if known is not None:
            for count in range(1, len(known.losses) + 1):
                if pruned := look(known.losses[:count]):
                    return known, pruned
            if known.score is not None:
                return known, None
        point, pruned = self._train(values, look)
        self._known[name] = point
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"values": name, "losses": point.losses, "score": point.score}) + "\n")
        return point, pruned

    def _train(self, values: dict[str, Any], look: Look) -> tuple[Point, tuple[int, float] | None]:
        params = _change(self.params, values)
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            folder, losses = Path(name), Losses(Path(name) / CURVE, None)
            process = FORK.Process(target=measure_point, args=(self.work / "base", folder, params))
            process.start()
            while process.is_alive():
                process.join(0.2)
                if pruned := look(losses.read()):
                    process.kill()
                    process.join()
                    return Point(losses.read(), None), pruned
            if process.exitcode:
                raise SystemExit(f"error: {values}: its process ended with {process.exitcode}")
            return Point(losses.read(), read_json(folder / "score.json")["score"]), None


def _change(params: Params, values: dict[str, Any]) -> Params:
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        inner = getattr(params, section)
        params = params.model_copy(update={section: inner.model_copy(update={name: value})})
    return Params.model_validate(params.model_dump())


def measure_point(base: Path, folder: Path, params: Params) -> None:
    """Train, make the file Q4_K_M, and write its exact match on validation rows."""
    torch.set_num_threads(1)
    sys.stdout = (folder / "log").open("w")
    made = household_commands.make_rows(42)
    rows = {split: made[split][:most] for split, most in ROWS.items()}
    files = {split: folder / f"{split}.jsonl" for split in rows}
    for split, file in files.items():
        write_jsonl(rows[split], file)
    adapter, merged = folder / "adapter", folder / "merged"
    adapter.mkdir()
    merged.mkdir()
    train(base, files, adapter, folder / "metrics", params=params)
    merge(base, adapter, merged, dtype=params.merge.dtype, max_shard_size_bytes=params.merge.max_shard_size_bytes)
    f16, matrix, quantized = (folder / name for name in ("f16.gguf", "imatrix.gguf", "quantized.gguf"))
    _in_a_process(_convert, merged, f16)
    tokenizer = load_tokenizer(merged)
    template = read_chat_template(tokenizer)
    chats = [template.render(row["messages"]) for row in rows["train"][: params.quantize.imatrix_rows]]
    importance = collect(merged, f16, tokenizer(chats, add_special_tokens=False)["input_ids"])
    imatrix_file.write_importance(importance, matrix, dataset="train", rows=len(chats))
    quantize(f16, quantized, type="Q4_K_M", threads=1, importance=matrix)
    settings = params.generate
    with Generator(quantized, n_parallel=32, n_ctx=int(settings.n_ctx), threads=1) as generator:
        pairs = [split_answer(generator.chat_template, row["messages"])[:2] for row in made["validation"][:SCORED_ROWS]]
        answers = generator.complete([prompt for prompt, _ in pairs], max_new_tokens=int(settings.max_new_tokens))
    right = [exact_match(answer.text, wanted) for answer, (_, wanted) in zip(answers, pairs, strict=True)]
    write_json(folder / "score.json", {"score": statistics.fmean(map(float, right))})


def _convert(model: Path, out: Path) -> None:
    """Run llama.cpp's converter as `lathe.gguf.convert` does, but with transformers imported before."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        del sys.modules[name]  # the converter brings its own
    log = os.open(out.with_name("converter.log"), os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    words = [str(paths.LLAMA_CPP), "convert_hf_to_gguf.py", "{}", str(model), "--outfile", str(out), "--outtype", "f16"]
    sys.argv[1:] = words
    run_converter.main()


def _in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"error: {function.__name__} ended with {process.exitcode}")


def _describe(found: Sequence[tuple[Found, Found]], plan: Plan, params: Params, pruner: Pruner) -> Iterator[str]:
    training = params.training
    yield (
        f"{machine.describe()}. {plan.n_trials} trials of `{plan.sampler}`, `{plan.objectives[0].metric}` on "
        f"{SCORED_ROWS} validation rows, batches of {training.per_device_train_batch_size}, evaluated every "
        f"{training.eval_steps} steps; `pruner: {{min_steps: {pruner.min_steps}, reduction: {pruner.reduction}}}`."
    )
    yield ""
    yield (
        "| seed | steps, no pruner | with it | times fewer | trained to the end | best score, no pruner | with it | "
        "no pruner, within the steps of the other |"
    )
    yield "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for seed, (whole, pruned) in enumerate(found, 1):
        before, after = sum(whole.steps), sum(pruned.steps)
        ended = sum(score is not None for score in pruned.scores)
        yield (
            f"| {seed} | {before:,} | {after:,} | {before / after:.2f} | {ended} of {len(pruned.scores)} | "
            f"{100 * whole.best:.1f} % | {100 * pruned.best:.1f} % | {100 * whole.best_within(after):.1f} % |"
        )
    before, after = (sum(sum(each[kind].steps) for each in found) for kind in (0, 1))
    means = [
        statistics.fmean(values)
        for values in (
            [whole.best for whole, _ in found],
            [pruned.best for _, pruned in found],
            [whole.best_within(sum(pruned.steps)) for whole, pruned in found],
        )
    ]
    yield (
        f"| all | {before:,} | {after:,} | **{before / after:.2f}** | | "
        + " | ".join(f"{100 * mean:.1f} %" for mean in means)
        + " |"
    )
    if len(found) > 1:
        differences = [100 * (pruned.best - whole.best) for whole, pruned in found]
        mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(found))
        reach = float(stats.t.ppf(0.975, len(found) - 1)) * error
        yield ""
        yield (
            f"Best score with the pruner less that without: {mean:+.2f} points, 95 % interval "
            f"[{mean - reach:+.2f}, {mean + reach:+.2f}] over {len(found)} seeds (from {min(differences):+.2f} to "
            f"{max(differences):+.2f})."
        )


if __name__ == "__main__":
    main()
