# ruff: noqa: F811 - fixtures are imported, then named as arguments
import json
import logging
import shutil

import llama_imatrix
import numpy as np
import pytest
from gguf_models import Made, convert, make_qwen3_moe, tiny  # noqa: F401 - fixtures
from refusals import refused

from lathe.gguf import collect_imatrix, imatrix_file
from lathe.gguf.description import describe_gguf
from lathe.gguf.imatrix_file import Importance
from lathe.gguf.tensor_list import list_tensors

ROWS = [[1, *range(10 + n, 300, 7)] for n in range(3)] + [[1, 5, 9, 200, 33]]


@pytest.fixture
def exact(monkeypatch):
    """Calibration in fp32, as llama.cpp computes, on whatever device."""
    monkeypatch.setattr(collect_imatrix, "resolve_precision", lambda _: "fp32")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("mixture") / "qwen3moe"
    make_qwen3_moe(folder)
    return Made(folder, convert(folder, folder.with_suffix(".gguf")))


def test_the_matrix_is_the_one_that_llama_cpp_collects_itself(tiny: Made, exact):
    ours, theirs = collect_imatrix.collect(tiny.folder, tiny.gguf, ROWS), llama_imatrix.collect(tiny.gguf, ROWS)
    assert set(ours) == set(theirs)
    assert len(ours) == 14
    for name in ours:
        assert ours[name].counts == theirs[name].counts == sum(map(len, ROWS)), name
        np.testing.assert_allclose(ours[name].sums, theirs[name].sums, rtol=0.02, err_msg=name)


def test_each_expert_of_a_mixture_has_an_importance_of_its_own(mixture: Made, exact, caplog):
    ours, theirs = (
        collect_imatrix.collect(mixture.folder, mixture.gguf, ROWS),
        llama_imatrix.collect(mixture.gguf, ROWS),
    )
    assert set(ours) == set(theirs)
    assert not caplog.records
    tokens = sum(map(len, ROWS))
    for name in ours:
        experts = "_exps" in name
        assert ours[name].sums.shape == theirs[name].sums.shape == (4 if experts else 1, ours[name].sums.shape[1])
        assert ours[name].counts.sum() == (2 * tokens if experts else tokens)
        # A router on the verge sends a token or two elsewhere.
        np.testing.assert_allclose(ours[name].counts, theirs[name].counts, atol=2, err_msg=name)
        np.testing.assert_allclose(ours[name].compute_means(), theirs[name].compute_means(), rtol=0.3, err_msg=name)
        if name.startswith("blk.0.ffn_down_exps"):
            assert not np.allclose(
                ours[name].compute_means().reshape(4, -1)[0], ours[name].compute_means().reshape(4, -1)[1], rtol=0.1
            )


def test_rows_of_any_lengths_and_batches_give_the_same_sums(tiny: Made, exact, monkeypatch):
    together = collect_imatrix.collect(tiny.folder, tiny.gguf, ROWS)
    monkeypatch.setattr(collect_imatrix, "TOKENS_PER_BATCH", 1)
    one_by_one = collect_imatrix.collect(tiny.folder, tiny.gguf, list(reversed(ROWS)))
    for name in together:
        np.testing.assert_allclose(together[name].sums, one_by_one[name].sums, rtol=1e-5)


def test_a_tensor_whose_columns_were_reordered_gets_no_importance_and_is_named(tiny: Made, tmp_path, caplog):
    harmed = tmp_path / "harmed.gguf"
    shutil.copy(tiny.gguf, harmed)
    [tensor] = [tensor for tensor in list_tensors(harmed) if tensor.name == "blk.1.attn_output.weight"]
    weight = np.memmap(harmed, "<f2", mode="r+", offset=tensor.offset, shape=tuple(reversed(tensor.extents)))
    weight[:] = weight[:, ::-1].copy()
    weight.flush()
    importance = collect_imatrix.collect(tiny.folder, harmed, ROWS[:1])
    assert "blk.1.attn_output.weight" not in importance
    assert "blk.0.attn_output.weight" in importance
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "no importance is known for the tensors attn_output.weight:" in record.getMessage()


def test_a_file_of_another_architecture_than_gguf_py_knows_is_refused_in_one_line(tiny: Made, monkeypatch):
    monkeypatch.setattr("gguf.MODEL_ARCH_NAMES", {})
    with refused("no-matching-layer", str(tiny.folder), "set quantize.imatrix to false"):
        collect_imatrix.collect(tiny.folder, tiny.gguf, ROWS[:1])


def test_a_matrix_is_read_as_it_was_written_and_unused_experts_count_alike(tmp_path):
    written = {
        "blk.0.a.weight": Importance(np.float32([[1, 2, 3]]), np.float32([2])),
        "blk.0.b_exps.weight": Importance(np.float32([[2, 4], [0, 0]]), np.float32([4, 0])),
    }
    imatrix_file.write_importance(written, tmp_path / "m.gguf", dataset="somewhere", rows=7)
    read = imatrix_file.read_importance(tmp_path / "m.gguf")
    assert read.keys() == written.keys()
    for name in read:
        np.testing.assert_array_equal(read[name].sums, written[name].sums)
        np.testing.assert_array_equal(read[name].counts, written[name].counts)
    assert read["blk.0.a.weight"].compute_means().tolist() == [0.5, 1, 1.5]
    assert read["blk.0.b_exps.weight"].compute_means().tolist() == [0.5, 1, 1, 1]
    metadata = describe_gguf(tmp_path / "m.gguf")["metadata"]
    assert metadata["general.type"] == "imatrix"
    assert metadata["imatrix.chunk_count"] == 7


def test_a_file_that_holds_no_matrix_is_refused(tiny: Made, tmp_path):
    with refused("no-such-file", "none.gguf: ", "run the stage imatrix"):
        imatrix_file.read_importance(tmp_path / "none.gguf")
    with refused("damaged-imatrix", f"{tiny.gguf}: ", "no sums with their counts"):
        imatrix_file.read_importance(tiny.gguf)
    (tmp_path / "text").write_text("no matrix at all, whatever its name")
    with refused("damaged-imatrix", "text: not an importance matrix"):
        imatrix_file.read_importance(tmp_path / "text")


def test_the_stage_takes_as_many_training_rows_as_asked_for_and_there_are(small_checkout):
    checkout = small_checkout
    for stage in ("fetch", "preprocess"):
        checkout.stage(stage)
    shutil.copytree(checkout.root / "models/base", checkout.root / "models/merged")
    (checkout.root / "models/gguf").mkdir()
    convert(checkout.root / "models/merged", checkout.root / "models/gguf/merged-f16.gguf")

    def run(**settings):
        checkout.set({"quantize.imatrix_rows": 8, "quantize.imatrix": True, "seed": 42, **settings})
        checkout.stage("imatrix")
        file = checkout.root / "models/imatrix/imatrix.gguf"
        return file.read_bytes() if file.exists() else None, checkout.json("metrics/imatrix.json")

    first, facts = run()
    assert facts["rows"] == 8
    assert facts["tensors"] == 7
    assert 8 * 10 < facts["tokens"] < 8 * 256
    rows = len((checkout.root / "data/processed/train.jsonl").read_text().splitlines())
    other, facts = run(**{"quantize.imatrix_rows": rows + 1})
    assert facts["rows"] == rows
    assert other != first
    nothing, facts = run(**{"quantize.imatrix": False})
    assert nothing is None
    assert list((checkout.root / "models/imatrix").iterdir()) == []
    assert json.dumps(facts) == '{"rows": 0, "tokens": 0, "tensors": 0}'
