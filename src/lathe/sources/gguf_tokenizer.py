"""Tokenizer of a GGUF file, as a Hugging Face tokenizer with llama.cpp's token ids.

transformers builds the vocabulary, the merges and the special tokens. It does not know most of the pre-tokenizers that
a GGUF file may name (`tokenizer.ggml.pre`), nor where llama.cpp puts the space before a SentencePiece text: in training
alone, texts with digits or in other scripts would get other ids than llama.cpp gives them.
"""

from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.gguf.pre_tokenizers import PRE_TOKENIZERS

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
SPACE = "\u2581"  # how SentencePiece writes a space

_UNKNOWN = 2  # SentencePiece's types of pieces have the numbers of llama.cpp's


def save_tokenizer(file: Path, folder: Path, metadata: dict[str, Any]) -> Any:
    """Save the tokenizer of a GGUF file, whose header is `metadata`, in a model folder; return it.

    Raises InputError if the file holds no tokenizer, or one that transformers cannot build.
    """
    from transformers import AutoTokenizer

    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        raise InputError(
            f"{file.name}: holds no tokenizer; give a GGUF file that llama.cpp can chat with", code="no-tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        _set_pre_tokenizer(tokenizer, str(kind), metadata)
    except Exception as error:  # transformers raises whatever its reading of foreign metadata comes upon
        raise InputError(
            f"{file.name}: transformers cannot build its tokenizer ({kind}): {_first_line(error)}; "
            "give the model's Hugging Face folder instead",
            code="tokenizer-not-read",
        ) from error
    tokenizer.save_pretrained(folder)
    if kind == SENTENCEPIECE:
        _save_pieces(file, folder / "tokenizer.model", metadata)
    return tokenizer


def _set_pre_tokenizer(tokenizer: Any, kind: str, metadata: dict[str, Any]) -> None:
    """Make the tokenizer split a text as llama.cpp does."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    # llama.cpp takes a file without a name for `default`.
    known = PRE_TOKENIZERS.get(metadata.get("tokenizer.ggml.pre") or "default")
    if kind == BYTE_LEVEL and known is not None:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in known.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        model = backend.model
        model.ignore_merges = known.ignore_merges
        backend.model = model
    elif kind == SENTENCEPIECE:
        rules: list[Any] = [normalizers.Replace(" ", SPACE)]
        if metadata.get("tokenizer.ggml.add_space_prefix", True):
            rules.insert(0, normalizers.Prepend(SPACE))
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(rules), None


def _save_pieces(file: Path, target: Path, metadata: dict[str, Any]) -> None:
    """Write the SentencePiece model of a GGUF file, from which llama.cpp's converter makes the vocabulary again."""
    from gguf import GGUFReader
    from sentencepiece import sentencepiece_model_pb2

    reader = GGUFReader(file)
    fields = (reader.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    tokens, scores, types = (field.contents() for field in fields)
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=int(kind))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    trainer = proto.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.byte_fallback, trainer.vocab_size = True, len(tokens)
    for name, key in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        setattr(trainer, f"{name}_id", int(metadata.get(f"tokenizer.ggml.{key}_token_id", -1)))
    if unknown is None:  # SentencePiece demands one
        trainer.unk_id = next((index for index, kind in enumerate(types) if kind == _UNKNOWN), 0)
    proto.normalizer_spec.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = bool(
        metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)
    )
    target.write_bytes(proto.SerializeToString(deterministic=True))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
