# ruff: noqa: F811 - fixtures are imported, then named as arguments
import itertools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf_models import METADATA, Made, convert, make_llama, quantize_program, qwen, tiny  # noqa: F401 - fixtures
from refusals import refused
from shared import made_once

from lathe.common.errors import InputError
from lathe.config.quantization_types import FILES_THAT_CANNOT_BE_MADE, FILES_THAT_NEED_IMATRIX, check_type
from lathe.gguf import collect_imatrix, imatrix_file
from lathe.gguf.description import describe_gguf
from lathe.gguf.ggml_types import read_ggml_types
from lathe.gguf.llama_library import collect_llama_log, load_library
from lathe.gguf.llama_model import LlamaModel
from lathe.gguf.quantize import quantize
from lathe.gguf.tensor_list import list_tensors
from lathe.gguf.tensor_types import list_file_types
from lathe.inference.kv_cache import KVCache


def test_fewer_bits_make_a_smaller_file_and_keep_the_metadata(tiny: Made, tmp_path):
    bits = []
    for name in ("Q8_0", "Q4_1", "Q4_K_M", "Q2_K"):
        quantize(tiny.gguf, tmp_path / name, type=name, threads=2)
        described = describe_gguf(tmp_path / name)
        bits.append(described["bits_per_weight"])
        assert described["metadata"].items() >= METADATA.items()
        assert described["chat_template"] == describe_gguf(tiny.gguf)["chat_template"]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == pytest.approx(8.5, abs=0.1)


