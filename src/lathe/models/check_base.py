"""Base model checked as it is fetched: what training, merge or conversion would refuse, or not notice, hours later."""

import logging
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.outside_files import check_sizes, translate_errors
from lathe.models.empty_model import make_empty_model
from lathe.models.loss_mask import encode
from lathe.models.merge.read_adapter import HEADS
from lathe.models.model_folder import open_model, read_json
from lathe.models.model_kind import check_kind
from lathe.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

# Tokens at which llama.cpp ends a generation, whatever the model says (llama-vocab.cpp, special_eog_ids).
ENDING_TOKENS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    }
)
# How weights of a quantized checkpoint end: GPTQ and AWQ, compressed-tensors, bitsandbytes, MXFP4, FP8.
QUANTIZED = (
    *(
        ".qweight",
        ".qzeros",
        ".weight_packed",
        ".absmax",
        ".quant_map",
        "_blocks",
        ".weight_scale",
        ".weight_scale_inv",
    ),
)
CHAT = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]


def check_base(folder: Path, shown: str) -> None:
    """Raise InputError where the model in `folder`, called `shown` in messages, cannot become a GGUF that answers.

    It must be one of transformers' causal language models, the files must hold every weight of it, and the chat
    template must use tokens that the embeddings have, and end an answer with one at which llama.cpp stops. No weight is
    read.
    """
    check_kind(folder, shown)
    model = _check_weights(folder, shown)
    _check_tied(folder, model, shown)
    try:
        with translate_errors(shown, "its tokenizer"):
            tokenizer = load_tokenizer(folder)
            _check_chat(tokenizer, model.get_input_embeddings().num_embeddings, shown)
    except InputError as error:
        text = str(error).removeprefix(f"{folder.name}: ").removeprefix("row 1: ").removeprefix(f"{shown}: ")
        raise InputError(f"{shown}: {text}", code=error.code) from None


def _check_weights(folder: Path, shown: str) -> Any:
    """Return the model on the meta device, after a look at which weights it would find."""
    check_sizes(read_json(folder / "config.json"), shown)
    try:
        model, found = make_empty_model(folder)
    except InputError:
        raise
    except Exception as error:  # transformers raises whatever its reading of foreign files comes upon
        raise InputError(
            f"{shown}: transformers cannot load it: {_describe(error)}; choose a causal language model whose files are "
            "whole",
            code="base-not-loaded",
        ) from None
    unread = sorted(found["unexpected_keys"])
    if wrong := sorted(found["mismatched_keys"]):
        name, stored, wanted = wrong[0]
        raise InputError(
            f"{shown}: {name} is of shape {list(stored)}; config.json asks for {list(wanted)}; correct config.json, or "
            "download the model again",
            code="weights-of-other-shape",
        )
    if quantized := [name for name in unread if name.endswith(QUANTIZED)]:
        raise InputError(
            f"{shown}: its weights are quantized ({quantized[0]}{_count_others(quantized)}), and a merge needs weights "
            "never quantized; give the 16-bit model",
            code="weights-quantized",
        )
    if missing := sorted(found["missing_keys"]):
        names = f"; nothing reads {unread[0]}{_count_others(unread)} of its files" if unread else ""
        raise InputError(
            f"{shown}: no weights for {missing[0]}{_count_others(missing)}, which {type(model).__name__} has and would "
            f"draw at random{names}; correct config.json (tie_word_embeddings) or the names, or download the model "
            "again",
            code="weights-incomplete",
        )
    if unread:
        logger.warning(
            "%s: %s%s of its files is read by nothing in %s, and left out",
            shown,
            unread[0],
            _count_others(unread),
            type(model).__name__,
        )
    return model


def _check_tied(folder: Path, model: Any, shown: str) -> None:
    """Refuse a head of its own that config.json says is the embeddings: programs differ in which they take."""
    # As transformers asks it: of the whole configuration, not of that of the language model in it.
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    import torch

    weights = open_model(folder)
    for embeddings in (name for name in weights.tensors if name.endswith(tuple(f"{key}.weight" for key in HEADS))):
        heads = [name for name in weights.tensors if name.endswith(tuple(f"{head}.weight" for head in HEADS.values()))]
        for head in heads:
            same = weights.shape(head) == weights.shape(embeddings)
            if not same or not torch.equal(weights.read(head), weights.read(embeddings)):
                raise InputError(
                    f"{shown}: config.json says that {head} is {embeddings} (tie_word_embeddings), and the files hold "
                    "another one; set tie_word_embeddings to false if the model was trained so, or remove the head",
                    code="tied-and-different",
                )


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__} {text}" if isinstance(error, KeyError) else text


def _count_others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_chat(tokenizer: Any, embeddings: int, shown: str) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{shown}: its tokenizer names no end token, at which answers stop; set eos_token in "
            "tokenizer_config.json, and eos_token_id in config.json, to the token that ends an answer in its template",
            code="no-end-token",
        )
    for name in ("eos", "pad", "bos"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None and token >= embeddings:
            raise InputError(
                f"{shown}: its {name}_token is {getattr(tokenizer, f'{name}_token')!r}, token {token}; the model has "
                f"embeddings for {embeddings}; name one that it has in tokenizer_config.json, or resize them",
                code="token-without-embedding",
            )
    [row, *_] = encode(tokenizer, [CHAT], supervise="last")
    for token in row.input_ids:
        if token >= embeddings:
            raise InputError(
                f"{shown}: its chat template writes {tokenizer.convert_ids_to_tokens(token)!r}, token {token}; the "
                f"model has embeddings for {embeddings}; resize them, or take another template",
                code="token-without-embedding",
            )
    last = max(index for index, is_supervised in enumerate(row.supervised) if is_supervised)
    ending = tokenizer.convert_ids_to_tokens(row.input_ids[last])
    if row.input_ids[last] != tokenizer.eos_token_id and ending not in ENDING_TOKENS:
        raise InputError(
            f"{shown}: its chat template ends an answer with {ending!r}, at which llama.cpp does not stop, but at the "
            f"tokenizer's eos_token, {tokenizer.eos_token!r}; set eos_token in tokenizer_config.json and eos_token_id "
            f"in config.json and generation_config.json to {ending!r}, or take another template",
            code="answers-never-end",
        )
