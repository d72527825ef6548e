"""Packages that stages need, imported by the process that forks them: torch, TRL and what they bring."""

import logging

logging.disable()  # bitsandbytes says at every import which of its kernels it does without

import bitsandbytes  # noqa: E402, F401
import datasets  # noqa: E402, F401
import dvclive  # noqa: E402, F401
import peft  # noqa: E402, F401
import pydantic  # noqa: E402, F401
import ruamel.yaml  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import sentencepiece  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers.models.auto.tokenization_auto  # noqa: E402
import transformers.trainer  # noqa: E402, F401
import trl.trainer.sft_trainer  # noqa: E402, F401

logging.disable(logging.NOTSET)
