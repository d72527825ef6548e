"""Checks of the parameters against the held-out rows: whether the references fit, and the score fits them.

`preprocess` reports lengths and kind of the references; this compares them with `generate` and `evaluate`. It is done
when the training starts and in `lathe doctor`, and by no stage of its own: a stage that compared them would depend on
these parameters, and a preprocess that did would run again, with all that follows, for another generate.max_new_tokens.
What only warns or refuses can change no output, so that DVC need not know of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lathe.common.numbers import round_up
from lathe.config.gates import parse_gate
from lathe.config.params import Evaluate, Generate, Params

# Median number of words above which a reference is prose, that no model repeats word for word.
PROSE_WORDS = 20

# What is measured of documents, which nobody asks for an answer.
SCORES_OF_DOCUMENTS = ("perplexity", "general_perplexity", "kl", "bytes")

# A quantile of the report above a limit means that more than this share of the rows is above it.
SHARES = {"min": "all", "p50": "more than half", "p90": "more than 10 %", "p99": "more than 1 %"}

# Beyond this multiple of the length that 99 % have, the longest reference is an exception.
OUTLIER_FACTOR = 2


@dataclass(frozen=True)
class Misfit:
    """A parameter that does not fit the held-out rows: what is wrong, and what to set.

    With a `code` the run cannot give a useful result, and is refused.
    """

    text: str
    remedy: str
    code: str | None = None


def find_misfits(report: Mapping[str, Any], params: Params) -> Iterator[Misfit]:
    """Yield what does not fit, by the report of preprocess; nothing if it has no references, as an older one."""
    splits = {split["split"]: split for split in report["splits"] if "references" in split and split["kept"]}
    if not splits:
        return
    yield from _check_method(report, params)
    yield from _check_documents(splits, params)
    yield from _check_answers(splits, params.generate)
    yield from _check_context(splits, params.generate)
    yield from _check_truncation(splits, params)
    yield from _check_metric(splits, params.evaluate)
    yield from _check_tools(report, splits, params.evaluate)
    yield from _check_scores(splits, params.evaluate)


def _check_method(report: Mapping[str, Any], params: Params) -> Iterator[Misfit]:
    """Refuse a training from prompts on documents, which have none."""
    method = params.training.method
    if method != "sft" and any(columns.get("format") == "text" for columns in report.get("columns", [])):
        yield Misfit(
            f"rows are documents (format text), and training.method is {method}, which needs prompts",
            "set training.method to sft, or leave the documents out",
            "documents-without-prompts",
        )


def _check_documents(splits: Mapping[str, Any], params: Params) -> Iterator[Misfit]:
    """Refuse what documents cannot have: answers that are scored, compared or judged."""
    found = {name: split["references"].get("documents", 0) for name, split in splits.items()}
    if not any(found.values()):
        return
    if params.judge.enabled:
        yield Misfit(
            "held-out rows are documents (format text), which have no answers, and judge.enabled is true",
            "set judge.enabled to false",
            "documents-without-answers",
        )
    if any(documents < splits[name]["kept"] for name, documents in found.items()):
        return
    scores = {"evaluate.primary_metric": [params.evaluate.primary_metric]} | {
        f"the gate {gate!r}": [score for _, score in parse_gate(gate).scores] for gate in params.evaluate.gates or []
    }
    for where, names in scores.items():
        if any(name not in SCORES_OF_DOCUMENTS for name in names):
            shown = ", ".join(name for name in names if name not in SCORES_OF_DOCUMENTS)
            yield Misfit(
                f"all held-out rows are documents (format text), which have no answers, and {where} needs {shown}",
                f"choose one of {', '.join(SCORES_OF_DOCUMENTS)}",
                "documents-without-answers",
            )


def _check_answers(splits: Mapping[str, Any], generate: Generate) -> Iterator[Misfit]:
    """Compare the references with the longest answer that is generated; the token that ends one may be missing."""
    limit = generate.max_new_tokens
    if limit == "auto":
        return
    lengths = {name: split["references"]["tokens"] for name, split in splits.items()}
    shares = {name: _find_share(quantiles, limit + 1) for name, quantiles in lengths.items()}
    cut = {name: share for name, share in shares.items() if share}
    if not cut:
        return
    longest = max(quantiles["max"] for quantiles in lengths.values())
    most = max(quantiles["p99"] for quantiles in lengths.values())
    remedy = f"set generate.max_new_tokens to {_choose_limit(longest, most)}"
    shown = " and ".join(f"{share} of the {name} references" for name, share in cut.items())
    text = f"{shown} are longer than generate.max_new_tokens {limit}: the longest has {longest} tokens"
    if all(share == SHARES["min"] for share in shares.values()):
        yield Misfit(f"{text}; no answer could be complete", remedy, "references-too-long")
    else:
        yield Misfit(f"{text}; such answers are cut, and score as wrong or incomplete", remedy)


def _check_context(splits: Mapping[str, Any], generate: Generate) -> Iterator[Misfit]:
    """Compare prompt and reference with the context: the stage `generate` refuses rows that do not fit into it."""
    limit = generate.n_ctx
    if limit == "auto":
        return
    longest = max(split["references"]["conversation_tokens"]["max"] for split in splits.values())
    if longest < limit:
        return
    names = [name for name, split in splits.items() if split["references"]["conversation_tokens"]["max"] >= limit]
    text = (
        f"prompt and reference of a {' and of a '.join(names)} row have {longest} tokens, which do not fit into "
        f"generate.n_ctx {limit}"
    )
    remedy = f"set generate.n_ctx to {_round_tokens_up(longest + 2)}"
    shortest = min(split["references"]["conversation_tokens"]["min"] for split in splits.values())
    if generate.max_rows is None or shortest >= limit:
        yield Misfit(f"{text}; generate would fail after the training", remedy, "conversations-too-long")
    else:  # it may be none of those that are answered
        yield Misfit(f"{text}; generate fails if it is among the first generate.max_rows {generate.max_rows}", remedy)


def _check_truncation(splits: Mapping[str, Any], params: Params) -> Iterator[Misfit]:
    """Look for references that preprocess has cut: right answers are then scored as wrong."""
    for name, split in splits.items():
        cut = split["truncated"]
        if cut["side"] == "answer" and 100 * cut["rows"] > split["kept"]:
            yield Misfit(
                f"{cut['rows']} of {split['kept']} {name} references are cut to training.max_length "
                f"{params.training.max_length}; whole answers are compared with them",
                "raise training.max_length, or set preprocess.too_long to drop",
            )


def _check_metric(splits: Mapping[str, Any], evaluate: Evaluate) -> Iterator[Misfit]:
    """Look for prose that is to be repeated word for word; with a pattern only a part of it is."""
    if evaluate.primary_metric != "exact_match" or evaluate.answer_pattern is not None:
        return
    references = {name: split["references"] for name, split in splits.items()}
    prose = {
        name: found["words"]["p50"]
        for name, found in references.items()
        if found["words"]["p50"] > PROSE_WORDS and 2 * found["json_rows"] < splits[name]["kept"]
    }
    if not prose:
        return
    shown = ", ".join(f"{words} words in {name}" for name, words in prose.items())
    better = next((metric for metric in ("rouge_l", "token_f1") if metric in evaluate.metrics), None)
    added = "" if better else ", and add it to evaluate.metrics"
    yield Misfit(
        f"evaluate.primary_metric is exact_match, and the references are prose (median {shown}), which no model "
        "repeats word for word: every artifact would score about 0",
        f"set evaluate.primary_metric to {better or 'rouge_l or token_f1'}{added} (json_fields is for JSON, "
        "exact_match for labels and other short answers), or evaluate.answer_pattern to the part that counts",
    )


def _check_tools(report: Mapping[str, Any], splits: Mapping[str, Any], evaluate: Evaluate) -> Iterator[Misfit]:
    """Look for scores of calls where no row has tools, which would be null, or where no call can be read."""
    listed = [metric for metric in evaluate.metrics if metric.startswith("tool_calls")]
    if listed and report.get("unread_calls"):
        yield Misfit(
            f"evaluate.metrics lists {' and '.join(listed)}, and calls cannot be read from what the model's chat "
            "template writes: every answer would count as one without calls",
            "take them off the list, or choose a model or a template whose calls are read (template: chatml-tools in "
            "the model's preset)",
            "calls-not-read" if evaluate.primary_metric in listed else None,
        )
    if not listed or any(split["references"].get("tool_rows") for split in splits.values()):
        return
    yield Misfit(
        f"evaluate.metrics lists {' and '.join(listed)}, and no held-out row has tools: there would be no score",
        "take them off the list, or choose a dataset with a column tools",
        "no-tools" if evaluate.primary_metric in listed else None,
    )


def _check_scores(splits: Mapping[str, Any], evaluate: Evaluate) -> Iterator[Misfit]:
    """Refuse to choose or to gate by a score that no validation row has: of JSON or of calls, where there is none."""
    if (validation := splits.get("validation")) is None:
        return
    found = validation["references"]
    missing = {"json_valid": "is JSON", "json_fields": "is JSON"} if not found["json_rows"] else {}
    if not found.get("tool_rows"):
        missing |= {"tool_calls": "is of a row with tools", "tool_calls_f1": "is of a row with tools"}
    steering = {"evaluate.primary_metric": [evaluate.primary_metric] if "json" in evaluate.primary_metric else []} | {
        f"the gate {gate!r}": [score for _, score in parse_gate(gate).scores] for gate in evaluate.gates or []
    }
    for where, names in steering.items():
        if lacking := next((name for name in names if name in missing), None):
            yield Misfit(
                f"{where} needs {lacking}, and no validation reference {missing[lacking]}: there would be no score",
                "choose another score",
                "score-without-rows",
            )


def _find_share(quantiles: Mapping[str, int], limit: int) -> str | None:
    """Return how many rows are above a limit in words; None for at most one in a hundred."""
    return next((share for name, share in SHARES.items() if quantiles[name] > limit), None)


def _choose_limit(longest: int, most: int) -> str:
    """Return a round number that holds every reference, or 99 % of them if the longest is an exception."""
    if longest <= OUTLIER_FACTOR * most:
        return f"{_round_tokens_up(longest)}, which holds all of them"
    return f"{_round_tokens_up(most)}, which holds 99 % of them ({_round_tokens_up(longest)} holds all)"


def _round_tokens_up(tokens: int) -> int:
    """Return the next multiple of 16, of 64 above 256, and of 256 above 1024."""
    step = 16 if tokens <= 256 else 64 if tokens <= 1024 else 256
    return round_up(tokens, step)
