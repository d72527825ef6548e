"""Do intervals hold the truth, and do rows show what `detectable` says? Simulated data sets, scored by `evaluate`.

Of each kind, data sets are drawn whose truth is known: how many of 100 intervals hold it, how often there is a p of at
most 0.05 where there is no difference, and how often where the difference is the one that should show in 80 of 100.

    python benchmarks/intervals.py                  # 1,000 data sets of each kind, about ten minutes
    python benchmarks/intervals.py --data-sets 100
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lathe.evaluation.detectable import compute_multiple, compute_smallest_share
from lathe.evaluation.evaluate import Resampling, ScoreDefinition, evaluate
from lathe.evaluation.metrics import compute_metric

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Drawn:
    """Row statistics (rows, 2) of two artifacts, and the cluster of each row, if there are any."""

    base: Array
    other: Array
    clusters: Array | None = None


@dataclass(frozen=True)
class Kind:
    """Data sets of one kind: how they are drawn for a true difference, the score of base, and what should show."""

    name: str
    draw: Callable[[np.random.Generator, float], Drawn]
    truth: float
    detectable: float
    metric: str = "exact_match"
    ignores_clusters: bool = False


@dataclass(frozen=True)
class Found:
    """Shares of the data sets; `told` is the mean of `detectable` over the true one, where that is the difference."""

    score_held: float
    difference_held: float
    false_alarms: float
    power: float
    told: float


def with_ones(values: Array) -> Array:
    """Return the statistics of a mean."""
    return np.stack([values, np.ones(len(values))], axis=1).astype(float)


def draw_shares(generator: np.random.Generator, change: float, *, rows: int, share: float, changed: float) -> Drawn:
    """Right and wrong answers: `changed` of the rows change, more of them to right than to wrong by `change`."""
    better, worse = (max(changed, change) + change) / 2, (max(changed, change) - change) / 2
    base = generator.random(rows) < share
    # Of all rows `better` become right and `worse` wrong, drawn among those that can.
    flips = np.where(base, generator.random(rows) < worse / share, generator.random(rows) < better / (1 - share))
    return Drawn(with_ones(base), with_ones(base ^ flips))


def draw_means(generator: np.random.Generator, change: float, *, rows: int, noise: float) -> Drawn:
    """Skewed scores from 0 to 1, such as ROUGE-L's, and those of an artifact that differs by noise."""
    base = generator.beta(4, 1, rows)
    return Drawn(with_ones(base), with_ones(base + change + generator.normal(0, noise, rows)))


def draw_nats(generator: np.random.Generator, change: float, *, rows: int) -> Drawn:
    """Nats and tokens of references of 1 to 20 tokens, of which perplexity is made; the truth is exp(0.5)."""
    tokens = generator.integers(1, 21, rows)
    return Drawn(*(np.stack([generator.gamma(tokens, 0.5), tokens], axis=1).astype(float) for _ in range(2)))


def draw_clusters(
    generator: np.random.Generator,
    change: float,
    *,
    clusters: int,
    sizes: tuple[int, int],
    between: float,
    within: float,
) -> Drawn:
    """Scores of documents with several rows each: rows of one share a part of their score, and of its change."""
    rows = generator.integers(sizes[0], sizes[1] + 1, clusters)
    numbers = np.repeat(np.arange(clusters), rows)
    base = generator.normal(0, between, clusters)[numbers] + generator.normal(0.5, within, len(numbers))
    moved = generator.normal(change, between, clusters)[numbers] + generator.normal(0, within, len(numbers))
    return Drawn(with_ones(base), with_ones(base + moved), numbers)


def draw_clustered_shares(
    generator: np.random.Generator, change: float, *, clusters: int, size: int, share: float
) -> Drawn:
    """Right and wrong answers of documents; how hard a document is varies (beta, an intra-class correlation of 1/3)."""
    numbers = np.repeat(np.arange(clusters), size)
    hard = generator.beta(2 * share, 2 * (1 - share), clusters)[numbers]
    base, other = (generator.random(len(numbers)) < hard for _ in range(2))
    return Drawn(with_ones(base), with_ones(other), numbers)


