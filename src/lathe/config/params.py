"""Parameters: type, range, unit and meaning of every key of `params.yaml`; there are no defaults in the code.

`lathe.config.load` reads the file and reports all problems at once, one line each: key, value, rule and remedy.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config import gates as gate_rules
from lathe.config.artifacts import get_file_name, list_artifacts, list_benchmarked
from lathe.config.base import (
    Fraction,
    Name,
    NonNegative,
    NonNegativeFloat,
    OptionName,
    OptionValue,
    Positive,
    PositiveFloat,
    Section,
    check_plain_address,
    entry,
    require_group,
)
from lathe.config.engine_marks import LLAMA_CPP
from lathe.config.engines import SERVER, list_in_process
from lathe.config.export_params import FormatExport
from lathe.config.generation_params import Generate, Sampling
from lathe.config.quantization_types import (
    FILE_TYPES,
    FILES_THAT_CANNOT_BE_MADE,
    FILES_THAT_NEED_IMATRIX,
    TENSORS_THAT_NEED_IMATRIX,
    check_type,
    parse_tensor_type,
)
from lathe.config.scores import MEASURED, Metric, suggest_remedy
from lathe.config.training_params import Dpo, Grpo, Lora, Quantization, Sft, Training


class Preprocess(Section):
    """Preprocessing: from raw records to validated chat messages in three splits."""

    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = entry(
        "share of the training rows that becomes the validation split if the source has none"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = entry(
        "share of the training rows that becomes the test split if the source has none"
    )
    max_dropped_fraction: Fraction = entry("share of unusable rows above which the stage fails")
    normalize_unicode: bool = entry(
        "text that the model's tokenizer would normalise (NFC) and llama.cpp does not: normalise it if true, drop and "
        "count the row if false"
    )
    too_long: Literal["drop", "truncate_prompt", "truncate_answer"] = entry(
        "rows over training.max_length: drop them, cut the prompt of the last answer, or cut the end of an answer"
    )
    max_truncated_fraction: Fraction = entry("share of truncated rows above which the stage fails")
    max_overlap_fraction: Fraction = entry(
        "share of near duplicates of another split, in a held-out split, above which the stage fails"
    )
    added_tokens: list[Name] = entry(
        "tokens of your own, added to the model's vocabulary, such as <call>; their embeddings are trained"
    )
    supervise: Literal["all", "last"] = entry(
        "assistant turns of a conversation that are supervised: all of them or the last"
    )
    chat_template_kwargs: dict[OptionName, OptionValue] = entry(
        "options of the model's chat template, such as `enable_thinking: false`, in training, generation and the GGUF; "
        "{}: none"
    )


class Merge(Section):
    """Merging of base and adapter into one model, from 16-bit weights, even after training on a 4-bit base."""

    dtype: Literal["auto", "bfloat16", "float16"] = entry("type of the merged weights; auto: that of the base")
    max_shard_size_bytes: Annotated[int, Field(ge=1_000_000)] = entry(
        "largest weight file to write, if the base is a single file", "bytes"
    )


class Convert(Section):
    """Conversion of safetensors to GGUF, with llama.cpp's converter."""

    llama_cpp_dir: Name | None = entry("llama.cpp checkout to convert with; null: the one of `make setup`")
    tokenizer_parity: Literal["rows", "strict"] = entry(
        "texts whose token ids must be llama.cpp's: those of the rows, or with strict samples in many scripts too"
    )


