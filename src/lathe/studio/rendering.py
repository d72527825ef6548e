"""Pages from templates: everything escaped, in the reader's language, with the session's CSRF token."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse, Response

from lathe.common import paths
from lathe.common.text import make_printable, readable_bytes, readable_seconds
from lathe.provenance.trace import format_change
from lathe.reports.page import choose_style, format_value, name_metric
from lathe.studio.run_facts import ScoreCell
from lathe.studio.started_commands import join_words
from lathe.studio.texts import COOKIE, LANGUAGES, choose_language, make_translation

TEMPLATES = Path(__file__).parent / "templates"

# Address, title and name of each page of the navigation.
PAGES = (
    ("/", "Overview"),
    ("/new", "New run"),
    ("/searches", "Search"),
    ("/data", "Data"),
    ("/compare", "Compare"),
    ("/chat", "Chat"),
    ("/lineage", "Lineage"),
    ("/judge", "Judge"),
)


@cache
def _make_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": lambda size: readable_bytes(int(size)) if size else "",
        "seconds": lambda seconds: readable_seconds(seconds) if seconds is not None else "",
        "score": format_score,
        "metric": name_metric,
        "literal": write_literal,
        "change": format_change,
        "words": join_words,
        "printable": lambda text: make_printable(str(text)),
    }
    environment.globals |= {"pages": PAGES, "languages": LANGUAGES, "checkout": paths.ROOT.name}
    return environment


def render(request: Request, template: str, *, status: int = 200, **context: Any) -> HTMLResponse:
    """Return a page or a part of one."""
    language = choose_language(request.cookies.get(COOKIE), request.headers.get("accept-language", ""))
    session = request.app.state.session
    html = (
        _make_environment()
        .get_template(f"{template}.html.jinja")
        .render(
            _=make_translation(language),
            language=language,
            csrf_token=session.csrf_token,
            here=request.url.path,
            **context,
        )
    )
    return HTMLResponse(html, status)


def render_refusal(request: Request, status: int, message: str) -> Response:
    """Return a refusal: of a form as a part of its page, else as a page."""
    if request.headers.get("hx-request") == "true":
        # 200: a browser writes other answers to its console as errors, which a refused form is not.
        response = render(request, "_refusal", lines=message.splitlines())
        response.headers["HX-Retarget"], response.headers["HX-Reswap"] = "#refusal", "innerHTML show:top"
        return response
    return render(request, "refusal", status=status, lines=message.splitlines(), title="Refused")


def redirect(address: str) -> Response:
    """Send the browser to another page after a form."""
    return Response(status_code=200, headers={"HX-Redirect": address})


def format_score(cell: ScoreCell | None, metric: str) -> str:
    """Return a score with its interval; a dash if there is none."""
    if cell is None or cell.value is None:
        return "–"
    style = choose_style(metric)
    text = format_value(cell.value, style)
    if cell.low is None or cell.high is None:
        return text
    ends = [format_value(end, style).removesuffix(" %") for end in (cell.low, cell.high)]
    return f"{text} [{ends[0]}, {ends[1]}]"


def write_literal(value: Any) -> str:
    """Return a value as params.yaml writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def arrange_bars(values: dict[str, float]) -> Sequence[dict[str, Any]]:
    """Return rows of a bar chart, the largest first."""
    return [{"name": name, "value": value} for name, value in sorted(values.items(), key=lambda item: -item[1])]
