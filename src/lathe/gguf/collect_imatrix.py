"""Importance matrix: squared inputs of every linear layer, summed while the model reads calibration texts.

The sums are those of llama.cpp's own `llama-imatrix`, by torch: on a GPU if there is one, and before anything is
quantized. As there, the output head and the token embeddings are left out.
"""

import bisect
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.gguf.header import read_metadata
from lathe.gguf.imatrix_file import Importance
from lathe.gguf.tensor_list import Tensor, list_tensors
from lathe.models.model_class import choose_model_class, read_model_config
from lathe.models.precision import DTYPES, resolve_precision

logger = logging.getLogger(__name__)

# Tokens in one forward pass, unless one row is longer.
TOKENS_PER_BATCH = 8192
# Values of a weight or of a file's tensor that are squared at once.
_CHUNK = 1 << 24


def collect(model: Path, file: Path, rows: Sequence[Sequence[int]]) -> dict[str, Importance]:
    """Return the importance of the weights in the GGUF `file`, from a forward pass of the model over `rows`.

    `model` is the model's folder, `file` its 16- or 32-bit GGUF; each of `rows` are the token ids of a text. The result
    has, by the tensor's name in the file, the sum of squares of each column's input over all tokens, for each expert of
    a stack over its own tokens. A layer is matched with a tensor of the file only if their columns are equal, compared
    by their squares: converters may reorder rows, which changes nothing, but with reordered columns the inputs would be
    those of others. Tensors without a layer get no importance and are named in one warning. Raises InputError if no
    layer is found in the file.
    """
    network = _load_model(model)
    recorder = _InputRecorder(network)
    with Progress("importance matrix", len(rows)) as progress, torch.inference_mode(), recorder:
        for batch in _group_rows(rows):
            network.base_model(input_ids=batch.to(network.device), use_cache=False)
            progress.add(len(batch))
    importance: dict[str, Importance] = {}
    tensors = {tensor.name: tensor for tensor in list_tensors(file)}
    names = _TensorNames(file, tensors)
    for layer, weight in recorder.weights.items():
        targets = names.find_tensors(layer)
        if targets and _has_same_columns(weight, file, [tensors[name] for name in targets]):
            sums, counts = recorder.get_sums(layer)
            importance |= {name: Importance(sums, counts) for name in targets}
    _warn_of_unmatched(tensors, importance)
    if not importance:
        raise InputError(
            f"{model}: no linear layer of it is found again in {file.name}, so there is no importance matrix; "
            "set quantize.imatrix to false",
            code="no-matching-layer",
        )
    return importance


