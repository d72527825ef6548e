"""Training parameters: method, tuning, optimizer, adapter, 4-bit base, rewards."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lathe.common import launch
from lathe.common.bounded_regex import compile_pattern
from lathe.common.errors import InputError
from lathe.config.base import (
    Auto,
    Name,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    count_groups,
    entry,
    require_group,
)


class Training(Section):
    """Training, for all methods; a step is an optimizer step."""

    method: Literal["sft", "dpo", "grpo"] = entry(
        "training data: answers (sft), pairs of a better and a worse answer (dpo), rewards of sampled answers (grpo)"
    )
    tuning: Literal["lora", "full"] = entry(
        "what is trained: an adapter on the frozen base, or all weights of the base"
    )
    launcher: Name = entry(
        "python for one process, or `accelerate launch --config_file experiments/accelerate/NAME.yaml`"
    )
    max_length: Annotated[int, Field(ge=8)] = entry("longest sequence, prompt and answer together", "tokens")
    num_train_epochs: PositiveFloat = entry("passes over the training split", "epochs")
    max_steps: Positive | None = entry("number of steps to stop after; null: num_train_epochs decides", "steps")
    per_device_train_batch_size: Positive | Auto = entry(
        "rows in one forward pass of one device; auto: as many as fit, of the rows that make one step", "rows"
    )
    per_device_eval_batch_size: Positive | Auto = entry(
        "the same in evaluation; auto: as many as fit, up to 64", "rows"
    )
    gradient_accumulation_steps: Positive = entry(
        "forward passes whose gradients make one step; rows, if per_device_train_batch_size is auto", "passes"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = entry("peak learning rate")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = entry("schedule of the learning rate after warmup, by its name in transformers")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = entry(
        "share of all steps in which the learning rate rises from 0"
    )
    weight_decay: NonNegativeFloat = entry("decoupled weight decay of the trained tensors")
    max_grad_norm: PositiveFloat = entry("gradients are clipped to this norm")
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
        "arithmetic of the forward pass; auto: bf16 if the device (a CPU too) has it, else fp32"
    )
    gradient_checkpointing: bool = entry("recompute activations in the backward pass: less memory, slower")
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = entry(
        "attention; auto: row by row without padding, by FlashAttention if it is installed; the others pad rows"
    )
    torch_compile: bool = entry("compile the model: a slow start, and faster steps on a GPU")
    use_liger_kernel: bool | Auto = entry("use Liger's fused kernels; auto: on a GPU, if liger-kernel is installed")
    logging_steps: Positive = entry("steps between two points of the loss curve", "steps")
    eval_steps: Positive = entry("steps between two evaluations on the validation split", "steps")
    save_steps: Positive = entry("steps between two checkpoints: at most these are lost if training is killed", "steps")
    metric_for_best_model: Literal["auto", "loss", "reward", "reward_margin", "reward_accuracy"] = entry(
        "validation metric for the two keys below; auto: reward for grpo, else loss"
    )
    load_best_model_at_end: bool = entry("keep the weights of the best evaluation instead of the last step's")
    early_stopping_patience: Positive | None = entry(
        "number of evaluations without improvement to stop after; null: never", "evaluations"
    )

    @field_validator("launcher")
    @classmethod
    def _check_launcher(cls, value: str) -> str:
        if value != "python" and not value.startswith("accelerate launch "):
            raise ValueError(f"{value!r} is no launcher; {launch.REMEDY}")
        return value


class Sft(Section):
    """Supervised fine-tuning, on its own or as the phase before another method."""

    packing: bool = entry(
        "pack several sequences, which do not attend to one another, into a row of up to training.max_length"
    )


class Dpo(Section):
    """Direct preference optimization, on pairs of a better and a worse answer (training.method: dpo)."""

    sft_epochs: NonNegativeFloat = entry("supervised passes before, at training.learning_rate; 0: none", "epochs")
    num_train_epochs: PositiveFloat = entry("passes over the pairs of the training split", "epochs")
    per_device_train_batch_size: Positive = entry("pairs in one forward pass of one device", "pairs")
    gradient_accumulation_steps: Positive = entry("forward passes whose gradients make one step", "passes")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = entry("peak learning rate")
    beta: PositiveFloat = entry("strength of the pull towards the model as it was before the pairs")
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sppo_hard"] = entry(
        "loss of a pair, by its name in TRL"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = entry(
        "share of pairs that the loss robust assumes to be in the wrong order"
    )

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> "Dpo":
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(
                f"dpo.label_smoothing is {self.label_smoothing}, which the loss {self.loss_type} does not use; "
                "set it to 0, or dpo.loss_type to robust"
            )
        return self


class Reward(Section):
    """One part of the reward of a sampled answer; each gives 0 to 1."""

    name: Literal[
        "exact_match",
        "numeric",
        "json_valid",
        "json_fields",
        "tool_calls",
        "tool_calls_f1",
        "regex",
        "length",
        "function",
    ] = Field(description="what is rewarded")
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(description="factor in the sum of all rewards")
    pattern: Name | None = Field(
        None, description="regular expression for `regex`, or for `numeric`, where its first group is the number"
    )
    min_characters: Annotated[int, Field(ge=0)] | None = Field(
        None, description="for `length`: shortest answer with full reward"
    )
    max_characters: Positive | None = Field(None, description="for `length`: longest answer with full reward")
    function: Name | None = Field(
        None, description="for `function`: MODULE:FUNCTION, where MODULE is a file of rewards/ or an installed package"
    )

    @model_validator(mode="after")
    def _check_options(self) -> "Reward":
        accepted = {
            "numeric": {"pattern"},
            "regex": {"pattern"},
            "length": {"min_characters", "max_characters"},
            "function": {"function"},
        }.get(self.name, set())
        given = {
            key for key in ("pattern", "min_characters", "max_characters", "function") if getattr(self, key) is not None
        }
        if extra := sorted(given - accepted):
            raise ValueError(
                f"the reward {self.name} takes no {extra[0]}; it takes {', '.join(sorted(accepted)) or 'none'}"
            )
        if self.name in ("regex", "function") and not given:
            raise ValueError(f"the reward {self.name} needs {accepted.pop()}; add it")
        if self.name == "length":
            if self.max_characters is None:
                raise ValueError("the reward length needs max_characters; add it")
            if (self.min_characters or 0) > self.max_characters:
                raise ValueError(f"min_characters {self.min_characters} is above max_characters {self.max_characters}")
        if self.pattern is not None:
            if self.name == "numeric":
                require_group(self.pattern, "number")
            else:
                count_groups(self.pattern)
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
    temperature: PositiveFloat = entry("temperature of the sampling; higher: more varied answers")
    top_p: Annotated[float, Field(gt=0, le=1)] = entry(
        "sample from the most likely tokens that make up this share of the probability"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = entry("peak learning rate")
    beta: NonNegativeFloat = entry("weight of the KL divergence from the model as it was before the rewards; 0: none")
    epsilon: Annotated[float, Field(gt=0, lt=1)] = entry("clipping range of a token's probability ratio")
    num_iterations: Positive = entry("steps made from the same answers", "steps")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = entry(
        "how the loss is averaged over tokens, by its name in TRL"
    )
    scale_rewards: Literal["group", "batch", "none"] = entry(
        "what rewards are normalised over: the answers to one prompt, the batch, or nothing"
    )
    vllm_mode: Literal["colocate", "server"] | None = entry(
        "vLLM samples the answers: on the GPU that trains (colocate), or as a server; null: transformers does"
    )
    vllm_server_base_url: Name | None = entry("address of the vLLM server, such as http://127.0.0.1:8000; null: none")
    vllm_server_timeout: PositiveFloat = entry("longest wait for the vLLM server before the training", "seconds")
    vllm_group_port: Annotated[int, Field(ge=1, le=65535)] = entry(
        "port of this machine from which the vLLM server gets the weights"
    )
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = entry(
        "share of the GPU's memory that vLLM takes in the mode colocate"
    )
    vllm_tensor_parallel_size: Positive = entry("GPUs that share a model of vLLM in the mode colocate", "GPUs")
    vllm_enable_sleep_mode: bool = entry("free vLLM's memory while a step is made, in the mode colocate; slower")
    rewards: Annotated[list[Reward], Field(min_length=1)] = entry("parts of an answer's reward, summed by weight")

    @model_validator(mode="after")
    def _check_vllm_server(self) -> "Grpo":
        url = self.vllm_server_base_url
        if self.vllm_mode == "server" and url is None:
            raise ValueError(
                "grpo.vllm_mode is 'server' and grpo.vllm_server_base_url null; set it to the server's address"
            )
        if self.vllm_mode != "server" and url is not None:
            raise ValueError(
                f"grpo.vllm_server_base_url is {url!r}, which only grpo.vllm_mode server uses; set that, or null here"
            )
        if url is not None and not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", url):
            raise ValueError(
                f"grpo.vllm_server_base_url is {url!r}; must be http:// or https://, a host and a port, without a "
                "password"
            )
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> "Grpo":
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
    target_parameters: Annotated[list[Name], Field(min_length=1)] | None = entry(
        "weights that get an update though no layer holds them: experts, such as mlp.experts.down_proj; null: none"
    )
    num_layers: Positive | None = entry(
        "transformer blocks that get an update, counted from the last; null: all; fewer train faster, in less memory",
        "blocks",
    )
    modules_to_save: Annotated[list[Name], Field(min_length=1)] | None = entry(
        "layers that are trained in full and saved with the adapter, such as lm_head; null: none"
    )
    use_rslora: bool = entry("scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)")
    use_dora: bool = entry("train the magnitude of each weight column separately from its direction (DoRA)")

    @field_validator("target_modules")
    @classmethod
    def _check_expression(cls, modules: str | list[str]) -> str | list[str]:
        # Whether it is an expression at all is said with the layers that the model has.
        if isinstance(modules, str) and modules != "all-linear":
            try:
                compile_pattern(modules, texts="names")
            except InputError as error:
                if error.code == "slow-pattern":
                    raise ValueError(str(error)) from None
        return modules

    @model_validator(mode="after")
    def _check_target_parameters(self) -> "Lora":
        if self.target_parameters and (self.lora_dropout or self.use_dora):
            key, value = ("use_dora", "true") if self.use_dora else ("lora_dropout", f"{self.lora_dropout:g}")
            raise ValueError(
                f"lora.{key} is {value} and lora.target_parameters names weights of experts, whose updates PEFT "
                f"computes without it; set lora.{key} to {'false' if self.use_dora else 0}, or "
                "lora.target_parameters to null"
            )
        return self

    @model_validator(mode="after")
    def _check_num_layers(self) -> "Lora":
        if self.num_layers and isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(
                f"lora.num_layers is {self.num_layers} and lora.target_modules a regular expression, which names the "
                "blocks itself; set lora.num_layers to null, or name modules in lora.target_modules"
            )
        return self


class Quantization(Section):
    """Format of the frozen base in memory while the adapter is trained."""

    load_in_4bit: bool = entry("4-bit base (QLoRA) if true, 16-bit base if false")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = entry("4-bit number format of bitsandbytes")
    bnb_4bit_use_double_quant: bool = entry("quantize the scales too, which saves 0.4 bits per weight")
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = entry(
        "type that 4-bit weights are computed in; auto: as training.precision"
    )
