"""Report page: one HTML file of facts and experiments, which loads nothing else.

Every number is an element that names its exact value and its place:

    <data value="0.9784" data-source="metrics/evaluate/test.json#/Q4_K_M/exact_match">97.8 %</data>

A number computed from several names them all, and in `data-is` how: `ratio` of the first to the second, or `sum`.
"""

import json
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from lathe.common import paths
from lathe.config.engine_marks import describe_engines
from lathe.evaluation.metric_order import orient_score
from lathe.reports import plots, text_diff
from lathe.reports.experiment_table import Experiments
from lathe.reports.facts import UNTRAINED, ReportFacts, Search
from lathe.reports.split_scores import SplitScores
from lathe.reports.values import Value

HERE = Path(__file__).parent

SHARES = {
    "exact_match",
    "token_f1",
    "json_valid",
    "json_fields",
    "tool_calls",
    "tool_calls_f1",
    "stop_rate",
    "win_rate",
}
SHARES_OF_TASKS = ("acc", "exact_match_", "prompt_level_", "pass@")
PASS_AT = "_pass_at_"  # in the name of a score of sampled answers, before their number
NAMES = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "json_valid": "valid JSON",
    "json_fields": "JSON fields F1",
    "tool_calls": "tool calls",
    "tool_calls_f1": "tool calls F1",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "bleu": "BLEU",
    "bert_score": "BERTScore",
    "length_ratio": "length ratio",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "kl": "KL to f16",
    "general_perplexity": "perplexity, general text",
    "stop_rate": "stops by itself",
    "win_rate": "win rate",
}
UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0}


def write_page(target: Path, facts: ReportFacts, experiments: Experiments) -> None:
    """Write the page completely or not at all."""
    html = render_page(facts, experiments)
    with paths.replace_file(target) as partial:
        partial.write_text(html, encoding="utf-8")


def render_page(facts: ReportFacts, experiments: Experiments) -> str:
    """Return the page; text of data and models is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"pieces": text_diff.split_text, "named": name_metric, "breakable": add_line_breaks}
    environment.globals |= {
        "number": format_number,
        "ratio": format_ratio,
        "total": format_total,
        "literal": format_literal,
        "verdict": format_verdict,
        "style_of": choose_style,
        "verdict_of": compare_scores,
        "engines_of": describe_engines,
        "style": Markup((HERE / "style.css").read_text(encoding="utf-8")),
    }
    return environment.get_template("page.html.jinja").render(
        facts=facts,
        experiments=experiments,
        made=datetime.now(UTC),
        seconds=[seconds for _, timing in facts.timings if (seconds := timing.get("seconds"))],
        on_gpu=any(timing.get("peak_gpu_memory_bytes") for _, timing in facts.timings),
        size_plots=draw_size_plots(facts),
        curves=draw_curve_plots(facts),
        lengths=draw_length_plot(facts),
        search_plots=[plot for plot in map(draw_search_plot, facts.searches) if plot],
    )


def name_metric(metric: str) -> str:
    """Return the usual name of a metric."""
    if PASS_AT in metric:
        right, _, answers = metric.partition(PASS_AT)
        return f"{name_metric(right)}, pass at {answers}"
    return NAMES.get(metric, metric.replace("_", " "))


def add_line_breaks(text: str) -> Markup:
    """Return the text escaped, with line breaks allowed after commas: compact JSON has no spaces."""
    return Markup(",<wbr>").join(text.split(","))


def choose_style(metric: str) -> str:
    """Return how a metric's values are written."""
    if metric in SHARES or metric.startswith(SHARES_OF_TASKS) or PASS_AT in metric:
        return "share"
    return {
        "bytes": "bytes",
        "judge": "points",
        "chrf": "points",
        "bleu": "points",
        "combined": "fine",
        "perplexity": "number",
        "kl": "number",
    }.get(metric, "number" if metric.endswith("perplexity") else "score")


