"""The studio's application: pages, files of the pages, and the HTTP API; refusals in one form."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from lathe import __version__
from lathe.common.errors import InputError, missing_extra
from lathe.common.text import make_printable
from lathe.studio import api, pages
from lathe.studio.rendering import render_refusal
from lathe.studio.security import Session

STATIC = Path(__file__).parent / "static"
STATUS = {
    "no-such-command": 404,
    "no-such-experiment": 404,
    "no-such-file": 404,
    "no-such-revision": 404,
    "no-such-study": 404,
    "unknown-recipe": 404,
    "workspace-busy": 409,
}
HTTP_CODES = {404: "no-such-page", 405: "other-method", 408: "too-slow", 413: "too-large"}


def create_application(session: Session) -> FastAPI:
    """Return the application of one session; the guard around it decides who is answered."""
    # Without FastAPI's own pages of documentation, which load scripts from another host.
    app = FastAPI(
        title="Lathe studio", version=__version__, openapi_url="/api/openapi.json", docs_url=None, redoc_url=None
    )
    app.state.session = session
    app.include_router(api.router)
    app.include_router(pages.router, include_in_schema=False)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.exception_handler(InputError)
    def refuse_input(request: Request, error: InputError) -> Response:
        return _refuse(request, STATUS.get(error.code, 422), error.code, str(error))

    @app.exception_handler(RequestValidationError)
    def refuse_request(request: Request, error: RequestValidationError) -> Response:
        lines = [
            f"{'.'.join(str(step) for step in problem['loc'][1:]) or 'the request'}: {problem['msg']}"
            for problem in error.errors()
        ]
        return _refuse(request, 422, "invalid-request", "\n".join(lines))

    @app.exception_handler(HTTPException)
    def refuse_page(request: Request, error: HTTPException) -> Response:
        code = HTTP_CODES.get(error.status_code, "refused")
        response = _refuse(request, error.status_code, code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ModuleNotFoundError)
    def refuse_missing(request: Request, error: ModuleNotFoundError) -> Response:
        if (missing := missing_extra(error)) is None:
            raise error
        return _refuse(request, 422, missing.code, str(missing))

    return app


def _refuse(request: Request, status: int, code: str, message: str) -> Any:
    text = make_printable(message)
    if request.url.path.startswith("/api/"):
        return JSONResponse({"code": code, "message": text}, status)
    return render_refusal(request, status, text)
