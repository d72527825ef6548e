"""BERTScore (Zhang et al. 2020): similarity of two texts, as the F1 score of tokens matched by an encoder's embeddings.

Texts are embedded here in batches of similar length, each distinct text once. torchmetrics matches the tokens of one
pair at a time: given several, it compares texts of different pairs (version 1.9.0; its issue 2728). Only the tokens of
the text itself are matched, without the special tokens that the tokenizer adds.
"""

import hashlib
import math
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.outside_files import check_sizes, translate_errors
from lathe.common.progress import Progress
from lathe.common.text import summarize_error

if TYPE_CHECKING:
    import torch

Pair = tuple[str, str]
PairScores = dict[Pair, float]

DECIMALS = 5  # of a score: these do not depend on how texts are batched
UNRELATED_PAIRS = 1000  # their mean score is the baseline `shuffled`
CACHE_FORMAT = b"1"  # part of the cache's key; to be changed when this module computes other scores


class Encoder:
    """An encoder in a folder: config.json, safetensors and tokenizer. No code in it is run, nothing is unpickled."""

    def __init__(self, folder: Path, *, num_layers: int | None, max_length: int) -> None:
        """Use the embeddings of layer `num_layers` (None: the last), for texts cut to `max_length` tokens.

        Raises InputError if the folder holds no encoder, or one with fewer layers.
        """
        from transformers import AutoConfig

        try:
            check_sizes(read_json_object(folder / "config.json"), folder.name)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its reading of foreign files comes upon
            raise InputError(
                f"bert_score.model: {folder}: {summarize_error(error)}; name another encoder",
                code="invalid-encoder",
            ) from None
        if config.is_encoder_decoder:
            raise InputError(
                f"bert_score.model: {folder} is a {config.model_type}, an encoder with a decoder; name one without",
                code="invalid-encoder",
            )
        layers = config.num_hidden_layers
        if num_layers is not None and num_layers > layers:
            raise InputError(
                f"bert_score.num_layers is {num_layers}; the encoder has {layers}; lower it", code="too-many-layers"
            )
        self.folder, self.max_length = folder, max_length
        self.num_layers = layers if num_layers is None else num_layers
        self._max_positions: int = config.max_position_embeddings

    def compute_digest(self) -> str:
        """Return a hash of everything that a score depends on besides the two texts."""
        content = hashlib.sha256(CACHE_FORMAT + f"{self.num_layers} {self.max_length}".encode())
        for file in sorted(self.folder.iterdir()):
            if file.suffix in {".json", ".safetensors", ".txt", ".model"}:
                with file.open("rb") as stream:
                    content.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return content.hexdigest()

    def load_tokenizer(self) -> Any:
        """Return the tokenizer. Raises InputError if the encoder takes fewer than `max_length` tokens."""
        from transformers import AutoTokenizer

        with translate_errors(self.folder.name, "its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, padding_side="right")
        longest = min(self._max_positions, tokenizer.model_max_length)
        if self.max_length > longest:
            raise InputError(
                f"bert_score.max_length is {self.max_length}; the encoder takes {longest} tokens; lower it",
                code="max-length-too-long",
            )
        return tokenizer

    def load(self) -> Callable[[Sequence[str]], "list[torch.Tensor]"]:
        """Return the function that embeds a batch of texts: for each text (tokens, hidden size), float32, on the CPU.

        Raises InputError as `load_tokenizer` does, and if the encoder cannot be loaded.
        """
        import torch
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # it warns about GPUs where there are none
        tokenizer = self.load_tokenizer()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with translate_errors(self.folder.name, "it"):
            model = AutoModel.from_pretrained(
                self.folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        model.eval().to(device)

        @torch.inference_mode()
        def embed(texts: Sequence[str]) -> list[torch.Tensor]:
            batch = tokenizer(
                list(texts),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            own = batch.pop("special_tokens_mask") == 0
            hidden = model(**batch.to(device), output_hidden_states=True).hidden_states[self.num_layers].cpu()
            own &= batch["attention_mask"].cpu().bool()
            return [states[kept] for states, kept in zip(hidden, own, strict=True)]

        return embed


def compute_scores(pairs: Iterable[Pair], encoder: Encoder, *, batch_size: int, cache: Path) -> PairScores:
    """Return the F1 score of every pair of texts, without rescaling.

    Equal texts score 1; an empty text and another one score 0. Scores that were computed before are read from the
    folder `cache`. Each batch is added to it at once, so that an interrupted run loses at most one batch.
    """
    scored = {(first, second): float(first == second) for first, second in pairs}
    missing = {pair for pair, equal in scored.items() if not equal and all(pair)}
    if not missing:
        return scored
    cache.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache / f"{encoder.compute_digest()}.sqlite", timeout=60)) as known:
        known.execute("CREATE TABLE IF NOT EXISTS scores (pair BLOB PRIMARY KEY, f1 REAL NOT NULL) WITHOUT ROWID")
        # One key per query: SQLite limits the number of parameters.
        for pair in sorted(missing):
            if row := known.execute("SELECT f1 FROM scores WHERE pair = ?", (_hash_pair(pair),)).fetchone():
                scored[pair] = row[0]
                missing.remove(pair)
        for computed in _compute_batches(missing, encoder, batch_size):
            scored |= computed
            known.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?)", [(_hash_pair(pair), f1) for pair, f1 in computed.items()]
            )
            known.commit()
    return scored


