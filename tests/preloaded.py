"""One process per test run with the heavy packages imported, which forks the Python processes of tests' checkouts.

Importing torch, transformers and TRL takes a process 3 to 8 s, and a pipeline starts two dozen processes; DVC takes 1 s
for its own. The PATH of a checkout begins with a `python3` and a `dvc` that ask this process to fork
(preloaded_client.py). The child has the arguments, folder, environment, open files, import path and exit code of a
process of its own, and no module of Lathe is imported before; their sources are compiled before, once for all
checkouts that have them. Where a variable differs that is read during imports, or
Python is given an option, the client starts Python itself. Tests of starting, of signals and of what is killed do
without: `Checkout.without_preloading()`.
"""

import _imp
import atexit
import gc
import importlib
import importlib.machinery
import io
import json
import marshal
import os
import random
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, cast
from unittest import mock

from filelock import FileLock

CLIENT, FAST_DVC = (Path(__file__).with_name(name) for name in ("preloaded_client.py", "fast_dvc.py"))
SOCKET = "socket"
LENGTH = struct.Struct("!I")  # of a request, before it

# Packages of others alone, and not `gguf`: llama.cpp's converter brings its own.
PACKAGES = (
    *("torch", "torch.distributed.fsdp", "numpy", "pandas", "scipy.stats", "pydantic", "ruamel.yaml", "yaml"),
    *("transformers", "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"),
    *("transformers.models.auto.tokenization_auto", "transformers.trainer", "sentencepiece", "jinja2", "psutil"),
    *("accelerate", "bitsandbytes", "peft", "datasets", "dvclive", "rouge_score.rouge_scorer"),
    *("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.grpo_trainer"),
    *("dvc.cli.parser", "dvc.repo.reproduce", "dvc.stage.run", "dvc.stage.cache", "dvc_data.index", "dvc.render"),
)
# What the names of variables begin with that are read when a package is imported or a library loaded. Not GOMP_ and
# ACCELERATE_, which llama.cpp's loading and a training set in the process of the tests: no import reads them.
READ_ONCE = (
    *("ATEN_", "BNB_", "CUDA", "HF_", "HOME", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_"),
    *("OMP_", "OPENBLAS", "PYTHON", "PYTORCH", "RANK", "TMPDIR", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRL_"),
    *("TZ", "WORLD_SIZE", "XDG_"),
)
# Those that the child takes over, and those that say again what HF_HUB_OFFLINE says.
TAKEN_OVER = (
    *("HOME", "PYTHONPATH", "PYTHONUTF8", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"),
    *("HF_TOKEN", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE"),
)
# Those of the hub's client, which the child imports again where they differ. What transformers has imported of the
# client stays as it was, offline: Lathe gives it folders alone.
OF_THE_HUB = ("HOME", "HF_HOME", "HF_ENDPOINT", "HF_HUB_")

# As it was before the test modules were imported: accelerate, MLflow and others set variables that no user's process
# begins with, and by which one that is to be forked would differ from this run's.
_before_imports = dict(os.environ)
_set_by_imports: set[str] = set()
folder = Path()  # of this run: with the `python3` that asks to be forked, and the socket that it asks over
_environment: dict[str, str] = {}
_holding: list[socket.socket] = []
_started: list["subprocess.Popen[bytes]"] = []


# --- In the processes that run tests.


def note_imports() -> None:
    """Note which variables the imports of the test modules have set; to be called when all are imported."""
    _set_by_imports.update(key for key, value in os.environ.items() if value != _before_imports.get(key))


def get_environment() -> dict[str, str]:
    """Return the environment of the processes that tests start: without what imports of the tests have set."""
    mine = {key: value for key, value in os.environ.items() if key not in _set_by_imports}
    before = {key: value for key, value in _before_imports.items() if key in _set_by_imports}
    # As in stages/_path.py, before torch is imported: a training of a test that shares two cores with another took
    # twice the processor time where its threads spun while they waited.
    return {"OMP_WAIT_POLICY": "PASSIVE", **mine, **before}


def set_up(run: Path) -> None:
    """Write the `python3` and the `dvc` of this run into its folder; nothing is started yet."""
    global folder
    folder = run / "preloaded"
    folder.mkdir(exist_ok=True)
    _environment.update({key: value for key, value in get_environment().items() if key not in TAKEN_OVER})
    _environment["HF_HUB_OFFLINE"] = "1"
    # Not Python itself behind #!: its path may hold spaces, and the script is its second argument.
    python = f"'{sys.executable}' -I -S '{CLIENT}' '{sys.executable}' '{folder}'"
    _write_program("python3", python)
    _write_program("dvc", f"{python} '{FAST_DVC}'")


def _write_program(name: str, command: str) -> None:
    partial = folder / f".{name}.{os.getpid()}"
    partial.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    partial.chmod(0o755)
    partial.replace(folder / name)


def start() -> None:
    """Start the process of this run if none has, and keep it until the last process that runs tests has ended."""
    if _holding:
        return
    with suppress(OSError), FileLock(folder / ".lock"):  # without it, each client starts Python itself
        address = folder / SOCKET
        if not address.exists():
            _start(address)
        held = socket.socket(socket.AF_UNIX)
        held.connect(str(address))
        held.sendall(LENGTH.pack(0))
        _holding.append(held)


def _start(address: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, (folder / "log").open("w") as log:
        listener.bind(str(address))
        listener.listen(64)
        number = listener.fileno()
        command = [sys.executable, __file__, str(folder), str(number), *sorted(_set_by_imports)]
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, env=_environment, pass_fds=[number], start_new_session=True, **options)
    _started.append(process)


@contextmanager
def forking() -> Iterator[None]:
    """Fork what this process starts by `sys.executable`, such as llama.cpp's converter."""
    start()
    with mock.patch.object(sys, "executable", str(folder / "python3")):
        yield


# --- In the process that forks.


class Server:
    """Forks a child per request, tells the client how it ended, and kills it where its client is gone."""

    def __init__(
        self, folder: Path, listener: socket.socket, environment: dict[str, str], set_by_tests: Collection[str]
    ) -> None:
        self.folder, self.listener, self.set_by_tests = folder, listener, set_by_tests
        self.set_by_imports = {key: value for key, value in os.environ.items() if key not in environment}
        self.environment = environment
        self.clients: dict[int, socket.socket] = {}  # by process
        self.holding: set[socket.socket] = set()
        self.selector = selectors.DefaultSelector()
        self.wakes, self.wakened = socket.socketpair()
        for each in (self.wakes, self.wakened):
            each.setblocking(False)
        signal.set_wakeup_fd(self.wakened.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(self.wakes, selectors.EVENT_READ)

    def serve(self) -> None:
        """Answer until nobody holds this process any more."""
        begun = False
        while self.holding or not begun:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fileobj is self.wakes:
                    self.wakes.recv(4096)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._forget(key.fileobj)
            self._tell_of_the_ended()
            begun = begun or bool(self.holding)
        (self.folder / SOCKET).unlink()

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        files: list[int] = []
        try:
            head, files, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
            kept = self._answer(connection, LENGTH.unpack(head)[0], files)
        except (OSError, EOFError, struct.error):  # the client has been killed meanwhile
            kept = False
        if kept:
            self.selector.register(connection, selectors.EVENT_READ)
        else:
            connection.close()
        for file in files:
            os.close(file)

    def _answer(self, connection: socket.socket, length: int, files: list[int]) -> bool:
        """Do what a client asks for; return whether its connection is to be kept."""
        if length == 0:
            self.holding.add(connection)
            return True
        request = json.loads(_receive(connection, length))
        if differing := self._find_differing(request["environment"]):
            print("not forked:", *differing, request["arguments"], flush=True)  # into the log beside the socket
            connection.sendall(b"alone\n")
            return False
        child = os.fork()
        if child == 0:
            self._become(request, connection, files)
        self.clients[child] = connection
        with suppress(OSError):
            connection.sendall(b"%d\n" % child)
        return True

    def _find_differing(self, environment: dict[str, str]) -> list[str]:
        """Return the variables that were read during this process's imports, and with another value."""
        said_again = {key: environment.get(key, "1") for key in ("TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")}
        said_again["PYTHONUTF8"] = environment.get("PYTHONUTF8", "1")
        others = {*TAKEN_OVER, *self.set_by_imports, *self.set_by_tests}
        mine, theirs = (
            {
                key: value
                for key, value in each.items()
                if key.startswith(READ_ONCE) and not key.startswith(OF_THE_HUB) and key not in others
            }
            for each in (self.environment, environment)
        )
        differing = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
        return sorted(differing | {key for key, value in said_again.items() if value != "1"})

    def _forget_client_of_hub(self, environment: dict[str, str]) -> None:
        """Have the hub's client imported again, if its variables are not those it was imported with."""
        mine, theirs = (
            {key: value for key, value in each.items() if key.startswith(OF_THE_HUB)}
            for each in (self.environment, environment)
        )
        if mine != theirs:
            for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
                del sys.modules[name]

    def _forget(self, connection: socket.socket) -> None:
        """A client, or a process that runs tests, is gone."""
        self.selector.unregister(connection)
        connection.close()
        self.holding.discard(connection)
        for child, client in self.clients.items():
            if client is connection:
                os.kill(child, signal.SIGKILL)

    def _tell_of_the_ended(self) -> None:
        while self.clients:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            connection = self.clients.pop(child)
            if connection.fileno() >= 0:
                with suppress(OSError):
                    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                self.selector.unregister(connection)
                connection.close()

    def _become(self, request: dict[str, Any], connection: socket.socket, files: list[int]) -> NoReturn:
        """Be the process that was asked for, in a child."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.selector.close()
            for each in (self.listener, self.wakes, self.wakened, connection, *self.clients.values(), *self.holding):
                each.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            os.umask(request["umask"])
            os.chdir(request["folder"])
            os.environ.clear()
            os.environ.update({**self.set_by_imports, **request["environment"]})
            self._forget_client_of_hub(request["environment"])
            sys.executable = str(self.folder / "python3")  # what the child starts is forked too
            importlib.import_module("numpy").random.seed()
            random.seed()
            if threads := os.environ.get("OMP_NUM_THREADS"):
                importlib.import_module("torch").set_num_threads(int(threads))
            if request["unbuffered"]:
                for stream in (sys.stdout, sys.stderr):
                    cast(io.TextIOWrapper, stream).reconfigure(write_through=True)
            code = _run(request["arguments"])
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)


def _receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        part = connection.recv(length - len(received))
        if not part:
            raise EOFError
        received += part
    return received


def _run(arguments: list[str]) -> int:
    """Run a script, a module or a program (-c) as the interpreter does, and return the exit code."""
    if arguments[:2] == ["-m", "dvc"]:  # as DVC starts itself, for an experiment in a copy
        arguments = [str(FAST_DVC), *arguments[2:]]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, os.getcwd())
            vars(runpy)["_run_module_as_main"](arguments[1])
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            sys.path.insert(0, "")
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = arguments
            script = Path(arguments[0])
            sys.path.insert(0, str(script.absolute().parent))
            main.__file__ = str(script.absolute())
            exec(compile(script.read_bytes(), main.__file__, "exec"), main.__dict__)
    except SystemExit as end:
        code = _exit_code(end.code)
    except BaseException as error:
        shown = error.with_traceback(_without_own_frames(error.__traceback__))
        sys.excepthook(type(error), shown, shown.__traceback__)
        code = 1
    with suppress(BaseException):
        vars(threading)["_shutdown"]()  # waits for the threads
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return code


def _compile_sources() -> None:
    """Compile the sources that checkouts have copies of, and have the children's imports take what is compiled."""
    root = Path(__file__).parents[1]
    loader = importlib.machinery.SourceFileLoader
    compiled = {}
    for file in (*root.glob("src/lathe/**/*.py"), *root.glob("stages/*.py")):
        source = file.read_bytes()
        with suppress(SyntaxError):
            compiled[source] = marshal.dumps(loader.source_to_code(loader("", ""), source, str(file)))
    compile_source = loader.source_to_code

    def source_to_code(self: Any, data: Any, path: Any, **options: Any) -> Any:
        code = compiled.get(data) if isinstance(data, bytes) else None
        if code is None:
            return compile_source(self, data, path, **options)
        of_path = marshal.loads(code)
        vars(_imp)["_fix_co_filename"](of_path, path)
        return of_path

    vars(importlib.machinery)["SourceFileLoader"].source_to_code = source_to_code


def _without_own_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace


def _exit_code(given: object) -> int:
    if given is None:
        return 0
    if isinstance(given, int):
        return given & 255
    print(given, file=sys.stderr)
    return 1


def main() -> None:
    """Import, then serve."""
    listener = socket.socket(fileno=int(sys.argv[2]))
    # Without the folder of this file: no module of the tests can be imported by accident.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != CLIENT.parent]
    environment = dict(os.environ)
    for name in PACKAGES:
        importlib.import_module(name)
    _compile_sources()
    assert not [name for name in sys.modules if name.partition(".")[0] in ("lathe", "gguf")]
    gc.collect()
    gc.freeze()
    Server(Path(sys.argv[1]), listener, environment, sys.argv[3:]).serve()


if __name__ == "__main__":
    main()
