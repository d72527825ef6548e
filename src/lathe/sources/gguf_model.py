"""GGUF file as base model: dequantized once to 16-bit safetensors, with its tokenizer and chat template.

transformers reads the file. What it made of it is then compared with llama.cpp, which the file was written for: the
token ids of many texts must be equal, and the next tokens' probabilities nearly so. Otherwise the file is refused.
"""

import hashlib
import json
import logging
import random
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lathe.common.errors import InputError
from lathe.common.text import readable_bytes, summarize_error
from lathe.gguf import tokenizer_parity
from lathe.gguf.description import describe_gguf
from lathe.gguf.logits import compute_logits
from lathe.sources.gguf_reading import parse_once
from lathe.sources.gguf_rope import set_rope_scaling
from lathe.sources.gguf_tokenizer import save_tokenizer

logger = logging.getLogger(__name__)

# The model of which the tensors of the file are: everything else in a GGUF file is no base model.
MODEL = "model"
MAX_SHARD_BYTES = 5_000_000_000
SAMPLE_TEXTS = 2_000
SPECIAL_TEXTS = 1_000
# Nats per token, from llama.cpp's probabilities on the file to transformers' on the dequantized weights in bf16. Seen:
# 0.004 for SmolLM2-135M in Q4_1, whose kernels in llama.cpp round activations to 8 bits; 0.5 and more where the shape
# of the model was read wrong.
MAX_DIVERGENCE = 0.1
PROBE = (
    "The capital of France is Paris, on the river Seine. In 1889 a tower of iron was built there for a fair. "
    "It was to be taken down after twenty years, and is still there today."
)

# Letters, digits and signs of the writing systems that most texts are in, as first and last code point.
SCRIPTS = (
    (0x41, 0x7A),
    (0xC0, 0x17F),
    (0x391, 0x3C9),
    (0x400, 0x4FF),
    (0x531, 0x586),
    (0x5D0, 0x5EA),
    (0x620, 0x64A),
    (0x660, 0x669),
    (0x904, 0x94D),
    (0x966, 0x96F),
    (0x985, 0x9B9),
    (0xB85, 0xBB9),
    (0xE01, 0xE4F),
    (0x10D0, 0x10F0),
    (0x1200, 0x135A),
    (0x1780, 0x17B3),
    (0x3041, 0x3096),
    (0x30A1, 0x30FA),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0xFF10, 0xFF5A),
    (0x2010, 0x2027),
    (0x20A0, 0x20BF),
    (0xBC, 0xBE),
    (0x2160, 0x217F),
    (0x2190, 0x22FF),
    (0x1F600, 0x1F64F),
)
SEPARATORS = (
    *[" "] * 5,
    "  ",
    "\n",
    "\n\n",
    "\t",
    ", ",
    ". ",
    "-",
    "_",
    "/",
    "'",
    '"',
    ": ",
    "!",
    "?",
    "(",
    ")",
    "\r\n",
)
PIECES = ("don't", "I'LL", "we've", "THEY'RE", "x=1;", "foo_bar()", "</p>", "3.14", "1e-5", "%", "@", "#", "$")


def write_model(file: Path, folder: Path) -> dict[str, Any]:
    """Fill the empty `folder` with the model of a GGUF file: bf16 safetensors, configuration, tokenizer, template.

    Returns what is known of the file: `gguf` (its name), `sha256`, `quantization` (the type of most of its tensors),
    `bits_per_weight`, `texts_compared` and `kl_divergence` (nats per token, from llama.cpp on the file). Raises
    InputError in one line for what is no base model, what transformers cannot read, and what it reads otherwise than
    llama.cpp.
    """
    described = describe_gguf(file)
    _check_kind(file, described)
    size = readable_bytes(described["parameters"] * 2)
    logger.info("%s: %s; in 16 bits it takes %s", file.name, _describe_quantization(described), size)
    with parse_once(), _quiet():
        model = _load(file, described["metadata"])
        tokenizer = save_tokenizer(file, folder, described["metadata"])
    _set_end_tokens(model, tokenizer)
    with _quiet():
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_BYTES)
    _write_readme(file, folder, described)
    texts = [*tokenizer_parity.SAMPLE_TEXTS, *make_texts(SAMPLE_TEXTS), *mention_special_tokens(tokenizer)]
    tokenizer_parity.check_tokens(folder, file, texts)
    divergence = _compare_probabilities(file, model, tokenizer)
    return {
        "gguf": file.name,
        "sha256": _hash(file),
        "quantization": _find_main_type(described["tensor_types"]),
        "bits_per_weight": described["bits_per_weight"],
        "texts_compared": len(texts),
        "kl_divergence": round(divergence, 6),
    }


def read_config(file: Path) -> dict[str, Any]:
    """Return the configuration of the model in a GGUF file, as config.json has it; raises InputError as above."""
    described = describe_gguf(file)
    _check_kind(file, described)
    with parse_once(), _quiet():
        config = _read_config(file, described["metadata"])
    return {**config.to_dict(), "dtype": "bfloat16"}


