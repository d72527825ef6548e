"""Importance matrix file: for each weight, the mean square of the inputs of each column.

The format is llama.cpp's own (GGUF of the type `imatrix`, tools/imatrix/imatrix.cpp): for the tensor NAME,
`NAME.in_sum2` holds the sums of squares, (experts, columns), and `NAME.counts` the tokens they were summed over,
(experts, 1); a tensor that is no stack of experts has one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lathe.common.errors import InputError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Importance:
    """Of one weight: `sums` of squared inputs, (experts, columns), over `counts` tokens, (experts,)."""

    sums: Floats
    counts: Floats

    def compute_means(self) -> Floats:
        """Return the quantizer's weights of errors, (experts × columns,); 1 for an expert without tokens."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32).ravel()


def write_importance(importance: Mapping[str, Importance], target: Path, *, dataset: str, rows: int) -> None:
    """Write the importance of weights, by their names in GGUF, summed over `rows` rows of `dataset`.

    The caller makes the file appear completely or not at all.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(target, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    # llama.cpp's chunks are texts of one length; here they are rows, with their mean length.
    tokens = max(float(one.counts.max()) for one in importance.values())
    writer.add_uint32("imatrix.chunk_count", rows)
    writer.add_uint32("imatrix.chunk_size", max(1, round(tokens / rows)))
    for name in sorted(importance):
        writer.add_tensor(f"{name}.in_sum2", importance[name].sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", importance[name].counts.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_importance(source: Path) -> dict[str, Importance]:
    """Read a file of `write_importance` or of llama.cpp's own `llama-imatrix`.

    Raises InputError if the file is missing or is something else.
    """
    from gguf import GGUFReader

    if not source.is_file():
        raise InputError(
            f"{source}: no such importance matrix; run the stage imatrix, which writes it", code="no-such-file"
        )
    try:
        tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in GGUFReader(source).tensors}
    except ValueError as error:
        raise InputError(
            f"{source}: not an importance matrix ({error}); run the stage imatrix again", code="damaged-imatrix"
        ) from None
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    if not names or any(f"{name}.counts" not in tensors for name in names):
        raise InputError(
            f"{source}: not an importance matrix; it holds no sums with their counts; run imatrix again",
            code="damaged-imatrix",
        )
    return {
        name: Importance(np.atleast_2d(tensors[f"{name}.in_sum2"]), tensors[f"{name}.counts"].ravel()) for name in names
    }
