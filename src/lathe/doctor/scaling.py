"""Scaling: what the training of a model of a known shape takes on named GPUs (`lathe doctor --for`), on paper.

Memory and disk come from `lathe.needs.estimate`, speed from what was measured on one H100 (docs/benchmarks.md), by the
share of the data sheet's peak that was reached there. Several GPUs have not been measured.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean, readable_bytes, readable_seconds
from lathe.config.overrides import apply_overrides, read_key
from lathe.config.params import Params
from lathe.doctor.checks import find_model_config
from lathe.models.meta_model import ignore_warnings
from lathe.needs.fit_batch import USABLE

if TYPE_CHECKING:
    from lathe.needs.estimate import TrainingMemory

# Memory in bytes, by a part of the device's name; the first that fits counts. From the makers' data sheets, as are the
# peaks of `lathe.training.throughput`.
GPU_BYTES = {
    "B200": 180e9,
    "H200": 141e9,
    "H100": 80e9,
    "A100": 80e9,
    "L40": 48e9,
    "L4": 24e9,
    "A40": 48e9,
    "A10": 24e9,
    "RTX 6000 Ada": 48e9,
    "RTX A6000": 48e9,
    "RTX 4090": 24e9,
    "RTX 3090": 24e9,
    "V100": 32e9,
    "T4": 16e9,
}
MOST_GPUS = 4096

# Share of the peak that a training reached on an H100, in rows of 4,096 tokens, by the width of the model.
SHARES_BY_WIDTH = ((1024, 0.101), (4096, 0.380))
# How much of that is left when activations are computed twice, and on a 4-bit base with that (8 B there).
LEFT_WITH_CHECKPOINTING, LEFT_WITH_4_BITS = 0.68, 0.51
SUPERVISED_SHARE = 1 / 3  # of the tokens, as there

LENGTH = 4096
# Of every training; overrides of the user come after them.
COMMON = (
    f"training.max_length={LENGTH}",
    "training.per_device_train_batch_size=1",
    "training.per_device_eval_batch_size=1",
    "training.precision=bf16",
    "lora.num_layers=null",
)
# The trainings that are compared, by name.
TRAININGS = {
    "lora, 16-bit base": {"tuning": "lora", "4bit": "false", "checkpointing": "false"},
    "lora, 16-bit base, checkpointing": {"tuning": "lora", "4bit": "false", "checkpointing": "true"},
    "lora, 4-bit base, checkpointing": {"tuning": "lora", "4bit": "true", "checkpointing": "true"},
    "full, checkpointing": {"tuning": "full", "4bit": "false", "checkpointing": "true"},
}
KEYS = {
    "tuning": "training.tuning",
    "4bit": "quantization.load_in_4bit",
    "checkpointing": "training.gradient_checkpointing",
}


@dataclass(frozen=True)
class Gpus:
    """So many GPUs of a name; `memory` of each in bytes, `peak` of its 16-bit products in operations per second."""

    count: int
    name: str
    memory: int
    peak: float


@dataclass(frozen=True)
class TrainingNeeds:
    """What a training takes on the GPUs.

    `bytes_on_one` is the memory without sharding. `shards` is over how many GPUs weights and states must be sharded so
    that it fits, None where it does not; `bytes_of_each` is then the memory of one of them, `gigabytes_per_second` what
    a GPU must receive meanwhile, so that computing does not wait. `tokens_per_second` is that of all GPUs, `seconds`
    those of the rows, once. `disk_bytes` are all outputs of the pipeline and its checkpoints, data aside.
    """

    training: str
    bytes_on_one: int
    shards: int | None
    bytes_of_each: int | None
    tokens_per_second: float | None
    seconds: float | None
    gigabytes_per_second: float | None
    disk_bytes: int


@dataclass(frozen=True)
class ModelNeeds:
    """The needs of each training of a model, how many weights it has, and the bytes of its files."""

    model: str
    weights: int
    gpus: Gpus
    length: int
    rows: int
    trainings: list[TrainingNeeds]
    base_bytes: int


@dataclass(frozen=True)
class _TuningSize:
    """Operations of a token, and bytes of all outputs on disk and of the base, by which weights are trained."""

    flops: float
    disk_bytes: int
    base_bytes: int


def parse_gpus(text: str) -> Gpus:
    """Return the GPUs of a text such as `8xH100`. Raises InputError for a number or a name that is not known."""
    from lathe.training.throughput import PEAK_FLOPS

    found = re.fullmatch(r"(?:(\d{1,4})\s*[x×*])?\s*([A-Za-z][\w -]{1,40})", text.strip())
    count = int(found[1] or 1) if found else 0
    name = found[2].strip().replace("-", " ") if found else ""
    known = next((known for known in PEAK_FLOPS if known.lower() == name.lower()), None)
    if known is None or not 1 <= count <= MOST_GPUS:
        remedy = did_you_mean(name or text[:40], list(PEAK_FLOPS))
        raise InputError(
            f"--gpus {text[:60]!r}: must be a number from 1 to {MOST_GPUS}, an x and a name, such as 8xH100; {remedy}",
            code="no-such-gpu",
        )
    memory = next(size for part, size in GPU_BYTES.items() if part in known)
    return Gpus(count, known, int(memory), PEAK_FLOPS[known])


def list_models() -> list[str]:
    """Return the names of the shapes that come along."""
    return list(_read_shapes())


def find_shape(name: str) -> Path | Mapping[str, Any]:
    """Return config.json of a shape that comes along, of a folder, or of a preset. Raises InputError for others."""
    shapes = _read_shapes()
    if name in shapes:
        return shapes[name]
    if (Path(name) / "config.json").is_file():
        return Path(name)
    try:
        config = apply_overrides([f"model={name}"])
    except InputError:
        raise InputError(
            f"--for {name[:80]!r}: no shape that comes along, no model of presets.yaml, no folder with config.json; "
            f"{did_you_mean(name, list(shapes))}",
            code="no-such-shape",
        ) from None
    return find_model_config(config.model, paths.ROOT)


def measure_needs(name: str, gpus: Gpus, rows: int, overrides: Sequence[str]) -> ModelNeeds:
    """Return what a model's trainings take for so many rows of `training.max_length` tokens.

    An override of what the trainings differ in leaves those that have its value. Raises InputError for a model or an
    override that is refused.
    """
    from lathe.models.meta_model import load_config, make_meta_model
    from lathe.needs.estimate import estimate_training_memory

    shape = find_shape(name)
    with ignore_warnings():
        base = make_meta_model(load_config(shape), "bf16")
    weights, largest = base.num_parameters(), _find_largest_block(base)
    width = base.config.get_text_config().hidden_size
    sizes: dict[str, _TuningSize] = {}
    given = {read_key(override): override.partition("=")[2].strip() for override in overrides}
    needs: list[TrainingNeeds] = []
    length = base_bytes = 0
    for training, values in TRAININGS.items():
        if any(given.get(KEYS[key], value) != value for key, value in values.items()):
            continue
        of_training = [f"{KEYS[key]}={value}" for key, value in values.items()]
        params = apply_overrides([*COMMON, *of_training, *overrides]).params
        length = params.training.max_length
        with ignore_warnings():
            size = sizes.get(params.training.tuning) or _measure_tuning(shape, params)
            supervised_tokens = max(1, round(SUPERVISED_SHARE * length))
            memory = estimate_training_memory(shape, params, supervised_tokens=supervised_tokens, device="cuda")
        sizes[params.training.tuning], base_bytes = size, size.base_bytes
        rate = gpus.peak * _get_share(width, params) / size.flops
        needs.append(_place_training(training, memory, size.disk_bytes, largest, rate, length, gpus, rows))
    if not needs:
        raise InputError(
            f"-S {', '.join(given)}: none of the trainings that are compared has these values; leave some of them out",
            code="nothing-compared",
        )
    return ModelNeeds(name, weights, gpus, length, rows, needs, base_bytes)


def _measure_tuning(shape: Path | Mapping[str, Any], params: Params) -> _TuningSize:
    """Return what holds for all trainings of a model with the same weights trained."""
    from lathe.models.meta_model import add_meta_adapter, load_config, make_meta_model
    from lathe.needs.estimate import estimate_disk
    from lathe.training.throughput import count_flops

    files = estimate_disk(shape, params)
    model = make_meta_model(load_config(shape), "bf16")
    if params.training.tuning != "full":
        model = add_meta_adapter(model, params.lora)
    per_token, per_supervised = count_flops(model)
    return _TuningSize(
        per_token + SUPERVISED_SHARE * per_supervised,
        sum(size or 0 for size in files.values()),
        files["models/base"] or 0,
    )


def _place_training(
    training: str,
    memory: "TrainingMemory",
    disk: int,
    largest: int,
    rate: float,
    length: int,
    gpus: Gpus,
    rows: int,
) -> TrainingNeeds:
    """Return what a training takes on the GPUs, of which each computes `rate` tokens per second."""
    states = memory.weights + memory.adapter + memory.optimizer
    pass_bytes = max(memory.gradients + memory.activations + memory.logits, memory.evaluation)
    usable = USABLE["cuda"] * gpus.memory

    def take(shards: int) -> int:
        if shards == 1:
            return states + pass_bytes
        # One block is computed with while the next one is gathered.
        kept = (states + memory.gradients) / shards
        return round(kept + max(memory.activations + memory.logits, memory.evaluation) + 2 * largest)

    divisors = [number for number in range(1, gpus.count + 1) if gpus.count % number == 0]
    shards = next((number for number in divisors if take(number) <= usable), None)
    if shards is None:
        return TrainingNeeds(training, take(1), None, None, None, None, None, disk)
    received = 0.0
    if shards > 1:
        # The weights are gathered for the forward and for the backward pass, the gradients are summed once.
        received = (shards - 1) / shards * (2 * (memory.weights or memory.adapter / 2) + memory.gradients)
    tokens = gpus.count * rate
    return TrainingNeeds(
        training,
        take(1),
        shards,
        take(shards),
        round(tokens, 1),
        round(rows * length / tokens, 1),
        round(received / (length / rate) / 1e9, 1) if received else None,
        disk,
    )


def _get_share(width: int, params: Params) -> float:
    """Return the share of a GPU's peak that a training reaches, between the widths that were measured."""
    (narrow, low), (wide, high) = SHARES_BY_WIDTH
    position = (math.log2(min(max(width, narrow), wide)) - math.log2(narrow)) / math.log2(wide / narrow)
    share = low + position * (high - low)
    if params.quantization.load_in_4bit:
        return share * LEFT_WITH_4_BITS
    return share * (LEFT_WITH_CHECKPOINTING if params.training.gradient_checkpointing else 1)


