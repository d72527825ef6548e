"""Estimates from config.json and parameters alone: memory of a training, and disk space of each output.

The model is made on torch's meta device, where tensors have shapes and no data, with the adapter that training would
add. One training step and one evaluation batch are then run on fake tensors, and the bytes of live tensors are counted
at their peak. Nothing is computed, so an 8 B model takes about as long as a small one: a second or two, and 100 MB.
"""

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lathe.common.errors import InputError
from lathe.common.text import readable_bytes
from lathe.config.base import Auto, get_number
from lathe.config.params import Params
from lathe.config.training_params import Quantization, Training
from lathe.gguf.file_sizes import estimate_gguf_bytes
from lathe.models.meta_model import add_meta_adapter, count_trained, ignore_warnings, load_config, make_meta_model
from lathe.training.checkpoints import KEPT_CHECKPOINTS

# Bytes of optimizer state per trained weight, by the optimizer's name in transformers. AdamW keeps two moments and Lion
# one: in float32, or a byte each in the 8-bit ones (bitsandbytes keeps tensors below 4096 values in float32, which is
# little in sum). Adafactor keeps a number per row and column of a matrix.
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "adafactor": 0,
    "sgd": 0,
}

# Bits that the scales of bitsandbytes' 4-bit blocks add to a weight: a float32 for 64 weights; doubly quantized a byte
# for 64 and a float32 for 256 such bytes (https://arxiv.org/abs/2305.14314, section 3).
SCALE_BITS = 32 / 64
DOUBLE_QUANT_SCALE_BITS = 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training at its peak, by purpose.

    `weights` is the frozen base, `adapter` the trained weights (with full tuning the whole model), which have
    `gradients` and `optimizer` states. `activations` and `logits` are those of one forward and backward pass;
    `evaluation` is both in a forward pass without gradients.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    evaluation: int

    @property
    def total(self) -> int:
        """The larger of a step and an evaluation, without the process itself and its libraries."""
        step = self.gradients + self.activations + self.logits
        return self.weights + self.adapter + self.optimizer + max(step, self.evaluation)


def estimate_training_memory(
    model: Path | Mapping[str, Any],
    params: Params,
    *,
    length: int | None = None,
    supervised_tokens: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
) -> TrainingMemory:
    """Estimate the memory of `lathe.training.train.train` on `device`, by default the one that would train here.

    `model` is a folder with config.json, or its content. `length` is that of the longest sequence in tokens, by default
    `training.max_length`; `supervised_tokens` is the number of batch columns with a supervised token, which get logits,
    by default all. The defaults give an upper bound.

    weights      linear layers in 4 bits with their scales, if configured; all else (embeddings, norms, head) in 16
                 bits, with fp32 in 32; with full tuning only buffers
    adapter      float32, with full tuning the whole model; as many bytes of gradients, and optimizer states by
                 `OPTIMIZER_BYTES`
    activations  live tensors at the peak of the step, counted on fake tensors, with activation checkpointing if
                 configured, and the largest 4-bit layer unpacked
    logits       the part of these that is as wide as the vocabulary: two numbers in the training precision per
                 supervised position and vocabulary entry, in the backward pass; on a GPU at most
                 `HELD_LOGITS_BYTES`, and above that one tile

    These are the bytes of tensors. With malloc set to return freed memory (MALLOC_MMAP_THRESHOLD_=262144) the
    resident size grew by 0.91 to 1.09 times the estimate in ten trainings on the CPU; glibc's default keeps freed
    blocks, and made that 1.4 to 2.2 times. A 16-bit checkpoint that is packed to 4 bits stays mapped as well, in pages
    that the kernel can take back: 1.1 to 1.4 times. Memory inside kernels is not seen, and attention is counted as in
    torch's fused kernel for the CPU. On a GPU (an H100, models of 0.6 and 8 B) the estimate was 7 to 30 % too high,
    when all logits were held there.

    Raises InputError where the model or the adapter cannot be made from the configuration, and for DPO and GRPO, whose
    memory has not been measured.
    """
    from lathe.models.precision import resolve_precision

    training, lora, quantization = params.training, params.lora, params.quantization
    if training.method != "sft":
        raise InputError(
            f"training.method is {training.method!r}; memory is estimated for 'sft' alone", code="method-not-estimated"
        )
    precision = resolve_precision(training.precision)
    length = length or training.max_length
    columns = supervised_tokens or length - 1
    with ignore_warnings():
        config = load_config(model)
        if training.tuning == "full":
            to_train = make_meta_model(config, "fp32")
            frozen, largest_packed = sum(buffer.nbytes for buffer in to_train.buffers()), 0
        else:
            base = make_meta_model(config, precision)
            frozen, largest_packed = _measure_weights(base, quantization)
            to_train = add_meta_adapter(base, lora)
        trained = count_trained(to_train)
        if training.tuning == "lora" and lora.num_layers:
            # Measured on the first blocks, which have no update here; that of all blocks is alike.
            every = lora.model_copy(update={"num_layers": None})
            to_train = add_meta_adapter(make_meta_model(config, precision), every)
        # The head of added tokens holds its logits everywhere, as the CPU does.
        device = "cpu" if params.preprocess.added_tokens else device or get_training_device()
        step, evaluation = _measure_peaks(to_train, params, precision, length, columns, device)
    return TrainingMemory(
        weights=frozen,
        adapter=4 * trained,
        gradients=4 * trained,
        optimizer=OPTIMIZER_BYTES[training.optim] * trained,
        activations=step["activations"] + largest_packed,
        logits=step["logits"],
        evaluation=evaluation["activations"] + evaluation["logits"] + largest_packed,
    )