def list_kinds() -> list[Kind]:
    """Return the kinds, with what 80 of 100 data sets should show of each."""
    kinds = []
    for rows in (100, 500):
        multiple, changed = compute_multiple(rows), 0.2
        smallest = multiple * math.sqrt(changed / (rows + multiple**2))
        kinds.append(
            Kind(
                f"right or wrong, {rows} rows",
                partial(draw_shares, rows=rows, share=0.6, changed=changed),
                0.6,
                smallest,
            )
        )
    kinds.append(
        Kind(
            "right or wrong, all changes to the better, 500 rows",
            partial(draw_shares, rows=500, share=0.6, changed=0.0),
            0.6,
            compute_smallest_share(500),
        )
    )
    kinds.append(
        Kind("skewed mean, 100 rows", partial(draw_means, rows=100, noise=0.2), 0.8, compute_multiple(100) * 0.2 / 10.0)
    )
    kinds.append(Kind("perplexity, 100 rows", partial(draw_nats, rows=100), math.exp(0.5), math.nan, "perplexity"))
    for clusters, sizes in ((15, (5, 5)), (40, (5, 5)), (100, (5, 5)), (100, (1, 9))):
        between, within = 0.1, 0.1
        count = f"{sizes[0]}" if sizes[0] == sizes[1] else f"{sizes[0]} to {sizes[1]}"
        mean_size = (sizes[0] + sizes[1]) / 2
        # The variance of a ratio of sums: clusters weigh by their size.
        weight = (((sizes[1] - sizes[0] + 1) ** 2 - 1) / 12 + mean_size**2) / mean_size**2
        error = math.sqrt((weight * between**2 + within**2 / mean_size) / clusters)
        draw = partial(draw_clusters, clusters=clusters, sizes=sizes, between=between, within=within)
        detectable = compute_multiple(clusters) * error
        kinds.append(Kind(f"{clusters} clusters of {count} rows", draw, 0.5, detectable))
        if sizes == (5, 5) and clusters == 100:
            name = f"the same, as if the {clusters * 5} rows were their own"
            kinds.append(Kind(name, draw, 0.5, detectable, ignores_clusters=True))
    kinds.append(
        Kind(
            "right or wrong, 100 clusters of 5 rows",
            partial(draw_clustered_shares, clusters=100, size=5, share=0.7),
            0.7,
            math.nan,
        )
    )
    return kinds


def measure(kind: Kind, data_sets: int, *, samples: int = 1000) -> Found:
    """Score `data_sets` without a difference, and as many with the one that should show."""
    score = ScoreDefinition("score", lambda row: row["statistics"], partial(compute_metric, kind.metric))

    def score_all(change: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        generator = np.random.default_rng(0)
        intervals, deltas = [], []
        for number in range(data_sets):
            drawn = kind.draw(generator, change)
            answers = {
                "base": make_rows(drawn.base, None if kind.ignores_clusters else drawn.clusters),
                "merged": make_rows(drawn.other, None if kind.ignores_clusters else drawn.clusters),
            }
            report = evaluate(answers, {}, {"base": 0, "merged": 0}, [score], Resampling(samples, number))
            intervals += report["base"]["intervals"]
            deltas += [delta for delta in report["merged"]["deltas"] if delta["metric"] == "score"]
        return intervals, deltas

    intervals, deltas = score_all(0.0)
    shifted: list[dict[str, Any]] = [] if math.isnan(kind.detectable) else score_all(kind.detectable)[1]
    return Found(
        score_held=float(np.mean([one["low"] <= kind.truth <= one["high"] for one in intervals])),
        difference_held=float(np.mean([one["low"] <= 0 <= one["high"] for one in deltas])),
        false_alarms=float(np.mean([one["p"] <= 0.05 for one in deltas])),
        power=float(np.mean([one["p"] <= 0.05 for one in shifted])) if shifted else math.nan,
        told=float(np.mean([one["detectable"] for one in shifted])) / kind.detectable if shifted else math.nan,
    )


def make_rows(statistics: Array, clusters: Array | None) -> list[dict[str, Any]]:
    """Return answers as `evaluate` takes them, with their statistics in place of texts."""
    names: Sequence[Any] = [None] * len(statistics) if clusters is None else [str(name) for name in clusters]
    return [
        {"statistics": tuple(row), **({} if name is None else {"cluster": name})}
        for row, name in zip(statistics.tolist(), names, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulated coverage of intervals, and power.")
    parser.add_argument("--data-sets", type=int, default=1000)
    count = parser.parse_args().data_sets
    print(
        f"| {count} data sets of | score's interval holds | difference's holds | false alarms | power | "
        "`detectable` / true |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for kind in list_kinds():
        found = measure(kind, count)
        shares = (found.score_held, found.difference_held, found.false_alarms, found.power)
        cells = ["" if math.isnan(share) else f"{100 * share:.1f} %" for share in shares]
        told = "" if math.isnan(found.told) else f"{found.told:.2f}"
        print(f"| {kind.name} | {' | '.join(cells)} | {told} |", flush=True)


if __name__ == "__main__":
    main()
