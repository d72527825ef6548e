"""Quantization of a GGUF by llama.cpp: the installed library, or the user's own `llama-quantize`."""

import ctypes
import logging
import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lathe.common import operating_system
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config.quantization_types import FILES_THAT_CANNOT_BE_MADE, check_type
from lathe.gguf import imatrix_file
from lathe.gguf.ggml_types import read_ggml_types
from lathe.gguf.llama_library import collect_llama_log, load_library
from lathe.gguf.program_errors import extract_reason, raise_disk_error
from lathe.gguf.tensor_list import Tensor, list_tensors
from lathe.gguf.tensor_types import assign_types, list_file_types

logger = logging.getLogger(__name__)


def quantize(
    source: Path,
    out: Path,
    *,
    type: str,  # noqa: A002 - the field's own word
    threads: int,
    binary: Path | None = None,
    importance: Path | None = None,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    tensor_types: Sequence[str] = (),
) -> None:
    """Write the 16- or 32-bit GGUF `source` to `out` in a type of `list_file_types()`, with llama.cpp's own
    quantizer: the installed library, or the `llama-quantize` program `binary`.

    `importance` is a file with an importance matrix. `output_tensor_type` and `token_embedding_type` are types of
    the output head and of the token embeddings in place of what the file's type has for them; where both are one
    tensor, the latter counts if it is given. Each of `tensor_types` is `PATTERN=TYPE` for other tensors.

    A tensor whose rows do not divide into the type's blocks (256 values for the K and most I types) gets a larger
    type from llama.cpp; that is logged as a warning with the number of such tensors. Metadata is kept. The
    caller makes the file appear completely or not at all. Raises InputError if a type is unknown, a pattern matches
    nothing, or llama.cpp refuses (some I types need an importance matrix).
    """
    types = list_file_types()
    if type not in types:
        raise InputError(
            f"{type!r} is no quantization type; {did_you_mean(type, list(types))}", code="unknown-quantization-type"
        )
    if type in FILES_THAT_CANNOT_BE_MADE:
        raise InputError(
            f"{type} is named by llama.cpp, whose quantizer cannot make such a file; take another type",
            code="unsupported-quantization-type",
        )
    if not source.is_file():
        raise InputError(f"{source}: no such GGUF file; quantizing starts from a 16-bit one", code="no-such-file")
    chosen = _choose_types(list_tensors(source), output_tensor_type, token_embedding_type, tensor_types)
    if tensor_types and type in ("F32", "F16", "BF16"):
        logger.warning("%s: llama.cpp leaves quantize.tensor_types out of account where no tensor is quantized", type)
    make = _quantize_with_library if binary is None else _quantize_with_program
    output = make(source, out, type, threads, importance, chosen, binary)
    _warn_of_fallbacks(type, output)


class _Chosen(NamedTuple):
    """Types that the user has chosen: of output head and token embeddings, and of other tensors by their names."""

    output: str | None
    token_embedding: str | None
    others: Mapping[str, str]


def _choose_types(
    tensors: Sequence[Tensor], output: str | None, token_embedding: str | None, patterns: Sequence[str]
) -> _Chosen:
    columns = {tensor.name: tensor.extents[0] for tensor in tensors}
    for key, name, chosen in (
        ("output_tensor_type", "output.weight", output),
        ("token_embedding_type", "token_embd.weight", token_embedding),
    ):
        if chosen is None:
            continue
        check_type(chosen, of_embeddings=True)
        # For these llama.cpp has no fallback, and ggml ends the process.
        if name in columns and columns[name] % (block := read_ggml_types()[chosen].block_values):
            raise InputError(
                f"quantize.{key} is {chosen}, which stores blocks of {block} values; the rows of {name} have "
                f"{columns[name]}; take a type of smaller blocks, such as Q8_0, or F16",
                code="rows-do-not-fit-blocks",
            )
    can_be_quantized = [
        tensor.name
        for tensor in tensors
        if len(tensor.extents) > 1 and re.search(r"(?<!_norm)\.weight$", tensor.name) is not None
    ]
    return _Chosen(output, token_embedding, assign_types(patterns, can_be_quantized))


def _quantize_with_library(
    source: Path,
    out: Path,
    name: str,
    threads: int,
    importance: Path | None,
    chosen: _Chosen,
    _: Path | None,
) -> list[str]:
    llama_cpp = load_library()
    numbers = {name: kind.number for name, kind in read_ggml_types().items()}
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = list_file_types()[name]
    params.nthread = threads
    if chosen.output:
        params.output_tensor_type = numbers[chosen.output]
    if chosen.token_embedding:
        params.token_embedding_type = numbers[chosen.token_embedding]
    # The patterns are resolved: Python's regular expressions are not C++'s. Each array ends with an empty entry.
    overrides = [(f"^{re.escape(name)}$".encode(), numbers[kind]) for name, kind in chosen.others.items()]
    if overrides:
        params.tt_overrides = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))(*overrides)
    means = (
        {name: one.compute_means() for name, one in imatrix_file.read_importance(importance).items()}
        if importance
        else {}
    )
    if means:
        floats = ctypes.POINTER(ctypes.c_float)
        entries = [(name.encode(), mean.ctypes.data_as(floats), len(mean)) for name, mean in means.items()]
        params.imatrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    with collect_llama_log() as log:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    if failed:
        raise_disk_error(log.reason, out)
        out.unlink(missing_ok=True)
        raise InputError(f"{source}: llama.cpp cannot make {name} of it: {log.reason}", code="quantization-refused")
    return log.lines


def _quantize_with_program(
    source: Path,
    out: Path,
    name: str,
    threads: int,
    importance: Path | None,
    chosen: _Chosen,
    binary: Path | None,
) -> list[str]:
    # Its path is written into the metadata: relative, so that the path of the clone does not change the bytes.
    options = ["--imatrix", os.path.relpath(importance)] if importance else []
    options += ["--output-tensor-type", chosen.output] if chosen.output else []
    options += ["--token-embedding-type", chosen.token_embedding] if chosen.token_embedding else []
    for tensor, kind in chosen.others.items():
        options += ["--tensor-type", f"^{re.escape(tensor)}$={kind}"]
    command = [str(binary), *options, str(source), str(out), name, str(threads)]
    try:
        done = operating_system.run_command(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise InputError(
            f"quantize.binary: {binary} cannot be run ({error.strerror}); name llama.cpp's llama-quantize, or null",
            code="program-failed",
        ) from None
    logger.debug("%s\n%s", " ".join(command), done.stdout)
    if done.returncode != 0 or not out.is_file():
        raise_disk_error(done.stdout, out)
        out.unlink(missing_ok=True)
        raise InputError(
            f"{source}: {binary} cannot make {name} of it: {extract_reason(done.stdout)} "
            f"(LATHE_LOG_LEVEL=debug shows its whole output)",
            code="quantization-refused",
        )
    return done.stdout.splitlines()


def _warn_of_fallbacks(name: str, output: list[str]) -> None:
    for line in output:
        if match := re.search(r"(\d+) of (\d+) tensor\(s\) required fallback quantization", line):
            fallbacks = Counter(re.findall(r"falling back to +(\w+)", "\n".join(output)))
            logger.warning(
                "%s: rows of %s of %s tensors do not divide into its blocks; stored in larger types: %s",
                name,
                match[1],
                match[2],
                ", ".join(f"{kind.upper()} × {n}" for kind, n in sorted(fallbacks.items())),
            )
