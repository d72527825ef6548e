"""LoRA updates added by the product itself: the output and the gradients of PEFT's own layers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lathe.training.fused_lora import add_updates_in_products


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(32, 48)
        self.second = torch.nn.Linear(48, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.nn.functional.silu(self.first(x)))
        return result


def make(**options) -> torch.nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], **options)
    model = get_peft_model(Layers().to(torch.bfloat16), config, autocast_adapter_dtype=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model: torch.nn.Module, *, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output, the gradient of the input, and those of the adapter."""
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().pow(2).sum().backward()
    assert x.grad is not None
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y, x.grad, gradients


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.float() - other.float()).norm() <= 0.01 * other.float().norm())


def test_output_and_gradients_are_pefts():
    model = make()
    expected = run(model)
    assert add_updates_in_products(model) == 2
    y, x_gradient, gradients = run(model)
    assert y.dtype == expected[0].dtype
    assert y.shape == expected[0].shape
    assert is_close(y, expected[0])
    assert is_close(x_gradient, expected[1])
    assert gradients.keys() == expected[2].keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert is_close(gradient, expected[2][name]), name


def test_a_frozen_layer_has_no_gradient_and_its_input_may_need_none():
    model = make()
    add_updates_in_products(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(3, 32).to(torch.bfloat16)).float().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=str)
def test_dropout_and_dora_stay_pefts(options):
    model = make(**options)
    torch.manual_seed(3)
    expected = run(model)
    add_updates_in_products(model)
    torch.manual_seed(3)
    y, x_gradient, _ = run(model)
    assert torch.equal(y, expected[0])
    assert torch.equal(x_gradient, expected[1])


def test_a_disabled_or_merged_adapter_and_float32_stay_pefts():
    model = make()
    add_updates_in_products(model)
    x = torch.randn(3, 32).to(torch.bfloat16)
    with_adapter = model(x)
    with model.disable_adapter():
        assert torch.equal(
            model(x),
            model.get_base_model().second.base_layer(
                torch.nn.functional.silu(model.get_base_model().first.base_layer(x))
            ),
        )
    model.merge_adapter()
    assert is_close(model(x), with_adapter)
    model.unmerge_adapter()
    whole = make().float()
    expected = whole(x.float())
    add_updates_in_products(whole)
    assert torch.equal(whole(x.float()), expected)


def test_4bit_layers_give_what_peft_gives():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = bitsandbytes.nn.Linear4bit(
                64, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.first(x)
            return result

    packed = Packed()
    packed.first.support_avx512bf16_for_cpu = False
    packed.first.weight.data = torch.randn(128, 64, dtype=torch.bfloat16)
    packed = packed.to("cpu")
    packed.is_loaded_in_4bit = True
    model = get_peft_model(packed, LoraConfig(r=4, lora_alpha=8, target_modules=["first"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)

    def outcome() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().pow(2).sum().backward()
        assert x.grad is not None
        return y, x.grad

    expected = outcome()
    assert add_updates_in_products(model) == 1
    y, x_gradient = outcome()
    assert is_close(y, expected[0])
    assert is_close(x_gradient, expected[1])
