"""Presets: base models and datasets by name, as `presets.yaml` holds them."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lathe.config.base import REPOSITORY, REVISION, Name, Positive, PositiveFloat, Section, Split

Format = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "preference",
    "openai_preference",
    "classification",
    "text",
]

GGUF_SUFFIX = ".gguf"
PRESET_NAME = r"[\w-]+"
SPLIT_OR_SLICE = r"\w+(\.\w+)*(\[(-?\d+)?:(-?\d+)?\]|\[(-?\d+%)?:(-?\d+%)?\])?"


class BuiltinModel(Section):
    """The tiny Llama that the pipeline makes itself."""

    source: Literal["builtin"]


class ChangeableModel(Section):
    """A model that may be given an adapter, and another chat template than its own."""

    adapter: Name | None = Field(
        None, description="folder under models/local with a LoRA adapter that PEFT saved, to be merged into it first"
    )

    template: Name | None = Field(
        None,
        description="chat template to use instead of the model's own: chatml, chatml-tools, llama-3, mistral, gemma, "
        "plain, or a file under models/local",
    )


class LocalModel(ChangeableModel):
    """A model of your own: a folder with config.json, safetensors and tokenizer, or a GGUF file."""

    source: Literal["local"]
    path: Name = Field(description="folder, or GGUF file, under models/local; the folder of an adapter stands for both")


class HubRepository(Section):
    """A repository on the Hugging Face Hub."""

    id: Name = Field(description="repository, as in `Qwen/Qwen3-0.6B` or `openai/gsm8k`")
    revision: Name | None = Field(None, description="commit, tag or branch; only a commit always means the same files")

    @field_validator("revision")
    @classmethod
    def _check_revision(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(REVISION, value):
            raise ValueError(f"{value!r} is no commit, tag or branch; write one, such as main or v1.0")
        return value

    @field_validator("id")
    @classmethod
    def _check_repository(cls, value: str) -> str:
        if not re.fullmatch(REPOSITORY, value):
            raise ValueError(
                f"{value!r} is not a repository; write OWNER/NAME as on the hub, such as 'Qwen/Qwen3-0.6B'"
            )
        return value


class HubModel(HubRepository, ChangeableModel):
    """A model on the Hugging Face Hub."""

    source: Literal["hub"]
    file: Name | None = Field(
        None, description="its GGUF file to take, `NAME.gguf`; if left out, its safetensors are taken"
    )

    @field_validator("file")
    @classmethod
    def _check_file(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith(GGUF_SUFFIX):
            raise ValueError(f"{value!r} is no GGUF file; give one that ends with {GGUF_SUFFIX}, or leave `file` out")
        return value


class PythonPackage(Section):
    """Files in an installed Python package, so that a package index is all that is needed."""

    source: Literal["package"]
    package: Name = Field(description="name of the package on the package index")
    version: Name = Field(description="its version, which must be the installed one")
    path: Name = Field(description="folder or GGUF file in the package, from its root")

    @field_validator("package")
    @classmethod
    def _check_package(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", value):
            raise ValueError(f"{value!r} is no name of a package; write it as on the package index, without a version")
        return value


class PackageModel(PythonPackage, ChangeableModel):
    """A model in an installed Python package: a folder as of `local`, or a GGUF file."""


ModelPreset = Annotated[BuiltinModel | LocalModel | HubModel | PackageModel, Field(discriminator="source")]


class LocalEncoder(Section):
    """An encoder of your own: a folder with config.json, safetensors and tokenizer."""

    source: Literal["local"]
    path: Name = Field(description="folder under models/local")


class HubEncoder(HubRepository):
    """An encoder on the Hugging Face Hub."""

    source: Literal["hub"]


class PackageEncoder(PythonPackage):
    """An encoder in an installed Python package."""


EncoderPreset = Annotated[LocalEncoder | HubEncoder | PackageEncoder, Field(discriminator="source")]


class ColumnMapping(Section):
    """How the columns of a record become chat messages."""

    format: Format | None = Field(
        None, description="format of the records; if left out, it is detected by the column names"
    )
    messages: Name | None = Field(None, description="column with a list of {role, content} or {from, value}")
    prompt: Name | None = Field(None, description="column with the prompt")
    completion: Name | None = Field(None, description="column with the answer, the label, or the raw text")
    prompt_template: Name | None = Field(None, description="text of the prompt, with {column} fields")
    rejected: Name | None = Field(None, description="column with the worse answer of a preference pair")
    tools: Name | None = Field(
        None, description="column with definitions of tools; if left out, tools or functions, unless columns are named"
    )
    thought: Name | None = Field(
        None,
        description="column with the thought before the answer; if left out, reasoning_content, thinking and the like, "
        "unless columns are named",
    )
    labels: Annotated[list[Name], Field(min_length=1)] | None = Field(
        None, description="names of the classes, if the label column holds their numbers from 0"
    )
    system_prompt: Name | None = Field(None, description="system message for conversations that have none")
    encoding: Name | None = Field(
        None, description="encoding of the text files, such as cp1251; if left out, their beginning tells it"
    )
    delimiter: Literal[",", ";", "\t", "|"] | None = Field(
        None, description="what separates the columns of CSV files; if left out, their first rows tell it"
    )
    rows_key: Name | None = Field(
        None,
        description="key of a JSON file's object that holds the list of rows, such as `data` or `result.items`; if "
        "left out, its only list of objects",
    )
    limits: dict[Split, Positive] | None = Field(None, description="number of rows of a split to keep at most")

    @model_validator(mode="after")
    def _check_combination(self) -> "ColumnMapping":
        parts = bool(self.prompt or self.completion or self.prompt_template)
        if self.messages and parts:
            raise ValueError("messages excludes prompt, completion and prompt_template; keep one of the two ways")
        if self.prompt and self.prompt_template:
            raise ValueError("prompt excludes prompt_template; keep one of them")
        format_ = self.format or ("preference" if self.rejected else "classification" if self.labels else None)
        if format_ is None and bool(self.prompt or self.prompt_template) != bool(self.completion):
            raise ValueError("completion goes with one of prompt, prompt_template; give both or neither")
        for key, value, formats in (
            ("messages", self.messages, ("messages", "sharegpt")),
            ("rejected", self.rejected, ("preference",)),
            ("labels", self.labels, ("classification",)),
            ("thought", self.thought, ("prompt_completion", "question_answer", "alpaca")),
        ):
            if value and (format_ or formats[0]) not in formats:
                raise ValueError(f"{key} does not go with the format {format_}; it belongs to {' and '.join(formats)}")
        if format_ == "text" and (self.messages or self.prompt or self.prompt_template or self.system_prompt):
            raise ValueError("the format text has no prompt and no system message; name its column in completion")
        if parts and format_ in ("messages", "sharegpt"):
            raise ValueError(f"the format {format_} is read from one column; name it in messages, and nothing else")
        return self


class BuiltinDataset(ColumnMapping):
    """The household commands that the pipeline makes itself, or the paragraphs that come with it."""

    source: Literal["builtin"]
    content: Literal["commands", "paragraphs"] = Field(
        "commands",
        description="commands and their answers, or 127 short paragraphs of general text as documents (default "
        "commands)",
    )
    errors: bool = Field(
        True, description="whether some commands cannot be carried out, and are answered with the reason (default true)"
    )


class LocalDataset(ColumnMapping):
    """A file or folder of your own: JSONL, JSON, CSV, TSV, Parquet or Arrow; text files also with gzip."""

    source: Literal["local"]
    path: Name = Field(description="file or folder under data/local")


class HubDataset(HubRepository, ColumnMapping):
    """A dataset on the Hugging Face Hub: its data files; its code is never run."""

    source: Literal["hub"]
    config: Name | None = Field(None, description="one of its configurations, if it has several")
    train_split: Name = Field(description="its split to train on, or a slice of it: `train[:1000]`, `train[:5%]`")
    validation_split: Name | None = Field(
        None, description="its split for validation, or a slice; if left out, it is taken from the training rows"
    )
    test_split: Name | None = Field(
        None, description="its split for test, or a slice; if left out, it is taken from the training rows"
    )

    @field_validator("train_split", "validation_split", "test_split")
    @classmethod
    def _check_split(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(SPLIT_OR_SLICE, value):
            raise ValueError(
                f"{value!r} is neither a split nor a slice of one; write 'train', 'train[:1000]', or 'train[5%:10%]'"
            )
        return value


class InMixture(Section):
    """How much of a dataset is in a mixture: its share or number of training rows; with neither, all of them."""

    weight: PositiveFloat | None = Field(
        None, description="share of the training rows, in proportion to the weights of the others"
    )
    rows: Positive | None = Field(None, description="number of training rows, at most")
    split: Split | None = Field(
        None,
        description="the only split that its rows go into, such as train: then none of them is held out; if left out, "
        "each has its own",
    )


class BuiltinPart(InMixture, BuiltinDataset):
    """The built-in dataset in a mixture."""


class LocalPart(InMixture, LocalDataset):
    """A dataset of your own in a mixture."""


class HubPart(InMixture, HubDataset):
    """A dataset of the Hub in a mixture."""


MixturePart = Annotated[BuiltinPart | LocalPart | HubPart, Field(discriminator="source")]


class MixtureDataset(Section):
    """Several datasets, each as an entry of its own would have it, mixed in the training split."""

    source: Literal["mixture"]
    datasets: Annotated[dict[Name, MixturePart], Field(min_length=2)] = Field(
        description="the datasets by name, each with its keys, and weight or rows, and split"
    )

    @model_validator(mode="after")
    def _check_shares(self) -> "MixtureDataset":
        for name, part in self.datasets.items():
            if not re.fullmatch(PRESET_NAME, name):
                raise ValueError(f"{name!r} names a dataset of the mixture; write letters, digits, - and _")
            if part.weight and part.rows:
                raise ValueError(f"{name} has weight and rows; keep one of them")
            if part.split in ("validation", "test") and (part.weight or part.rows):
                raise ValueError(
                    f"{name} has no training rows to choose (split: {part.split}); leave weight and rows out"
                )
        trained = [part for part in self.datasets.values() if part.split in (None, "train")]
        if not trained:
            raise ValueError("no dataset gives training rows; leave split out of one of them")
        weighted = [bool(part.weight) for part in trained]
        if any(weighted) and not all(weighted):
            raise ValueError("some datasets have a weight and others none; give one to each, or rows instead")
        return self


SingleDataset = BuiltinDataset | LocalDataset | HubDataset
DatasetPreset = Annotated[BuiltinDataset | LocalDataset | HubDataset | MixtureDataset, Field(discriminator="source")]


def list_datasets(preset: Any) -> dict[str, Any]:
    """Return the datasets of a mixture by name; of another preset, of a model too, itself under the name ""."""
    return dict(preset.datasets) if isinstance(preset, MixtureDataset) else {"": preset}


class Presets(Section):
    """All of `presets.yaml`: models, encoders and datasets by name."""

    models: dict[Name, ModelPreset]
    encoders: dict[Name, EncoderPreset] = Field(default_factory=dict)
    datasets: dict[Name, DatasetPreset]

    @field_validator("models", "encoders", "datasets")
    @classmethod
    def _check_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(PRESET_NAME, name):
                better = re.sub(r"[^\w-]+", "-", name).strip("-") or "mine"
                raise ValueError(
                    f"{name!r} names a preset; DVC takes a dot for a level of the file; write letters, digits, - "
                    f"and _, such as {better!r}"
                )
        return value