def _find_largest_block(model: Any) -> int:
    """Return the bytes in 16 bits of the largest part that is gathered at once: a block, or the embeddings."""
    from torch import nn

    depth = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    parts = [block for blocks in lists for block in blocks]
    parts += [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    return 2 * max(sum(weight.numel() for weight in part.parameters()) for part in parts)


def format_needs(needs: ModelNeeds) -> Iterator[str]:
    """Yield the lines of a table of the trainings, and what holds for all of them."""
    gpus = needs.gpus
    yield (
        f"{needs.model}: {needs.weights / 1e9:,.3g} B weights, rows of {needs.length:,} tokens, one a GPU and step, on "
        f"{gpus.count} x {gpus.name} of {readable_bytes(gpus.memory)}"
    )
    head = (
        "training",
        "on one GPU",
        "GPUs a copy",
        "memory each",
        "tokens/s",
        f"{needs.rows:,} rows",
        "between GPUs",
        "disk",
    )
    table = [head, *(_list_cells(training) for training in needs.trainings)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
    yield f"the base has {readable_bytes(needs.base_bytes)} to download once; disk is without the data"
    yield "speeds are scaled from one H100, tokens of which a third is supervised; several GPUs have not been measured"


def _list_cells(needs: TrainingNeeds) -> tuple[str, ...]:
    one, disk = readable_bytes(needs.bytes_on_one), readable_bytes(needs.disk_bytes)
    if needs.shards is None:
        return (needs.training, one, "does not fit", "", "", "", "", disk)
    return (
        needs.training,
        one,
        str(needs.shards),
        readable_bytes(needs.bytes_of_each or 0),
        f"{needs.tokens_per_second:,.0f}",
        readable_seconds(needs.seconds or 0),
        f"{needs.gigabytes_per_second:,.0f} GB/s" if needs.gigabytes_per_second else "",
        disk,
    )


def _read_shapes() -> dict[str, dict[str, Any]]:
    shapes: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("model_shapes.json").read_text(encoding="utf-8")
    )
    return shapes
