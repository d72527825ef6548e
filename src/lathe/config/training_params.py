"""Parameters of training: method, tuning, adapter, 4-bit base, rewards."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lathe.common import launch
from lathe.config.base import Name, NonNegativeFloat, Positive, PositiveFloat, Section, _groups, _with_group, entry


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
