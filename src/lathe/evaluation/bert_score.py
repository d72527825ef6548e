"""BERTScore (Zhang et al. 2020): how alike two texts are in meaning, to an encoder. F1 of tokens matched by embedding.

Texts are embedded here, in batches of like length, each once where it stands in several pairs. torchmetrics matches
the tokens of one pair at a time: given several it compares texts of different pairs (version 1.9.0; its issue 2728).
Only a text's own tokens are matched: what the tokenizer puts around them is left out by its own account.
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
from lathe.common.progress import Progress

if TYPE_CHECKING:
    import torch

Pair = tuple[str, str]
Scored = dict[Pair, float]

DECIMALS = 5  # what stays the same however texts are batched
UNRELATED_PAIRS = 1000  # whose mean is the baseline `shuffled`
FORM = b"1"  # of the cached scores; changes with what this module computes


class Encoder:
    """A folder with config.json, safetensors and tokenizer, as the hub has them; nothing in it is run or unpickled."""

    def __init__(self, folder: Path, *, num_layers: int | None, max_length: int) -> None:
        """Take the embeddings of layer `num_layers` (None: the last) for texts of at most `max_length` tokens.

        Raises InputError where the folder holds no encoder, or one with fewer layers or room for fewer tokens.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"bert_score.model: {folder}: {str(error).splitlines()[0]}; give another encoder"
            ) from None
        if config.is_encoder_decoder:
            raise InputError(
                f"bert_score.model: {folder} is a {config.model_type}, an encoder with a decoder; give one without"
            )
        layers = config.num_hidden_layers
        if num_layers is not None and num_layers > layers:
            raise InputError(f"bert_score.num_layers is {num_layers}; the encoder has {layers}; lower it")
        self.folder, self.max_length = folder, max_length
        self.num_layers = layers if num_layers is None else num_layers
        self._room: int = config.max_position_embeddings

    def digest(self) -> str:
        """Return a hash of all that a score depends on besides the two texts."""
        content = hashlib.sha256(FORM + f"{self.num_layers} {self.max_length}".encode())
        for file in sorted(self.folder.iterdir()):
            if file.suffix in {".json", ".safetensors", ".txt", ".model"}:
                with file.open("rb") as stream:
                    content.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return content.hexdigest()

    def load(self) -> Callable[[Sequence[str]], "list[torch.Tensor]"]:
        """Return what embeds a batch of texts: for each (its own tokens, hidden size), float32, on the CPU."""
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # it warns of tensors not shared between GPUs where there is none
        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, padding_side="right")
        room = min(self._room, tokenizer.model_max_length)
        if self.max_length > room:
            raise InputError(f"bert_score.max_length is {self.max_length}; the encoder takes {room} tokens; lower it")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        device = "cuda" if torch.cuda.is_available() else "cpu"
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


def scores(pairs: Iterable[Pair], encoder: Encoder, *, batch_size: int, cache: Path) -> Scored:
    """Return the F1 of every pair of texts, without rescaling.

    Equal texts score 1, an empty one and another 0. What was computed before is taken from the folder `cache`, whoever
    computed it; every batch is kept there at once, so that an interrupted run loses no more than one.
    """
    scored = {(one, other): float(one == other) for one, other in pairs}
    missing = {pair for pair, equal in scored.items() if not equal and all(pair)}
    if not missing:
        return scored
    cache.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache / f"{encoder.digest()}.sqlite", timeout=60)) as known:
        known.execute("CREATE TABLE IF NOT EXISTS scores (pair BLOB PRIMARY KEY, f1 REAL NOT NULL) WITHOUT ROWID")
        # One key in a query: SQLite takes no more than some thousands.
        for pair in sorted(missing):
            if row := known.execute("SELECT f1 FROM scores WHERE pair = ?", (_key(pair),)).fetchone():
                scored[pair] = row[0]
                missing.remove(pair)
        for computed in _computed(missing, encoder, batch_size):
            scored |= computed
            known.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?)", [(_key(pair), f1) for pair, f1 in computed.items()]
            )
            known.commit()
    return scored


