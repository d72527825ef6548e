"""Tensors that the GGUF of a base model will have, as far as they are known before it is converted."""

from collections.abc import Sequence
from pathlib import Path

from lathe.common.errors import InputError
from lathe.gguf.ggml_types import read_ggml_types
from lathe.gguf.tensor_types import assign_types
from lathe.models.model_folder import get_text_config, open_model, read_config

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


def check_tensor_types(
    base: Path,
    *,
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    tensor_types: Sequence[str],
) -> None:
    """Raise InputError for types that `quantize` would refuse for a model as the one in `base`.

    Rows of head and embeddings must divide into the blocks of their types, and a pattern must match a tensor that
    llama.cpp has for the architecture; whether the model has it too, is known once it is converted.
    """
    columns = {name: stored.shape[-1] for name, stored in open_model(base).tensors.items() if stored.shape}
    for key, suffixes, chosen in (
        ("output_tensor_type", HEADS, output_tensor_type),
        ("token_embedding_type", EMBEDDINGS, token_embedding_type),
    ):
        found = [name for name in columns if name.endswith(suffixes)]
        if chosen and found and columns[found[0]] % (block := read_ggml_types()[chosen].block_values):
            raise InputError(
                f"quantize.{key} is {chosen}, which stores blocks of {block} values; the rows of {found[0]} have "
                f"{columns[found[0]]}; take a type of smaller blocks, such as Q8_0, or F16",
                code="rows-do-not-fit-blocks",
            )
    if tensor_types and (names := list_possible_tensors(base)):
        assign_types(tensor_types, names)


def list_possible_tensors(base: Path) -> list[str]:
    """Return the names of the weights that llama.cpp has for the architecture, or for any if it has another name there.

    Empty where config.json does not say how many blocks there are.
    """
    import gguf

    config = get_text_config(read_config(base))
    kind = str(config.get("model_type", "")).removesuffix("_text").replace("_", "")
    tensors = next(
        (gguf.MODEL_TENSORS[arch] for arch, name in gguf.MODEL_ARCH_NAMES.items() if name.replace("-", "") == kind),
        list(gguf.TENSOR_NAMES),
    )
    blocks = config.get("num_hidden_layers")
    if not isinstance(blocks, int):
        return []
    names = (gguf.TENSOR_NAMES[tensor] for tensor in tensors)
    return [
        f"{name.format(bid=block, xid=0)}.weight"
        for name in names
        if not name.endswith("_norm")
        for block in (range(blocks) if "{bid}" in name else (0,))
    ]