def get_training_device() -> Literal["cpu", "cuda"]:
    """Return the kind of device that this machine trains on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def estimate_disk(model: Path | Mapping[str, Any], params: Params) -> dict[str, int | None]:
    """Estimate the bytes of each output of the pipeline, by its path; None where it depends on the data alone.

    Safetensors hold each weight in the configuration's type (float32 if it names none), the merged model in
    `merge.dtype`, the adapter float32. For GGUF files see `gguf_bytes`. `.scratch/train` holds checkpoints during the
    training, each with the trained weights in float32 and the optimizer's states: those that are kept, and one that is
    being written.
    """
    from lathe.models.experts import count_weights_beside

    with ignore_warnings():
        config = load_config(model)
        base = make_meta_model(config, "bf16")
        weights, head = base.num_parameters(), base.get_output_embeddings()
        projector, full = count_weights_beside(base), params.training.tuning == "full"
        trained = weights if full else count_trained(add_meta_adapter(base, params.lora))
    vocabulary = config.get_text_config().vocab_size
    output = head.weight.numel() if head is not None else 0
    stored = _get_bytes_per_weight(config)
    return {
        "models/base": weights * stored,
        "data/raw": None,
        "data/processed": None,
        ".scratch/train": (KEPT_CHECKPOINTS + 1) * (4 + OPTIMIZER_BYTES[params.training.optim]) * trained,
        "models/adapter": trained * (stored if full else 4),
        "models/merged": weights * (stored if params.merge.dtype == "auto" else 2),
        "models/gguf/adapter": 0 if full else trained * 2,
        "models/gguf/mmproj": 2 * projector,
        "models/gguf/base-f16.gguf": estimate_gguf_bytes("F16", weights, output, vocabulary),
        "models/gguf/merged-f16.gguf": estimate_gguf_bytes("F16", weights, output, vocabulary),
        **{
            f"models/gguf/{name}.gguf": estimate_gguf_bytes(name, weights, output, vocabulary)
            for name in params.quantize.types
        },
        "data/generated": None,
    }


def explain(memory: TrainingMemory, training: Training, quantization: Quantization) -> str:
    """Return one line that names the largest part, and what to change about it."""
    part, size, remedy = _find_largest_part(memory, training, quantization)
    return f"most of it is {part}, {readable_bytes(size)} of {readable_bytes(memory.total)}; {remedy}"


def describe_largest_part(memory: TrainingMemory, training: Training, quantization: Quantization) -> str:
    """Return one line that names the largest part."""
    part, size, _ = _find_largest_part(memory, training, quantization)
    return f"most of it is {part}, {readable_bytes(size)}"


def _find_largest_part(memory: TrainingMemory, training: Training, quantization: Quantization) -> tuple[str, int, str]:
    """Return the largest part, its bytes, and what to change about it."""
    is_evaluation_larger = memory.evaluation > memory.gradients + memory.activations + memory.logits
    forward_pass = (
        {"evaluation": memory.evaluation}
        if is_evaluation_larger
        else {"activations": memory.activations, "logits": memory.logits}
    )
    trained = memory.adapter + memory.gradients + memory.optimizer
    parts = {"weights": memory.weights, "adapter, gradients and optimizer": trained, **forward_pass}
    largest = max(parts, key=lambda name: parts[name])
    match largest:
        case "weights" if quantization.load_in_4bit:
            remedy = "choose a smaller model"
        case "weights":
            remedy = "set quantization.load_in_4bit to true"
        case "activations" if not training.gradient_checkpointing:
            remedy = "set training.gradient_checkpointing to true"
        case "evaluation":
            remedy = _advise_lower("per_device_eval_batch_size", training.per_device_eval_batch_size)
        case "activations" | "logits":
            remedy = _advise_lower("per_device_train_batch_size", training.per_device_train_batch_size)
        case _ if training.tuning == "full":
            remedy = "set training.tuning to lora"
        case _:
            remedy = (
                "lower lora.r or lora.num_layers, or name fewer layers in lora.target_modules and lora.modules_to_save"
            )
    return largest, parts[largest], remedy


def _advise_lower(key: str, batch_size: int | Auto) -> str:
    if batch_size == 1:
        return "lower training.max_length"
    accumulate = ", raise gradient_accumulation_steps as much" if "train" in key else ""
    return f"lower training.{key} (now {batch_size}){accumulate}, or training.max_length"


def _measure_weights(base: Any, quantization: Quantization) -> tuple[int, int]:
    """Return the bytes of the frozen base, and of its largest 4-bit layer when it is unpacked."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    total = sum(parameter.nbytes for parameter in base.parameters())
    total += sum(buffer.nbytes for buffer in base.buffers())
    if not quantization.load_in_4bit:
        return total, 0
    kept = get_keys_to_not_convert(base)
    packed = [
        module.weight
        for name, module in base.named_modules()
        if type(module) in (nn.Linear, Conv1D) and not any(name == key or name.startswith(f"{key}.") for key in kept)
    ]
    bits = 4 + (DOUBLE_QUANT_SCALE_BITS if quantization.bnb_4bit_use_double_quant else SCALE_BITS)
    total += sum(int(weight.numel() * bits / 8) - weight.nbytes for weight in packed)
    return total, max((weight.nbytes for weight in packed), default=0)


