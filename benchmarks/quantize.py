"""What each quantization type costs in quality, with and without the importance matrix.

python benchmarks/quantize.py [--rows 500] [--types Q4_K_M,Q2_K] [--plot docs/quantization.svg]

Takes what the pipeline left in this checkout: models/gguf/merged-f16.gguf, models/imatrix/imatrix.gguf, the first
held-out rows of data/processed (validation, then test), and the paragraphs of `evaluate.general_text`. Each type is
quantized twice, and the file measured as `generate` does: its answers to the rows, and the KL divergence from the f16
file over the references and over the paragraphs.

Prints a Markdown table: bytes, bits per weight, mean KL(f16 || file) in nats per token with its 95 % interval
(bootstrap over rows, or over paragraphs), and exact match; and, where a type can do without, the ratio of the KL with
the matrix to that without on the same resamples. Draws size against KL and against exact match.
"""

import argparse
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import machine
import numpy as np
from numpy.typing import NDArray

from lathe.commands.general import choose_generation_sizes
from lathe.common import paths
from lathe.common.jsonl import read_jsonl
from lathe.config.load import load
from lathe.config.quantization_types import FILES_THAT_CANNOT_BE_MADE, FILES_THAT_NEED_IMATRIX
from lathe.evaluation.text_metrics import exact_match
from lathe.gguf.description import describe_gguf
from lathe.gguf.quantize import quantize
from lathe.gguf.tensor_types import list_file_types
from lathe.inference import likelihood
from lathe.inference.general_text import read_paragraphs
from lathe.inference.generate import Generator
from lathe.inference.generation_sizes import HELD_OUT
from lathe.models.answer_split import split_answer

SAMPLES = 2000
# Of these, llama.cpp makes files as large as of others, or larger than the original, from a dense f16 model.
NOT_OF_INTEREST = {"F32", "F16", "BF16", "MXFP4_MOE"}


@dataclass(frozen=True)
class Divergence:
    """KL from the f16 file: `kl` is the sum of each row's divergence, `tokens` how many it is over."""

    kl: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """KL in nats per token."""
        return float(self.kl.sum() / self.tokens.sum())

    def resample(self) -> NDArray[np.float64]:
        """Return the mean over the rows drawn again and again, the same ones for every file."""
        drawn = np.random.default_rng(0).integers(0, len(self.kl), (SAMPLES, len(self.kl)))
        return self.kl[drawn].sum(1) / self.tokens[drawn].sum(1)

    def interval(self) -> tuple[float, float]:
        """Return 95 % of it."""
        low, high = np.quantile(self.resample(), [0.025, 0.975])
        return float(low), float(high)


@dataclass(frozen=True)
class Measured:
    """One file, measured on the references of the held-out rows and on general text."""

    type: str
    by_matrix: bool
    bytes: int
    bits_per_weight: float
    exact_match: float
    rows: Divergence
    general: Divergence