def make_texts(count: int) -> Iterator[str]:
    """Yield `count` texts of words from many scripts, numbers and punctuation, always the same."""
    chance = random.Random(0)
    for _ in range(count):
        text = ""
        for _ in range(chance.randint(3, 16)):
            first, last = chance.choice(SCRIPTS)
            word = "".join(chr(chance.randint(first, last)) for _ in range(chance.randint(1, 9)))
            if chance.random() < 0.25:
                word = str(chance.randint(0, 10 ** chance.randint(1, 9)))
            elif chance.random() < 0.15:
                word = chance.choice(PIECES)
            text += word + chance.choice(SEPARATORS)
        # Composed, as the tokenizers of some models make them and llama.cpp does not; without unassigned characters.
        yield "".join(char for char in unicodedata.normalize("NFC", text) if unicodedata.category(char) != "Cn")


def mention_special_tokens(tokenizer: Any) -> list[str]:
    """Return texts with the special tokens of a tokenizer in them, a thousand at most."""
    return [f"one {token} two{token}three" for token in sorted(tokenizer.get_added_vocab())[:SPECIAL_TEXTS]]


def _check_kind(file: Path, described: dict[str, Any]) -> None:
    metadata = described["metadata"]
    kind = metadata.get("general.type", MODEL)
    if kind != MODEL:
        raise InputError(
            f"{file.name}: is of the type {kind!r}, not a model; give the GGUF file with the language model",
            code="not-a-model",
        )
    if not described["parameters"]:
        raise InputError(f"{file.name}: holds no weights, only a vocabulary; give the model's file", code="no-weights")
    if (parts := int(metadata.get("split.count", 1))) > 1:
        raise InputError(
            f"{file.name}: is one of {parts} parts; join them first: `llama-gguf-split --merge FIRST_PART WHOLE_FILE`",
            code="split-gguf",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing bars and tables: what matters is in a message of ours."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _read_config(file: Path, metadata: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # transformers raises whatever its reading of foreign metadata comes upon
        raise _refuse(file, metadata, error) from error
    # Qwen3 and others; for Llama transformers takes the number of rotated dimensions, which is the same.
    head_dim = metadata.get(f"{metadata['general.architecture']}.attention.key_length")
    if head_dim and getattr(config, "head_dim", None):
        config.head_dim = head_dim
    set_rope_scaling(config, file, metadata)
    return config


def _load(file: Path, metadata: dict[str, Any]) -> Any:
    """Return the dequantized model in bf16, without the traces of a quantizer."""
    from transformers import AutoModelForCausalLM, GgufConfig

    config = _read_config(file, metadata)
    # Its bar is for terminals alone.
    bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
    try:
        with bar:
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                config=config,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers raises whatever its reading of foreign metadata comes upon
        raise _refuse(file, metadata, error) from error
    # Saving a dequantized model is refused while these say that it is quantized.
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)
    return model.eval()


def _set_end_tokens(model: Any, tokenizer: Any) -> None:
    """Have generation end where the tokenizer's turns end."""
    for config in filter(None, (model.config, model.generation_config)):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def _write_readme(file: Path, folder: Path, described: dict[str, Any]) -> None:
    """Write the model's README, whose front matter has the licence that the file names."""
    metadata = described["metadata"]
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    front = [f"{key}: {json.dumps(str(metadata[name]))}" for key, name in keys.items() if metadata.get(name)]
    lines = ["---", *front, "---", ""] if front else []
    lines.append(f"{metadata.get('general.name', file.stem)}, dequantized from {file.name} to bf16.")
    (folder / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _refuse(file: Path, metadata: dict[str, Any], error: BaseException) -> InputError:
    architecture = metadata.get("general.architecture")
    return InputError(
        f"{file.name}: transformers cannot read this model (architecture {architecture!r}): {summarize_error(error)}; "
        "give its Hugging Face folder instead",
        code="gguf-not-read",
    )


def _compare_probabilities(file: Path, model: Any, tokenizer: Any) -> float:
    """Return the mean KL divergence from llama.cpp's next-token probabilities to transformers', in nats per token."""
    tokens = tokenizer(PROBE)["input_ids"]
    with torch.inference_mode():
        ours = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1).numpy()
    theirs = compute_logits(file, tokens).astype(np.float64)
    theirs -= np.logaddexp.reduce(theirs, axis=-1, keepdims=True)
    ours = ours[:, : theirs.shape[1]]
    divergence = float((np.exp(theirs) * (theirs - ours)).sum(axis=-1).mean())
    if not divergence <= MAX_DIVERGENCE:
        raise InputError(
            f"{file.name}: transformers reads another model from it than llama.cpp does (KL divergence "
            f"{divergence:.3g} nats per token, at most {MAX_DIVERGENCE} is rounding); give its Hugging Face folder "
            "instead",
            code="other-model",
        )
    return divergence


def _describe_quantization(described: dict[str, Any]) -> str:
    types = described["tensor_types"]
    return f"{_find_main_type(types)}, {described['bits_per_weight']:.2f} bits per weight"


def _find_main_type(types: dict[str, int]) -> str:
    # Norms and biases are stored in F32 whatever the weights are.
    weights = {name: count for name, count in types.items() if name != "F32"} or types
    return max(weights, key=lambda name: weights[name])


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
