"""Listening: a port of this machine alone, for the servers that Lathe starts."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from lathe.common.errors import InputError

HOST = "127.0.0.1"


def check_port(port: int) -> None:
    """Raise InputError for a number that is no port; 0 stands for any free one."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: no port; must be from 0 (any free one) to 65535", code="invalid-port")


@contextmanager
def open_port(port: int) -> Iterator[socket.socket]:
    """Bind a socket to a port of 127.0.0.1, to be closed at the end. Raises InputError if it is not to be had."""
    check_port(port)
    with socket.socket() as listener:
        # As servers do: a port whose last connections are still closing is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"--port {port}: not to be had ({os.strerror(error.errno or 0)}); name another one, or 0 for any",
                code="port-not-free",
            ) from None
        yield listener
