"""Tokens that are drawn: with the probabilities that transformers gives them, and from seed, answer and place alone."""

from array import array
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from lathe.inference.sampling import TokenSampler
from lathe.inference.shared_prefix import TokenSequence

VOCABULARY = 1000


def compute_probabilities(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    scores = torch.from_numpy(logits)[None].double()
    ids = torch.zeros(1, 1, dtype=torch.long)
    warped = TopPLogitsWarper(top_p)(ids, TemperatureLogitsWarper(temperature)(ids, scores))
    return torch.softmax(warped, dim=-1)[0].numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.95), (3.0, 0.9), (0.2, 0.5)])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_tokens_have_the_probabilities_of_transformers(temperature, top_p, scale):
    logits = (np.random.default_rng(1).normal(size=VOCABULARY) * scale).astype(np.float32)
    sampler = TokenSampler(1, temperature, top_p)
    # Numbers spread evenly over [0, 1) stand for each token as often as it is probable.
    steps = 20_000
    drawn = Counter(sampler.draw(logits, (step + 0.5) / steps) for step in range(steps))
    shares = np.array([drawn[token] / steps for token in range(VOCABULARY)])
    expected = compute_probabilities(logits, temperature, top_p)
    assert np.abs(shares - expected).max() <= 1.5 / steps
    assert drawn.keys() <= set(np.flatnonzero(expected > 0))


def test_the_coldest_draw_is_the_likeliest_token():
    logits = np.random.default_rng(2).normal(size=VOCABULARY).astype(np.float32)
    sampler = TokenSampler(1, 1e-6, 1.0)
    assert {sampler.draw(logits, uniform) for uniform in (0.0, 0.5, 0.999999)} == {int(logits.argmax())}


def test_a_draw_depends_on_seed_answer_and_place_and_not_on_the_rows_beside_it():
    logits = np.random.default_rng(3).normal(size=(6, VOCABULARY)).astype(np.float32)
    logits[:] = logits[0]
    rows = [TokenSequence(number, array("i", [1] * places), 0) for number in (4, 900) for places in (3, 4, 5)]
    sampler = TokenSampler(7, 1.0, 0.95)
    together = sampler.choose(rows, logits)
    assert [sampler.choose([row], logits[:1])[0] for row in rows] == together
    assert list(reversed(sampler.choose(rows[::-1], logits))) == together
    assert len(set(together)) > 3
    assert TokenSampler(8, 1.0, 0.95).choose(rows, logits) != together
