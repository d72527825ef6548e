"""Every hyperparameter: its type, range, unit and meaning. No second place holds a default.

`load()` reads `params.yaml` and `presets.yaml` and reports every problem of both at once, one line each:
the key, the value, the rule and a remedy.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config import gates as gate_rules
from lathe.config.base import (
    REPOSITORY,
    Fraction,
    Name,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    _with_group,
    entry,
    plain_address,
)
from lathe.config.quantization_types import (
    FILE_TYPES,
    FILES_THAT_CANNOT_BE_MADE,
    FILES_THAT_NEED_IMATRIX,
    TENSORS_THAT_NEED_IMATRIX,
    check_type,
    parse,
)
from lathe.config.scores import MEASURED, Metric, to_compute
from lathe.config.training_params import Dpo, Grpo, Lora, Quantization, Sft, Training


class Preprocess(Section):
    """From raw rows to validated, split chat messages."""

    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = entry(
        "share of the training rows that becomes the validation split where the source has none"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = entry(
        "share of the training rows that becomes the test split where the source has none"
    )
    max_dropped_fraction: Fraction = entry("share of unusable rows above which the stage fails")
    too_long: Literal["drop", "truncate_prompt", "truncate_answer"] = entry(
        "rows over training.max_length: drop them, cut what comes before the last answer, or cut the end of an answer"
    )
    max_truncated_fraction: Fraction = entry("share of rows cut by too_long above which the stage fails")
    max_overlap_fraction: Fraction = entry(
        "share of a held-out split's rows that are nearly in another split above which the stage fails"
    )
    supervise: Literal["all", "last"] = entry(
        "assistant turns of a conversation that are learnt: all of them or the last"
    )


class Merge(Section):
    """How base and adapter become one model; never through quantized weights."""

    dtype: Literal["auto", "bfloat16", "float16"] = entry("type of the merged weights; auto: as the base")
    max_shard_size_bytes: Annotated[int, Field(ge=1_000_000)] = entry(
        "largest weight file to write where the base is one file", "bytes"
    )


class Convert(Section):
    """From safetensors to GGUF, with llama.cpp's own converter."""

    llama_cpp_dir: Name | None = entry("llama.cpp checkout to convert with; null: the one of `make setup`")


class Quantize(Section):
    """The GGUF files that are shipped."""

    types: Annotated[list[Name], Field(min_length=1)] = entry("one GGUF per llama.cpp quantization type")
    imatrix: bool = entry("collect an importance matrix from training rows, and quantize by it")
    imatrix_rows: Positive = entry("training rows it is collected from", "rows")
    output_tensor_type: Name | None = entry("type of the output head, such as Q8_0; null: as the file's type has it")
    token_embedding_type: Name | None = entry("type of the token embeddings; null: as the file's type has it")
    tensor_types: Annotated[list[Name], Field(min_length=1)] | None = entry(
        "types of other tensors, each `PATTERN=TYPE` with a regular expression for their names; null: none"
    )
    binary: Name | None = entry(
        "llama-quantize program to quantize with, such as one built with CUDA; null: the library of `make setup`"
    )

    # Asked here, by every stage, and not only by the one that quantizes: hours of training may lie between.
    @field_validator("types")
    @classmethod
    def _known(cls, types: list[str]) -> list[str]:
        known = [name for name in FILE_TYPES if name not in FILES_THAT_CANNOT_BE_MADE]
        for name in types:
            if name in FILES_THAT_CANNOT_BE_MADE:
                raise ValueError(f"{name} is named by llama.cpp, whose quantizer cannot make it; take another type")
            if name not in known:
                raise ValueError(f"{name!r} is no quantization type; {did_you_mean(name, known)}")
        return types

    @field_validator("output_tensor_type", "token_embedding_type")
    @classmethod
    def _known_of_embeddings(cls, name: str | None) -> str | None:
        try:
            return name and check_type(name, of_embeddings=True)
        except InputError as error:
            raise ValueError(str(error)) from None

    @field_validator("tensor_types")
    @classmethod
    def _readable(cls, entries: list[str] | None) -> list[str] | None:
        try:
            for pattern_and_type in entries or []:
                parse(pattern_and_type)
        except InputError as error:
            raise ValueError(str(error)) from None
        return entries

    @model_validator(mode="after")
    def _unique(self) -> "Quantize":
        twice = sorted({name for name in self.types if self.types.count(name) > 1})
        if twice:
            raise ValueError(f"types lists {', '.join(twice)} twice; name each type once")
        return self

    @model_validator(mode="after")
    def _has_importance_where_needed(self) -> "Quantize":
        if self.imatrix:
            return self
        needing = [name for name in self.types if name in FILES_THAT_NEED_IMATRIX]
        needing += [name for name in self.tensor_types or [] if parse(name)[1] in TENSORS_THAT_NEED_IMATRIX]
        if needing:
            raise ValueError(
                f"quantize.imatrix is false, and llama.cpp makes {', '.join(needing)} by an importance matrix alone; "
                "set quantize.imatrix to true, or take larger types"
            )
        return self


