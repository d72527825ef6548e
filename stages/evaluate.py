"""Score every artifact's answers on the held-out rows, how sure that is, what each step cost, and judge the gates.

reads   data/generated/, metrics/generate/, models/local/ or the hub where an encoder is asked for,
        params.yaml: seed, evaluate, bert_score, judge.enabled, quantize.types
writes  metrics/evaluate/{validation,test,gates}.json, metrics/evaluate/scores.csv (for the plots),
        data/scored/<ARTIFACT>/{validation,test}.jsonl (rows with their own scores, worst first)
removes what is left of quantization types that are no longer listed
"""

import json
import shutil

import _path  # noqa: F401

from lathe import paths, stage, track
from lathe.gates import UNQUANTIZED, metrics, outcome, parse
from lathe.params import Config

SPLITS = ("validation", "test")


def main(config: Config) -> None:
    from lathe.evaluate import (
        Sampling,
        add_bert_score,
        evaluate,
        plot_rows,
        read_answers,
        read_general,
        row_scores,
        scored_rows,
    )
    from lathe.jsonl import write_jsonl

    settings, types = config.params.evaluate, config.params.quantize.types
    artifacts = [*UNQUANTIZED, *types]
    _forget_other_types(types)
    judged = paths.DATA_JUDGED if config.params.judge.enabled else None
    answers = {split: read_answers(paths.DATA_GENERATED, judged, artifacts, split) for split in SPLITS}
    if "bert_score" in settings.metrics:
        cache = paths.SCRATCH / "bert_score"
        add_bert_score(list(answers.values()), config.params.bert_score, seed=config.params.seed, cache=cache)

    scores = row_scores(
        settings.metrics,
        normalize=settings.normalize,
        answer_pattern=settings.answer_pattern,
        bert_score_weight=settings.bert_score_weight,
        judge_weight=settings.judge_weight if config.params.judge.enabled else None,
    )
    general, bytes_of = read_general(paths.DATA_GENERATED, artifacts), _bytes(artifacts)
    sampling = Sampling(settings.bootstrap_samples, config.params.seed)
    reports = {split: evaluate(answers[split], general, bytes_of, scores, sampling) for split in SPLITS}
    outcomes = [outcome(parse(gate), reports["validation"], types) for gate in settings.gates or []]

    with paths.whole_folder(paths.DATA_SCORED) as folder:
        for artifact in artifacts:
            (folder / artifact).mkdir()
            for split in SPLITS:
                rows = scored_rows(answers[split][artifact], scores, settings.primary_metric)
                write_jsonl(rows, folder / artifact / f"{split}.jsonl")
    for split, report in reports.items():
        track.write_json(paths.METRICS / f"evaluate/{split}.json", report)
    track.write_json(paths.METRICS / "evaluate/gates.json", metrics(outcomes))
    track.write_csv(paths.METRICS / "evaluate/scores.csv", plot_rows(reports, settings.primary_metric))


def _bytes(artifacts: list[str]) -> dict[str, int]:
    files = {artifact: paths.METRICS / f"generate/{artifact}.json" for artifact in artifacts}
    return {artifact: json.loads(file.read_text(encoding="utf-8"))["bytes"] for artifact, file in files.items()}


def _forget_other_types(types: list[str]) -> None:
    # DVC leaves the files of a type that was taken off the list, and this stage depends on the folders they lie in.
    # Types are written in capitals; an adapter or an importance matrix that lies beside them is not.
    for folder, pattern in (
        (paths.DATA_GENERATED, "*"),
        (paths.METRICS / "generate", "*.json"),
        (paths.METRICS / "quantize", "*.json"),
        (paths.GGUF, "*.gguf"),
    ):
        for path in folder.glob(pattern):
            if path.stem.isupper() and path.stem not in types:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    stage.run(main)