def _load_model(folder: Path) -> Any:
    """Return the model, on the GPU if its weights fit there, else on the CPU."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    weight_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    on_gpu = torch.cuda.is_available() and weight_bytes < 0.8 * torch.cuda.mem_get_info()[0]
    if torch.cuda.is_available() and not on_gpu:
        logger.warning("the merged model does not fit the GPU's free memory; calibrating on the CPU, which is slow")
    model = choose_model_class(read_model_config(folder)).from_pretrained(
        folder,
        dtype=DTYPES[resolve_precision("auto")],
        device_map={"": f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"},
        # One expert after the other, each by its own linear operation, whose inputs can be recorded.
        experts_implementation="eager",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    return model.eval()


def _group_rows(rows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Yield batches of rows of one length, which need no padding: it would count as text; (rows, tokens)."""
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for row in rows:
        by_length[len(row)].append(row)
    for length, same in sorted(by_length.items()):
        size = max(1, TOKENS_PER_BATCH // length)
        for start in range(0, len(same), size):
            yield torch.tensor(same[start : start + size])


class _InputRecorder(TorchFunctionMode):
    """Adds up the squared inputs of every product with a weight of the model.

    A mode instead of hooks on modules, because transformers multiplies experts without modules of their own. `weights`
    are those used so far, by their names in the model, as (rows, columns) or (experts, rows, columns).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # In the order of their addresses: an expert's weight is inside that of its stack.
        named = sorted(model.named_parameters(), key=lambda pair: pair[1].data_ptr())
        self._places = [parameter.data_ptr() for _, parameter in named]
        self._named = named
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            self._add_squares(args[0], args[1])
        elif func is torch.addmm:  # GPT-2's Conv1D, whose weights are transposed
            self._add_squares(args[1], args[2].t())
        return func(*args, **(kwargs or {}))

    def get_sums(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return sums of squares, (experts, columns), and the numbers of tokens, (experts,)."""
        return self._sums[name].float().cpu().numpy(), self._counts[name].float().cpu().numpy()

    def _find(self, weight: torch.Tensor) -> tuple[str, torch.Tensor, int] | None:
        """Return the parameter of a weight, its name, and the index of the expert if it is a stack of them."""
        place = bisect.bisect_right(self._places, weight.data_ptr()) - 1
        if place < 0:
            return None
        name, parameter = self._named[place]
        distance = weight.data_ptr() - parameter.data_ptr()
        if parameter.dim() not in (2, 3) or distance >= parameter.nbytes:
            return None
        return name, parameter, distance // (parameter.stride(0) * parameter.itemsize) if parameter.dim() == 3 else 0

    def _add_squares(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        if (match := self._find(weight)) is None:
            return
        name, parameter, expert = match
        if name not in self.weights:
            experts = parameter.shape[0] if parameter.dim() == 3 else 1
            self.weights[name] = weight if parameter.dim() == 2 else parameter
            self._sums[name] = torch.zeros(experts, weight.shape[1], dtype=torch.float64, device=inputs.device)
            self._counts[name] = torch.zeros(experts, dtype=torch.float64, device=inputs.device)
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        self._sums[name][expert] += flat.square().sum(0, dtype=torch.float64)
        self._counts[name][expert] += len(flat)


class _TensorNames:
    """Names of weights in transformers, translated to those in the GGUF file by gguf-py's table."""

    def __init__(self, file: Path, tensors: Mapping[str, Any]) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = read_metadata(file)["general.architecture"]
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        blocks = [int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))]
        self._tensors = tensors
        # Without a table for a newer architecture no layer is found, which is reported.
        self._table = (
            get_tensor_name_map(numbers[architecture], max(blocks, default=0) + 1) if architecture in numbers else None
        )

    def find_tensors(self, layer: str) -> list[str]:
        """Return the tensors of a layer's weight: none, one, or gate and up of experts that transformers has in one."""
        name = layer.replace("language_model.", "")
        if not name.endswith(".weight"):
            name += ".weight"
        candidates = [[name]]
        if "experts.gate_up_proj" in name:
            candidates.append([name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")])
        for parts in candidates:
            names = [self._table.get_name(part, (".weight",)) for part in parts] if self._table else []
            if names and all(one in self._tensors and one.startswith("blk.") for one in names):
                return [one for one in names if one]
        return []


def _has_same_columns(weight: torch.Tensor, file: Path, tensors: Sequence[Tensor]) -> bool:
    """Tell whether the file's tensors together have the columns of a weight in order, by the squares of each column.

    A factor common to all columns does not matter.
    """
    ours = _sum_squares(weight)
    theirs = sum(_sum_stored_squares(file, tensor) for tensor in tensors)
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours / ours.sum(), theirs / theirs.sum()
    return bool(np.allclose(ours, theirs, rtol=2e-3, atol=1e-6 * float(ours.max())))


@torch.no_grad()
def _sum_squares(weight: torch.Tensor) -> Any:
    """Return the sum of squares of each column, (experts, columns)."""
    stack = weight.reshape(-1, *weight.shape[-2:])
    rows = max(1, _CHUNK // stack.shape[-1])
    sums = [sum(part.float().square().sum(0, dtype=torch.float64) for part in one.split(rows)) for one in stack]
    return torch.stack(sums).cpu().numpy()


def _sum_stored_squares(file: Path, tensor: Tensor) -> Any:
    from gguf import GGMLQuantizationType as Kind

    kinds = {Kind.F32: "<f4", Kind.F16: "<f2", Kind.BF16: "<u2"}
    columns, rows, *experts = tensor.extents
    shape = (*experts, rows, columns) if experts else (1, rows, columns)
    stored = np.memmap(file, kinds[Kind(tensor.kind)], mode="r", offset=tensor.offset, shape=shape)
    step = max(1, _CHUNK // columns)
    sums = np.zeros((shape[0], columns))
    for expert in range(shape[0]):
        for start in range(0, rows, step):
            part = stored[expert, start : start + step]
            if part.dtype == np.uint16:  # bfloat16 is the upper half of a float32
                part = (part.astype(np.uint32) << 16).view(np.float32)
            sums[expert] += np.square(part, dtype=np.float32).sum(0, dtype=np.float64)
    return sums


def _warn_of_unmatched(tensors: Mapping[str, Tensor], importance: Mapping[str, Importance]) -> None:
    left = {
        re.sub(r"^blk\.\d+\.", "", name)
        for name in set(tensors) - set(importance)
        if re.fullmatch(r"blk\.\d+\..*(?<!_norm)\.weight", name) and len(tensors[name].extents) > 1
    }
    # Routers and convolutions are never quantized.
    left = {name for name in left if not re.search(r"ffn_gate_inp|conv1d", name)}
    if left:
        logger.warning(
            "no importance is known for the tensors %s: they are quantized without, or refused for the smallest types",
            ", ".join(sorted(left)),
        )