class Generate(Section):
    """Greedy answers of every artifact on the held-out rows."""

    max_new_tokens: Positive = entry("longest answer", "tokens")
    n_ctx: Annotated[int, Field(ge=16)] = entry("room for a row, prompt and answer together", "tokens")
    n_parallel: Positive = entry("rows decoded in one batch", "rows")
    max_rows: Positive | None = entry("answer only the first rows of each split; null: all of them", "rows")
    few_shot: Positive = entry("training rows shown to the base model before each request, as a baseline", "rows")


class Judge(Section):
    """A language model that marks the answers from 0 to 100."""

    enabled: bool = entry("ask the judge; without one there is no judge's score")
    provider: Literal["openai", "gemini", "gigachat", "gguf"] = entry(
        "openai: any server of its protocol; Google Gemini; Sber GigaChat; gguf: a file on this machine"
    )
    model: Name = entry("model by the provider's name for it; for gguf the path of the file")
    base_url: Name | None = entry("address of the provider; null: its public one")
    ca_bundle: Name | None = entry("file with the certificates to trust, as GigaChat needs; null: the usual ones")
    rubric: Name = entry("text file that tells the judge how to mark")
    max_rows: Positive | None = entry("judge only the first rows of each split; null: all of them", "rows")
    max_tokens: Positive = entry("longest verdict", "tokens")
    concurrency: Positive = entry("requests under way at once", "requests")
    timeout_seconds: PositiveFloat = entry("wait so long for an answer", "seconds")
    max_retries: Annotated[int, Field(ge=0)] = entry(
        "further attempts at a request that failed, after ever longer pauses", "attempts"
    )
    max_requests: Positive = entry("requests that one run may make, attempts included", "requests")
    max_cost: PositiveFloat | None = entry("what one run may cost, in the currency of the prices; null: no limit")
    input_price: NonNegativeFloat = entry("price of a million tokens of requests")
    output_price: NonNegativeFloat = entry("price of a million tokens of verdicts")

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        # It is written into dvc.lock and data/judged: a key within would be published.
        return value and plain_address(value)

    @model_validator(mode="after")
    def _file_has_no_address(self) -> "Judge":
        if self.provider == "gguf" and self.base_url is not None:
            raise ValueError("judge.base_url does not go with judge.provider gguf, a file; set it to null")
        return self


