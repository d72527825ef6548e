"""Quick reading of GGUF files by transformers, which has gguf-py parse a file anew for every part of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gguf
import numpy as np


class _QuickReader(gguf.GGUFReader):
    """gguf-py's reader, over a plain view of the file: each slice of a memory map costs what ten of an array cost."""

    @property
    def data(self) -> Any:
        return self._view

    @data.setter
    def data(self, mapped: Any) -> None:
        self._view = np.asarray(mapped)


@contextmanager
def parse_once() -> Iterator[None]:
    """Inside, gguf-py parses a file once, and makes its table of tensor names once instead of once per module."""
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(_QuickReader), cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before
