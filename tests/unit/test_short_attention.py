"""Attention of short rows as matrix products is attention."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lathe.training import short_attention


def errors(found, expected) -> list[float]:
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_is_as_exact_as_the_fused_kernel_in_bf16(window, key_heads, scaling):
    random = torch.Generator().manual_seed(1)

    def states(heads: int) -> torch.Tensor:
        return torch.randn(3, heads, 40, 16, generator=random).bfloat16().requires_grad_()

    inputs = states(4), states(key_heads), states(key_heads)
    gradient = torch.randn(3, 4, 40, 16, generator=random)
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    if window:
        visible = visible.triu(1 - window)

    def through(function, dtype):
        copies = [each.detach().to(dtype).requires_grad_() for each in inputs]
        attended = function(*copies)
        attended.backward(gradient.to(dtype))
        return [attended.detach(), *(copy.grad for copy in copies)]

    def fused(query, key, value):
        return scaled_dot_product_attention(query, key, value, visible, scale=scaling, enable_gqa=True)

    exact = through(fused, torch.float32)
    own = through(lambda *states: short_attention.attend(*states, visible, scaling), torch.bfloat16)
    for ours, theirs in zip(errors(own, exact), errors(through(fused, torch.bfloat16), exact), strict=True):
        assert ours < max(0.006, 2 * theirs)


def test_it_is_for_short_rows_in_bf16_on_the_cpu():
    row = torch.zeros(1, 1, short_attention.MAX_TOKENS, 8, dtype=torch.bfloat16)
    assert short_attention.is_faster(row)
    assert not short_attention.is_faster(row.float())
    assert not short_attention.is_faster(torch.cat([row, row], dim=2))
    assert not short_attention.is_faster(row.to("meta"))
