"""OpenAI-compatible server on this machine alone, with the template of training: llama-server, or llama-cpp-python's.

llama-server answers many requests at once; `make llama-server` builds it. The other is always there.
"""

import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lathe.common.errors import InputError
from lathe.common.listening import HOST, check_port, open_port
from lathe.common.trial_load import try_to_load
from lathe.config.base import Auto
from lathe.gguf.build_llama_server import SERVER, find_program
from lathe.gguf.file_templates import ignore_file_templates
from lathe.gguf.llama_library import load_library
from lathe.gguf.llama_model import LlamaModel
from lathe.inference.generate import find_marker_tokens
from lathe.inference.llama_server import LlamaServer
from lathe.inference.serve_limits import RequestLimits
from lathe.inference.serve_requests import make_preparer, refuse_template_options
from lathe.inference.serve_tools import answer_with_calls, format_prompt
from lathe.models.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

CHAT_FORMAT = "lathe"
# A body may have so many bytes: a token of text takes up to 16, written as \uXXXX up to 64.
BYTES_OF_A_BODY = 1_000_000
BYTES_PER_TOKEN = 64
CONNECTIONS = 256  # at once, each with at most one body
LLAMA_CPP_PYTHON = "llama-cpp-python"

Engine = Literal["auto", "llama-server", "llama-cpp-python"]


def serve(
    gguf: Path,
    *,
    port: int,
    api_key: str | None,
    n_ctx: int,
    threads: int,
    engine: Engine,
    parallel: int | Auto,
) -> None:
    """Serve the model in `gguf` on 127.0.0.1 until Ctrl-C; port 0 takes a free one, which the log names.

    `engine` is what answers; auto: llama-server where it is built. It answers `parallel` requests at once (auto: 32, or
    as many as fit into a quarter of the memory), llama-cpp-python's server one. A request and its answer may take
    `n_ctx` tokens. With `api_key`, requests without it are refused (401); requests that could end or block the engine
    are refused too, as `RequestLimits` says. A request that does not set sampling is answered as the model was
    measured: greedily and without a penalty on repetition. Raises InputError if the file is no usable model, or the
    port is taken.
    """
    check_port(port)  # before the file is read
    if parallel != "auto" and parallel < 1:
        raise InputError(f"--parallel {parallel}: must be at least 1", code="number-too-small")
    program = _find_engine(engine)
    with LlamaModel(gguf, vocab_only=True) as model:
        template, markers, n_vocab = model.chat_template, find_marker_tokens(model), model.n_vocab
    library = load_library()
    try_to_load(gguf, library, vocab_only=False)
    with ExitStack() as stack:
        listener = stack.enter_context(open_port(port))
        if program:
            from lathe.inference.serve_proxy import EngineProxy

            on_gpu = bool(library.llama_supports_gpu_offload())
            server = stack.enter_context(
                LlamaServer(
                    program,
                    gguf,
                    n_ctx=n_ctx,
                    parallel=parallel,
                    threads=threads,
                    connections=CONNECTIONS,
                    on_gpu=on_gpu,
                )
            )
            inner: Any = EngineProxy(server, gguf.stem)
            prepare, how = make_preparer(template, gguf.stem), f"{SERVER}, {server.parallel} requests at once"
        else:
            inner = _make_application(gguf, _make_chat_handler(template, markers), n_ctx, threads)
            prepare, how = refuse_template_options, f"{LLAMA_CPP_PYTHON}, one request at a time"
        app = RequestLimits(
            inner,
            api_key=api_key,
            most_bytes=BYTES_OF_A_BODY + BYTES_PER_TOKEN * n_ctx,
            n_vocab=n_vocab,
            prepare=prepare,
        )
        if api_key is None:
            logger.warning("LATHE_API_KEY is not set: every program on this machine may ask the model")
        _run(app, listener, f"{gguf.name} at http://{HOST}:{listener.getsockname()[1]}/v1 ({how})")


def _find_engine(engine: Engine) -> Path | None:
    """Return the program of llama-server, or None for llama-cpp-python's server."""
    program = None if engine == LLAMA_CPP_PYTHON else find_program(SERVER)
    if engine == SERVER and program is None:
        raise InputError(
            f"--engine {SERVER}: is not built; run `make llama-server`, or take --engine {LLAMA_CPP_PYTHON}",
            code="llama-server-not-built",
        )
    if engine == "auto" and program is None:
        logger.info("`make llama-server` builds a server that answers many requests at once")
    return program


def _make_chat_handler(template: ChatTemplate, markers: Mapping[int, bytes]) -> Callable[..., Any]:
    """Return a chat handler of llama-cpp-python that renders requests with the template of training."""
    from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

    def format_request(*, messages: list[dict[str, Any]], tools: Any = None, **_: Any) -> Any:
        prompt = format_prompt(template, messages, tools)
        # `added_special`: nothing is added before the prompt. As in training, there is exactly one BOS.
        has_bos = not template.adds_bos or prompt.startswith(template.bos_token)
        return ChatFormatterResponse(prompt=prompt, added_special=has_bos)

    return answer_with_calls(chat_formatter_to_chat_completion_handler(format_request), template, markers)


def _make_application(gguf: Path, handler: Callable[..., Any], n_ctx: int, threads: int) -> Any:
    load_library()
    ignore_file_templates()
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry
    from llama_cpp.server import types

    # Before the application is imported, which reads them.
    for request in (types.CreateChatCompletionRequest, types.CreateCompletionRequest):
        request.model_fields["temperature"].default = 0.0
        request.model_fields["repeat_penalty"].default = 1.0
        request.model_fields["model"].default = gguf.stem  # named in the answer, in place of the file's path
        request.model_rebuild(force=True)
    # Messages and tools are read as rows of a dataset are; OpenAI's null as the content beside calls would be refused.
    for field, annotation in (("messages", list[dict[str, Any]]), ("tools", list[dict[str, Any]] | None)):
        types.CreateChatCompletionRequest.model_fields[field].annotation = annotation
    types.CreateChatCompletionRequest.model_rebuild(force=True)
    LlamaChatCompletionHandlerRegistry().register_chat_completion_handler(CHAT_FORMAT, handler, overwrite=True)
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    # Without validation, which would also take MODEL, SEED, API_KEY, … from the environment.
    # A stream is not cut off because another request comes in.
    server = ServerSettings.model_construct(host=HOST, api_key=None, interrupt_requests=False)
    model = ModelSettings.model_construct(
        model=str(gguf),
        model_alias=gguf.stem,
        n_ctx=n_ctx,
        n_threads=threads,
        n_threads_batch=threads,
        chat_format=CHAT_FORMAT,
        verbose=False,
    )
    os.environ.pop("CONFIG_FILE", None)  # another server's, if it is set
    return create_app(server_settings=server, model_settings=[model])


def _run(app: Any, listener: socket.socket, what: str) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            logger.info("serving %s; Ctrl-C ends it", what)

    Server(uvicorn.Config(app, log_level="warning", lifespan="off", limit_concurrency=CONNECTIONS)).run(
        sockets=[listener]
    )