def unrelated_pairs(references: Sequence[str], seed: int) -> list[Pair]:
    """Return pairs of different references, by chance, whose mean score is the baseline `shuffled`."""
    chosen = np.random.default_rng(seed).integers(0, len(references), (UNRELATED_PAIRS, 2))
    pairs = [(references[one], references[other]) for one, other in chosen]
    unrelated = [(one, other) for one, other in pairs if one != other]
    if not unrelated:
        raise InputError(
            "bert_score.baseline is shuffled, but all references are equal; set it to null or a file of bert-score's"
        )
    return unrelated


def rescale(f1: float, baseline: float) -> float:
    """Return where the score stands between the baseline, 0, and equality, 1."""
    return round((f1 - baseline) / (1 - baseline), DECIMALS)


def baseline_of_file(file: Path, num_layers: int) -> float:
    """Return the F1 of unrelated texts in a file of the package bert-score: LAYER,P,R,F with a line for each layer.

    Raises InputError where there is no such file or line.
    """
    try:
        lines = [line.split(",") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
        by_layer = {int(line[0]): float(line[3]) for line in lines}
        return by_layer[num_layers]
    except FileNotFoundError:
        raise InputError(
            f"bert_score.baseline: {file}: no such file; give one, or set it to shuffled or null"
        ) from None
    except (ValueError, IndexError):
        raise InputError(f"bert_score.baseline: {file}: must hold lines LAYER,P,R,F behind a heading") from None
    except KeyError:
        raise InputError(
            f"bert_score.baseline: {file} has no line for layer {num_layers}; set bert_score.num_layers to one it has"
        ) from None


def _computed(pairs: Iterable[Pair], encoder: Encoder, batch_size: int) -> Iterable[Scored]:
    # By reference, which several artifacts' answers share, and by length, so that little is padded.
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
            yield {pair: _f1(embedded[pair[0]], embedded[pair[1]]) for pair in share}
            progress.add(len(share))


def _f1(completion: "torch.Tensor", reference: "torch.Tensor") -> float:
    """Return BERTScore's F1 of the embedded tokens of one pair, (tokens, hidden size) each."""
    import torch
    from torchmetrics.functional.text.bert import bert_score

    if not len(completion) or not len(reference):
        return 0.0  # white space alone, of which a tokenizer may leave nothing
    embedded = {"completion": completion, "reference": reference}

    def tokenized(texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        # The first and the last token are left out as [CLS] and [SEP]: two that stand for nothing. Their ids tell whose
        # they are.
        tokens = torch.full((1, len(embedded[texts[0]]) + 2), int(texts[0] == "reference"))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def looked_up(_: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        states = embedded["reference" if batch["input_ids"][0, 0] else "completion"]
        edge = torch.ones(1, states.shape[1])
        return torch.cat([edge, states, edge])[None]

    found: dict[str, Any] = bert_score(
        ["completion"],
        ["reference"],
        model=_NoModel(),  # type: ignore[arg-type]
        user_tokenizer=tokenized,
        user_forward_fn=looked_up,
    )
    if not math.isfinite(found["precision"]) or not math.isfinite(found["recall"]):  # of which the F1 would be 0
        raise InputError("bert_score.model: its embeddings are not finite; give another encoder")
    return round(float(found["f1"]), DECIMALS)


class _NoModel:
    """Stands where torchmetrics takes a model: the embeddings are already there."""

    config = SimpleNamespace(num_hidden_layers=1)

    def eval(self) -> None:
        """Do nothing, as asked."""

    def to(self, device: object) -> None:
        """Do nothing, as asked."""


def _key(pair: Pair) -> bytes:
    completion, reference = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in pair)
    return completion + reference
