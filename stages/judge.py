"""Let a language model score or compare the answers by a rubric; each verdict is paid for once and kept.

reads   data/generated/, the file judge.rubric, params.yaml: judge, evaluate.strip_thinking,
        evaluate.allow_mixed_engines, quantize.types, export.formats; an API key from the environment
writes  data/judged/<ARTIFACT>/{validation,test}.jsonl, data/judged/judge.json, metrics/judge.json
removes files in data/generated of quantization types and of formats that are no longer listed

Without judge.enabled, data/judged holds a note that says so. Verdicts are kept in .scratch/judge/ as they arrive, and
those in data/judged are reused. After an interruption or a spent budget, the next run requests only the missing ones.
"""

import logging
import os
from typing import TYPE_CHECKING

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.common.errors import InputError
from lathe.config.load import Config
from lathe.config.params import Judge
from lathe.stage import Throughput

if TYPE_CHECKING:
    from lathe.evaluation.judge.judged_rows import JudgedRows
    from lathe.evaluation.judge.request_verdicts import JudgeLedger
    from lathe.evaluation.judge.verdict_cache import VerdictCache

logger = logging.getLogger("lathe.judge")


def main(config: Config) -> Throughput:
    from lathe.config import artifacts
    from lathe.config.export_params import remove_unlisted_formats
    from lathe.evaluation.judge import judged_rows
    from lathe.evaluation.judge.providers.provider import identify_judge
    from lathe.evaluation.judge.verdict_cache import VerdictCache

    types, formats = config.params.quantize.types, config.params.export.formats
    names = [*artifacts.list_artifacts(types), *formats]
    artifacts.remove_unlisted_types(paths.DATA_GENERATED, types)
    remove_unlisted_formats(paths.DATA_GENERATED, formats)
    settings = config.params.judge
    if not settings.enabled:
        with paths.replace_folder(paths.DATA_JUDGED) as folder:
            paths.mark_unused(folder, "judge.enabled is false: no answer was judged")
            json_files.write_json(paths.METRICS / "judge.json", {"rows": 0})
        return {}

    rubric = judged_rows.read_rubric(paths.ROOT / settings.rubric)
    identity = identify_judge(settings, paths.ROOT)
    rows, commit = _collect_rows(config, names, rubric, identity)
    with VerdictCache(paths.SCRATCH / "judge/verdicts.sqlite") as cache:
        cache.add_tracked(judged_rows.read_verdicts(paths.DATA_JUDGED))
        speeds = _request_missing(rows, settings, cache)
        verdicts = cache.find(rows.prompts)
    with paths.replace_folder(paths.DATA_JUDGED) as folder:
        judged_rows.write_verdicts(folder, rows, verdicts)
        description = judged_rows.describe_judge(rows, rubric, settings, identity)
        if commit:
            description["against_commit"] = commit
        json_files.write_json(folder / judged_rows.JUDGE_FILE, description)
    json_files.write_json(paths.METRICS / "judge.json", judged_rows.count_verdicts(rows, verdicts.values()))
    return speeds


def _collect_rows(
    config: Config, names: list[str], rubric: str, identity: dict[str, str]
) -> "tuple[JudgedRows, str | None]":
    """Return what is judged, and the commit of the experiment that it is compared with, if there is one."""
    from lathe.evaluation.judge.judged_pairs import collect_pairs, read_other_answers
    from lathe.evaluation.judge.judged_rows import collect_prompts

    settings, strip_thinking = config.params.judge, config.params.evaluate.strip_thinking
    if settings.mode == "score":
        rows = collect_prompts(paths.DATA_GENERATED, names, rubric, settings, identity, strip_thinking=strip_thinking)
        return rows, None
    others = read_other_answers(paths.DATA_GENERATED, names, settings.against)
    pairs = collect_pairs(
        paths.DATA_GENERATED,
        names,
        rubric,
        settings,
        identity,
        others,
        strip_thinking=strip_thinking,
        allow_mixed_engines=config.params.evaluate.allow_mixed_engines,
    )
    return pairs, others.commit


def _request_missing(rows: "JudgedRows", settings: Judge, cache: "VerdictCache") -> Throughput:
    """Request the verdicts that are not in the cache; raises InputError if one is still missing after that."""
    from lathe.evaluation.judge.request_verdicts import JudgeLedger, request_verdicts

    kept = cache.find(rows.prompts)
    missing = {key: prompt for key, prompt in rows.prompts.items() if key not in kept}
    logger.info(
        "%d rows, %d verdicts: %d kept, %d to be requested", len(rows.keys), len(rows.prompts), len(kept), len(missing)
    )
    ledger = request_verdicts(missing, settings, cache, os.environ, paths.ROOT) if missing else JudgeLedger()
    speeds = {"verdicts_kept": len(kept), **ledger.to_metrics()}
    if len(missing) > ledger.bought:
        raise InputError(_describe_missing(rows, ledger, len(missing) - ledger.bought), code="missing-verdicts")
    return speeds


def _describe_missing(rows: "JudgedRows", ledger: "JudgeLedger", missing: int) -> str:
    places = {key: place for place, key in reversed(list(rows.keys.items()))}
    for key, reason in ledger.unjudged.items():
        logger.warning("%s is not judged: %s", places[key], reason)
    reason = (
        ledger.stopped or f"the first: {places[next(iter(ledger.unjudged))]}: {next(iter(ledger.unjudged.values()))}"
    )
    kept = len(rows.prompts) - missing
    return (
        f"{missing} of {len(rows.prompts)} verdicts are missing: {reason}. The other {kept} are kept (this run bought "
        f"{ledger.bought}, for {ledger.requests} requests and a cost of {ledger.cost:.4g}); run again to request only "
        "the missing ones"
    )


if __name__ == "__main__":
    stage.run(main)
