"""Every hyperparameter: its type, range, unit and meaning. No second place holds a default.

`load()` reads `params.yaml` and `presets.yaml` and reports every problem of both at once, one line each:
the key, the value, the rule and a remedy.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lathe import launch, paths
from lathe.errors import InputError

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
Split = Literal["train", "validation", "test"]
Format = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "preference", "classification"
]

SPLIT_OR_SLICE = r"\w+(\.\w+)*(\[(-?\d+)?:(-?\d+)?\]|\[(-?\d+%)?:(-?\d+%)?\])?"

REPOSITORY = r"\w[\w.-]*(/\w[\w.-]*)?"

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


# What `evaluate` takes from generation, whatever evaluate.metrics lists.
MEASURED = ("perplexity", "kl", "stop_rate", "general_perplexity", "bytes")


def entry(meaning: str, unit: str | None = None) -> Any:
    """Describe a required key; the text is also the comment beside it in `params.yaml`."""
    return Field(description=meaning, json_schema_extra={"unit": unit} if unit else None)


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def _with_group(pattern: str, what: str) -> str:
    if not _groups(pattern):
        raise ValueError(f"pattern {pattern!r} has no group; put parentheses around the {what}")
    return pattern


def plain_address(address: str) -> str:
    """Return the address of a server, in which no key may stand; raises ValueError, which shows none either."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", address):
        raise ValueError(
            f"{_shown(re.sub('//.*@|[?#].*', '…', address))} is no plain address; write http(s)://HOST[:PORT][/PATH] "
            "and put keys into the environment"
        )
    return address