def main() -> None:
    """Measure every type, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500, help="held-out rows, validation before test (default 500)")
    parser.add_argument("--types", help="types, with commas between (default: all that make a dense model smaller)")
    parser.add_argument("--plot", type=Path, help="SVG file to draw, such as docs/quantization.svg (default: none)")
    chosen = parser.parse_args()
    original, matrix = paths.GGUF / "merged-f16.gguf", paths.IMATRIX / "imatrix.gguf"
    for file in (original, matrix, paths.DATA_PROCESSED / "validation.jsonl"):
        if not file.is_file():
            raise SystemExit(f"error: {file}: no such file; run the pipeline first: make repro")
    sensible = sorted(set(list_file_types()) - FILES_THAT_CANNOT_BE_MADE - NOT_OF_INTEREST)
    types = chosen.types.split(",") if chosen.types else sensible
    splits = [paths.DATA_PROCESSED / f"{split}.jsonl" for split in HELD_OUT]
    rows = [row for file in splits if file.is_file() for row in read_jsonl(file)][: chosen.rows]
    params = load().params
    texts = [_split_first_word(text) for text in read_paragraphs(paths.ROOT / params.evaluate.general_text)]
    measured: list[Measured] = []
    with _opened(original) as reference, tempfile.TemporaryDirectory(dir=paths.GGUF) as folder:
        pairs = [split_answer(reference.chat_template, row["messages"], row.get("tools"))[:2] for row in rows]
        measure = partial(_measure, pairs=pairs, texts=texts, reference=reference)
        f16 = measure("F16", False, original, reference)
        for name, by_matrix in itertools.product(types, (False, True)):
            file = Path(folder) / "file.gguf"
            if by_matrix or name not in FILES_THAT_NEED_IMATRIX:
                quantize(
                    original, file, type=name, threads=os.cpu_count() or 1, importance=matrix if by_matrix else None
                )
                with _opened(file) as generator:
                    measured.append(measure(name, by_matrix, file, generator))
                print(f"{name}{' with the matrix' if by_matrix else ''}: measured", file=sys.stderr, flush=True)
    print(
        f"{machine.describe()}; {len(rows)} held-out rows, {int(f16.rows.tokens.sum())} tokens of references; "
        f"{len(texts)} paragraphs, {int(f16.general.tokens.sum())} tokens\n"
    )
    print("\n".join(_table(f16, measured)))
    if chosen.plot:
        _draw(f16, measured, chosen.plot)


def _opened(file: Path) -> Generator:
    settings, sizes = load().params.generate, choose_generation_sizes()
    return Generator(file, n_parallel=settings.n_parallel, n_ctx=sizes.n_ctx, threads=os.cpu_count() or 1)


def _split_first_word(text: str) -> tuple[str, str]:
    """Return what a text begins with, which nothing is scored on, and the rest."""
    word, space, rest = text.partition(" ")
    return word, space + rest


def _measure(
    name: str,
    by_matrix: bool,
    file: Path,
    generator: Generator,
    *,
    pairs: Sequence[tuple[str, str]],
    texts: Sequence[tuple[str, str]],
    reference: Generator,
) -> Measured:
    answers = generator.complete(
        [prompt for prompt, _ in pairs], max_new_tokens=choose_generation_sizes().max_new_tokens
    )
    facts = describe_gguf(file)
    return Measured(
        name,
        by_matrix,
        facts["bytes"],
        facts["bits_per_weight"],
        fmean(exact_match(answer.text, wanted) for answer, (_, wanted) in zip(answers, pairs, strict=True)),
        _measure_divergence(generator, pairs, reference),
        _measure_divergence(generator, texts, reference),
    )


def _measure_divergence(generator: Generator, pairs: Sequence[tuple[str, str]], reference: Generator) -> Divergence:
    against = None if generator is reference else reference
    scored = dict(likelihood.score_references(generator, lambda: pairs, against=against))
    in_order = [scored[number] for number in range(len(pairs))]
    return Divergence(
        np.array([(one.kl or 0.0) * one.tokens for one in in_order]),
        np.array([float(one.tokens) for one in in_order]),
    )


def _format(divergence: Divergence) -> str:
    low, high = divergence.interval()
    return f"{divergence.mean:.2e} ({low:.1e} to {high:.1e})"


def _format_ratio(one: Divergence, other: Divergence) -> str:
    low, high = np.quantile(one.resample() / other.resample(), [0.025, 0.975])
    return f"{one.mean / other.mean:.2f} ({low:.2f} to {high:.2f})"


def _table(f16: Measured, measured: Sequence[Measured]) -> Iterator[str]:
    yield "| type | matrix | bytes | bits per weight | exact match | KL on rows | ratio | KL on general text | ratio |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    without = {one.type: one for one in measured if not one.by_matrix}
    order = {one.type: one.bytes for one in measured}
    for one in (f16, *sorted(measured, key=lambda one: (-order[one.type], one.type, one.by_matrix))):
        other = without.get(one.type) if one.by_matrix else None
        cells = [one.type, "yes" if one.by_matrix else "", f"{one.bytes:,}", f"{one.bits_per_weight:.2f}"]
        cells.append(f"{100 * one.exact_match:.1f} %")
        for name in ("rows", "general"):
            divergence: Divergence = getattr(one, name)
            cells.append("0" if one is f16 else _format(divergence))
            cells.append(_format_ratio(divergence, getattr(other, name)) if other else "")
        yield f"| {' | '.join(cells)} |"


def _draw(f16: Measured, measured: Sequence[Measured], target: Path) -> None:
    """Above, size against KL; below, against exact match; a line from each file without the matrix to that with it."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "lathe", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(10, 11), sharex=True, dpi=72)
    for axes, value in ((upper, lambda one: one.rows.mean), (lower, lambda one: 100 * one.exact_match)):
        for by_matrix, color, label in ((False, "#7b8794", "without the matrix"), (True, "#2563a8", "with the matrix")):
            of_this = [one for one in measured if one.by_matrix == by_matrix]
            points = [(one.bytes / 1e6, value(one)) for one in of_this]
            axes.scatter(*zip(*points, strict=True), s=22, color=color, label=label, zorder=3)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for one in measured:
        low, high = one.rows.interval()
        color = "#2563a8" if one.by_matrix else "#7b8794"
        upper.plot([one.bytes / 1e6] * 2, [low, high], color=color, linewidth=0.8, alpha=0.6)
    lower.axhline(100 * f16.exact_match, color="#1f2933", linewidth=0.8, linestyle="--")
    upper.set(yscale="log", ylabel="KL to the f16 file (nats per token), 95 % interval")
    lower.set(xlabel=f"size of the GGUF (MB); f16: {f16.bytes / 1e6:.2f}", ylabel="exact match on held-out rows (%)")
    upper.legend(frameon=False)
    figure.tight_layout()
    of_matrix = [one for one in measured if one.by_matrix]
    drawn = [(one.bytes / 1e6, one.rows.mean) for one in measured]
    _label(upper, [(one.bytes / 1e6, one.rows.mean, one.type) for one in of_matrix], drawn)
    # Most lie on the line of the f16 file: named is what loses a point or more.
    losing = [one for one in of_matrix if one.exact_match < f16.exact_match - 0.01]
    drawn = [(one.bytes / 1e6, 100 * one.exact_match) for one in measured]
    _label(lower, [(one.bytes / 1e6, 100 * one.exact_match, one.type) for one in losing], drawn)
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def _label(axes: Any, points: Sequence[tuple[float, float, str]], drawn: Sequence[tuple[float, float]]) -> None:
    """Write each name as near to its point as it covers no other and nothing `drawn`; at 72 dpi a pixel is a point."""
    size = 7
    spots = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in map(axes.transData.transform, drawn)]
    places = sorted(itertools.product((7, -7, 25, -25), range(-110, 111, 3)), key=lambda at: math.hypot(*at))
    for (x, y), (column, row, name) in sorted(zip(spots, points, strict=True)):
        width = 0.68 * size * len(name)
        for across, up in places:
            left = x + across if across > 0 else x + across - width
            box = (left, y + up - size / 2 - 1, left + width, y + up + size / 2 + 1)
            if not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            ):
                break
        else:
            raise RuntimeError(f"no room for the label {name}")
        taken.append(box)
        axes.annotate(
            name,
            (column, row),
            textcoords="offset points",
            xytext=(across, up),
            ha="left" if across > 0 else "right",
            va="center",
            fontsize=size,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#7b8794", "shrinkA": 0, "shrinkB": 2},
        )


if __name__ == "__main__":
    main()
