"""GRPO with vLLM: TRL's real configuration and client, against a server that speaks vLLM's part of the protocol."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from conftest import changed, write_splits
from refusals import refused
from toy import load_toy
from vllm_server import INFO, VllmServer, WeightQueue, serving

from lathe.config.training_params import Grpo, Reward
from lathe.models.adapter import add_adapter
from lathe.models.loading import load_base
from lathe.models.template_options import load_tokenizer_with_options
from lathe.sources.builtin import household_commands
from lathe.training import grpo
from lathe.training.train import train
from lathe.training.trainer_setup import TrainerSetup
from lathe.training.vllm import check_vllm, unmerge_exactly

SPLITS = {
    "train": household_commands.make_rows(1)["train"][:12],
    "validation": household_commands.make_rows(1)["validation"][:6],
}
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "method": "grpo",
    "precision": "fp32",
    "max_length": 256,
    "logging_steps": 1,
    "eval_steps": 2,
    "save_steps": 2,
    "quantization.load_in_4bit": False,
    "lora.lora_dropout": 0.0,
    "grpo.sft_epochs": 1.0,
    "grpo.max_steps": 3,
    "grpo.per_device_train_batch_size": 8,
    "grpo.gradient_accumulation_steps": 1,
    "grpo.num_generations": 4,
    "grpo.max_completion_length": 12,
    "grpo.learning_rate": 0.01,
    "grpo.rewards": [Reward(name="length", weight=1.0, max_characters=8)],
}
SERVER = {"grpo.vllm_mode": "server", "grpo.vllm_server_timeout": 1e-9}


def chosen(**changes: Any) -> Any:
    return changed(load_toy().params, {**SETTINGS, **changes})


@pytest.fixture
def with_vllm(monkeypatch):
    """TRL as if vLLM were installed and there were a GPU; weights go through a queue in place of NCCL."""
    from trl import import_utils
    from trl.generation import vllm_client, vllm_generation

    for module in (import_utils, vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda min_version=None: True)
    monkeypatch.setattr(vllm_client, "NCCLWeightTransferEngine", WeightQueue, raising=False)
    monkeypatch.setattr(vllm_client, "NCCLTrainerSendWeightsArgs", SimpleNamespace, raising=False)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(vllm_client.VLLMClient, "communicator", None, raising=False)
    monkeypatch.setattr("lathe.training.vllm._has_gpu", lambda: True)


@pytest.fixture
def server(small_model):
    with serving(small_model) as running:
        yield running


def run(base: Path, out: Path, **changes: Any) -> Any:
    (out / "adapter").mkdir(parents=True)
    files = write_splits(out / "data", SPLITS)
    return train(base, files, out / "adapter", out / "metrics", params=chosen(**changes), scratch=out / "scratch")


def curve(out: Path, name: str) -> list[float]:
    lines = (out / f"metrics/plots/metrics/{name}.tsv").read_text().splitlines()[1:]
    return [float(line.split("\t")[1]) for line in lines]


def test_a_training_whose_answers_a_server_samples(small_model, tmp_path, with_vllm, server, monkeypatch):
    logged: list[dict[str, float]] = []
    usual = trl.GRPOTrainer.log

    def log(self: Any, logs: dict[str, float], *others: Any) -> None:
        logged.append(logs | {name: values[-1] for name, values in self._metrics["train"].items()})
        usual(self, logs, *others)

    monkeypatch.setattr(trl.GRPOTrainer, "log", log)
    trained = run(small_model, tmp_path / "served", **SERVER, **{"grpo.vllm_server_base_url": server.url})
    run(small_model, tmp_path / "own")
    # Greedy answers by the server's weights are those of the model itself, before the first step ...
    for name in ("reward", "completion_length", "unfinished"):
        served, own = (curve(tmp_path / kind, f"eval/{name}") for kind in ("served", "own"))
        assert served[0] == pytest.approx(own[0], abs=1e-6), name
        assert len(served) == len(own)
    # ... and what it says of the answers that it samples is what the trainer computes.
    steps = [entry for entry in logged if "sampling/sampling_logp_difference/max" in entry]
    assert len(steps) == 3
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in steps)
    sampled = [body for body in server.sent("/v1/completions") if body["n"] == 4]
    assert len(sampled) == 3
    assert all(len(body["prompt"]) == 2 for body in sampled)
    assert {body["max_tokens"] for body in sampled} == {12}
    assert {body["temperature"] for body in sampled} == {chosen().grpo.temperature}
    greedy = [body for body in server.sent("/v1/completions") if body["n"] == 1]
    assert {body["temperature"] for body in greedy} == {0}
    assert all(
        name.startswith("model.") and "lora" not in name
        for name in server.sent("/update_weights")[0]["update_info"]["names"]
        if name != "lm_head.weight"
    )
    assert trained.frozen


def test_merged_for_vllm_and_back_the_base_is_as_it_was(small_model):
    lora = load_toy().params.lora
    base = load_base(small_model, chosen().quantization, precision="bf16")
    model = add_adapter(base, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}

    def moved() -> list[str]:
        return [name for name, weight in model.named_parameters() if name in frozen and not weight.equal(frozen[name])]

    model.merge_adapter()
    model.unmerge_adapter()
    assert moved()  # PEFT's own way leaves rounding
    for name, weight in model.named_parameters():
        if name in frozen:
            weight.data.copy_(frozen[name])
    unmerge_exactly(model)
    for _ in range(3):
        model.merge_adapter()
        assert moved()
        model.unmerge_adapter()
        assert not moved()


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_trls_configuration_is_given_what_the_parameters_say(small_model, monkeypatch, mode):
    given: dict[str, Any] = {}
    monkeypatch.setattr(grpo, "RewardTrainer", lambda **arguments: given.update(arguments))
    url = {"grpo.vllm_server_base_url": "http://127.0.0.1:8000"} if mode == "server" else {}
    options = {
        "grpo.vllm_mode": mode,
        "grpo.vllm_gpu_memory_utilization": 0.25,
        "grpo.vllm_tensor_parallel_size": 2,
        "grpo.vllm_enable_sleep_mode": True,
        "grpo.vllm_server_timeout": 60.0,
        "grpo.vllm_group_port": 51217,
        "preprocess.chat_template_kwargs": {"enable_thinking": False},
    }
    params = chosen(**options, **url)
    tokenizer = load_tokenizer_with_options(small_model, {})
    model = add_adapter(load_base(small_model, params.quantization, precision="fp32"), params.lora)
    grpo.build_trainer(TrainerSetup(model, tokenizer, SPLITS, params, "fp32", None, [], {}))
    config = given["args"]
    assert type(config) is trl.GRPOConfig
    assert (config.use_vllm, config.vllm_mode) == (True, mode)
    assert config.vllm_server_base_url == url.get("grpo.vllm_server_base_url")
    assert (config.vllm_server_timeout, config.vllm_group_port) == (60, 51217)
    assert (config.vllm_gpu_memory_utilization, config.vllm_tensor_parallel_size) == (0.25, 2)
    assert config.vllm_enable_sleep_mode
    longest = max(len(row["prompt"]) for row in given["train_dataset"])
    assert config.vllm_max_model_length >= longest + 12
    assert tokenizer.eos_token_id in config.generation_kwargs["stop_token_ids"]
    assert config.chat_template_kwargs == {"enable_thinking": False}


def test_without_vllm_trl_is_given_nothing_of_it(small_model, monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(grpo, "RewardTrainer", lambda **arguments: given.update(arguments))
    tokenizer = load_tokenizer_with_options(small_model, {})
    model = add_adapter(load_base(small_model, chosen().quantization, precision="fp32"), chosen().lora)
    grpo.build_trainer(TrainerSetup(model, tokenizer, SPLITS, chosen(), "fp32", None, [], {}))
    assert not given["args"].use_vllm
    assert given["args"].generation_kwargs is None


def test_a_machine_without_vllm_says_so():
    with refused("vllm-missing", "grpo.vllm_mode is 'colocate'", "trl[vllm]"):
        check_vllm(chosen(**{"grpo.vllm_mode": "colocate"}))


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_machine_without_a_gpu_says_so(with_vllm, monkeypatch, mode):
    monkeypatch.setattr("lathe.training.vllm._has_gpu", lambda: False)
    with refused("vllm-needs-gpu", f"grpo.vllm_mode is {mode!r}", "torch sees none"):
        check_vllm(chosen(**{"grpo.vllm_mode": mode}))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"quantization.load_in_4bit": True}, "vllm-4bit"),
        ({"preprocess.added_tokens": ["<a>"]}, "vllm-added-tokens"),
    ],
)
def test_what_vllm_could_not_be_sent_is_refused(changes, code):
    with refused(code, "grpo.vllm_mode is 'colocate'"):
        check_vllm(chosen(**{"grpo.vllm_mode": "colocate"}, **changes))


def test_weights_that_are_shared_out_are_refused(monkeypatch):
    monkeypatch.setattr("lathe.common.launch.is_sharded", lambda: True)
    with refused("vllm-sharded", "grpo.vllm_mode is 'colocate'"):
        check_vllm(chosen(**{"grpo.vllm_mode": "colocate"}))


def test_a_server_that_is_not_there_is_said_with_its_address(with_vllm):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with refused("vllm-unreachable", f"grpo.vllm_server_base_url: {url}", kept=False):
            check_vllm(chosen(**SERVER, **{"grpo.vllm_server_base_url": url}))


@pytest.mark.parametrize(
    ("info", "code", "part"),
    [
        (None, "vllm-refused", "VLLM_SERVER_DEV_MODE=1"),
        ({**INFO, "weight_transfer_config": None}, "vllm-no-weights", "--weight-transfer-config"),
    ],
)
def test_a_server_that_was_started_otherwise_is_refused(with_vllm, small_model, info, code, part):
    with serving(small_model, info) as running, refused(code, running.url, part, kept=False):
        check_vllm(chosen(**SERVER, **{"grpo.vllm_server_base_url": running.url}))


def test_a_server_of_something_else_is_refused(with_vllm, small_model, monkeypatch):
    monkeypatch.setattr(VllmServer, "answer", lambda self, path, body: {})
    with serving(small_model) as running, refused("vllm-refused", running.url, kept=False):
        check_vllm(chosen(**SERVER, **{"grpo.vllm_server_base_url": running.url}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"vllm_mode": "server"}, "grpo.vllm_server_base_url null"),
        ({"vllm_server_base_url": "http://127.0.0.1:8000"}, "which only grpo.vllm_mode server uses"),
        ({"vllm_mode": "server", "vllm_server_base_url": "127.0.0.1:8000"}, "must be http:// or https://"),
        ({"vllm_mode": "server", "vllm_server_base_url": "http://a:b@host"}, "without a password"),
        ({"vllm_gpu_memory_utilization": 1.5}, "less than 1"),
    ],
)
def test_values_that_do_not_go_together_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        Grpo.model_validate({**load_toy().params.grpo.model_dump(), **values})