class Section(BaseModel):
    """A group of keys: unknown ones are refused, no type is coerced, nothing can be changed after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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


class Training(Section):
    """What is trained and how; a step is an optimizer step."""

    method: Literal["sft", "dpo", "grpo"] = entry(
        "what is learnt from: answers (sft), pairs of a better and a worse one (dpo), rewards of sampled ones (grpo)"
    )
    tuning: Literal["lora", "full"] = entry("what is trained: an adapter beside the frozen base, or all its weights")
    launcher: Name = entry(
        "python for one process, or `accelerate launch --config_file experiments/accelerate/NAME.yaml`"
    )
    max_length: Annotated[int, Field(ge=8)] = entry("longest row, prompt and answer together", "tokens")
    num_train_epochs: PositiveFloat = entry("passes over the training split", "epochs")
    max_steps: Positive | None = entry("stop after so many steps; null: num_train_epochs decides", "steps")
    per_device_train_batch_size: Positive = entry("rows in one forward pass of one device", "rows")
    per_device_eval_batch_size: Positive = entry("the same in evaluation", "rows")
    gradient_accumulation_steps: Positive = entry("forward passes whose gradients make one step", "passes")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = entry("peak learning rate")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = entry("course of the learning rate after warmup, by its name in transformers")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = entry("share of all steps in which the rate rises from 0")
    weight_decay: NonNegativeFloat = entry("decoupled weight decay of the trained tensors")
    max_grad_norm: PositiveFloat = entry("gradients are scaled down to this norm")
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_32bit",
        "lion_8bit",
        "paged_lion_8bit",
        "adafactor",
        "sgd",
    ] = entry("optimizer, by its name in transformers")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = entry(
        "arithmetic of the forward pass; auto: bf16 where the device (a CPU too) has it, else fp32"
    )
    gradient_checkpointing: bool = entry("recompute activations in the backward pass: less memory, slower")
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = entry(
        "attention; auto: row by row without padding, by FlashAttention where it is installed; the others pad rows"
    )
    torch_compile: bool = entry("compile the model: slow to begin, faster steps on a GPU")
    use_liger_kernel: bool = entry("Liger's fused kernels, on a GPU where liger-kernel is installed")
    logging_steps: Positive = entry("distance between two points of the loss curve", "steps")
    eval_steps: Positive = entry("distance between two evaluations on the validation split", "steps")
    save_steps: Positive = entry("distance between two checkpoints: what a kill loses at most", "steps")
    metric_for_best_model: Literal["auto", "loss", "reward", "reward_margin", "reward_accuracy"] = entry(
        "validation metric that the two keys below go by; auto: reward for grpo, else loss"
    )
    load_best_model_at_end: bool = entry("keep the weights of the best evaluation instead of the last step's")
    early_stopping_patience: Positive | None = entry(
        "stop after so many evaluations without a better one; null: never", "evaluations"
    )

    @field_validator("launcher")
    @classmethod
    def _known_launcher(cls, value: str) -> str:
        if value != "python" and not value.startswith("accelerate launch "):
            raise ValueError(f"{value!r} is no launcher; {launch.REMEDY}")
        return value


class Sft(Section):
    """Supervised fine-tuning, on its own or as the phase before another method."""

    packing: bool = entry("fill each row with several, up to training.max_length, that do not see one another")


class Dpo(Section):
    """Direct preference optimization on rows with a better and a worse answer (training.method: dpo)."""

    sft_epochs: NonNegativeFloat = entry("supervised passes before, at training.learning_rate; 0: none", "epochs")
    num_train_epochs: PositiveFloat = entry("passes over the pairs of the training split", "epochs")
    per_device_train_batch_size: Positive = entry("pairs in one forward pass of one device", "pairs")
    gradient_accumulation_steps: Positive = entry("forward passes whose gradients make one step", "passes")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = entry("peak learning rate")
    beta: PositiveFloat = entry("how strongly the model is held to what it was when the pairs began")
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sppo_hard"] = entry(
        "loss of a pair, by its name in TRL"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = entry(
        "share of pairs taken to be the wrong way round, by the loss robust"
    )

    @model_validator(mode="after")
    def _smoothed(self) -> "Dpo":
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(
                f"dpo.label_smoothing is {self.label_smoothing}, which the loss {self.loss_type} does not know; "
                "set it to 0, or dpo.loss_type to robust"
            )
        return self


class Reward(Section):
    """One part of the reward of a sampled answer; each gives 0 to 1."""

    name: Literal["exact_match", "numeric", "json_valid", "json_fields", "regex", "length", "function"] = Field(
        description="what is rewarded"
    )
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(description="factor in the sum of all rewards")
    pattern: Name | None = Field(
        None, description="regular expression: of `regex`; of `numeric`, whose first group is the number"
    )
    min_characters: Annotated[int, Field(ge=0)] | None = Field(None, description="shortest answer of `length`")
    max_characters: Positive | None = Field(None, description="longest answer of `length`")
    function: Name | None = Field(
        None, description="of `function`: MODULE:FUNCTION, where MODULE is a file of rewards/ or an installed package"
    )

    @model_validator(mode="after")
    def _options(self) -> "Reward":
        taken = {
            "numeric": {"pattern"},
            "regex": {"pattern"},
            "length": {"min_characters", "max_characters"},
            "function": {"function"},
        }.get(self.name, set())
        given = {
            key for key in ("pattern", "min_characters", "max_characters", "function") if getattr(self, key) is not None
        }
        if unfit := sorted(given - taken):
            raise ValueError(
                f"the reward {self.name} takes no {unfit[0]}; it takes {', '.join(sorted(taken)) or 'none'}"
            )
        if self.name in ("regex", "function") and not given:
            raise ValueError(f"the reward {self.name} needs {taken.pop()}; add it")
        if self.name == "length":
            if self.max_characters is None:
                raise ValueError("the reward length needs max_characters; add it")
            if (self.min_characters or 0) > self.max_characters:
                raise ValueError(f"min_characters {self.min_characters} is above max_characters {self.max_characters}")
        if self.pattern is not None:
            if self.name == "numeric":
                _with_group(self.pattern, "number")
            else:
                _groups(self.pattern)
        if self.function is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", self.function):
            raise ValueError(f"function is {self.function!r}; write MODULE:FUNCTION, such as 'example:brevity'")
        return self


class Grpo(Section):
    """Group relative policy optimization: rewards of sampled answers (training.method: grpo)."""

    sft_epochs: NonNegativeFloat = entry("supervised passes before, at training.learning_rate; 0: none", "epochs")
    max_steps: Positive = entry("length of the training", "steps")
    per_device_train_batch_size: Positive = entry("answers in one forward pass of one device", "answers")
    gradient_accumulation_steps: Positive = entry("forward passes whose gradients make one step", "passes")
    num_generations: Annotated[int, Field(ge=2)] = entry("answers to one prompt that are compared", "answers")
    max_completion_length: Positive = entry("longest answer", "tokens")
    temperature: PositiveFloat = entry("of the sampling; higher: more various answers")
    top_p: Annotated[float, Field(gt=0, le=1)] = entry("sample from the likeliest tokens that make up this share")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = entry("peak learning rate")
    beta: NonNegativeFloat = entry("weight of the KL divergence from the model when the rewards began; 0: none")
    epsilon: Annotated[float, Field(gt=0, lt=1)] = entry("how far the odds of a token may move at once")
    num_iterations: Positive = entry("steps made from the same answers", "steps")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = entry("how tokens are averaged, by its name in TRL")
    scale_rewards: Literal["group", "batch", "none"] = entry("over what the spread of rewards is normalised")
    rewards: Annotated[list[Reward], Field(min_length=1)] = entry("parts of an answer's reward, added up by weight")

    @model_validator(mode="after")
    def _whole_groups(self) -> "Grpo":
        answers = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if answers % self.num_generations:
            raise ValueError(
                f"grpo.per_device_train_batch_size x grpo.gradient_accumulation_steps is {answers}; must be a multiple "
                f"of grpo.num_generations, {self.num_generations}"
            )
        return self


class Lora(Section):
    """The adapter that is trained on the frozen base."""

    r: Positive = entry("rank of the update")
    lora_alpha: PositiveFloat = entry("the update is scaled by lora_alpha / r")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = entry("dropout before the update, in training")
    target_modules: Name | Annotated[list[Name], Field(min_length=1)] = entry(
        "layers that get an update: a list of names, all-linear, or a regular expression"
    )
    modules_to_save: Annotated[list[Name], Field(min_length=1)] | None = entry(
        "layers trained whole and saved beside the adapter, such as lm_head; null: none"
    )
    use_rslora: bool = entry("scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)")
    use_dora: bool = entry("learn the magnitude of each weight column apart from its direction (DoRA)")


class Quantization(Section):
    """In what form the frozen base lies in memory while the adapter is trained."""

    load_in_4bit: bool = entry("4-bit base (QLoRA) if true, 16-bit base if false")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = entry("4-bit number format of bitsandbytes")
    bnb_4bit_use_double_quant: bool = entry("quantize the scales too: 0.4 bit per weight less")
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = entry(
        "type that 4-bit weights are multiplied in; auto: as training.precision"
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
        from lathe.quantize import quant_types
        from lathe.tensor_types import FILES_THAT_CANNOT_BE_MADE

        known = [name for name in quant_types() if name not in FILES_THAT_CANNOT_BE_MADE]
        for name in types:
            if name in FILES_THAT_CANNOT_BE_MADE:
                raise ValueError(f"{name} is named by llama.cpp, whose quantizer cannot make it; take another type")
            if name not in known:
                raise ValueError(f"{name!r} is no quantization type; {did_you_mean(name, known)}")
        return types

    @field_validator("output_tensor_type", "token_embedding_type")
    @classmethod
    def _known_of_embeddings(cls, name: str | None) -> str | None:
        from lathe.tensor_types import check_type

        try:
            return name and check_type(name, of_embeddings=True)
        except InputError as error:
            raise ValueError(str(error)) from None

    @field_validator("tensor_types")
    @classmethod
    def _readable(cls, entries: list[str] | None) -> list[str] | None:
        from lathe.tensor_types import parse

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
        from lathe.tensor_types import FILES_THAT_NEED_IMATRIX, TENSORS_THAT_NEED_IMATRIX, parse

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

    metrics: Annotated[
        list[
            Literal[
                "exact_match",
                "token_f1",
                "json_valid",
                "json_fields",
                "rouge_1",
                "rouge_2",
                "rouge_l",
                "chrf",
                "bleu",
                "bert_score",
                "length_ratio",
                "distinct_1",
                "distinct_2",
            ]
        ],
        Field(min_length=1),
    ] = entry("scores to compute; json_valid and json_fields only where the references are JSON")
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
        from lathe.gates import parse

        for gate in gates or []:
            parse(gate)
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
        from lathe import gates

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
                gates.check(gates.parse(gate), types=self.quantize.types, scores=self.scores)
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


class BuiltinModel(Section):
    """The tiny Llama that the pipeline makes itself."""

    source: Literal["builtin"]


class Templated(Section):
    """How the model's conversations are written, where its own chat template is missing or not wanted."""

    template: Name | None = Field(
        None,
        description="chat template instead of the model's own: chatml, llama-3, mistral, gemma, plain, "
        "or a file under models/local",
    )


