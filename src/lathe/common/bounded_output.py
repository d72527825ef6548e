"""Output of a program, bounded: what runs on another machine may print without end."""

import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from lathe.common.errors import InputError

MOST_BYTES = 64 << 20  # of what a program prints, and again of its errors


def run_bounded(
    command: Sequence[str], *, stdin: str, name: str, most_bytes: int = MOST_BYTES
) -> "subprocess.CompletedProcess[str]":
    """Run a program with a text for its standard input, and return it with what it has printed.

    Raises InputError, which begins with `name`, and ends the program, where it prints more than `most_bytes`.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        printed: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        too_long = threading.Event()

        def read(stream: IO[bytes], kept: bytearray) -> None:
            while piece := stream.read1(1 << 16):  # type: ignore[attr-defined]
                kept += piece
                if len(kept) > most_bytes:
                    too_long.set()
                    process.kill()
                    return

        assert process.stdin
        assert process.stdout
        assert process.stderr
        streams = {"stdout": process.stdout, "stderr": process.stderr}
        readers = [threading.Thread(target=read, args=(streams[key], printed[key])) for key in streams]
        for reader in readers:
            reader.start()
        with suppress(BrokenPipeError):
            process.stdin.write(stdin.encode())
            process.stdin.close()
        for reader in readers:
            reader.join()
    if too_long.is_set():
        raise InputError(
            f"{name}: its output has not ended after {most_bytes >> 20} MiB; see what it prints, and stop that",
            code="endless-output",
        )
    texts = [bytes(printed[key]).decode(errors="replace") for key in ("stdout", "stderr")]
    return subprocess.CompletedProcess(list(command), process.returncode, *texts)
