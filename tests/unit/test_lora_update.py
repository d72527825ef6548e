"""The update of a LoRA layer, added in place: PEFT's result and gradients, and nothing left behind."""

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from toy import load_toy
from transformers import AutoConfig, AutoModelForCausalLM

from lathe.models.adapter import add_adapter
from lathe.training.lora_update import add_updates_in_place
from lathe.training.training_step import autocast

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
IDS = torch.randint(90, (12, 24), generator=torch.Generator().manual_seed(0))


def adapted(dtype=torch.float32, **lora):
    """Return a Llama with an adapter that changes its output."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), dtype=dtype)
    model = add_adapter(base, load_toy().params.lora.model_copy(update={"r": 4, **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model, precision: str, ids=IDS[0]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits, and the gradient of each trained tensor."""
    with disable_input_dtype_casting(model), autocast("cpu", precision):
        logits = model(input_ids=ids[None], use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:]).backward()
    gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    model.zero_grad()
    return logits.detach(), gradients


def updated_layers(model) -> int:
    return sum(bool(getattr(module, "lora_variant", None)) for module in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_peft(checkpointing):
    model = adapted()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    expected, expected_gradients = step(model, "fp32")
    with torch.no_grad(), model.disable_adapter():
        assert (model(input_ids=IDS[:1]).logits - expected).abs().max() > 0.1
    with add_updates_in_place(model):
        assert updated_layers(model) == 14
        logits, gradients = step(model, "fp32")
    assert updated_layers(model) == 0
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_is_as_near_to_float32_as_peft_is():
    exact, rounded = adapted(torch.bfloat16).float(), adapted(torch.bfloat16)
    errors = {"peft": 0.0, "in place": 0.0}
    for ids in IDS:
        _, reference = step(exact, "fp32", ids)
        results = {"peft": step(rounded, "bf16", ids)[1]}
        with add_updates_in_place(rounded):
            results["in place"] = step(rounded, "bf16", ids)[1]
        for kind, gradients in results.items():
            for name, gradient in gradients.items():
                assert gradient.dtype == torch.float32
                errors[kind] += float((gradient - reference[name]).norm() / reference[name].norm())
    assert 0 < errors["in place"] < 1.2 * errors["peft"]


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_other_kinds_of_lora_stay_as_peft_has_them(lora):
    model = adapted(**lora)
    before = updated_layers(model)
    with add_updates_in_place(model):
        assert updated_layers(model) == before
    assert updated_layers(model) == before


def test_a_layer_trained_in_full_is_no_matter():
    model = adapted(modules_to_save=["lm_head"])
    with add_updates_in_place(model):
        _, gradients = step(model, "fp32")
    assert any("lm_head" in name for name in gradients)
