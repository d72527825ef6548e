"""Range of weights: whether they are numbers, and fit into the 16-bit floats of a GGUF."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.models.model_folder import open_model

if TYPE_CHECKING:
    import torch

LARGEST_F16 = 65504.0
FLOATS = ("F16", "BF16", "F32", "F64")
VALUES_AT_A_TIME = 1 << 22


class _Bits(NamedTuple):
    """A float type read as integers, which are in the order of the absolute values once the sign is masked out."""

    type: type[np.unsignedinteger[Any]]
    mask: int  # of all but the sign
    largest_f16: int  # the largest value that is not above LARGEST_F16
    infinity: int
    shift: int  # to the bits of a 32-bit float


# By the names of safetensors.
_WIDER_THAN_F16 = {
    "BF16": _Bits(np.uint16, 0x7FFF, 0x477F, 0x7F80, 16),
    "F32": _Bits(np.uint32, 0x7FFFFFFF, 0x477FE000, 0x7F800000, 0),
}


def find_beyond_f16(folder: Path) -> tuple[str, float] | None:
    """Return the first tensor with a weight beyond what f16 holds, and the largest of them; None where all fit.

    A weight that is infinite already is not meant. Every weight is read once, in the time that a disk takes, and as
    bits: importing torch for that would take longer than most models.
    """
    headers: dict[Path, tuple[int, dict[str, Any]]] = {}
    for name, stored in open_model(folder).tensors.items():
        if bits := _WIDER_THAN_F16.get(stored.dtype):
            if stored.path not in headers:
                headers[stored.path] = _read_header(stored.path)
            start, header = headers[stored.path]
            begin, end = header[name]["data_offsets"]
            if end > begin and (found := _find_largest(stored.path, start + begin, end - begin, bits)):
                return name, found
    return None


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a safetensors file begin (bytes), and its header."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header: dict[str, Any] = json.loads(content.read(length))
    return 8 + length, header


def _find_largest(file: Path, offset: int, size: int, bits: _Bits) -> float | None:
    """Return the largest finite absolute value in a part of a file, or None where f16 holds it."""
    values = np.memmap(file, bits.type, "r", offset, shape=(size // np.dtype(bits.type).itemsize,))
    largest = 0
    for begin in range(0, len(values), VALUES_AT_A_TIME):
        absolute: NDArray[Any] = values[begin : begin + VALUES_AT_A_TIME] & bits.type(bits.mask)
        if int(absolute.max()) > bits.largest_f16:
            finite = absolute[absolute < bits.infinity]
            largest = max(largest, int(finite.max(initial=0)))
    if largest <= bits.largest_f16:
        return None
    return float(np.array(largest << bits.shift, np.uint32).view(np.float32))


def check_finite(folder: Path, shown: str) -> None:
    """Raise InputError where a weight of the model in `folder`, called `shown` in messages, is infinite or no number.

    Every weight is read once, in the time that a disk takes. Weights of fewer than 16 bits are not looked at.
    """
    import torch

    weights = open_model(folder)
    with Progress("checking weights", len(weights.tensors), unit="tensor") as progress:
        for name, stored in weights.tensors.items():
            if stored.dtype in FLOATS:
                tensor = weights.read(name)
                # The smallest and the largest of values one of which is no number are none either.
                if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
                    raise InputError(
                        f"{shown}: {name} holds {_count_not_finite(tensor)}; a training with it has no loss; download "
                        "the model again, or take another",
                        code="weights-not-finite",
                    )
            progress.add()


def _count_not_finite(tensor: "torch.Tensor") -> str:
    wrong = tensor[~tensor.isfinite()]
    return f"{len(wrong):,} of {tensor.numel():,} weights that are infinite or no number ({wrong[0].item()})"
