"""Tokenizer of a GGUF file, as a Hugging Face tokenizer with llama.cpp's token ids.

transformers builds the vocabulary, the merges and the special tokens. It does not know most of the pre-tokenizers that
a GGUF file may name (`tokenizer.ggml.pre`), nor where llama.cpp puts the space before a SentencePiece text: in training
alone, texts with digits or in other scripts would get other ids than llama.cpp gives them.
"""

import json
from pathlib import Path
from typing import Any

from lathe.common import json_files
from lathe.common.errors import InputError
from lathe.common.text import summarize_error
from lathe.gguf.llama_library import load_library
from lathe.gguf.llama_model import LlamaModel
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
        built = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        with LlamaModel(file, vocab_only=True) as vocabulary:
            tokenizer, adds_bos = _restore(built, str(kind), metadata, vocabulary), vocabulary.adds_bos
    except InputError:
        raise
    except Exception as error:  # transformers raises whatever its reading of foreign metadata comes upon
        raise InputError(
            f"{file.name}: transformers cannot build its tokenizer ({kind}): {summarize_error(error)}; "
            "give the model's Hugging Face folder instead",
            code="tokenizer-not-read",
        ) from error
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # For llama.cpp's converter, which does not see in the tokenizer itself that nothing is added.
    flags = {"add_bos_token": adds_bos}
    json_files.write_json(config, json.loads(config.read_text(encoding="utf-8")) | flags)
    if kind == SENTENCEPIECE:
        _save_pieces(file, folder / "tokenizer.model", metadata)
    return tokenizer


def _restore(built: Any, kind: str, metadata: dict[str, Any], vocabulary: LlamaModel) -> Any:
    """Return the tokenizer that transformers built with what it leaves out or changes.

    Its class is the general one: those named for a model put a pre-tokenizer of their own in place of the saved one.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    library = load_library()
    names = {"bos": vocabulary.bos, "eos": vocabulary.eos}
    names |= {"unk": metadata.get("tokenizer.ggml.unknown_token_id")} if kind == SENTENCEPIECE else {}
    names |= {"pad": metadata.get("tokenizer.ggml.padding_token_id")}
    texts = {f"{name}_token": vocabulary.get_token_text(token) for name, token in names.items() if token is not None}
    template = built.chat_template
    end_of_turn = library.llama_vocab_eot(vocabulary.vocab)
    if template and end_of_turn != library.LLAMA_TOKEN_NULL:
        text = vocabulary.get_token_text(end_of_turn)
        # The end of a text is not that of a turn in many files; answers are trained to stop at the latter.
        if text in template and not any(word in template for word in ("eos_token", texts.get("eos_token", text))):
            texts["eos_token"] = text

    layout = json.loads(built.backend_tokenizer.to_str())
    layout["added_tokens"] = _list_special_tokens(vocabulary)
    if layout["model"]["type"] == "BPE":
        # transformers spells special tokens in the alphabet of bytes, and then adds them once more at the end.
        special = {token["id"]: token["content"] for token in layout["added_tokens"]}
        ids = {text: token for text, token in layout["model"]["vocab"].items() if token < vocabulary.n_vocab}
        kept = {text: token for text, token in ids.items() if token not in special}
        layout["model"]["vocab"] = kept | {text: token for token, text in special.items()}
    backend = Tokenizer.from_str(json.dumps(layout))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    _set_pre_tokenizer(backend, kind, metadata.get("tokenizer.ggml.pre"), prefix=prefix)
    _set_ends(backend, vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **texts
    )
    if kind == SENTENCEPIECE:  # for llama.cpp's converter
        tokenizer.init_kwargs["add_prefix_space"] = prefix
    return tokenizer


def _list_special_tokens(vocabulary: LlamaModel) -> list[dict[str, Any]]:
    """Return the tokens that llama.cpp finds in a text before it splits it, as tokenizer.json has them."""
    library = load_library()
    tokens = []
    for token in range(vocabulary.n_vocab):
        attributes = library.llama_vocab_get_attr(vocabulary.vocab, token)
        if attributes & (
            library.LLAMA_TOKEN_ATTR_CONTROL | library.LLAMA_TOKEN_ATTR_USER_DEFINED | library.LLAMA_TOKEN_ATTR_UNKNOWN
        ):
            entry = {
                "id": token,
                "content": vocabulary.get_token_text(token),
                "single_word": False,
                "lstrip": bool(attributes & library.LLAMA_TOKEN_ATTR_LSTRIP),
                "rstrip": bool(attributes & library.LLAMA_TOKEN_ATTR_RSTRIP),
                "normalized": False,
                "special": not attributes & library.LLAMA_TOKEN_ATTR_USER_DEFINED,
            }
            tokens.append(entry)
    return [token for token in tokens if token["content"]]


def _set_pre_tokenizer(backend: Any, kind: str, name: str | None, *, prefix: bool) -> None:
    """Make the tokenizer split a text as llama.cpp does."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    known = PRE_TOKENIZERS.get(name or "default")  # llama.cpp takes a file without a name for `default`
    if kind == BYTE_LEVEL and known is not None:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in known.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Sequence([*splits, byte_level])
        model = backend.model
        model.ignore_merges = known.ignore_merges
        backend.model = model
    elif kind == SENTENCEPIECE:
        rules: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
        rules.append(normalizers.Replace(" ", SPACE))
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(rules), None


def _set_ends(backend: Any, vocabulary: LlamaModel) -> None:
    """Have the tokenizer put before and after a text what llama.cpp does: in many files its flags are left out."""
    from tokenizers import processors

    adds_eos = load_library().llama_vocab_get_add_eos(vocabulary.vocab)
    before = [vocabulary.bos] if vocabulary.adds_bos and vocabulary.bos is not None else []
    after = [vocabulary.eos] if adds_eos and vocabulary.eos is not None else []
    texts = {vocabulary.get_token_text(token): token for token in (*before, *after)}

    def frame(place: str, number: int) -> list[str]:
        ends = [[f"{vocabulary.get_token_text(token)}:{number}" for token in tokens] for tokens in (before, after)]
        return [*ends[0], f"{place}:{number}", *ends[1]]

    backend.post_processor = processors.TemplateProcessing(
        single=frame("$A", 0), pair=[*frame("$A", 0), *frame("$B", 1)], special_tokens=list(texts.items())
    )


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
