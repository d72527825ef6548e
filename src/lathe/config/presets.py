"""Presets: base models and datasets by name, as `presets.yaml` holds them."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lathe.config.base import REPOSITORY, Name, Positive, Section, Split

Format = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "preference", "classification"
]

SPLIT_OR_SLICE = r"\w+(\.\w+)*(\[(-?\d+)?:(-?\d+)?\]|\[(-?\d+%)?:(-?\d+%)?\])?"


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