class LocalModel(Templated):
    """A folder of the user's own: config.json, safetensors, tokenizer."""

    source: Literal["local"]
    path: Name = Field(description="folder under models/local")


class HubRepository(Section):
    """A repository on the Hugging Face Hub."""

    id: Name = Field(description="repository, as in `Qwen/Qwen3-0.6B` or `openai/gsm8k`")
    revision: Name | None = Field(
        None, description="commit, tag or branch; only a commit means the same files for good"
    )

    @field_validator("id")
    @classmethod
    def _owner_and_name(cls, value: str) -> str:
        if not re.fullmatch(REPOSITORY, value):
            raise ValueError(
                f"{value!r} is not a repository; write OWNER/NAME as on the hub, such as 'Qwen/Qwen3-0.6B'"
            )
        return value


class HubModel(HubRepository, Templated):
    """A model on the Hugging Face Hub."""

    source: Literal["hub"]


ModelPreset = Annotated[BuiltinModel | LocalModel | HubModel, Field(discriminator="source")]


class Columns(Section):
    """How a row's columns become chat messages."""

    format: Format | None = Field(None, description="what the columns hold; without it, their names tell")
    messages: Name | None = Field(None, description="column that holds a list of {role, content}, or of {from, value}")
    prompt: Name | None = Field(None, description="column that holds the request")
    completion: Name | None = Field(None, description="column that holds the answer, or its label")
    prompt_template: Name | None = Field(None, description="text of the request with {column} fields")
    rejected: Name | None = Field(None, description="column that holds the worse answer of a preference pair")
    labels: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="text of each class, where the label column holds its number, from 0"
    )
    system_prompt: Name | None = Field(None, description="system message for conversations that have none")
    limits: dict[Split, Positive] | None = Field(None, description="keep at most so many rows of a split")

    @model_validator(mode="after")
    def _one_way(self) -> "Columns":
        parts = bool(self.prompt or self.completion or self.prompt_template)
        if self.messages and parts:
            raise ValueError("messages excludes prompt, completion and prompt_template; keep one way")
        if self.prompt and self.prompt_template:
            raise ValueError("prompt excludes prompt_template; keep one of them")
        meant = self.format or ("preference" if self.rejected else "classification" if self.labels else None)
        if meant is None and bool(self.prompt or self.prompt_template) != bool(self.completion):
            raise ValueError("completion goes with one of prompt, prompt_template; give both or neither")
        for key, given, formats in (
            ("messages", self.messages, ("messages", "sharegpt")),
            ("rejected", self.rejected, ("preference",)),
            ("labels", self.labels, ("classification",)),
        ):
            if given and (meant or formats[0]) not in formats:
                raise ValueError(f"{key} does not go with the format {meant}; it belongs to {' and '.join(formats)}")
        if parts and meant in ("messages", "sharegpt"):
            raise ValueError(f"the format {meant} is read from one column; name it in messages, and nothing else")
        return self