class Quantize(Section):
    """Quantization of the merged model to the GGUF files that are shipped."""

    types: Annotated[list[Name], Field(min_length=1)] = entry("one GGUF per llama.cpp quantization type")
    imatrix: bool = entry("collect an importance matrix from training rows, and use it for quantization")
    imatrix_rows: Positive = entry("training rows that the importance matrix is collected from", "rows")
    output_tensor_type: Name | None = entry("type of the output head, such as Q8_0; null: as the file's type says")
    token_embedding_type: Name | None = entry("type of the token embeddings; null: as the file's type says")
    tensor_types: Annotated[list[Name], Field(min_length=1)] | None = entry(
        "types of other tensors, each `PATTERN=TYPE` with a regular expression for their names; null: none"
    )
    binary: Name | None = entry(
        "llama-quantize program to quantize with, such as one built with CUDA; null: the library of `make setup`"
    )

    # Checked when any stage starts, as quantization may come hours of training later.
    @field_validator("types")
    @classmethod
    def _check_types(cls, types: list[str]) -> list[str]:
        known = [name for name in FILE_TYPES if name not in FILES_THAT_CANNOT_BE_MADE]
        for name in types:
            if name in FILES_THAT_CANNOT_BE_MADE:
                raise ValueError(f"{name} is a type of llama.cpp that its quantizer cannot make; take another type")
            if name not in known:
                raise ValueError(f"{name!r} is no quantization type; {did_you_mean(name, known)}")
        return types

    @field_validator("output_tensor_type", "token_embedding_type")
    @classmethod
    def _check_embedding_type(cls, name: str | None) -> str | None:
        try:
            return name and check_type(name, of_embeddings=True)
        except InputError as error:
            raise ValueError(str(error)) from None

    @field_validator("tensor_types")
    @classmethod
    def _check_tensor_types(cls, entries: list[str] | None) -> list[str] | None:
        try:
            for pattern_and_type in entries or []:
                parse_tensor_type(pattern_and_type)
        except InputError as error:
            raise ValueError(str(error)) from None
        return entries

    @model_validator(mode="after")
    def _check_unique(self) -> "Quantize":
        repeated = sorted({name for name in self.types if self.types.count(name) > 1})
        if repeated:
            raise ValueError(f"types lists {', '.join(repeated)} twice; name each type once")
        return self

    @model_validator(mode="after")
    def _check_importance(self) -> "Quantize":
        if self.imatrix:
            return self
        needing = [name for name in self.types if name in FILES_THAT_NEED_IMATRIX]
        needing += [name for name in self.tensor_types or [] if parse_tensor_type(name)[1] in TENSORS_THAT_NEED_IMATRIX]
        if needing:
            raise ValueError(
                f"quantize.imatrix is false, and llama.cpp needs an importance matrix for {', '.join(needing)}; "
                "set quantize.imatrix to true, or take larger types"
            )
        return self


class Judge(Section):
    """Judge: a language model that scores the answers from 0 to 100."""

    enabled: bool = entry("score the answers with a judge")
    mode: Literal["score", "pairwise"] = entry(
        "score: each answer from 0 to 100; pairwise: which of two answers is better, in both orders"
    )
    against: Name = entry(
        "in the mode pairwise, what every answer is compared with: an artifact such as base or merged, or the same "
        "artifact of an experiment, by its name"
    )
    provider: Literal["openai", "gemini", "gigachat", "gguf"] = entry(
        "openai: any server of its protocol; Google Gemini; Sber GigaChat; gguf: a file on this machine"
    )
    model: Name = entry("the provider's name of the model; for gguf the path of the file")
    base_url: Name | None = entry("address of the provider; null: its public one")
    ca_bundle: Name | None = entry("file with the certificates to trust, which GigaChat needs; null: the usual ones")
    rubric: Name = entry("text file that tells the judge how to score")
    max_rows: Positive | None = entry("judge only the first rows of each split; null: all of them", "rows")
    max_tokens: Positive = entry("longest verdict", "tokens")
    concurrency: Positive = entry("requests in flight at a time", "requests")
    timeout_seconds: PositiveFloat = entry("longest wait for an answer", "seconds")
    max_retries: Annotated[int, Field(ge=0)] = entry(
        "further attempts at a failed request, after increasing pauses", "attempts"
    )
    max_requests: Positive = entry("requests that one run may make, repeated attempts included", "requests")
    max_cost: PositiveFloat | None = entry("highest cost of one run, in the currency of the prices; null: no limit")
    input_price: NonNegativeFloat = entry("price of a million input tokens")
    output_price: NonNegativeFloat = entry("price of a million output tokens")

    @property
    def score(self) -> str:
        """The name of the score that the verdicts make."""
        return "win_rate" if self.mode == "pairwise" else "judge"

    @field_validator("base_url")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        # The address is written into dvc.lock and data/judged, where a key in it would be published.
        return value and check_plain_address(value)

    @model_validator(mode="after")
    def _check_no_address(self) -> "Judge":
        if self.provider == "gguf" and self.base_url is not None:
            raise ValueError("judge.base_url is set, but judge.provider is gguf, a file; set judge.base_url to null")
        return self


class BertScore(Section):
    """BERTScore, if evaluate.metrics lists bert_score: similarity of two texts by the embeddings of an encoder."""

    model: Name | None = entry("encoder: a name under `encoders` in presets.yaml; null: none")
    num_layers: Positive | None = entry("layer of the encoder whose embeddings are compared; null: the last")
    max_length: Positive = entry("texts are cut to this length", "tokens")
    batch_size: Positive = entry("texts in one forward pass", "texts")
    baseline: Name | None = entry(
        "rescale by the score of unrelated texts: shuffled for that of these very texts, or a file of bert-score's; "
        "null: no rescaling"
    )


