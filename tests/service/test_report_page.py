# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""`python -m lathe report` in a real checkout with a real experiment, and its page in headless Chromium."""

import csv
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import report_run
from browser import browser  # noqa: F401 - a fixture
from conftest import Checkout, copy_of, make_checkout

from lathe.config.yaml_files import read_yaml

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
VIEWS = [(size, scheme) for size in (DESKTOP, PHONE) for scheme in ("light", "dark")]
NAMES = [f"{'phone' if size is PHONE else 'desktop'}-{scheme}" for size, scheme in VIEWS]

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</style></title></script><img src=https://evil.invalid/x.png onerror='window.hacked=1'>",
    '"><svg onload="window.hacked=1"><a href="javascript:window.hacked=1">click</a>',
    "[click](javascript:alert(1)) {{ 7 * 7 }} {% raw %} {# gone #} &lt;b&gt; <!-- ",
    "safe \u202egnp.exe\u202c, zero\u200bwidth, \u2066isolated\u2069, \ufeffmark",
    "nul \x00, bell \x07, escape \x1b[31m, lone \ud800 surrogate",
    "x" * 20_000,
    "many\n" * 3_000,
    "ع" * 300 + " שלום " + "🙂" * 200,
    "<textarea><plaintext><base href=https://evil.invalid/><meta http-equiv=refresh content='0;url=https://evil.invalid/'>",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with all that a run leaves, the judge's scores too, one experiment, two studies, and the report."""
    checkout = make_checkout(tmp_path_factory.mktemp("report") / "lathe")
    report_run.build(checkout.root, judged=True)
    report_run.search(checkout.root)
    report_run.pretend(checkout)
    checkout.run("dvc", "exp", "run", "--name", "lower-rate", "-S", "training.learning_rate=0.003")
    checkout.run("git", "checkout", "--", ".")
    report(checkout)
    return checkout


def report(checkout: Checkout, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command with the checkout's own code."""
    environment = {"PYTHONPATH": str(checkout.root / "src")}
    return checkout.run("python3", "-m", "lathe", "report", *options, check=check, env=environment)


class View:
    """An opened page: what it asked for beside itself, and what it complained of."""

    def __init__(self, browser: Any, file: Path, size: dict[str, int], scheme: str) -> None:
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.route(re.compile("^(?!file:)"), lambda route: route.abort())
        self.page.goto(file.as_uri())
        # What is folded is looked at too.
        self.page.eval_on_selector_all("details", "all => all.forEach(each => { each.open = true })")
        self.requests.remove(file.as_uri())

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def index(checkout: Checkout) -> Path:
    return checkout.root / "metrics/report/index.html"


@pytest.fixture(scope="module")
def numbers(checkout: Checkout, browser: Any) -> list[dict[str, str]]:
    """Every element that shows a value of a file."""
    view = View(browser, index(checkout), DESKTOP, "light")
    script = """all => all.map(each => ({value: each.getAttribute("value"), source: each.dataset.source,
        style: each.dataset.style, is: each.dataset.is ?? "", text: each.textContent}))"""
    found: list[dict[str, str]] = view.page.eval_on_selector_all("data", script)
    view.page.close()
    return found


@pytest.fixture(scope="module")
def sources(checkout: Checkout) -> "Sources":
    return Sources(checkout)


class Sources:
    """The files as they are, read anew and by other means than the page's."""

    def __init__(self, checkout: Checkout) -> None:
        self.checkout = checkout
        self.read: dict[str, Any] = {}

    def __call__(self, address: str) -> Any:
        file, _, pointer = address.partition("#")
        if file not in self.read:
            self.read[file] = self._content(unquote(file))
        found = self.read[file]
        for step in pointer.split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            found = found[int(key)] if isinstance(found, list) else found[key]
        return found

    def _content(self, name: str) -> Any:
        if name.startswith("dvc exp show"):
            return json.loads(self.checkout.run(*name.split(), "--num", "10").stdout)
        file = self.checkout.root / name
        if name.endswith((".lock", ".yaml")):
            return read_yaml(file)
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in file.read_text().splitlines()]
        if name.endswith((".tsv", ".csv")):
            with file.open() as lines:
                return list(csv.DictReader(lines, delimiter="\t" if name.endswith("tsv") else ","))
        return json.loads(file.read_text())


