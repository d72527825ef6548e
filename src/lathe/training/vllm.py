"""vLLM as the sampler of GRPO's answers (`grpo.vllm_mode`): what it needs, and the arguments that TRL is given."""

from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from lathe.common import launch
from lathe.common.errors import InputError
from lathe.config.params import Params
from lathe.config.training_params import Grpo


def check_vllm(params: Params) -> None:
    """Raise InputError where `grpo.vllm_mode` is set and vLLM cannot sample, or cannot be sent the weights.

    The mode `server` waits up to `grpo.vllm_server_timeout` for the server.
    """
    grpo = params.grpo
    if grpo.vllm_mode is None:
        return
    asked = f"grpo.vllm_mode is {grpo.vllm_mode!r}"
    if params.quantization.load_in_4bit:
        raise InputError(
            f"{asked} and quantization.load_in_4bit true; vLLM is sent merged weights, which 4 bits would round; set "
            "quantization.load_in_4bit to false, or grpo.vllm_mode to null",
            code="vllm-4bit",
        )
    if params.preprocess.added_tokens:
        raise InputError(
            f"{asked} and preprocess.added_tokens names tokens, which the model that vLLM loads lacks; set "
            "grpo.vllm_mode to null",
            code="vllm-added-tokens",
        )
    if launch.is_sharded():
        raise InputError(
            f"{asked} and weights are shared out over processes, where PEFT cannot merge them for vLLM; set "
            "training.launcher to a DDP configuration, or grpo.vllm_mode to null",
            code="vllm-sharded",
        )
    from trl.import_utils import is_vllm_available

    if not is_vllm_available():
        raise InputError(
            f"{asked}; the package vllm is not installed; install it (`pip install 'trl[vllm]'` says which versions "
            "TRL takes), or set grpo.vllm_mode to null",
            code="vllm-missing",
        )
    if not _has_gpu():
        raise InputError(
            f"{asked}; needs a GPU for the training too, and torch sees none; train on one, or set grpo.vllm_mode to "
            "null",
            code="vllm-needs-gpu",
        )
    if grpo.vllm_mode == "server" and launch.is_main():
        _check_server(grpo)


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _check_server(grpo: Grpo) -> None:
    from trl.generation.vllm_client import VLLMClient

    where = f"grpo.vllm_server_base_url: {grpo.vllm_server_base_url}"
    try:
        client = VLLMClient(base_url=grpo.vllm_server_base_url, connection_timeout=grpo.vllm_server_timeout)
        info = client.get_server_info()
    except OSError:  # of requests
        raise InputError(
            f"{where}: no answer within grpo.vllm_server_timeout, {grpo.vllm_server_timeout:g} s; start the server, or "
            "set its address",
            code="vllm-unreachable",
        ) from None
    except Exception as error:  # TRL raises that itself for a status, and KeyError for an answer of another form
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: no vLLM server that TRL can use: {said}", code="vllm-refused") from None
    if info.get("weight_transfer_config") is None:
        raise InputError(
            f"{where}: the server takes no weights; start it with `--weight-transfer-config "
            """'{"backend": "nccl"}'`""",
            code="vllm-no-weights",
        )


def build_vllm_arguments(grpo: Grpo, ends: list[int], longest_prompt: int) -> dict[str, Any]:
    """Return the arguments of TRL's `GRPOConfig` for vLLM: none where it is not used.

    `ends` are the tokens that end an answer, `longest_prompt` is in tokens.
    """
    if grpo.vllm_mode is None:
        return {}
    return {
        "use_vllm": True,
        "vllm_mode": grpo.vllm_mode,
        "vllm_server_base_url": grpo.vllm_server_base_url,
        "vllm_server_timeout": grpo.vllm_server_timeout,
        "vllm_group_port": grpo.vllm_group_port,
        "vllm_gpu_memory_utilization": grpo.vllm_gpu_memory_utilization,
        "vllm_tensor_parallel_size": grpo.vllm_tensor_parallel_size,
        "vllm_enable_sleep_mode": grpo.vllm_enable_sleep_mode,
        "vllm_max_model_length": longest_prompt + grpo.max_completion_length,
        # vLLM reads the ends of the model's folder, not those of the chat template.
        "generation_kwargs": {"stop_token_ids": ends},
    }


def unmerge_exactly(model: Any) -> None:
    """Let `unmerge_adapter` of a PEFT model put back the very weights that `merge_adapter` changed.

    TRL merges before it sends the weights to vLLM, and unmerges after it. PEFT adds the update and subtracts it again,
    which leaves the rounding of both in the base, more of it after every step. The weights are kept in the CPU's memory
    in between: as many bytes as the layers with an update have.
    """
    merge, unmerge = model.merge_adapter, model.unmerge_adapter
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def merge_adapter(self: Any, *arguments: Any, **options: Any) -> None:
        for layer in self.modules():
            if isinstance(layer, BaseTunerLayer):
                for weight in layer.get_base_layer().parameters(recurse=False):
                    kept.setdefault(weight, weight.detach().to("cpu", copy=True))
        merge(*arguments, **options)

    def unmerge_adapter(self: Any) -> None:
        unmerge()
        for weight, values in kept.items():
            weight.data.copy_(values)
        kept.clear()

    model.merge_adapter = MethodType(merge_adapter, model)
    model.unmerge_adapter = MethodType(unmerge_adapter, model)