class Evaluate(Section):
    """Evaluation: the scores of the answers, and the gates."""

    metrics: Annotated[list[Metric], Field(min_length=1)] = entry(
        "metrics to compute; json_valid and json_fields apply only to references that are JSON, tool_calls to rows "
        "with tools"
    )
    primary_metric: Name = entry(
        "score that names the best file: one of metrics, judge, combined, perplexity, kl, general_perplexity, stop_rate"
    )
    normalize: Literal["none", "text", "json"] = entry(
        "what exact_match ignores: none: spaces at the ends; text: case, punctuation and spaces; json: JSON's layout"
    )
    answer_pattern: Name | None = entry(
        "exact_match compares the first group of this regular expression's last match; null: the whole texts"
    )
    strip_thinking: bool = entry(
        "score what an answer says after its thought; false: thought and answer, as the model wrote them"
    )
    general_text: Name = entry("text file in paragraphs, whose perplexity before and after training shows forgetting")
    bootstrap_samples: Annotated[int, Field(ge=100)] = entry(
        "resamples of the rows for 95 % intervals and significance", "resamples"
    )
    cluster_by: Name | None = entry(
        "column of the dataset that says which rows belong together, such as source, and are resampled together; "
        "null: every row is its own; preprocess keeps it, so a change trains again"
    )
    bert_score_weight: Fraction = entry("weight of bert_score in the score combined")
    judge_weight: Fraction = entry("weight of judge / 100 in the score combined, if the judge is enabled")
    allow_mixed_engines: bool = entry(
        "set scores of answers by different engines side by side, and let llama.cpp answer for what generate.engine "
        "does not; false: refuse"
    )
    gates: Annotated[list[Name], Field(min_length=1)] | None = entry(
        "comparisons that must hold on validation: `Q4_K_M.exact_match >= merged.exact_match - 0.03`; null: none"
    )

    @field_validator("metrics")
    @classmethod
    def _check_unique(cls, metrics: list[str]) -> list[str]:
        if repeated := sorted({name for name in metrics if metrics.count(name) > 1}):
            raise ValueError(f"lists {', '.join(repeated)} twice; name each metric once")
        return metrics

    @field_validator("answer_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        return pattern and require_group(pattern, "answer")

    @field_validator("gates")
    @classmethod
    def _check_gates(cls, gates: list[str] | None) -> list[str] | None:
        for gate in gates or []:
            gate_rules.parse_gate(gate)
        return gates


class Benchmark(Section):
    """Benchmark: tasks of lm-evaluation-harness for the base, the merged model and every GGUF that ships."""

    tasks: list[Name] = entry("tasks, groups and tags by their names in lm-evaluation-harness, such as mmlu; []: none")
    include_path: Name = entry("folder with task files of your own, in the harness's YAML, and with their data")
    limit: Positive | None = entry("only the first documents of each task; null: all of them", "documents")
    num_fewshot: NonNegative | None = entry("examples in a prompt; null: as many as each task says", "documents")
    apply_chat_template: bool = entry("put prompts into the chat template of the file, as a user's request")
    fewshot_as_multiturn: bool = entry("with the chat template, make each example in a prompt a turn of its own")
    system_instruction: Name | None = entry("text before every prompt; with the chat template, its system message")
    max_length: Annotated[int, Field(ge=16)] | None = entry(
        "longest prompt with its answer, cut at its beginning; null: the context of the model's training", "tokens"
    )
    cluster_by: Name | None = entry(
        "field of the documents that says which belong together, such as passage, and are resampled together; null: "
        "every document is its own"
    )

    @field_validator("tasks")
    @classmethod
    def _check_unique(cls, tasks: list[str]) -> list[str]:
        if repeated := sorted({name for name in tasks if tasks.count(name) > 1}):
            raise ValueError(f"lists {', '.join(repeated)} twice; name each task once")
        for name in tasks:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
                raise ValueError(
                    f"lists {name!r}, but files are named for a task; its name must be of letters, digits, '_', '.' "
                    "and '-': name the group that the task belongs to, or give it another name in a file of your own"
                )
        return tasks


class Mlflow(Section):
    """An MLflow server."""

    enabled: bool = entry("mirror runs to it; the variable MLFLOW_ENABLED takes precedence")
    tracking_uri: Name = entry("its address; the variable MLFLOW_TRACKING_URI takes precedence")
    experiment_name: Name = entry("experiment with the runs; the variable MLFLOW_EXPERIMENT_NAME takes precedence")

    @field_validator("tracking_uri")
    @classmethod
    def _check_address(cls, value: str) -> str:
        return check_plain_address(value)


class Wandb(Section):
    """Weights & Biases."""

    enabled: bool = entry("mirror runs to it; the variable WANDB_MODE (disabled, or a mode) takes precedence")
    mode: Literal["online", "offline"] = entry("online: its servers; offline: folders under wandb/, for `wandb sync`")
    project: Name = entry("project with the runs")


class Tracking(Section):
    """Trackers that runs are mirrored to: copies of what the stages wrote. No stage depends on these keys."""

    mlflow: Mlflow
    wandb: Wandb


class Params(Section):
    """All of `params.yaml`."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = entry(
        "seed of everything random: built-in data and model, splits, adapter, order"
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
    export: FormatExport
    generate: Generate
    sampling: Sampling
    judge: Judge
    bert_score: BertScore
    benchmark: Benchmark
    evaluate: Evaluate
    tracking: Tracking

    @property
    def scores(self) -> list[str]:
        """All scores of an artifact, in the order of the report of the stage evaluate."""
        judge = [self.judge.score] if self.judge.enabled else []
        combined = ["combined"] if "bert_score" in self.evaluate.metrics else []
        return [*self.evaluate.metrics, *judge, *combined, *MEASURED]

    @model_validator(mode="after")
    def _check_scores(self) -> "Params":
        if "bert_score" in self.evaluate.metrics and self.bert_score.model is None:
            raise ValueError(
                "evaluate.metrics lists bert_score, but bert_score.model is null; name one of the encoders in "
                "presets.yaml there, or take bert_score off the list"
            )
        primary = self.evaluate.primary_metric
        if primary not in self.scores:
            raise ValueError(
                f"evaluate.primary_metric is {primary!r}, which is not computed; {suggest_remedy(primary, self.scores)}"
            )
        for gate in self.evaluate.gates or []:
            try:
                gate_rules.check_names(
                    gate_rules.parse_gate(gate),
                    types=[*self.quantize.types, *self.export.formats],
                    scores=self.scores,
                    tasks=bool(self.benchmark.tasks),
                )
            except ValueError as error:
                raise ValueError(f"evaluate.gates: {error}") from None
        return self

    @model_validator(mode="after")
    def _check_sampled(self) -> "Params":
        known = [get_file_name(artifact).removesuffix(".gguf") for artifact in list_benchmarked(self.quantize.types)]
        for name in self.sampling.files:
            if name not in known:
                raise ValueError(f"sampling.files lists {name!r}, which is not made; {did_you_mean(name, known)}")
            if self.sampling.files.count(name) > 1:
                raise ValueError(f"sampling.files lists {name!r} twice; name each file once")
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> "Params":
        settings, known = self.generate, list_artifacts(self.quantize.types)
        for served in settings.servers:
            if served.artifact not in known:
                remedy = did_you_mean(served.artifact, known)
                raise ValueError(f"generate.servers lists {served.artifact!r}, which is not made; {remedy}")
        if settings.engine == LLAMA_CPP:
            return self
        remaining = list_in_process(settings, known)
        if settings.engine == SERVER and remaining == known:
            raise ValueError(
                "generate.engine is server, and generate.servers lists none of the artifacts; add what serves "
                f"{', '.join(known)}"
            )
        if remaining and not self.evaluate.allow_mixed_engines:
            remedy = f"add what serves {'it' if len(remaining) == 1 else 'them'}, or " * (settings.engine == SERVER)
            raise ValueError(
                f"generate.engine is {settings.engine}, which answers for none of {', '.join(remaining)}: llama.cpp "
                f"would, and scores of both engines would stand side by side; {remedy}set "
                "evaluate.allow_mixed_engines to true"
            )
        return self

    @model_validator(mode="after")
    def _check_full_tuning(self) -> "Params":
        if self.training.tuning == "full" and self.quantization.load_in_4bit:
            raise ValueError(
                "training.tuning is 'full'; 4-bit weights cannot be trained; set quantization.load_in_4bit to false"
            )
        if self.training.tuning == "full" and self.training.method == "grpo" and self.grpo.beta:
            # TRL would compare with the fetched base, without the supervised phase before.
            raise ValueError(
                f"training.tuning is 'full' and grpo.beta {self.grpo.beta:g}; only an adapter can be compared with "
                "what it was; set grpo.beta to 0, or training.tuning to lora"
            )
        return self