def compare_scores(metric: str, ours: Value | None, theirs: Value | None, lower: Collection[str] = ()) -> str:
    """Return whether a score is better than another one; `lower` are scores of a task that are better if lower."""
    known = "perplexity" if metric in lower else metric
    first, second = (orient_score(known, score.content if score else None) for score in (ours, theirs))
    return "better" if first > second else "worse"


def format_number(value: Value | None, style: str, *, sign: bool = False) -> Markup:
    """Return the element that shows a number, a dash if there is none."""
    if value is None:
        return Markup('<span class="none" title="does not apply">–</span>')
    return _build_element(value.content, value.address, style, sign=sign)


def format_ratio(first: Value, second: Value) -> Markup:
    """Return the element of the ratio of the first number to the second."""
    return _build_element(first.content / second.content, f"{first.address} {second.address}", "ratio", how="ratio")


def format_total(values: Sequence[Value], style: str) -> Markup:
    """Return the element of the sum of numbers."""
    sources = " ".join(value.address for value in values)
    return _build_element(sum(value.content for value in values), sources, style, how="sum")


def format_literal(value: Value) -> Markup:
    """Return the element of a value as params.yaml has it: true, 0.006, `all-linear`."""
    text = value.content if isinstance(value.content, str) else json.dumps(value.content, ensure_ascii=False)
    return Markup('<data value="{}" data-source="{}" data-style="literal">{}</data>').format(
        json.dumps(value.content), value.address, text
    )


def format_verdict(value: Value) -> Markup:
    """Return the element that says whether a gate held."""
    opening = Markup('<data value="{}" data-source="{}" data-style="verdict">')
    text = "passed" if value.content else "failed"
    return opening.format(json.dumps(value.content), value.address) + text + Markup("</data>")


def _build_element(value: float, sources: str, style: str, *, how: str | None = None, sign: bool = False) -> Markup:
    text = format_value(value + 0.0, style)  # a negative zero is none
    if sign and value > 0:
        text = "+" + text
    text = text.replace("-", "−").replace(" ", "\u00a0")
    made = Markup(' data-is="{}"').format(how) if how else ""
    opening = Markup('<data value="{}" data-source="{}" data-style="{}"{}>').format(
        json.dumps(value), sources, style, made
    )
    return opening + text + Markup("</data>")


def format_value(value: float, style: str) -> str:
    """Return the number rounded, with its unit."""
    match style:
        case "share":
            return f"{100 * value:.1f} %"
        case "percent":  # the unit is in the heading
            return f"{100 * value:.1f}"
        case "points":
            return f"{value:.1f}"
        case "ratio":
            return f"{value:.1f}"
        case "score":
            return f"{value:.3f}"
        case "fine":
            return f"{value:.4f}"
        case "count":
            return f"{value:,.0f}"
        case "bytes":
            # 0.9 MB and 1.5 MB in one column have one unit.
            fitting = (unit for unit, size in reversed(UNITS.items()) if value >= (1e5 if unit == "MB" else size))
            unit = next(fitting, "B")
            return f"{value:,.0f} B" if unit == "B" else f"{value / UNITS[unit]:.2f} {unit}"
        case "seconds":
            unit = "s" if value < 120 else "min" if value < 7200 else "h"
            return f"{value / TIMES[unit]:.1f} {unit}"
        case "p":
            return f"{value:.2g}" if value >= 0.001 else "< 0.001"
        case "number" if abs(value) >= 1000:
            return f"{value:,.0f}"
        case "number":
            return f"{value:.4g}" if abs(value) >= 0.001 else f"{value:.2g}".replace("e-0", "e-")
    raise ValueError(f"{style!r} is no style of numbers")


