"""Draw the README's pictures and fill in its results from dvc.yaml and the committed metrics.

writes  docs/pipeline.svg, docs/result.svg, the table between the `results` marks of README.md
run     python docs/build.py
"""

import csv
import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import networkx
from dvc.repo import Repo

ROOT = Path(__file__).resolve().parents[1]
FIRST_MARK, LAST_MARK = "<!-- results -->", "<!-- end of results -->"
INK, ACCENT, SOFT, MUTED = "#1f2933", "#2563a8", "#e8eff7", "#7b8794"


def main() -> None:
    # Equal inputs give equal bytes: no date, no random element names, text as text.
    plt.rcParams.update({"svg.hashsalt": "lathe", "svg.fonttype": "none", "font.family": "sans-serif"})
    draw_pipeline(ROOT / "docs/pipeline.svg")
    draw_result(ROOT / "docs/result.svg")
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text(encoding="utf-8").partition(FIRST_MARK)
    _, end, after = rest.partition(LAST_MARK)
    readme.write_text(f"{before}{mark}\n{results()}\n{end}{after}", encoding="utf-8")


def results() -> str:
    """Return the table of test scores as Markdown, 95 % intervals in brackets."""
    report: dict[str, dict[str, Any]] = json.loads((ROOT / "metrics/evaluate/test.json").read_text(encoding="utf-8"))
    lines = [
        "| artifact | exact match | JSON fields | perplexity | KL to f16 | general text | stops by itself | size |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, scores in report.items():
        ends = {interval["metric"]: (interval["low"], interval["high"]) for interval in scores["intervals"]}
        cells = [
            f"`{name}`" + ("" if name.isupper() else " (f16)"),
            *(_percent(scores[key], ends.get(key)) for key in ("exact_match", "json_fields")),
            _short(scores["perplexity"]),
            "" if scores["kl"] is None else f"{scores['kl']:.1e}",
            _short(scores["general_perplexity"]),
            _percent(scores["stop_rate"]),
            f"{scores['bytes'] / 1e6:.2f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    return "\n".join(lines)


def _percent(share: float | None, ends: tuple[float, float] | None = None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.1f} %" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if value < 100 else f"{value:,.0f}"


def draw_pipeline(target: Path) -> None:
    """Boxes are the stages of dvc.yaml, a matrix as one box with its items; arrows are what must come first."""
    items, graph = _stages()
    column = _columns(graph)
    place: dict[str, tuple[float, float]] = {}
    # The way to the end is a straight line; what branches off stands below it.
    for name in sorted(items, key=lambda name: -len(networkx.descendants(graph, name))):
        below = sum(column[other] == column[name] for other in place)
        place[name] = (column[name] * 2.6, -1.5 * below)
    figure, axes = plt.subplots(figsize=(13, 3.2))
    for first, second in sorted(graph.edges):
        (x0, y0), (x1, y1) = place[first], place[second]
        start, end = (x0 + 1.12, y0), (x1 - 1.12, y1) if y1 <= y0 else (x1, y1 - 0.5)
        bend = "arc3" if y0 == y1 else "angle3,angleA=0,angleB=90" if y1 > y0 else "arc3,rad=0.2"
        props = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 1.1, "connectionstyle": bend, "shrinkA": 0}
        axes.annotate("", xy=end, xytext=start, arrowprops={**props, "shrinkB": 0}, zorder=1)
    for name, (x, y) in place.items():
        shown = textwrap.fill(" ".join(items[name]), 18)
        title = name.replace("_", "_\n")
        axes.text(
            x, y, title, ha="center", va="bottom" if shown else "center", fontsize=9, weight="bold", color=INK, zorder=3
        )
        axes.text(x, y - 0.08, shown, ha="center", va="top", fontsize=7, color=MUTED, zorder=3)
        box = plt.Rectangle((x - 1.12, y - 0.5), 2.24, 1.0, facecolor=SOFT, edgecolor=ACCENT, linewidth=1.2, zorder=2)
        axes.add_patch(box)
    axes.set_xlim(-1.3, max(x for x, _ in place.values()) + 1.3)
    axes.set_ylim(min(y for _, y in place.values()) - 0.7, 0.7)
    axes.axis("off")
    _save(figure, target)


def draw_result(target: Path) -> None:
    """Left the loss curves, right the test scores against file size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for name, label in (("train", "training"), ("eval", "validation")):
        points = _curve(ROOT / f"metrics/train/plots/metrics/{name}/loss.tsv")
        left.plot(*zip(*points, strict=True), label=label, color=ACCENT if name == "train" else INK)
    left.set(xlabel="optimizer step", ylabel="loss (nats per answer token)", yscale="log")
    left.legend(frameon=False)
    report: dict[str, dict[str, Any]] = json.loads((ROOT / "metrics/evaluate/test.json").read_text(encoding="utf-8"))
    for artifact, scores in report.items():
        x, y = scores["bytes"] / 1e6, 100 * scores["exact_match"]
        right.scatter(x, y, color=MUTED if artifact.startswith("base") else ACCENT, zorder=3)
        above = artifact not in {"base_few_shot", "Q4_K_M"}
        right.annotate(
            artifact, (x, y), textcoords="offset points", xytext=(0, 8 if above else -14), ha="center", fontsize=9
        )
    right.set(xlabel="size of the GGUF (MB)", ylabel="test exact match (%)", ylim=(-12, 112))
    right.set_xlim(0, 1.15 * max(scores["bytes"] for scores in report.values()) / 1e6)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, target)


def _stages() -> tuple[dict[str, list[str]], networkx.DiGraph]:
    """Return the items of each stage, and the graph of stages without the arrows that others imply."""
    with Repo(str(ROOT)) as repo:
        graph = repo.index.graph
        stages = [stage for stage in repo.index.stages if stage.cmd]
    items: dict[str, list[str]] = {}
    for stage in stages:
        name, _, item = stage.name.partition("@")
        items.setdefault(name, [])
        if item:
            items[name].append(item)
    named = [
        (second.name.partition("@")[0], first.name.partition("@")[0])
        for first, second in graph.edges
        if first.cmd and second.cmd
    ]
    return items, networkx.transitive_reduction(networkx.DiGraph((one, other) for one, other in named if one != other))


def _columns(graph: networkx.DiGraph) -> dict[str, int]:
    """Place each stage one column after the last of those it needs."""
    return {name: number for number, names in enumerate(networkx.topological_generations(graph)) for name in names}


def _curve(file: Path) -> list[tuple[int, float]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(lines, delimiter="\t")]


def _save(figure: Any, target: Path) -> None:
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