class BuiltinDataset(Columns):
    """The household commands that the pipeline makes itself."""

    source: Literal["builtin"]


class LocalDataset(Columns):
    """A file or folder of the user's own: JSONL, JSON, CSV, Parquet or Arrow; gzip of the first three."""

    source: Literal["local"]
    path: Name = Field(description="file or folder under data/local")


class HubDataset(HubRepository, Columns):
    """A dataset on the Hugging Face Hub: its data files; code that lies beside them is never run."""

    source: Literal["hub"]
    config: Name | None = Field(None, description="one of its configurations, where it has several")
    train_split: Name = Field(description="its split to train on, or a slice of it: `train[:1000]`, `train[:5%]`")
    validation_split: Name | None = Field(
        None, description="its split to steer by, or a slice; without one it is taken from the training rows"
    )
    test_split: Name | None = Field(
        None, description="its split to report, or a slice; without one it is taken from the training rows"
    )

    @field_validator("train_split", "validation_split", "test_split")
    @classmethod
    def _split_or_slice(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(SPLIT_OR_SLICE, value):
            raise ValueError(
                f"{value!r} is neither a split nor a slice of one; write 'train', 'train[:1000]', or 'train[5%:10%]'"
            )
        return value


DatasetPreset = Annotated[BuiltinDataset | LocalDataset | HubDataset, Field(discriminator="source")]


class Presets(Section):
    """The whole of `presets.yaml`: models and datasets by name."""

    models: dict[Name, ModelPreset]
    datasets: dict[Name, DatasetPreset]


class Config(Section):
    """What a run is made from: the parameters and the two presets they select."""

    params: Params
    model: ModelPreset
    dataset: DatasetPreset


def load(params_file: Path = paths.PARAMS, presets_file: Path = paths.PRESETS) -> Config:
    """Read and validate both files.

    Raises InputError with one line per problem, all problems of both files at once.
    """
    tree, presets_tree = read_yaml(params_file), read_yaml(presets_file)
    problems = _problems(Params, tree, params_file.name) + _problems(Presets, presets_tree, presets_file.name)
    for key, table in (("model", "models"), ("dataset", "datasets")):
        problems += _unknown_preset(tree, presets_tree, key, table, params_file.name, presets_file.name)
    if problems:
        raise InputError("\n".join(problems))
    params, presets = Params.model_validate(tree), Presets.model_validate(presets_tree)
    return Config(params=params, model=presets.models[params.model], dataset=presets.datasets[params.dataset])


def read_yaml(file: Path) -> Any:
    """Read a YAML file with DVC's own library and settings (YAML 1.2: `5e-05` is a number)."""
    try:
        return YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; restore it with `git checkout {file.name}`") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join((error.problem or "unreadable").split())
        raise InputError(f"{file.name}:{line}: not valid YAML: {problem}; mend this line") from None
    except YAMLError as error:
        raise InputError(f"{file.name}: not valid YAML: {' '.join(str(error).split())}") from None


def line_of(marked: Any, location: Sequence[Any]) -> int:
    """Return the line of a key or item in a YAML file, or of the nearest above it that is there.

    `marked` is the file as ruamel's round-trip loader gives it, `location` a problem's as pydantic tells it.
    """
    line = 1
    for step in location:
        try:
            line = marked.lc.item(step)[0] + 1 if isinstance(step, int) else marked.lc.key(step)[0] + 1
            marked = marked[step]
        except (AttributeError, KeyError, TypeError):
            continue  # of a union's member, or missing
    return line


def problems_of(key: str, value: Any, tree: dict[str, Any], where: str) -> list[str]:
    """Return what is wrong with one key's `value` in a tree of parameters; rules between keys are left out.

    `where` stands before each sentence: the file, and the line if it is known.
    """
    *parents, last = key.split(".")
    changed = section = dict(tree)
    for parent in parents:
        inner = section.get(parent)
        if not isinstance(inner, dict):
            return [f"{where}: {key} is not a known key; {did_you_mean(parent, list(section))}"]
        section[parent] = section = dict(inner)
    section[last] = value
    try:
        Params.model_validate(changed)
    except ValidationError as error:
        found = [problem for problem in error.errors() if problem["loc"][: len(parents) + 1] == (*parents, last)]
        by_path: dict[tuple[Any, ...], list[Any]] = {}
        for problem in found:
            by_path.setdefault(_path_in_file(problem["loc"], changed, missing=False), []).append(problem)
        return [_sentence(path, problems, Params, changed, where) for path, problems in by_path.items()]
    return []


def did_you_mean(name: str, known: list[str]) -> str:
    """Return `did you mean 'X'?` for a near name, whatever its case, else the list of known ones."""
    return _near(name, known) or f"known: {', '.join(sorted(map(_printed, known)))}"


def to_compute(score: str, computed: list[str]) -> str:
    """Return what to do for a score that is asked for and not computed."""
    if score == "judge":
        return "set judge.enabled to true"
    if score in ("combined", "bert_score"):
        return "add bert_score to evaluate.metrics"
    metrics = get_args(get_args(Evaluate.model_fields["metrics"].annotation)[0])
    return "add it to evaluate.metrics" if score in metrics else did_you_mean(score, computed)


def _problems(model: type[Section], tree: Any, file: str) -> list[str]:
    try:
        TypeAdapter(model).validate_python(tree)
    except ValidationError as error:
        by_path: dict[tuple[Any, ...], list[Any]] = {}
        for problem in error.errors():
            path = _path_in_file(problem["loc"], tree, missing=problem["type"] == "missing")
            by_path.setdefault(path, []).append(problem)
        return [_sentence(path, problems, model, tree, file) for path, problems in by_path.items()]
    return []


def _sentence(path: tuple[Any, ...], problems: list[Any], model: type[Section], tree: Any, file: str) -> str:
    # A value of several allowed types fails once per type; where it fits one, only that one's rule matters.
    deeper = [problem for problem in problems if not problem["type"].endswith("_type")]
    problem, given = (deeper or problems)[0], problems[0]["input"]
    key = ".".join(map(_printed, path)) or "the whole file"
    match problem["type"]:
        case "extra_forbidden":
            remedy = did_you_mean(str(path[-1]), _keys(model, path[:-1], tree))
            return f"{file}: {key} is not a known key; {remedy}"
        case "missing":
            return f"{file}: {key} is missing; add it (`python -m lathe schema` says what it means)"
        case "literal_error":
            known = [text.strip("'") for text in re.split(r", | or ", problem["ctx"]["expected"])]
            near = _near(str(given), known)
            return f"{file}: {key} is {_shown(given)}; must be one of {', '.join(known)}{near and f'; {near}'}"
        case "union_tag_not_found" | "union_tag_invalid":
            source = given.get("source") if isinstance(given, dict) else given
            return f"{file}: {key}.source is {_shown(source)}; must be one of builtin, local, hub"
        case "value_error" if not path:  # of several keys, which it names
            return f"{file}: {problem['msg'].removeprefix('Value error, ')}"
        case "value_error":
            return f"{file}: {key}: {problem['msg'].removeprefix('Value error, ')}"
        case "too_short":
            return f"{file}: {key} is {_shown(given)}; must have at least {problem['ctx']['min_length']} item"
    rules = [rule["msg"].removeprefix("Input should be ").removeprefix("a valid ") for rule in deeper or problems]
    return f"{file}: {key} is {_shown(given)}; must be {' or '.join(dict.fromkeys(rules))}"


def section_of(kind: Any) -> type[Section] | None:
    """Return the class of the keys that a value of this type has, or its entries where it is a list."""
    if get_origin(kind) is list:
        [kind] = get_args(kind)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _near(name: str, known: list[str]) -> str:
    by_folded = {item.casefold(): item for item in known}
    near = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=0.5)
    return f"did you mean {by_folded[near[0]]!r}?" if near else ""


