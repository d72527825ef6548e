"""How many steps and how much memory a training takes, and how much disk each output, before there are any weights.

Everything follows from a model's config.json and the parameters. The model is made on torch's meta device, which knows
shapes and holds no data, with the adapter that training would put on it; one step and one evaluation are then run on
fake tensors, and what would be alive at the worst moment is counted. Nothing is computed, so an 8 B model takes
about as long as a small one: a second or two, and some 100 MB.
"""

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.text import readable_bytes
from lathe.config.params import Params
from lathe.config.training_params import Lora, Quantization, Training
from lathe.gguf.file_sizes import gguf_bytes
from lathe.training.checkpoints import KEPT_CHECKPOINTS
from lathe.training.optimizer_steps import _less

# Bytes of state per trained weight, by the optimizer's name in transformers: AdamW keeps two moments and Lion one, in
# float32 or, for the 8-bit ones, a byte each (bitsandbytes leaves tensors below 4096 values in float32: little in sum).
# Adafactor keeps a number per row and column of a matrix.
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
    """Bytes that a training holds at its worst moment, by what they are for.

    `weights` is the frozen base, `adapter` what is trained (under full tuning the whole model; nothing is frozen), both
    with `gradients` and `optimizer` states there in each step; `activations` and `logits` are those of one forward and
    backward pass, `evaluation` both of a pass without gradients, which takes the place of a step's.
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
        """The larger of a step and an evaluation, without what the process itself and its libraries take."""
        step = self.gradients + self.activations + self.logits
        return self.weights + self.adapter + self.optimizer + max(step, self.evaluation)


def estimate_training_memory(
    model: Path | Mapping[str, Any],
    params: Params,
    *,
    length: int | None = None,
    supervised_tokens: int | None = None,
) -> TrainingMemory:
    """Estimate the memory of `lathe.training.train.train` on the device that would train.

    `model` is a folder with config.json, or its content. `length` is that of the longest row in tokens, by default
    `training.max_length`; `supervised_tokens` in how many columns of a batch some row is supervised, which get logits,
    by default all. The defaults make an upper bound.

    weights      linear layers in 4 bits and their scales if asked for; all else (embeddings, norms, head) in 16 bits,
                 in fp32 in 32; under full tuning nothing but buffers
    adapter      float32, under full tuning the whole model; its gradients as many bytes, the optimizer's states
                 `OPTIMIZER_BYTES`
    activations  what is alive at the worst moment of the step, counted on fake tensors, checkpointing included, and
                 the largest 4-bit layer unpacked
    logits       the part of that as wide as the vocabulary: per supervised position and entry two numbers of the
                 precision in the backward pass

    This is what the tensors take. With malloc told to return what is freed (MALLOC_MMAP_THRESHOLD_=262144), the
    resident size grew by 0.91 to 1.09 times the estimate in ten trainings on the CPU; glibc's malloc as it is keeps
    freed blocks, and made that 1.4 to 2.2 times. A 16-bit checkpoint that is packed to 4 bits stays mapped besides, in
    pages that the kernel takes back when it must: 1.1 to 1.4 times.
    What a kernel uses inside is not seen, and attention is counted as torch's fused kernel for the CPU does it. On a
    GPU the estimate is untested.

    Raises InputError where the model or the adapter cannot be made from the configuration, and for another method than
    supervised fine-tuning: what pairs and samples hold has not been measured.
    """
    from lathe.models.precision import resolve_precision

    training, lora, quantization = params.training, params.lora, params.quantization
    if training.method != "sft":
        raise InputError(f"training.method is {training.method!r}; memory is estimated for 'sft' alone")
    precision = resolve_precision(training.precision)
    length = length or training.max_length
    columns = supervised_tokens or length - 1
    with _quiet():
        config = _config(model)
        if training.tuning == "full":
            to_train = _on_meta(config, "fp32")
            frozen, largest_packed = sum(buffer.nbytes for buffer in to_train.buffers()), 0
        else:
            base = _on_meta(config, precision)
            frozen, largest_packed = _weights_bytes(base, quantization)
            to_train = _adapted(base, lora)
        trained = _trained_weights(to_train)
        step, evaluation = _worst_moments(to_train, params, precision, length, columns)
    return TrainingMemory(
        weights=frozen,
        adapter=4 * trained,
        gradients=4 * trained,
        optimizer=OPTIMIZER_BYTES[training.optim] * trained,
        activations=step["activations"] + largest_packed,
        logits=step["logits"],
        evaluation=evaluation["activations"] + evaluation["logits"] + largest_packed,
    )


def estimate_disk(model: Path | Mapping[str, Any], params: Params) -> dict[str, int | None]:
    """Estimate the bytes of each output of the pipeline, by its path; None where it depends on the data alone.

    Safetensors hold each weight in the configuration's type (float32 if it names none), the merged model in
    `merge.dtype`, the adapter float32. For GGUF files see `gguf_bytes`. `.scratch/train` is what checkpoints take while
    the model is trained: the trained weights in float32 and the optimizer's states, in those that are kept and the
    one that is being written.
    """
    with _quiet():
        config = _config(model)
        base = _on_meta(config, "bf16")
        weights, head = base.num_parameters(), base.get_output_embeddings()
        full = params.training.tuning == "full"
        trained = weights if full else _trained_weights(_adapted(base, params.lora))
    vocabulary = config.get_text_config().vocab_size
    output = head.weight.numel() if head is not None else 0
    stored = _dtype_bytes(config)
    return {
        "models/base": weights * stored,
        "data/raw": None,
        "data/processed": None,
        ".scratch/train": (KEPT_CHECKPOINTS + 1) * (4 + OPTIMIZER_BYTES[params.training.optim]) * trained,
        "models/adapter": trained * (stored if full else 4),
        "models/merged": weights * (stored if params.merge.dtype == "auto" else 2),
        "models/gguf/adapter": 0 if full else trained * 2,
        "models/gguf/base-f16.gguf": gguf_bytes("F16", weights, output, vocabulary),
        "models/gguf/merged-f16.gguf": gguf_bytes("F16", weights, output, vocabulary),
        **{f"models/gguf/{name}.gguf": gguf_bytes(name, weights, output, vocabulary) for name in params.quantize.types},
        "data/generated": None,
    }


def explain(memory: TrainingMemory, training: Training, quantization: Quantization) -> str:
    """Name in one line the part that takes most, and what to change about it."""
    evaluating = memory.evaluation > memory.gradients + memory.activations + memory.logits
    passes = (
        {"evaluation": memory.evaluation}
        if evaluating
        else {"activations": memory.activations, "logits": memory.logits}
    )
    trained = memory.adapter + memory.gradients + memory.optimizer
    parts = {"weights": memory.weights, "adapter, gradients and optimizer": trained, **passes}
    largest = max(parts, key=lambda name: parts[name])
    match largest:
        case "weights" if quantization.load_in_4bit:
            remedy = "choose a smaller model"
        case "weights":
            remedy = "set quantization.load_in_4bit to true"
        case "activations" if not training.gradient_checkpointing:
            remedy = "set training.gradient_checkpointing to true"
        case "evaluation":
            remedy = _less("per_device_eval_batch_size", training.per_device_eval_batch_size)
        case "activations" | "logits":
            remedy = _less("per_device_train_batch_size", training.per_device_train_batch_size)
        case _ if training.tuning == "full":
            remedy = "set training.tuning to lora"
        case _:
            remedy = "lower lora.r, or name fewer layers in lora.target_modules and lora.modules_to_save"
    return f"most of it is {largest}, {readable_bytes(parts[largest])} of {readable_bytes(memory.total)}; {remedy}"


def _config(model: Path | Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    content, shown = (_read(model), f"{model.name}/config.json") if isinstance(model, Path) else (model, "config.json")
    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise InputError(f"{shown}: model_type is {kind!r}; no architecture of the installed transformers")
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(content))
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise InputError(f"{shown}: transformers refuses it: {' '.join(str(error).split())}") from None


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json_object(folder / "config.json", remedy="fetch the model again")
    return content


def _on_meta(config: Any, precision: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from lathe.models.precision import DTYPES

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision], trust_remote_code=False)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise InputError(f"config.json: no causal language model: {' '.join(str(error).split())}") from None


def _adapted(base: Any, lora: Lora) -> Any:
    import torch

    from lathe.models.adapter import add_adapter

    with torch.device("meta"):
        return add_adapter(base, lora)


def _trained_weights(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _weights_bytes(base: Any, quantization: Quantization) -> tuple[int, int]:
    """Bytes of the frozen base, and of its largest packed layer once unpacked for a product."""
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


def _worst_moments(
    adapted: Any, params: Params, precision: str, length: int, columns: int
) -> tuple[Counter[str], Counter[str]]:
    """Bytes of activations and logits at the worst moment of a training step, and of an evaluation pass.

    Each layer adds as much as the next, so that what two and four of them hold tells what all of them do. Layers are
    taken off `adapted` for that.
    """
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    training = params.training
    depth = adapted.config.get_text_config().num_hidden_layers
    layers = next(module for module in adapted.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    # A pack's attention is that of its rows, which is less.
    longest = max(length, training.max_length) if params.sft.packing else length
    kept = columns if longest == length else longest - 1
    passes = (
        (True, (training.per_device_train_batch_size, longest, kept)),
        (False, (training.per_device_eval_batch_size, length, columns)),
    )
    counted: list[list[Counter[str]]] = []
    counts = sorted({min(depth, 4), min(depth, 2)}, reverse=True)
    for count in counts:
        del layers[count:]
        with FakeTensorMode():
            _take_fake_weights(adapted)
            if training.gradient_checkpointing:
                adapted.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
                adapted.enable_input_require_grads()
            try:
                moments = [_worst_moment(adapted, *shape, precision, learning) for learning, shape in passes]
            except RuntimeError as error:
                raise InputError(
                    f"config.json: its layers do not fit together: {' '.join(str(error).split())}"
                ) from None
            counted.append(moments)
    if len(counts) == 1:
        step, evaluation = counted[0]
        return step, evaluation
    steps = (depth - counts[0]) / (counts[0] - counts[1])
    step, evaluation = (
        Counter({kind: round(more[kind] + steps * (more[kind] - less[kind])) for kind in more | less})
        for more, less in zip(*counted, strict=True)
    )
    return step, evaluation


def _worst_moment(model: Any, rows: int, length: int, columns: int, precision: str, learning: bool) -> Counter[str]:
    """Run the trainer's own step on one batch; return the bytes by kind at the moment when most were alive."""
    import torch

    from lathe.training.training_step import autocast, compute_step_loss

    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "columns": torch.arange(columns),
        "targets": torch.zeros(rows, columns, dtype=torch.long),
    }
    model.train(learning)
    for parameter in model.parameters():
        # There from the second pass of an accumulated step on; counted apart.
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and learning else None
    alive = _alive(model.config.get_text_config().vocab_size)
    alive.leave_out([*batch.values(), *model.buffers()])
    for parameter in model.parameters():
        alive.leave_out([parameter] if parameter.grad is None else [parameter, parameter.grad])
    with alive, torch.set_grad_enabled(learning):
        # On the CPU there is no fp16; bf16 takes as many bytes.
        with autocast("cpu", "fp32" if precision == "fp32" else "bf16"):
            loss = compute_step_loss(model, batch)
        if learning:
            loss.backward()
    return alive.most


