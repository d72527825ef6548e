"""Draw the pictures of the documentation and fill in its results, from dvc.yaml and the committed metrics.

writes  docs/pipeline.svg, docs/result.svg, the table between the `results` marks of README.md and docs/evaluation.md
run     python docs/build.py
"""

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import networkx
from dvc.repo import Repo

from lathe.common.json_files import read_json
from lathe.common.metric_files import unwrap_list

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs/evaluation.md")
FIRST_MARK, LAST_MARK = "<!-- results -->", "<!-- end of results -->"
INK, ACCENT, SOFT, MUTED = "#1f2933", "#2563a8", "#e8eff7", "#7b8794"


def main() -> None:
    # Equal inputs give equal bytes: no date, no random element names, text as text.
    plt.rcParams.update({"svg.hashsalt": "lathe", "svg.fonttype": "none", "font.family": "sans-serif"})
    draw_pipeline(ROOT / "docs/pipeline.svg")
    draw_result(ROOT / "docs/result.svg")
    for page in PAGES:
        before, mark, rest = page.read_text(encoding="utf-8").partition(FIRST_MARK)
        _, end, after = rest.partition(LAST_MARK)
        page.write_text(f"{before}{mark}\n\n{results()}\n\n{end}{after}", encoding="utf-8")


def results() -> str:
    """Return the table of test scores as Markdown, 95 % intervals in brackets."""
    report: dict[str, dict[str, Any]] = unwrap_list(read_json(ROOT / "metrics/evaluate/test.json"))
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
    """Boxes are the scripts of the stages, with what each is run for; arrows are what must come first."""
    items, graph = _stages()
    column = _columns(graph)
    row: dict[str, int] = {}
    # The way to the end is a straight line, broken once like a line of text; what branches off stands below it.
    for name in sorted(items, key=lambda name: -len(networkx.descendants(graph, name))):
        row[name] = sum(column[other] == column[name] for other in row)
    broken = max(column.values()) // 2 + 1
    second_line = 1 + max(row[name] for name in row if column[name] < broken)
    place = {
        name: (2.6 * (column[name] % broken), -1.5 * (row[name] + second_line * (column[name] // broken)))
        for name in row
    }
    figure, axes = plt.subplots(figsize=(13, 1.25 * (1 + max(-y for _, y in place.values()) / 1.5)))
    for first, second in sorted(graph.edges):
        (x0, y0), (x1, y1) = place[first], place[second]
        if x1 < x0:  # to the next line, round what stands below this one
            axes.plot([x0, x0, x1, x1], [y0 - 0.55, y1 + 0.8, y1 + 0.8, y1 + 0.7], color=MUTED, linewidth=1.1, zorder=1)
            begin, end, bend = (x1, y1 + 0.75), (x1, y1 + 0.6), "arc3"
        else:
            begin, end, bend = (x0 + 1.05, y0), (x1 - 1.05, y1), "arc3" if y0 == y1 else "arc3,rad=0.1"
        props = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 1.1, "connectionstyle": bend}
        axes.annotate("", xy=end, xytext=begin, arrowprops={**props, "shrinkA": 0, "shrinkB": 0}, zorder=1)
    for name, (x, y) in place.items():
        shown = " ".join(items[name]) if len(items[name]) <= 3 else f"{len(items[name])} artifacts"
        axes.text(
            x,
            y - 0.02 if shown else y,
            name.replace("_", "\n"),
            ha="center",
            va="bottom" if shown else "center",
            linespacing=1.0,
            fontsize=11,
            weight="bold",
            color=INK,
            zorder=3,
        )
        axes.text(
            x, y - 0.14, shown, ha="center", va="top", fontsize=7.5 if len(shown) < 20 else 6.6, color=MUTED, zorder=3
        )
        box = plt.Rectangle((x - 1.05, y - 0.55), 2.1, 1.15, facecolor=SOFT, edgecolor=ACCENT, linewidth=1.2, zorder=2)
        axes.add_patch(box)
    axes.set_xlim(-1.3, max(x for x, _ in place.values()) + 1.3)
    axes.set_ylim(min(y for _, y in place.values()) - 0.7, 0.75)
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
    report: dict[str, dict[str, Any]] = unwrap_list(read_json(ROOT / "metrics/evaluate/test.json"))
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
    """Return what each script is run for, and the graph of scripts without the arrows that others imply."""
    with Repo(str(ROOT)) as repo:
        graph = repo.index.graph
        main = [stage for stage in repo.index.stages if stage.cmd and Path(stage.path).parent == ROOT]
        stages = {stage: Path(stage.cmd.split()[2]).stem for stage in main}
    items: dict[str, list[str]] = {}
    for stage, script in stages.items():
        items.setdefault(script, []).extend(word for word in stage.cmd.split()[3:] if not word.startswith("--"))
    arrows = [
        (stages[second], stages[first])
        for first, second in graph.edges
        if first in stages and second in stages and stages[first] != stages[second]
    ]
    return items, networkx.transitive_reduction(networkx.DiGraph(arrows))


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