def _printed(name: Any) -> str:
    return str(name) if str(name).isprintable() else repr(name)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _path_in_file(location: tuple[Any, ...], tree: Any, *, missing: bool) -> tuple[Any, ...]:
    # Pydantic puts a union's member into the location; the path in the file is what the user knows.
    path: list[Any] = []
    for index, step in enumerate(location):
        if (isinstance(tree, dict) and step in tree) or (isinstance(tree, list) and isinstance(step, int)):
            tree = tree[step]
        elif not (missing and index == len(location) - 1):
            continue
        path.append(step)
    return tuple(path)


def _keys(model: type[Section], parent: tuple[Any, ...], tree: Any) -> list[str]:
    if not parent:
        return list(model.model_fields)
    if model is Presets:
        for step in parent:
            tree = tree[step]
        members: dict[str, dict[str, type[Section]]] = {
            "models": {"builtin": BuiltinModel, "local": LocalModel, "hub": HubModel},
            "datasets": {"builtin": BuiltinDataset, "local": LocalDataset, "hub": HubDataset},
        }
        return list(members[parent[0]][tree["source"]].model_fields)
    section = model
    for step in parent:
        # A list's entries are sections where they have keys at all; which of them it is does not matter.
        if inner := None if isinstance(step, int) else section_of(section.model_fields[step].annotation):
            section = inner
    return list(section.model_fields)


def _unknown_preset(tree: Any, presets: Any, key: str, table: str, params_name: str, presets_name: str) -> list[str]:
    name = tree.get(key) if isinstance(tree, dict) else None
    known = presets.get(table) if isinstance(presets, dict) else None
    if not isinstance(name, str) or not isinstance(known, dict) or name in known:
        return []
    remedy = did_you_mean(name, [str(preset) for preset in known])
    return [f"{params_name}: {key} is {name!r}; must be a name under {table} in {presets_name}; {remedy}"]
