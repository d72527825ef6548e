"""LoRA delta: B @ A scaled and added to the base weights in float32, by chunks of rows; DoRA and rsLoRA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lathe.models.merge.read_adapter import _Change
from lathe.models.model_folder import Weights

# Elements worked on at once: 0.25 MB in float32, which stays in a core's cache from the product to the file. With more,
# malloc hands every buffer back to the system and the pages come in anew: half the time of a merge.
CHUNK_ELEMENTS = 1 << 16


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.shape[0] if tensor.dim() else 1
    return tensor.reshape(rows, tensor.numel() // rows if rows else 0)


def _row_chunks(shape: Sequence[int]) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


# The arithmetic -----------------------------------------------------------------------------------


def _merged_rows(
    original: torch.Tensor, change: _Change, adapter: Weights, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the merged tensor some rows at a time: (which rows, the rows in `dtype`)."""
    # PEFT loads what replaces a tensor in the precision of the base before anything is added to it.
    start = original
    if change.replacement:
        start = _as_rows(adapter.read(change.replacement)).to(original.dtype)
    factors = None
    if change.low_rank:
        first, second = (adapter.read(name).float() for name in change.low_rank)
        magnitude = adapter.read(change.magnitude).float() if change.magnitude else None
        factors = _Factors(
            first.T if change.embedding else first, second.T if change.embedding else second, change.scaling
        )
        if magnitude is not None:
            by_column = change.embedding
            factors = replace(
                factors,
                row_magnitude=None if by_column else magnitude,
                column_scale=magnitude / _column_norms(start, factors) if by_column else None,
            )
    addend = _as_rows(adapter.read(change.addend).float()) * change.scaling if change.addend else None
    token_rows = adapter.read(change.token_rows) if change.token_rows else None
    indices = torch.tensor(change.token_indices, dtype=torch.long)

    for rows in _row_chunks(start.shape):
        merged = start[rows]
        if factors is not None:
            merged = factors.add_to(merged, rows)
        if addend is not None:
            merged = merged.float() + addend[rows]
        merged = merged.to(dtype)
        if token_rows is not None:
            within = (indices >= rows.start) & (indices < rows.stop)
            merged = merged.index_copy(0, indices[within] - rows.start, token_rows[within].to(dtype))
        yield rows, merged


@dataclass(frozen=True)
class _Factors:
    """The product of left (rows x r), right (r x columns) and scaling in float32, and DoRA's rescaling."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    row_magnitude: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None

    def sum(self, start: torch.Tensor, rows: slice) -> torch.Tensor:
        """Add the product to these rows of the weight (in 16 or 32 bit), in float32."""
        return torch.mm(self.left[rows], self.right).mul_(self.scaling).add_(start.float())

    def add_to(self, start: torch.Tensor, rows: slice) -> torch.Tensor:
        merged = self.sum(start, rows)
        if self.row_magnitude is not None:
            norms = torch.linalg.norm(merged, dim=1)
            merged.mul_((self.row_magnitude[rows] / norms).unsqueeze(1))
        if self.column_scale is not None:
            merged.mul_(self.column_scale)
        return merged


def _column_norms(start: torch.Tensor, factors: _Factors) -> torch.Tensor:
    """The norm of every column of the sum: DoRA scales each dimension of an embedding over all its rows."""
    squares = torch.zeros(start.shape[1], dtype=torch.float64)
    for rows in _row_chunks(start.shape):
        squares += factors.sum(start[rows], rows).double().square_().sum(dim=0)
    return squares.sqrt().float()
