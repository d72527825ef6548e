"""Empty model: the modules of a model folder without its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lathe.models.model_class import choose_model_class, read_model_config


def make_empty_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder on the meta device, and which weights of the files it would find.

    No weight is read. The model knows how transformers has renamed, stacked or split the weights of its files.
    """
    with silence_transformers():
        model, found = choose_model_class(read_model_config(folder)).from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    return model, found


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Keep transformers from logging anything below an error, and from drawing bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
