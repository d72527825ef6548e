"""Merge tried before the training: whether every weight of the adapter to come would find its place in the base."""

from pathlib import Path

import torch

from lathe.common.errors import InputError
from lathe.common.scratch import temporary_folder
from lathe.config.training_params import Lora
from lathe.models.adapter import add_adapter, check_adapter
from lathe.models.merge.merge import plan_merge
from lathe.models.model_class import choose_model_class, read_model_config
from lathe.models.model_folder import ADAPTER_FILE


def check_merge(base: Path, lora: Lora, scratch: Path) -> None:
    """Raise InputError where `merge` would refuse an adapter that `lora` describes, or would not find its weights.

    An adapter of zeros and of rank 1 is written to the folder `scratch`, planned with the base, and removed. Modules
    that are trained whole are left out, as they have the names of the base. No weight of the base is read.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    check_adapter(base, lora)
    smallest = lora.model_copy(update={"r": 1, "modules_to_save": None})
    config = read_model_config(base)
    with torch.device("meta"):
        adapted = add_adapter(choose_model_class(config).from_config(config, trust_remote_code=False), smallest)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with temporary_folder(scratch, "adapter") as folder:
        adapted.peft_config["default"].save_pretrained(folder)
        save_file({key: torch.zeros(tensor.shape) for key, tensor in state.items()}, folder / ADAPTER_FILE)
        try:
            plan_merge(base, folder, dtype="auto")
        except InputError:
            raise
        except Exception as error:  # of transformers' conversions, which change with every release
            raise InputError(
                f"lora.target_modules, lora.target_parameters: their update of {config.model_type} could not be merged "
                f"after the training ({type(error).__name__}: {' '.join(str(error).split())[:200]}); name other layers "
                "or weights",
                code="merge-impossible",
            ) from None
