"""Clusters: rows that belong together, such as questions about one document, and are resampled together.

Answers to rows of one document err alike, so that a hundred of them say less than a hundred rows of their own. Every
score is a function of sums over rows; with the sums of each cluster in place of the rows, intervals, differences and
p values are of whole clusters (Cameron, Gelbach and Miller 2008; Miller 2024, "Adding error bars to evals").
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lathe.common.jsonl import iterate_jsonl

CLUSTER = "cluster"  # key of a row in data/processed, and then of its answer


def add_clusters(answers: Mapping[str, Sequence[dict[str, Any]]], processed: Path) -> None:
    """Add to the answers of every artifact the `cluster` of their rows in a processed split, where these have one."""
    clusters = [row.get(CLUSTER) for row in iterate_jsonl(processed)]
    for rows in answers.values():
        for row, cluster in zip(rows, clusters, strict=False):  # only the first rows may have been answered
            if cluster is not None:
                row[CLUSTER] = cluster


def number_clusters(rows: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    """Return the number of each row's cluster, (rows,), from 0 in the order of the rows; one without is its own."""
    numbers: dict[object, int] = {}
    names = (row.get(CLUSTER) if row.get(CLUSTER) is not None else ("row", index) for index, row in enumerate(rows))
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def sum_clusters(statistics: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the sums of row statistics in each cluster, (rows, k) -> (clusters, k)."""
    count = int(numbers.max()) + 1 if len(numbers) else 0
    if count == len(numbers):
        return statistics
    sums = np.zeros((count, statistics.shape[1]))
    np.add.at(sums, numbers, statistics)
    return sums
