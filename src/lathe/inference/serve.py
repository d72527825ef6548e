"""llama-cpp-python's own OpenAI-compatible server, on this machine alone, with the template of training."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.gguf.llama_library import library
from lathe.gguf.llama_model import Model
from lathe.models.chat_template import render

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
CHAT_FORMAT = "lathe"


def serve(gguf: Path, *, port: int, api_key: str | None, n_ctx: int, threads: int) -> None:
    """Serve the model in `gguf` on 127.0.0.1 until Ctrl-C; port 0 takes a free one, which the log names.

    With `api_key`, requests without it are refused (401). A request that says nothing of sampling is answered as the
    model was measured: greedily and without a penalty on repetition. Requests are answered one at a time; `n_ctx` is
    the room for one and its answer, in tokens. Raises InputError if the file is no usable model, or the port is taken.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: no port; must be from 0 (any free one) to 65535")
    model = Prompts(gguf)
    with socket.socket() as listener:
        # As servers do: a port whose last connections have not yet died is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"--port {port}: not to be had ({os.strerror(error.errno or 0)}); name another one, or 0 for any"
            ) from None
        app = _application(gguf, model, api_key, n_ctx, threads)
        if api_key is None:
            logger.warning(
                "LATHE_API_KEY is not set: every program on this machine, web pages in a browser too, may ask the model"
            )
        _run(app, listener, f"{gguf.name} at http://{HOST}:{listener.getsockname()[1]}/v1")


class Prompts:
    """What the template of training makes of messages, and the special tokens it needs.

    Raises InputError if the file is no GGUF with a template.
    """

    def __init__(self, gguf: Path) -> None:
        with Model(gguf, vocab_only=True) as model:
            self.template = model.template
            self.bos_token, self.eos_token = model.text_of(model.bos), model.text_of(model.eos)
            self.adds_bos = model.adds_bos

    def __call__(self, *, messages: list[dict[str, Any]], tools: Any = None, **_: Any) -> Any:
        """Render a request; the signature is that of llama-cpp-python's chat formats."""
        from llama_cpp.llama_chat_format import ChatFormatterResponse

        text = render(
            self.template,
            messages,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            add_generation_prompt=True,
            tools=tools,
        )
        # `added_special`: nothing is to be put in front. As in training, there is exactly one BOS.
        has_bos = not self.adds_bos or text.startswith(self.bos_token)
        return ChatFormatterResponse(prompt=text, added_special=has_bos)


def _application(gguf: Path, prompts: Prompts, api_key: str | None, n_ctx: int, threads: int) -> Any:
    library()
    from llama_cpp.llama_chat_format import register_chat_format
    from llama_cpp.server import types

    # Before the application is imported, which reads them.
    for request in (types.CreateChatCompletionRequest, types.CreateCompletionRequest):
        request.model_fields["temperature"].default = 0.0
        request.model_fields["repeat_penalty"].default = 1.0
        request.model_rebuild(force=True)
    register_chat_format(CHAT_FORMAT)(prompts)
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    # Constructed as they are: these classes would also take MODEL, SEED, API_KEY, … from the environment.
    server = ServerSettings.model_construct(host=HOST, api_key=api_key)
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

    Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run(sockets=[listener])