class BertScore(Section):
    """BERTScore, where evaluate.metrics lists bert_score: how alike the meanings of two texts are to an encoder."""

    model: Name | None = entry("encoder: a folder under models/local, or a repository of the hub; null: none")
    revision: Name | None = entry("its commit, tag or branch, where it is from the hub; null: main")
    num_layers: Positive | None = entry("layer whose embeddings are compared; null: the last")
    max_length: Positive = entry("texts are cut to this length", "tokens")
    batch_size: Positive = entry("texts in one forward pass", "texts")
    baseline: Name | None = entry(
        "rescale by the score of unrelated texts: shuffled for that of these very texts, or a file of bert-score's; "
        "null: no rescaling"
    )

    @field_validator("model")
    @classmethod
    def _folder_or_repository(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("models/local/") and not re.fullmatch(REPOSITORY, value):
            raise ValueError(f"{value!r} is neither a folder under models/local nor a repository; write OWNER/NAME")
        return value


class Evaluate(Section):
    """What the answers are scored by."""

    metrics: Annotated[list[Metric], Field(min_length=1)] = entry(
        "scores to compute; json_valid and json_fields only where the references are JSON"
    )
    primary_metric: Name = entry(
        "score that names the best file: one of metrics, judge, combined, perplexity, kl, general_perplexity, stop_rate"
    )
    normalize: Literal["none", "text", "json"] = entry(
        "what exact_match overlooks: spaces at the ends; case, punctuation and spaces; how JSON is written"
    )
    answer_pattern: Name | None = entry(
        "exact_match compares the first group of this regular expression's last match; null: the whole texts"
    )
    general_text: Name = entry("text file, in paragraphs, whose perplexity before and after training shows forgetting")
    bootstrap_samples: Annotated[int, Field(ge=100)] = entry(
        "resamples of the rows for 95 % intervals and significance", "resamples"
    )
    bert_score_weight: Fraction = entry("weight of bert_score in the score combined")
    judge_weight: Fraction = entry("weight of judge / 100 in the score combined, where a judge is enabled")
    gates: Annotated[list[Name], Field(min_length=1)] | None = entry(
        "what must hold on validation, such as `Q4_K_M.exact_match >= merged.exact_match - 0.03`; null: nothing"
    )

    @field_validator("metrics")
    @classmethod
    def _unique(cls, metrics: list[str]) -> list[str]:
        if twice := sorted({name for name in metrics if metrics.count(name) > 1}):
            raise ValueError(f"lists {', '.join(twice)} twice; name each score once")
        return metrics

    @field_validator("answer_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        return pattern and _with_group(pattern, "answer")

    @field_validator("gates")
    @classmethod
    def _comparisons(cls, gates: list[str] | None) -> list[str] | None:
        for gate in gates or []:
            gate_rules.parse(gate)
        return gates


class Mlflow(Section):
    """An MLflow server."""

    enabled: bool = entry("mirror to it; MLFLOW_ENABLED of the environment wins")
    tracking_uri: Name = entry("its address; MLFLOW_TRACKING_URI of the environment wins")
    experiment_name: Name = entry("experiment that holds the runs; MLFLOW_EXPERIMENT_NAME of the environment wins")

    @field_validator("tracking_uri")
    @classmethod
    def _plain_address(cls, value: str) -> str:
        return plain_address(value)


class Wandb(Section):
    """Weights & Biases."""

    enabled: bool = entry("mirror to it; WANDB_MODE of the environment wins: disabled, or a mode")
    mode: Literal["online", "offline"] = entry("online: its servers; offline: folders below wandb/, for `wandb sync`")
    project: Name = entry("project that holds the runs")


class Tracking(Section):
    """Where runs are shown besides: copies of what the stages wrote. No stage depends on it."""

    mlflow: Mlflow
    wandb: Wandb


class Params(Section):
    """The whole of `params.yaml`."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = entry(
        "of all that is random: built-in data and model, splits, adapter, order"
    )
    model: Name = entry("base model: a name under `models` in presets.yaml")
    dataset: Name = entry("dataset: a name under `datasets` in presets.yaml")
    preprocess: Preprocess
    training: Training
    sft: Sft
    dpo: Dpo
    grpo: Grpo
    lora: Lora
    quantization: Quantization
    merge: Merge
    convert: Convert
    quantize: Quantize
    generate: Generate
    judge: Judge
    bert_score: BertScore
    evaluate: Evaluate
    tracking: Tracking

    @property
    def scores(self) -> list[str]:
        """Every score of an artifact that `evaluate` computes, in the order of its report."""
        of_judge = ["judge"] if self.judge.enabled else []
        of_both = ["combined"] if "bert_score" in self.evaluate.metrics else []
        return [*self.evaluate.metrics, *of_judge, *of_both, *MEASURED]

    @model_validator(mode="after")
    def _scores_that_are_computed(self) -> "Params":
        if "bert_score" in self.evaluate.metrics and self.bert_score.model is None:
            raise ValueError(
                "evaluate.metrics lists bert_score, but bert_score.model is null; name an encoder there, a folder "
                "under models/local or a repository of the hub, or take bert_score off the list"
            )
        primary = self.evaluate.primary_metric
        if primary not in self.scores:
            raise ValueError(
                f"evaluate.primary_metric is {primary!r}, which is not computed; {to_compute(primary, self.scores)}"
            )
        for gate in self.evaluate.gates or []:
            try:
                gate_rules.check(gate_rules.parse(gate), types=self.quantize.types, scores=self.scores)
            except ValueError as error:
                raise ValueError(f"evaluate.gates: {error}") from None
        return self

    @model_validator(mode="after")
    def _fits_full_tuning(self) -> "Params":
        if self.training.tuning == "full" and self.quantization.load_in_4bit:
            raise ValueError(
                "training.tuning is 'full'; 4-bit weights cannot be trained; set quantization.load_in_4bit to false"
            )
        if self.training.tuning == "full" and self.training.method == "grpo" and self.grpo.beta:
            # TRL would compare with the base as it was fetched, whatever has been learnt since.
            raise ValueError(
                f"training.tuning is 'full' and grpo.beta {self.grpo.beta:g}; only an adapter can be compared with "
                "what it was; set grpo.beta to 0, or training.tuning to lora"
            )
        return self