def _take_fake_weights(model: Any) -> None:
    """Put fake tensors, which have a device and a type but no data, in the place of those on the meta device."""
    import torch

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _alive(vocabulary: int) -> Any:
    """Return a context that counts the bytes of what is made inside it for as long as it is alive."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes: Counter[str] = Counter()
            self.most: Counter[str] = Counter()
            self.known = WeakIdKeyDictionary()  # storages, which views share

        def leave_out(self, tensors: Sequence[torch.Tensor]) -> None:
            for tensor in tensors:
                self.known[tensor.untyped_storage()] = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for made in tree_leaves(result):
                if isinstance(made, torch.Tensor) and made.untyped_storage() not in self.known:
                    self.add(made)
            if self.bytes.total() > self.most.total():
                self.most = Counter(self.bytes)
            return result

        def add(self, made: torch.Tensor) -> None:
            kind = "logits" if made.dim() and made.shape[-1] == vocabulary else "activations"
            storage = made.untyped_storage()
            self.known[storage] = True
            self.bytes[kind] += storage.nbytes()
            weakref.finalize(storage, self.bytes.subtract, {kind: storage.nbytes()})

    return Alive()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # PEFT and transformers warn of what only matters to a model that is trained or saved.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dtype_bytes(config: Any) -> int:
    import torch

    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
