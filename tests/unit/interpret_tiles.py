"""Compute the losses of test_loss.py by the GPU's kernels, on the CPU by Triton's interpreter (TRITON_INTERPRET=1)."""

import test_loss
from trl.kernels import chunked_logprob
from trl.trainer import add_fused_lm_head, utils


def main() -> None:
    chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE = 16, 64
    chunked_logprob._use_triton = utils._use_triton = lambda device: True
    for kind in test_loss.MODELS:
        model = test_loss.make_model(kind)
        add_fused_lm_head(model)
        test_loss.assert_same(model, "fp32", 1e-5)
        print(kind)


if __name__ == "__main__":
    main()