def draw_unrelated_pairs(references: Sequence[str], seed: int) -> list[Pair]:
    """Return random pairs of different references, whose mean score is the baseline `shuffled`."""
    chosen = np.random.default_rng(seed).integers(0, len(references), (UNRELATED_PAIRS, 2))
    pairs = [(references[first], references[second]) for first, second in chosen]
    unrelated = [(first, second) for first, second in pairs if first != second]
    if not unrelated:
        raise InputError(
            "bert_score.baseline is shuffled, but all references are equal; set it to null or a file of bert-score's",
            code="equal-references",
        )
    return unrelated


def rescale(f1: float, baseline: float) -> float:
    """Return the score on a scale on which the baseline is 0 and equal texts are 1."""
    return round((f1 - baseline) / (1 - baseline), DECIMALS)


def read_baseline(file: Path, num_layers: int) -> float:
    """Return the F1 score of unrelated texts from a baseline file of bert-score: LAYER,P,R,F, one line per layer.

    Raises InputError if there is no such file or line.
    """
    try:
        lines = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
        by_layer = {int(line[0]): float(line[3]) for line in lines}
        return by_layer[num_layers]
    except FileNotFoundError:
        raise InputError(
            f"bert_score.baseline: {file}: no such file; name one, or set it to shuffled or null",
            code="missing-file",
        ) from None
    except (ValueError, IndexError):
        raise InputError(
            f"bert_score.baseline: {file}: not a baseline file; it must have a header and lines LAYER,P,R,F",
            code="invalid-baseline",
        ) from None
    except KeyError:
        raise InputError(
            f"bert_score.baseline: {file} has no line for layer {num_layers}; set bert_score.num_layers to one it has",
            code="missing-layer",
        ) from None


def _compute_batches(pairs: Iterable[Pair], encoder: Encoder, batch_size: int) -> Iterable[PairScores]:
    # Sorted by length, for little padding, and by reference, as answers of several artifacts share it.
    waiting = sorted(pairs, key=lambda pair: (len(pair[1]), pair[1], len(pair[0]), pair[0]))
    if not waiting:
        return
    embed = encoder.load()
    with Progress("BERTScore", total=len(waiting)) as progress:
        for start in range(0, len(waiting), batch_size):
            share = waiting[start : start + batch_size]
            texts = sorted({text for pair in share for text in pair}, key=lambda text: (len(text), text))
            embedded: dict[str, torch.Tensor] = {}
            for first in range(0, len(texts), batch_size):
                batch = texts[first : first + batch_size]
                embedded |= zip(batch, embed(batch), strict=True)
            yield {pair: _compute_f1(embedded[pair[0]], embedded[pair[1]]) for pair in share}
            progress.add(len(share))


def _compute_f1(completion: "torch.Tensor", reference: "torch.Tensor") -> float:
    """Return the F1 score of the embeddings of one pair, (tokens, hidden size) each."""
    import torch
    from torchmetrics.functional.text.bert import bert_score

    if not len(completion) or not len(reference):
        return 0.0  # white space only, for which a tokenizer may return no token
    embedded = {"completion": completion, "reference": reference}

    def make_tokens(texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        # torchmetrics leaves out the first and the last token as [CLS] and [SEP], so that two dummies are added. Their
        # ids tell which of the two texts it is.
        tokens = torch.full((1, len(embedded[texts[0]]) + 2), int(texts[0] == "reference"))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def look_up_embeddings(_: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        states = embedded["reference" if batch["input_ids"][0, 0] else "completion"]
        edge = torch.ones(1, states.shape[1])
        return torch.cat([edge, states, edge])[None]

    result: dict[str, Any] = bert_score(
        ["completion"],
        ["reference"],
        model=_ModelPlaceholder(),  # type: ignore[arg-type]
        user_tokenizer=make_tokens,
        user_forward_fn=look_up_embeddings,
    )
    if not math.isfinite(result["precision"]) or not math.isfinite(
        result["recall"]
    ):  # torchmetrics would give an F1 of 0
        raise InputError(
            "bert_score.model: its embeddings are not finite; name another encoder", code="invalid-encoder"
        )
    return round(float(result["f1"]), DECIMALS)


class _ModelPlaceholder:
    """Passed to torchmetrics as the model, as the embeddings are already computed."""

    config = SimpleNamespace(num_hidden_layers=1)

    def eval(self) -> None:
        """Do nothing."""

    def to(self, device: object) -> None:
        """Do nothing."""


def _hash_pair(pair: Pair) -> bytes:
    completion, reference = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in pair)
    return completion + reference
