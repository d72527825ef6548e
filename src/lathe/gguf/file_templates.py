"""Chat templates that llama-cpp-python would take from a GGUF: none, as it compiles and renders them without limits.

A template is a program that comes with a file. Lathe renders it itself, in `lathe.models.chat_template`.
Compiling alone can hang, since Jinja computes `2 ** (10 ** 11)` at that time.
"""

from typing import Any


def ignore_file_templates() -> None:
    """Have llama-cpp-python compile no template of a file that it loads; to be called before `Llama` is made."""
    from llama_cpp import llama_chat_format

    llama_chat_format.Jinja2ChatFormatter = _UnusedTemplate


class _UnusedTemplate:
    def __init__(self, **_: Any) -> None:
        pass

    def to_chat_handler(self) -> Any:
        """Return what refuses to answer: whoever loads a file renders its template before."""

        def refuse(**_: Any) -> Any:
            raise NotImplementedError("the chat template of a GGUF is rendered by Lathe")

        return refuse
