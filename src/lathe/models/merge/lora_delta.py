"""LoRA delta: B @ A scaled and added to the base weights in float32, by chunks of rows; DoRA and rsLoRA."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from lathe.models.merge.read_adapter import TensorChange
from lathe.models.model_folder import Weights

# Elements computed at once: 0.25 MB in float32, which stays in a core's cache from the product to the file. Of larger
# buffers malloc returns every one to the system, and new pages cost half the time of a merge.
CHUNK_ELEMENTS = 1 << 16


def reshape_to_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as (rows, columns), whatever its number of dimensions."""
    rows = tensor.shape[0] if tensor.dim() else 1
    return tensor.reshape(rows, tensor.numel() // rows if rows else 0)


def iterate_row_chunks(shape: Sequence[int]) -> Iterator[slice]:
    """Yield slices of rows with about CHUNK_ELEMENTS elements each; `shape`: (rows, columns)."""
    step = max(1, CHUNK_ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def merge_rows(
    original: torch.Tensor, change: TensorChange, adapter: Weights, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the merged tensor some rows at a time: (which rows, the rows in `dtype`)."""
    # PEFT casts a replacement to the precision of the base before anything is added to it.
    start = original
    if change.replacement:
        start = reshape_to_rows(adapter.read(change.replacement)).to(original.dtype)
    factors = None
    if change.low_rank:
        first, second = (adapter.read(name).float() for name in change.low_rank)
        magnitude = adapter.read(change.magnitude).float() if change.magnitude else None
        factors = LoraFactors(
            first.T if change.embedding else first, second.T if change.embedding else second, change.scaling
        )
        if magnitude is not None:
            by_column = change.embedding
            factors = replace(
                factors,
                row_magnitude=None if by_column else magnitude,
                column_scale=magnitude / _compute_column_norms(start, factors) if by_column else None,
            )
    addend = reshape_to_rows(adapter.read(change.addend).float()) * change.scaling if change.addend else None
    if change.update:
        addend = reshape_to_rows(change.update())
    token_rows = adapter.read(change.token_rows) if change.token_rows else None
    indices = torch.tensor(change.token_indices, dtype=torch.long)

    for rows in iterate_row_chunks(start.shape):
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
class LoraFactors:
    """LoRA's delta in float32: left (rows x r), right (r x columns) and scaling; and DoRA's rescaling."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    row_magnitude: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None

    def sum(self, start: torch.Tensor, rows: slice) -> torch.Tensor:
        """Add the delta to these rows of the weight (in 16 or 32 bit), in float32."""
        return torch.mm(self.left[rows], self.right).mul_(self.scaling).add_(start.float())

    def add_to(self, start: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return these rows of the weight with the delta added, rescaled for DoRA, in float32."""
        merged = self.sum(start, rows)
        if self.row_magnitude is not None:
            norms = torch.linalg.norm(merged, dim=1)
            merged.mul_((self.row_magnitude[rows] / norms).unsqueeze(1))
        if self.column_scale is not None:
            merged.mul_(self.column_scale)
        return merged


def _compute_column_norms(start: torch.Tensor, factors: LoraFactors) -> torch.Tensor:
    """Return the norm of every column of the sum: DoRA scales each dimension of an embedding over all its rows."""
    squares = torch.zeros(start.shape[1], dtype=torch.float64)
    for rows in iterate_row_chunks(start.shape):
        squares += factors.sum(start[rows], rows).double().square_().sum(dim=0)
    return squares.sqrt().float()
