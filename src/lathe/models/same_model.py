"""Same model: the GGUF that ships gives the held-out answers the likelihood that the trained model gave them."""

from lathe.common.errors import InputError

# Differences in nats per token that rounding makes: of weights and activations in 16 bits; of a base that was in 4 bits
# in training and is in 16 bits in the file.
ROUNDING_NATS, ROUNDING_SHARE = 0.05, 0.02
ROUNDING_NATS_4BIT, ROUNDING_SHARE_4BIT = 0.5, 0.25


def check_same_model(shown: str, *, trained: float, shipped: float, tokens: int, load_in_4bit: bool) -> None:
    """Raise InputError where two likelihoods of the same tokens (nats per token) differ by more than rounding.

    `shown` is what the message calls the file; `trained` was measured at the end of the training.
    """
    nats, share = (ROUNDING_NATS_4BIT, ROUNDING_SHARE_4BIT) if load_in_4bit else (ROUNDING_NATS, ROUNDING_SHARE)
    if abs(shipped - trained) <= nats + share * trained:  # false for NaN too
        return
    raise InputError(
        f"{shown}: {shipped:.3f} nats per token for {tokens} tokens of validation answers; the model that was trained "
        f"had {trained:.3f}; the file is not that model: a tensor that the base lacks (it was drawn at random), "
        "another base than the adapter's, a part of the architecture that llama.cpp's converter does not write, or "
        "weights beyond its 16-bit type; set convert.llama_cpp_dir to another llama.cpp, or choose another base",
        code="other-than-trained",
    )
