"""Weights beyond f16 are found in the bits of the file, as torch finds them in the values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lathe.models.weight_range import LARGEST_F16, find_beyond_f16


def save(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_every_value_around_the_limit_is_judged_as_torch_judges_it(kind: torch.dtype, tmp_path: Path) -> None:
    limit = torch.tensor([LARGEST_F16], dtype=torch.float32).view(torch.int32)
    bits = limit + torch.arange(-3, 4) * (1 << 16 if kind == torch.bfloat16 else 1)
    for number, value in enumerate(bits.view(torch.float32)):
        folder = tmp_path / str(number)
        folder.mkdir()
        weight = torch.tensor([[0.5, -value.item()], [value.item(), -0.25]], dtype=kind)
        beyond = abs(weight).max().item() > torch.finfo(torch.float16).max
        found = find_beyond_f16(save(folder, other=torch.ones(3, dtype=kind), weight=weight))
        assert found == (("weight", abs(weight).max().item()) if beyond else None), value


def test_what_is_no_number_or_infinite_is_not_meant(tmp_path: Path) -> None:
    weight = torch.tensor([1.0, float("inf"), float("nan"), -float("inf")])
    assert find_beyond_f16(save(tmp_path, weight=weight, halves=weight.half(), none=torch.ones(0))) is None


def test_the_largest_of_several_is_named(tmp_path: Path) -> None:
    weight = torch.tensor([7e4, -9e4, 8e4, float("inf")])
    assert find_beyond_f16(save(tmp_path, weight=weight)) == ("weight", 9e4)
