"""Server of the studio: a port on 127.0.0.1, a link with a one-time token, and connections that may not wait for ever.

It keeps nothing of its own: what it shows is read from Git, DVC, the files of the stages and Optuna's study, and what
it starts goes on without it.
"""

import asyncio
import logging
import os
import socket
import sys
import webbrowser
from typing import Any

from lathe.common.errors import InputError
from lathe.common.listening import HOST, open_port
from lathe.studio.child_process import BEARER
from lathe.studio.security import LINK, Guard, Session, list_hosts

logger = logging.getLogger(__name__)

SHORTEST_BEARER = 16  # characters
SECONDS_TO_ASK = 10.0  # from a connection to the last header of its first request
MOST_CONNECTIONS = 512
SECONDS_TO_CLOSE = 2


def run(*, port: int, opens_browser: bool, largest_upload_bytes: int) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises InputError for a port that is not free, or a token that is too short."""
    import uvicorn

    from lathe.studio.application import create_application

    bearer = os.environ.get(BEARER) or None
    if bearer is not None and len(bearer) < SHORTEST_BEARER:
        raise InputError(
            f"{BEARER} has {len(bearer)} characters; give it {SHORTEST_BEARER} or more, as `openssl rand -hex 32` does",
            code="short-token",
        )
    with open_port(port) as listener:
        port = listener.getsockname()[1]
        session = Session(list_hosts(port), bearer, largest_upload_bytes)
        link = f"http://{HOST}:{port}{LINK}?token={session.link_token}"

        class StudioServer(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                sys.stdout.write(f"{link}\n")
                sys.stdout.flush()
                logger.info("the studio is at this link, which opens it once; Ctrl-C ends it, and no run with it")
                if opens_browser:
                    webbrowser.open(link)

        config = uvicorn.Config(
            Guard(create_application(session), session),
            http=make_protocol(SECONDS_TO_ASK),
            log_level="warning",
            access_log=False,  # it would hold the token
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        )
        StudioServer(config).run(sockets=[listener])


def make_protocol(seconds_to_ask: float) -> type[Any]:
    """Return uvicorn's protocol for HTTP/1.1 that closes a connection on which no request has come in time."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ImpatientProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            asyncio.get_running_loop().call_later(seconds_to_ask, self._close_without_request)

        def _close_without_request(self) -> None:
            if self.cycle is None and self.transport is not None:
                self.transport.close()

    return ImpatientProtocol