def draw_size_plots(facts: ReportFacts) -> list[plots.Plot]:
    """Draw score, KL, perplexity and speed against size, of the merged model and the quantized files."""
    if "validation" not in facts.splits:
        return []
    split = facts.splits["validation"]
    names = [name for name in split.artifacts if name not in UNTRAINED]
    wanted = [metric for metric in dict.fromkeys((facts.primary_metric, "kl", "perplexity")) if metric in split.metrics]
    sizes = [size.content for name in names if (size := split.score(name, "bytes"))]
    if not sizes:
        return []
    unit = next((unit for unit, size in reversed(UNITS.items()) if max(sizes) >= size), "B")
    x = plots.create_x_axis(sizes, unit=UNITS[unit])
    drawn = [_draw_against_size(split, names, metric, x, unit) for metric in wanted]
    speeds = [
        plots.Point(name, size, speed)
        for name in names
        if (speed := facts.speed(name)) and (size := split.score(name, "bytes"))
    ]
    if speeds:
        drawn.append(plots.draw_scatter("Speed", speeds, x, x_label=f"size ({unit})", y_label="generated tokens/s"))
    return [plot for plot in drawn if plot]


def _draw_against_size(
    split: SplitScores, names: Sequence[str], metric: str, x: plots.Axis, unit: str
) -> plots.Plot | None:
    points = []
    for name in names:
        size, score, interval = split.score(name, "bytes"), split.score(name, metric), split.interval(name, metric)
        if size and score:
            ends = (interval.get("low"), interval.get("high")) if interval else (None, None)
            points.append(plots.Point(name, size, score, *ends))
    if not points:
        return None
    y_unit, y_label = (0.01, "%") if metric in SHARES else (1, {"kl": "nats per token"}.get(metric, "score"))
    if metric.endswith("perplexity"):
        y_label = "per token"
    return plots.draw_scatter(_capitalize(metric), points, x, x_label=f"size ({unit})", y_label=y_label, y_unit=y_unit)


def _capitalize(metric: str) -> str:
    return name_metric(metric)[0].upper() + name_metric(metric)[1:]


def draw_curve_plots(facts: ReportFacts) -> list[plots.Plot]:
    """Draw every curve of the training."""
    drawn = [
        plots.draw_curves(
            curve.name.replace("_", " ").capitalize(),
            {name: list(table) for name, table in curve.series.items()},
            x="step",
            y=curve.name.rpartition("/")[2],
            x_label="step",
            y_label="nats per token" if curve.name.endswith("loss") else "",
            may_be_log=curve.name.endswith("loss"),
        )
        for curve in facts.curves
    ]
    return [plot for plot in drawn if plot]


def draw_length_plot(facts: ReportFacts) -> plots.Plot | None:
    """Draw the lengths of the training rows."""
    if facts.lengths is None:
        return None
    series: dict[str, list[Value]] = {}
    for part in ("prompt", "answer", "total"):
        rows = [row for row in facts.lengths if row.content["split"] == "train" and row.content["part"] == part]
        if rows:
            series[part] = rows
    title = "Lengths of the training rows"
    return plots.draw_curves(title, series, x="tokens", y="rows", x_label="tokens", y_label="rows")


def draw_search_plot(search: Search) -> plots.Plot | None:
    """Draw the best score over the trials of a search, or the best trials by two objectives."""
    name = search.study.content["study"]
    if search.course:
        label = search.objectives[0]
        series = {"best so far": list(search.course)}
        return plots.draw_curves(f"Search {name}", series, x="trial", y="best", x_label="trial", y_label=label)
    if len(search.objectives) != 2:
        return None
    up, across = search.objectives
    best = [trial for trial in search.trials if trial.content["experiment"] in search.study.content["best"]]
    points = [
        plots.Point(trial.content["experiment"], x, y)
        for trial in best
        if (x := trial.get("scores", across)) and (y := trial.get("scores", up))
    ]
    if not points:
        return None
    axis = plots.create_x_axis([point.x.content for point in points])
    return plots.draw_scatter(f"Search {name}: best trials", points, axis, x_label=across, y_label=up)