def test_quantizing_gives_the_same_bytes_whatever_the_threads(tiny: Made, tmp_path):
    quantize(tiny.gguf, tmp_path / "one", type="Q4_K_M", threads=1)
    quantize(tiny.gguf, tmp_path / "two", type="Q4_K_M", threads=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_rows_that_fit_no_block_are_warned_of(qwen: Made, tiny: Made, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    quantize(tiny.gguf, tmp_path / "fits", type="Q4_K_M", threads=2)
    assert not caplog.records
    quantize(qwen.gguf, tmp_path / "odd", type="Q4_K_M", threads=2)
    [record] = caplog.records
    assert "do not divide into its blocks; stored in larger types: Q5_0 × " in record.getMessage()


def test_an_unknown_type_is_answered_with_the_near_one(tiny: Made, tmp_path):
    with refused("unknown-quantization-type", "'q4_km'", "did you mean 'Q4_K_M'?"):
        quantize(tiny.gguf, tmp_path / "x", type="q4_km", threads=1)


def test_a_type_that_needs_an_importance_matrix_is_refused_and_leaves_no_file(tiny: Made, tmp_path):
    with refused("quantization-refused", "cannot make IQ2_XXS of it: this quantization requires an importance"):
        quantize(tiny.gguf, tmp_path / "x", type="IQ2_XXS", threads=1)
    assert not (tmp_path / "x").exists()


def test_an_external_program_quantizes_to_the_same_bytes(tiny: Made, tmp_path, quantize_program, caplog):
    caplog.set_level(logging.DEBUG)
    quantize(tiny.gguf, tmp_path / "one", type="Q4_K_M", threads=2)
    quantize(tiny.gguf, tmp_path / "two", type="Q4_K_M", threads=2, binary=quantize_program)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert "quantizing with a program of its own" in caplog.text


def test_an_external_program_that_cannot_be_run_or_fails_is_refused_in_one_line(tiny: Made, tmp_path, quantize_program):
    out = tmp_path / "x"
    with refused("program-failed", "none cannot be run (No such file or directory); name llama.cpp's"):
        quantize(tiny.gguf, out, type="Q8_0", threads=1, binary=tmp_path / "none")
    with refused("program-failed", "cannot be run (Permission denied)"):
        quantize(tiny.gguf, out, type="Q8_0", threads=1, binary=tmp_path)
    parts = ("llama-quantize cannot make IQ2_XXS of it: ", "requires an importance")
    with refused("quantization-refused", *parts, kept=False) as caught:
        quantize(tiny.gguf, out, type="IQ2_XXS", threads=1, binary=quantize_program)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_every_type_of_the_library_is_offered():
    import llama_cpp

    types = list_file_types()
    assert types["Q4_K_M"] == llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert types["F32"] == llama_cpp.LLAMA_FTYPE_ALL_F32
    assert "GUESSED" not in types
    assert len(types) == sum(name.startswith("LLAMA_FTYPE_") for name in dir(llama_cpp)) - 1


class Uneven(NamedTuple):
    gguf: Path
    matrix: Path
    rows: list[list[int]]  # of token ids, on which nothing was calibrated


@pytest.fixture(scope="session")
def uneven(tmp_path_factory) -> Uneven:
    """A random Llama, whose layers' inputs are of very different sizes, and its importance matrix."""
    import torch

    def stretch(model):
        generator = torch.Generator().manual_seed(3)
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                scales = torch.exp(1.5 * torch.randn(norm.weight.shape, generator=generator))
                norm.weight.copy_(scales / scales.square().mean().sqrt())
            # Less sharp, so that small errors stay small.
            layer.self_attn.q_proj.weight.mul_(0.3)

    rows = np.random.default_rng(0).integers(5, 400, (80, 24)).tolist()

    def make(folder: Path) -> None:
        make_llama(folder, stretch)
        importance = collect_imatrix.collect(folder, convert(folder, folder.with_suffix(".gguf")), rows[:40])
        imatrix_file.write_importance(importance, folder / "imatrix.gguf", dataset="random tokens", rows=40)

    folder = made_once(tmp_path_factory, "uneven", make)
    return Uneven(folder.with_suffix(".gguf"), folder / "imatrix.gguf", rows[40:])


def logits(file: Path, rows: list[list[int]]) -> list[np.ndarray]:
    with LlamaModel(file) as model, KVCache(model, slots=1, length=64, max_outputs=64, threads=2, min_rows=1) as cache:
        found = []
        for row in rows:
            cache.cut(0, 0)
            found.append(cache.feed(0, row, first_output=0).astype(np.float64))
    return found


def divergences(reference: list[np.ndarray], file: Path, rows: list[list[int]]) -> np.ndarray:
    """KL of each row, in nats per token."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)

    pairs = zip(map(log_softmax, reference), map(log_softmax, logits(file, rows)), strict=True)
    return np.array([(np.exp(p) * (p - q)).sum(1).mean() for p, q in pairs])


def interval(values: np.ndarray) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (1000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("name", sorted(set(list_file_types()) - FILES_THAT_CANNOT_BE_MADE))
def test_every_type_of_the_library_makes_a_file_that_runs(name, uneven: Uneven, tmp_path):
    out = tmp_path / "out.gguf"
    if name in FILES_THAT_NEED_IMATRIX:
        with pytest.raises(InputError, match="requires an importance matrix"):
            quantize(uneven.gguf, out, type=name, threads=2)
        assert not out.exists()
    else:
        quantize(uneven.gguf, out, type=name, threads=2)
    quantize(uneven.gguf, out, type=name, threads=2, importance=uneven.matrix)
    bits = describe_gguf(out)["bits_per_weight"]
    assert bits < 9 or name in ("F32", "F16", "BF16")
    [found] = logits(out, uneven.rows[:1])
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", sorted(FILES_THAT_CANNOT_BE_MADE))
def test_a_type_that_llama_cpp_names_and_cannot_make_is_refused_in_one_line(name, tiny: Made, tmp_path):
    with refused("unsupported-quantization-type", f"{name} is named by llama.cpp"):
        quantize(tiny.gguf, tmp_path / "x", type=name, threads=1)
    llama_cpp = load_library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = list_file_types()[name]
    with collect_llama_log() as log:
        assert llama_cpp.llama_model_quantize(str(tiny.gguf).encode(), str(tmp_path / "x").encode(), params)
    assert "invalid output file type" in log.reason


def test_more_bits_are_nearer_to_the_original_beyond_their_intervals(uneven: Uneven, tmp_path):
    reference = logits(uneven.gguf, uneven.rows)
    intervals = []
    for name in ("Q8_0", "Q6_K", "Q4_K_M", "Q2_K"):
        quantize(uneven.gguf, tmp_path / name, type=name, threads=2, importance=uneven.matrix)
        intervals.append(interval(divergences(reference, tmp_path / name, uneven.rows)))
    for (_, nearer), (farther, _) in itertools.pairwise(intervals):
        assert nearer < farther, intervals


@pytest.mark.parametrize("name", ["Q4_K_M", "Q2_K", "IQ4_XS", "IQ3_M"])
def test_the_importance_matrix_brings_a_file_nearer_to_the_original_and_one_in_the_wrong_order_does_not(
    name, uneven: Uneven, tmp_path
):
    reference = logits(uneven.gguf, uneven.rows)
    reversed_columns = {
        tensor: imatrix_file.Importance(one.sums[:, ::-1], one.counts)
        for tensor, one in imatrix_file.read_importance(uneven.matrix).items()
    }
    imatrix_file.write_importance(reversed_columns, tmp_path / "reversed.gguf", dataset="reversed", rows=24)
    nats = {}
    for which, importance in (("none", None), ("own", uneven.matrix), ("reversed", tmp_path / "reversed.gguf")):
        quantize(uneven.gguf, tmp_path / which, type=name, threads=2, importance=importance)
        nats[which] = divergences(reference, tmp_path / which, uneven.rows)
    assert interval(nats["own"])[1] < interval(nats["none"])[0]
    assert interval(nats["own"])[1] < interval(nats["reversed"])[0]


def test_columns_that_nothing_flows_into_do_no_harm(uneven: Uneven, tmp_path):
    dead = {
        tensor: imatrix_file.Importance(np.where(np.arange(one.sums.shape[1]) < 64, 0, one.sums), one.counts)
        for tensor, one in imatrix_file.read_importance(uneven.matrix).items()
    }
    imatrix_file.write_importance(dead, tmp_path / "dead.gguf", dataset="dead", rows=24)
    for name in ("Q4_0", "Q4_K_M", "Q2_K", "IQ3_M", "IQ2_XXS", "IQ1_S"):
        quantize(uneven.gguf, tmp_path / name, type=name, threads=2, importance=tmp_path / "dead.gguf")
        assert np.isfinite(logits(tmp_path / name, uneven.rows[:1])).all()


def stored(file: Path) -> dict[str, str]:
    numbers = {kind.number: name for name, kind in read_ggml_types().items()}
    return {tensor.name: numbers[tensor.kind] for tensor in list_tensors(file)}


def test_types_of_head_embeddings_and_named_tensors_are_the_users(tiny: Made, tmp_path):
    usual, chosen = tmp_path / "usual", tmp_path / "chosen"
    quantize(tiny.gguf, usual, type="Q4_K_M", threads=2)
    quantize(
        tiny.gguf,
        chosen,
        type="Q4_K_M",
        threads=2,
        output_tensor_type="Q8_0",
        token_embedding_type="F16",
        tensor_types=[r"blk\.0\.attn_[kv]=Q8_0", "attn=Q5_K", r"(?<=ffn_)down=IQ4_NL"],
    )
    expected = stored(usual)
    for name in expected:
        if name == "output.weight" or name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight"):
            expected[name] = "Q8_0"
        elif name == "token_embd.weight":
            expected[name] = "F16"
        elif "attn" in name and "norm" not in name:
            expected[name] = "Q5_K"
        elif "ffn_down" in name:
            expected[name] = "IQ4_NL"
    assert stored(chosen) == expected


def test_a_program_gets_matrix_and_types_as_the_library_does(uneven: Uneven, tmp_path, quantize_program):
    options: dict[str, Any] = {
        "importance": uneven.matrix,
        "output_tensor_type": "Q8_0",
        "token_embedding_type": "Q5_K",
        "tensor_types": ["attn_v=Q8_0", "ffn_up=IQ2_XXS"],
    }
    quantize(uneven.gguf, tmp_path / "one", type="Q4_K_M", threads=2, **options)
    quantize(uneven.gguf, tmp_path / "two", type="Q4_K_M", threads=2, binary=quantize_program, **options)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("name", sorted(set(read_ggml_types()) - {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}))
def test_every_type_that_a_tensor_may_be_given_can_be_given(name, uneven: Uneven, tmp_path):
    quantize(
        uneven.gguf, tmp_path / "x", type="Q8_0", threads=2, importance=uneven.matrix, tensor_types=[f"ffn_down={name}"]
    )
    assert stored(tmp_path / "x")["blk.1.ffn_down.weight"] == name
    try:
        check_type(name, of_embeddings=True)
    except InputError as error:
        assert error.code == "importance-needed"  # noqa: PT017 - both ways are right
        return
    chosen = {"output_tensor_type": name, "token_embedding_type": name}
    quantize(uneven.gguf, tmp_path / "y", type="Q8_0", threads=2, importance=uneven.matrix, **chosen)
    assert stored(tmp_path / "y")["output.weight"] == stored(tmp_path / "y")["token_embd.weight"] == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_types": ["attn_w=Q8_0"]}, r"'attn_w=Q8_0' matches no tensor .*; did you mean 'attn_v'\?; .*'blk\."),
        ({"tensor_types": ["attn_norm=Q8_0"]}, "'attn_norm=Q8_0' matches no tensor that can be quantized"),
        ({"tensor_types": ["attn_v=Q8_9"]}, r"'Q8_9' is no tensor type; did you mean 'Q8_0'\?"),
        ({"tensor_types": ["attn_v=Q8_K"]}, "'Q8_K' is no tensor type"),
        ({"tensor_types": ["attn_v"]}, "'attn_v' is not of the form PATTERN=TYPE"),
        ({"tensor_types": ["attn(=Q8_0"]}, r"'attn\(' is not a regular expression: missing \)"),
        ({"token_embedding_type": "Q2_K"}, "quantize.token_embedding_type is Q2_K, .*; the rows of token_embd.weight"),
        ({"output_tensor_type": "IQ2_XS"}, "IQ2_XS needs an importance matrix"),
        ({"importance": Path("/nowhere/imatrix.gguf")}, "no such importance matrix; run the stage imatrix"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_one_line(qwen: Made, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as caught:
        quantize(qwen.gguf, tmp_path / "x", type="Q8_0", threads=1, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