def test_the_report_of_a_checkout_is_one_file_that_git_ignores(checkout):
    assert [file.name for file in index(checkout).parent.iterdir()] == ["index.html"]
    assert checkout.run("git", "status", "--porcelain", "--", "metrics").stdout == ""
    elsewhere = checkout.root / "elsewhere.html"
    done = report(checkout, "--out", str(elsewhere))
    assert done.stdout == f"{elsewhere}\n"
    assert "lower-rate" in elsewhere.read_text()


def test_a_checkout_in_which_nothing_was_measured_is_refused_in_one_line(checkout, tmp_path):
    bare = copy_of(checkout, tmp_path / "lathe")
    shutil.rmtree(bare.root / "metrics")
    done = report(bare, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {bare.root}/metrics: nothing has been measured; run `make repro` first\n"


def test_every_number_is_that_of_its_file(numbers, sources):
    assert len(numbers) > 500
    for number in numbers:
        values = [sources(address) for address in number["source"].split()]
        if number["source"].endswith(("loss", "reward")):
            values = [float(value) for value in values]
        if number["is"] == "ratio":
            value = values[0] / values[1]
        else:
            value = sum(values) if number["is"] == "sum" else values[0]
        assert json.loads(number["value"]) == value, number


def test_every_number_is_shown_as_its_value_rounded(numbers):
    for number in numbers:
        value = json.loads(number["value"])
        text = number["text"].replace("\u00a0", " ").replace("−", "-")
        if number["style"] == "literal":
            assert text == (value if isinstance(value, str) else json.dumps(value)), number
        elif number["style"] == "verdict":
            assert text == ("passed" if value else "failed"), number
        elif text.startswith("<"):
            assert 0 <= value < float(text[1:]), number
        else:
            assert_rounded(value, text, number["style"])


def assert_rounded(value: float, text: str, style: str) -> None:
    """What is shown is the value to the last digit shown; trailing zeros may be left out where digits are counted."""
    units = {"%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9, "min": 60, "h": 3600}
    parsed = re.fullmatch(r"([+-]?)([\d,]+)(?:\.(\d+))?(e[+-]\d+)?(?: (%|B|kB|MB|GB|s|min|h))?", text)
    assert parsed, (value, text)
    sign, whole, digits, exponent, unit = parsed.groups()
    factor = units.get(unit or "", 1.0) * (0.01 if style == "percent" else 1.0) * float(f"1{exponent or ''}")
    shown = float(f"{sign}{whole.replace(',', '')}.{digits or 0}") * factor
    error = 0.5 * 10.0 ** -len(digits or "") * factor
    if style in {"number", "p"} and abs(value) < 1000:
        counted = 2 if style == "p" or abs(value) < 0.001 else 4  # digits
        error = min(error, 0.5 * abs(value) * 10.0 ** (1 - counted))
    assert abs(shown - value) <= error * (1 + 1e-6) + 1e-15, (value, text)
    assert not (sign == "-" and value >= 0), (value, text)


def test_no_number_stands_anywhere_without_its_source(checkout, browser):
    """But for texts of data and names, ticks of axes, the date, and what the page says of itself."""
    view = View(browser, index(checkout), DESKTOP, "light")
    script = """() => {
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
      while (walker.nextNode()) {
        const {parentElement, data} = walker.currentNode;
        if (!parentElement.closest("data, [data-quote], .artifact, .tick, time, svg title")) found.push(data);
      }
      return found;
    }"""
    texts = view.page.evaluate(script)
    view.page.close()
    own = ("95 % interval", "(p below 0.05)", "JSON fields F1", "f16", "MD5", "ROUGE-1", "ROUGE-2", "(16 bits)")
    for text in texts:
        rest = text
        for phrase in own:
            rest = rest.replace(phrase, "")
        rest = re.sub(r"\b(Q8_0|Q4_K_M|Q4_1)\.", "", rest)  # columns of experiments
        assert not re.search(r"\d", rest), text


def test_plots_put_every_point_where_its_figures_belong(checkout, browser, sources):
    view = View(browser, index(checkout), DESKTOP, "light")
    script = """all => all.map(svg => ({x: svg.dataset.x, y: svg.dataset.y, title: svg.getAttribute("aria-label"),
        marks: [...svg.querySelectorAll("circle[data-x-source]")].map(each => ({cx: each.getAttribute("cx"),
            cy: each.getAttribute("cy"), x: each.dataset.xSource, y: each.dataset.ySource})),
        lines: [...svg.querySelectorAll("g.line")].map(each => ({file: each.dataset.points,
            points: [...each.querySelectorAll("polyline")].map(one => one.getAttribute("points")).join(" ")}))}))"""
    drawn = view.page.eval_on_selector_all("svg", script)
    view.page.close()
    [front] = [study["best"] for study in checkout_studies(sources.checkout) if len(study["objectives"]) == 2]
    assert len(front) > 1
    # Score, KL (none for merged), perplexity, speed; the front of one study, the course of the other.
    assert sum(len(svg["marks"]) for svg in drawn) == 4 + 3 + 4 + 4 + len(front)
    assert sum(len(svg["lines"]) for svg in drawn) == 4 + 3 + 1
    for svg in drawn:
        x, y = place(svg["x"]), place(svg["y"])
        for mark in svg["marks"]:
            assert abs(x(sources(mark["x"])) - float(mark["cx"])) < 0.02
            assert abs(y(sources(mark["y"])) - float(mark["cy"])) < 0.02
        for line in svg["lines"]:
            rows = sources(line["file"])
            first, second = ("tokens", "rows") if line["file"].endswith(".csv") else list(rows[0])[:2]
            known = {(round(x(float(row[first])), 1), round(y(float(row[second])), 1)) for row in rows}
            points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
            assert len(points) == len(rows) / (3 if line["file"].endswith(".csv") else 1)
            for point in points:
                assert min(max(abs(point[0] - a), abs(point[1] - b)) for a, b in known) < 0.11, (svg["title"], point)


def checkout_studies(checkout: Checkout) -> list[Any]:
    return [json.loads(file.read_text()) for file in (checkout.root / "metrics/search").glob("*/study.json")]


def place(scale: str) -> Any:
    low, high, first, last, log = map(float, scale.split())
    bend = math.log10 if log else float
    return lambda value: first + (last - first) * (bend(value) - bend(low)) / (bend(high) - bend(low))


@pytest.mark.parametrize(("size", "scheme"), VIEWS, ids=NAMES)
def test_the_page_asks_for_nothing_complains_of_nothing_and_is_as_wide_as_the_window(checkout, browser, size, scheme):
    view = View(browser, index(checkout), size, scheme)
    assert view.requests == []
    assert view.complaints == []
    assert view.overflow() == 0
    smallest = view.page.evaluate(SMALLEST_TEXT)
    assert smallest["pixels"] >= 10, smallest
    view.page.set_viewport_size({"width": 320, "height": 600})
    assert view.overflow() == 0
    view.page.close()


# Text of an SVG grows and shrinks with it.
SMALLEST_TEXT = """() => {
  let found = {pixels: 99};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || parent.closest("svg title, .unseen")) continue;
    const svg = parent.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const pixels = parseFloat(getComputedStyle(parent).fontSize) * scale;
    if (pixels < found.pixels) found = {pixels, text: walker.currentNode.data};
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(checkout, browser, scheme):
    """WCAG's contrast of at least 4.5 to 1, of every text and of the lines of plots at least 3."""
    view = View(browser, index(checkout), DESKTOP, scheme)
    found = view.page.evaluate(COLOURS)
    paper = view.page.evaluate("getComputedStyle(document.body).backgroundColor")
    view.page.close()
    assert len(found) > 20
    for colours in found:
        assert contrast(colours["ink"], colours["paper"]) >= colours["least"], colours
    assert (luminance(paper) > 0.5) == (scheme == "light")


COLOURS = """() => {
  const seen = new Map();
  const behind = each => {
    for (; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
  };
  const note = (ink, paper, text, least) => seen.set(ink + paper + least, {ink, paper, text, least});
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement, style = getComputedStyle(parent);
    if (!walker.currentNode.data.trim() || parent.closest("svg title")) continue;
    note(parent.closest("svg") ? style.fill : style.color, behind(parent), walker.currentNode.data, 4.5);
  }
  document.querySelectorAll(".line, .mark circle").forEach(each =>
    note(getComputedStyle(each).stroke, behind(each), each.tagName, 3));
  return [...seen.values()];
}"""


def luminance(colour: str) -> float:
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_page_has_what_a_screen_reader_goes_by(checkout, browser):
    view = View(browser, index(checkout), DESKTOP, "light")

    def count(selector: str) -> int:
        return int(view.page.locator(selector).count())

    assert count("html[lang=en]") == count("h1") == count("main") == 1
    levels = view.page.eval_on_selector_all("h1, h2, h3", "all => all.map(each => Number(each.tagName[1]))")
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert count("th:not([scope])") == 0
    assert count("svg:not([role=img][aria-label])") == 0
    assert count(".scroll:not([tabindex][aria-label])") == 0
    ids = view.page.eval_on_selector_all("[id]", "all => all.map(each => each.id)")
    assert len(ids) == len(set(ids))
    targets = view.page.eval_on_selector_all("a", "all => all.map(each => each.getAttribute('href'))")
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)
    view.page.close()


def test_rows_on_which_all_agree_can_be_put_away_without_a_script(checkout, browser):
    view = View(browser, index(checkout), PHONE, "light")
    samples = view.page.locator("#answers .sample:visible")
    assert samples.count() == 20
    view.page.locator("#differing").check()
    assert 0 < samples.count() < 20
    assert view.page.locator("script").count() == 0
    view.page.close()


def test_the_page_prints_whole(checkout, browser):
    view = View(browser, index(checkout), DESKTOP, "light")
    assert view.page.pdf().startswith(b"%PDF")
    view.page.emulate_media(media="print")
    view.page.set_viewport_size({"width": 718, "height": 1000})  # A4 between margins of 10 mm
    assert view.overflow() == 0
    assert not view.page.locator("nav").is_visible()
    view.page.close()


@pytest.mark.parametrize(("size", "scheme"), VIEWS, ids=NAMES)
def test_hostile_texts_are_shown_and_do_nothing(tmp_path, browser, size, scheme):
    from lathe.reports import experiment_table, facts, page

    report_run.build(tmp_path, rows=len(HOSTILE))
    for artifact in report_run.ARTIFACTS:
        for folder in ("generated", "scored"):
            file = tmp_path / f"data/{folder}/{artifact}/validation.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            for number, row in enumerate(rows):
                row["completion"] = HOSTILE[number]
                row["reference"] = HOSTILE[number - 1]
            report_run.write_lines(file, rows)
    hostile = "".join(HOSTILE[:4])
    processed = [{"messages": [{"role": role, "content": text} for role in ("user", "assistant")]} for text in HOSTILE]
    report_run.write_lines(tmp_path / "data/processed/validation.jsonl", processed)
    origin = {"name": hostile, "source": hostile, "id": hostile}
    report_run.write_json(tmp_path / "metrics/fetch/model.json", {"origin": [origin]})
    gates = {"passed": False, "gates": {hostile: {"passed": False, "margin": None}}}
    report_run.write_json(tmp_path / "metrics/evaluate/gates.json", gates)
    target = tmp_path / "index.html"
    found = facts.gather_facts(tmp_path, seed=42, primary_metric="exact_match")
    page.write_page(target, found, experiment_table.Experiments([], [], [], hostile))

    written = target.read_text(encoding="utf-8")
    assert not set("\x00\x07\x1b\u202e\u2066\u200b\ufeff") & set(written)
    view = View(browser, target, size, scheme)
    assert view.page.evaluate("window.hacked") is None
    assert view.requests == []
    assert view.complaints == []
    assert view.overflow() == 0
    for selector in ("script", "img", "textarea", "base", "iframe", "plaintext", "[onerror]", "[onload]"):
        assert view.page.locator(selector).count() == 0, selector
    targets = view.page.eval_on_selector_all("a", "all => all.map(each => each.getAttribute('href'))")
    assert all(target.startswith("#") for target in targets)
    shown = view.page.locator("#answers").inner_text()
    for text in (*HOSTILE[:4], "U+202E", "U+0000", "U+D800", "more characters"):
        assert text in shown, text
    view.page.close()
