"""`python -I -S preloaded_client.py PYTHON FOLDER [ARGUMENT …]`: what `PYTHON [ARGUMENT …]` does, forked if it can be.

Asks preloaded.py for that: passes on its files, arguments, folder and environment, then the signals that it gets, and
ends as the child ends. Only modules that take no time are imported.
"""

import contextlib
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Ask to be forked; be Python itself where that is refused."""
    python, folder, *arguments = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX)
    try:
        unbuffered = arguments[:1] == ["-u"]
        words = arguments[unbuffered:]
        if not words or not (words[0] in ("-m", "-c") or os.path.isfile(words[0])):
            raise ValueError("an option of Python, or no script")
        connection.connect(os.path.join(folder, "socket"))
        child = ask(connection, words, unbuffered)
    except (OSError, ValueError):
        os.execv(python, [python, *arguments])
    for number in FORWARDED:
        signal.signal(number, lambda number, _: forward(child, number))
    code = int(connection.makefile("rb").readline() or -signal.SIGKILL)
    if code >= 0:
        os._exit(code)
    if -code in FORWARDED:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


def forward(child: int, number: int) -> None:
    """Send a signal to the child, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def ask(connection: socket.socket, arguments: "list[str]", unbuffered: bool) -> int:
    """Send the request, and return the number of the child; ValueError where it is refused."""
    umask = os.umask(0)
    os.umask(umask)
    environment = dict(os.environ)
    request = {
        "arguments": arguments,
        "unbuffered": unbuffered,
        "folder": os.getcwd(),
        "environment": environment,
        "umask": umask,
    }
    content = json.dumps(request).encode()
    socket.send_fds(connection, [len(content).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(content)
    line = b""
    while not line.endswith(b"\n"):  # not one byte more: what follows is how it ended
        if not (byte := connection.recv(1)):
            raise OSError("the process that forks is gone")
        line += byte
    return int(line)


if __name__ == "__main__":
    main()