def _measure_peaks(
    adapted: Any, params: Params, precision: str, length: int, columns: int, device: str
) -> tuple[Counter[str], Counter[str]]:
    """Return the bytes of activations and logits at the peak of a training step, and of an evaluation batch.

    Layers are alike, so the peak is extrapolated from those with two and with four layers. The other layers of
    `adapted` are removed for that. Layers before the first that `lora.num_layers` trains keep no activations, unless
    they are computed twice, by activation checkpointing.
    """
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    training = params.training
    depth = adapted.config.get_text_config().num_hidden_layers
    layers = next(module for module in adapted.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    # Attention in a pack is within its sequences, which is less.
    longest = max(length, training.max_length) if params.sft.packing else length
    step_columns = columns if longest == length else longest - 1
    shapes = (
        (True, (get_number(training.per_device_train_batch_size), longest, step_columns)),
        (False, (get_number(training.per_device_eval_batch_size), length, columns)),
    )
    peaks: list[list[Counter[str]]] = []
    counts = sorted({min(depth, 4), min(depth, 2)}, reverse=True)
    for count in counts:
        del layers[count:]
        with FakeTensorMode():
            _replace_by_fake_tensors(adapted)
            if training.gradient_checkpointing:
                adapted.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
                adapted.enable_input_require_grads()
            try:
                of_depth = [
                    _measure_peak(adapted, *shape, precision, is_training, device) for is_training, shape in shapes
                ]
            except RuntimeError as error:
                raise InputError(
                    f"config.json: its layers do not fit together: {' '.join(str(error).split())}",
                    code="shapes-do-not-fit",
                ) from None
            peaks.append(of_depth)
    if len(counts) == 1:
        step, evaluation = peaks[0]
        return step, evaluation
    is_partial = training.tuning == "lora" and not training.gradient_checkpointing
    kept = (params.lora.num_layers if is_partial else None) or depth

    def extrapolate(more: Counter[str], less: Counter[str], count: int) -> Counter[str]:
        extra = (count - counts[0]) / (counts[0] - counts[1])
        return Counter({kind: round(more[kind] + extra * (more[kind] - less[kind])) for kind in more | less})

    (step, evaluation), (step_of_fewer, evaluation_of_fewer) = peaks
    return extrapolate(step, step_of_fewer, kept), extrapolate(evaluation, evaluation_of_fewer, depth)


def _measure_peak(
    model: Any, rows: int, length: int, columns: int, precision: str, is_training: bool, device: str
) -> Counter[str]:
    """Run the trainer's own step on one batch of fake tensors, and return the bytes by kind at their peak.

    Where a GPU would compute the loss in tiles, the step has logits in one column, and a tile is added.
    """
    import torch

    from lathe.training.loss import count_tile_bytes, uses_tiles
    from lathe.training.training_step import autocast, compute_step_loss

    config, positions, itemsize = model.config.get_text_config(), rows * columns, 4 if precision == "fp32" else 2
    in_tiles = uses_tiles(device, positions, config.vocab_size, itemsize=itemsize)
    if in_tiles:
        columns = 1
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "columns": torch.arange(columns),
        "targets": torch.zeros(rows, columns, dtype=torch.long),
    }
    model.train(is_training)
    for parameter in model.parameters():
        # Present from the second pass of an accumulated step on; counted separately.
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and is_training else None
    counter = _make_memory_counter(config.vocab_size)
    counter.leave_out([*batch.values(), *model.buffers()])
    for parameter in model.parameters():
        counter.leave_out([parameter] if parameter.grad is None else [parameter, parameter.grad])
    with counter, torch.set_grad_enabled(is_training):
        # On the CPU there is no fp16; bf16 takes as many bytes.
        with autocast("cpu", "fp32" if precision == "fp32" else "bf16"):
            loss = compute_step_loss(model, batch)
        if is_training:
            loss.backward()
    peak = counter.peak
    if in_tiles:
        peak["logits"] += count_tile_bytes(positions, config.vocab_size, itemsize=itemsize)
        # The hidden states of these positions, and their gradient in float32.
        peak["activations"] += positions * config.hidden_size * (itemsize + 4 * is_training)
    return peak


def _replace_by_fake_tensors(model: Any) -> None:
    """Replace tensors on the meta device by fake tensors, which have a device and a type but no data."""
    import torch

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _make_memory_counter(vocabulary: int) -> Any:
    """Return a context manager that counts the bytes of live tensors that were made inside it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    class MemoryCounter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes: Counter[str] = Counter()
            self.peak: Counter[str] = Counter()
            self.known = WeakIdKeyDictionary()  # storages, shared by views

        def leave_out(self, tensors: Sequence[torch.Tensor]) -> None:
            for tensor in tensors:
                self.known[tensor.untyped_storage()] = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor) and made.untyped_storage() not in self.known:
                    self.add(made)
            if self.bytes.total() > self.peak.total():
                self.peak = Counter(self.bytes)
            return result

        def add(self, made: torch.Tensor) -> None:
            kind = "logits" if made.dim() and made.shape[-1] == vocabulary else "activations"
            storage = made.untyped_storage()
            self.known[storage] = True
            self.bytes[kind] += storage.nbytes()
            weakref.finalize(storage, self.bytes.subtract, {kind: storage.nbytes()})

    return MemoryCounter()


def _get_bytes_per_weight(config: Any) -> int:
    import torch

    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
