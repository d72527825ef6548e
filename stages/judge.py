"""Let a language model mark the answers from 0 to 100 by a rubric; each verdict is bought once and kept.

reads   data/generated/, the file judge.rubric, params.yaml: judge, quantize.types; a key from the environment
writes  data/judged/<ARTIFACT>/{validation,test}.jsonl, data/judged/judge.json, metrics/judge.json
removes what is left in data/generated of quantization types that are no longer listed

Without judge.enabled data/judged is empty. Verdicts are kept in .scratch/judge/ as they arrive, and those that lie in
data/judged are used again; interrupted or out of budget, it buys only what is missing when it is run again.
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
from lathe.stage import Speeds

if TYPE_CHECKING:
    from lathe.evaluation.judge.judged_rows import Rows
    from lathe.evaluation.judge.request_verdicts import Ledger
    from lathe.evaluation.judge.verdict_cache import Cache

logger = logging.getLogger("lathe.judge")


def main(config: Config) -> Speeds:
    from lathe.config import artifacts
    from lathe.evaluation.judge import judged_rows
    from lathe.evaluation.judge.providers.provider import identity
    from lathe.evaluation.judge.verdict_cache import Cache

    names = artifacts.names(config.params.quantize.types)
    artifacts.forget_other_types(paths.DATA_GENERATED, config.params.quantize.types)
    settings = config.params.judge
    if not settings.enabled:
        with paths.whole_folder(paths.DATA_JUDGED):
            json_files.write_json(paths.METRICS / "judge.json", {"rows": 0})
        return {}

    rubric = judged_rows.read_rubric(paths.ROOT / settings.rubric)
    judge = identity(settings, paths.ROOT)
    wanted = judged_rows.collect(paths.DATA_GENERATED, names, rubric, settings, judge)
    with Cache(paths.SCRATCH / "judge/verdicts.sqlite") as cache:
        cache.adopt(judged_rows.verdicts_in(paths.DATA_JUDGED))
        speeds = _buy_missing(wanted, settings, cache)
        verdicts = cache.find(wanted.questions)
    with paths.whole_folder(paths.DATA_JUDGED) as folder:
        judged_rows.write(folder, wanted, verdicts)
        json_files.write_json(folder / judged_rows.FACTS, judged_rows.facts(wanted, rubric, settings, judge))
    json_files.write_json(paths.METRICS / "judge.json", judged_rows.counts(wanted, verdicts.values()))
    return speeds


def _buy_missing(wanted: "Rows", settings: Judge, cache: "Cache") -> Speeds:
    """Buy the verdicts that are not kept yet; raises InputError if one is still missing then."""
    from lathe.evaluation.judge.request_verdicts import Ledger, buy

    kept = cache.find(wanted.questions)
    missing = {key: question for key, question in wanted.questions.items() if key not in kept}
    logger.info(
        "%d rows, %d verdicts: %d kept, %d to be bought",
        len(wanted.keys),
        len(wanted.questions),
        len(kept),
        len(missing),
    )
    ledger = buy(missing, settings, cache, os.environ, paths.ROOT) if missing else Ledger()
    speeds = {"verdicts_kept": len(kept), **ledger.figures()}
    if len(missing) > ledger.bought:
        raise InputError(_what_is_missing(wanted, ledger, len(missing) - ledger.bought))
    return speeds


def _what_is_missing(wanted: "Rows", ledger: "Ledger", missing: int) -> str:
    places = {key: place for place, key in reversed(list(wanted.keys.items()))}
    for key, reason in ledger.unjudged.items():
        logger.warning("%s is not judged: %s", places[key], reason)
    reason = (
        ledger.stopped or f"the first: {places[next(iter(ledger.unjudged))]}: {next(iter(ledger.unjudged.values()))}"
    )
    there = len(wanted.questions) - missing
    return (
        f"{missing} of {len(wanted.questions)} verdicts are missing: {reason}. The other {there} are kept (this run "
        f"bought {ledger.bought}, for {ledger.requests} requests and a cost of {ledger.cost:.4g}); run again to buy "
        "only what is missing"
    )


if __name__ == "__main__":
    stage.run(main)
