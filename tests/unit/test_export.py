"""Export: what params.yaml may ask, the commands that are run, and an exported model measured as a GGUF is."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import changed
from huggingface_hub import ModelCardData
from refusals import refused
from test_card import FACTS, REPORT
from toy import load_toy

from lathe.common.code_closure import module_file
from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.config import params
from lathe.config.export_params import COMPRESSED, FORMATS, list_gguf_types, remove_unlisted_formats
from lathe.config.load import refuse_problems, validate_tree
from lathe.evaluation.summary import summarize
from lathe.export import compress, convert, environments
from lathe.export.runtime import RuntimeCache, compare_token_ids, mark_answers
from lathe.export.weights import count_bits_per_weight
from lathe.inference.kv_cache import N_BATCH
from lathe.needs import disk_space
from lathe.needs.later_stages import list_checks
from lathe.publishing import format_card
from lathe.reports.model_card import render_model_card

TOY = load_toy().params


def choose(formats: list[str], **changes: Any) -> params.Params:
    tree = TOY.model_dump()
    tree["export"] |= {"formats": formats, **changes}
    return params.Params.model_validate(tree)


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        (["onxn"], "'onxn' is no format; did you mean 'onnx'"),
        (["gguf"], "'gguf' is no format"),
        (["mlx", "mlx"], "lists 'mlx' twice"),
        (["../merged"], "is no format"),
    ],
)
def test_formats_that_are_none_are_refused_before_anything_runs(formats, said):
    tree = TOY.model_dump()
    tree["export"]["formats"] = formats
    with refused("invalid-value", "export.formats", said, kept=False):
        refuse_problems(validate_tree(params.Params, tree, "params.yaml"))


def test_a_gate_may_name_a_format_that_is_made_and_no_other():
    tree = choose(["onnx"]).model_dump()
    tree["evaluate"]["gates"] = ["onnx.exact_match >= merged.exact_match - 0.01", "onnx.kl < 0.01"]
    assert params.Params.model_validate(tree).export.formats == ["onnx"]
    tree["evaluate"]["gates"] = ["mlx.exact_match > 0"]
    with pytest.raises(ValueError, match="names mlx, which is no artifact"):
        params.Params.model_validate(tree)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_made_by_the_program_of_its_runtime(name, tmp_path):
    command = convert.build_command(
        name,
        Path("/env/python"),
        Path("/m/merged"),
        tmp_path / "made",
        scratch=tmp_path,
        calibration=tmp_path / "rows.json",
    )
    made = str(tmp_path / "made")
    builder = (
        f"-m onnxruntime_genai.models.builder --input /m/merged --output {made} --precision {{}} "
        f"--execution_provider cpu --cache_dir {tmp_path}/cache --extra_options hf_token=false"
    )
    mlx = f"-m mlx_lm convert --hf-path /m/merged --mlx-path {made}"
    wanted = {
        "onnx": builder.format("fp32"),
        "onnx_int4": builder.format("int4"),
        "mlx": mlx,
        "mlx_4bit": f"{mlx} --quantize --q-bits 4 --q-group-size 64",
        "fp8": f"-m lathe.export.compress fp8 /m/merged {made} {tmp_path}/rows.json",
        "awq": f"-m lathe.export.compress awq /m/merged {made} {tmp_path}/rows.json",
    }
    assert shlex.join(command) == f"/env/python {wanted[name]}"


@pytest.mark.parametrize(("columns", "size"), [([4096, 14336], 128), ([576, 1536], 64), ([256, 96], 32)])
def test_awq_takes_the_largest_groups_that_the_weights_divide_into(columns, size):
    assert compress.choose_group_size(columns) == size


def test_awq_of_weights_that_divide_into_no_groups_is_refused():
    with pytest.raises(SystemExit, match="rows of 100 weights divide into no groups of 32"):
        compress.choose_group_size([256, 100])


def test_calibration_rows_are_joined_to_blocks_and_none_is_cut():
    rows = [[1] * 200, [2] * 200, [3] * 200, [4] * 600, [5]]
    blocks = compress.join_rows(rows)
    assert [len(block) for block in blocks] == [400, 200, 600, 1]
    assert [token for block in blocks for token in block] == [token for row in rows for token in row]
    assert rows[0] == [1] * 200


def test_what_runs_in_another_environment_imports_nothing_of_lathe():
    for module in ("compress", "runtime_process"):
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import lathe.export." + module + "\n"
            "print(sorted(name for name in sys.modules if name.startswith('lathe')))"
        )
        source = module_file("lathe.export.compress").parents[2]
        done = subprocess.run(
            [sys.executable, "-c", program, source], capture_output=True, text=True, check=True, env={}
        )
        assert done.stdout == f"['lathe', 'lathe.export', 'lathe.export.{module}']\n"


def test_programs_of_formats_are_given_no_key():
    given = {"PATH": "/bin", "OMP_NUM_THREADS": "2", "HF_TOKEN": "hf_x", "OPENAI_API_KEY": "sk-x", "AWS_PROFILE": "a"}
    kept = environments.choose_environment(given)
    assert kept["OMP_NUM_THREADS"] == "2"
    assert kept["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_TOKEN", "OPENAI_API_KEY", "AWS_PROFILE"} & set(kept)


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_missing_environment_is_said_before_the_training(name, tmp_path):
    chosen = choose([name], llmcompressor_python="nowhere/python")
    check = list_checks(chosen, tmp_path, {})[-1]
    with refused("no-llmcompressor", "export.llmcompressor_python is nowhere/python", "make llmcompressor"):
        list(check())


def test_a_missing_package_is_said_before_the_training(monkeypatch, tmp_path):
    monkeypatch.setitem(environments.PACKAGES, "onnx", ("no-such-runtime", "numpy"))
    check = list_checks(choose(["onnx"]), tmp_path, {})[-1]
    with refused("missing-extra", "no-such-runtime is not installed", "make setup EXTRAS=export", kept=False):
        list(check())
    monkeypatch.setitem(environments.PACKAGES, "onnx", ("numpy",))
    assert environments.read_versions("onnx", Path(sys.executable)) == {"numpy": np.__version__}


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxruntime_genai"), ("mlx", "mlx_lm")])
def test_a_base_that_the_runtime_does_not_know_is_said_before_the_training(name, package, tmp_path):
    pytest.importorskip(package, reason="`make setup EXTRAS=export` installs what the format is made with")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check = list_checks(choose([name]), tmp_path, {})[-1]
    assert list(check()) == []
    config = {"architectures": ["OddForCausalLM"], "model_type": "odd"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused("unsupported-architecture", f"export.formats lists {name}", "exports no"):
        list(check())


def test_formats_that_are_no_longer_listed_are_removed_and_nothing_else(tmp_path):
    for name in ("onnx", "mlx", "base", "Q8_0"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").write_text("{}")
    remove_unlisted_formats(tmp_path, ["mlx"])
    assert {file.name for file in tmp_path.iterdir()} == {
        *("mlx", "base", "Q8_0"),
        *("mlx.json", "base.json", "Q8_0.json"),
    }


def test_bits_per_weight_are_those_of_the_merged_weights(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, dtype in (("merged", torch.bfloat16), ("fp8", torch.int8)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1000, 1000, dtype=dtype)}, tmp_path / name / "model.safetensors")
    (tmp_path / "fp8/tokenizer.json").write_text("x" * 100_000)
    assert count_bits_per_weight(tmp_path / "fp8", tmp_path / "merged") == pytest.approx(8, abs=0.01)
    assert count_bits_per_weight(tmp_path / "merged", tmp_path / "merged") == pytest.approx(16, abs=0.01)


class Recorder:
    """In place of a runtime's process: the last logit of a row is the number of tokens that were read before it."""

    def __init__(self, *, can_forget_a_part: bool) -> None:
        self.name, self.can_forget_a_part = "onnx", can_forget_a_part
        self.tokens: list[int] = []
        self.asked: list[tuple[int, int, int]] = []

    def read(self, keep: int, tokens: Any, outputs: int) -> Any:
        assert keep <= len(self.tokens)
        self.asked.append((keep, len(tokens), outputs))
        self.tokens = [*self.tokens[:keep], *tokens]
        ends = np.arange(len(self.tokens) - outputs, len(self.tokens)) + 1
        return np.stack([np.zeros(outputs), ends], axis=1).astype(np.float32)


def make_cache(*, can_forget_a_part: bool = True, max_outputs: int = 4) -> tuple[Any, Recorder]:
    process: Any = Recorder(can_forget_a_part=can_forget_a_part)
    return RuntimeCache(process, 2, max_outputs=max_outputs), process


def test_a_sequence_is_read_in_the_pieces_that_llama_cpp_gives_its_logits_in():
    cache, process = make_cache()
    tokens = list(range(10))
    pieces = []
    while cache.length(0) < len(tokens):
        pieces.append(cache.feed(0, tokens, first_output=3)[:, 1].tolist())
    assert pieces == [[4, 5, 6, 7], [8, 9, 10]]
    assert process.asked == [(0, 7, 4), (7, 3, 3)]
    long, _ = make_cache()
    assert len(long.feed(0, range(N_BATCH + 5), first_output=N_BATCH + 5)) == 0
    assert long.length(0) == N_BATCH


def test_an_answer_goes_on_from_its_prompt_and_the_next_prompt_from_what_both_share():
    cache, process = make_cache()
    logits = cache.feed_to_end({0: [1, 2, 3]})
    assert logits[:, 1].tolist() == [3]
    assert cache.step([9])[:, 1].tolist() == [4]
    cache.cut(0, 2)
    assert cache.feed_to_end({0: [1, 2, 7, 8]})[:, 1].tolist() == [4]
    assert process.asked[-1] == (2, 2, 1)
    assert process.tokens == [1, 2, 7, 8]


def test_a_model_that_cannot_forget_a_part_reads_all_again():
    cache, process = make_cache(can_forget_a_part=False)
    cache.feed_to_end({0: [1, 2, 3]})
    cache.cut(0, 3)
    assert cache.length(0) == 3
    cache.cut(0, 2)
    assert cache.length(0) == 0
    cache.feed_to_end({0: [1, 2, 4]})
    assert process.asked[-1] == (0, 3, 1)


def test_logits_of_another_vocabulary_are_refused():
    process: Any = Recorder(can_forget_a_part=True)
    with refused("other-vocabulary", "logits of 2 tokens", "has 3"):
        RuntimeCache(process, 3, max_outputs=4).step([1])


def test_an_answer_is_marked_with_its_runtime_and_a_document_is_not(tmp_path):
    file = tmp_path / "test.jsonl"
    write_jsonl([{"finish_reason": "stop"}, {"finish_reason": None}], file)
    mark_answers(file, "mlx-lm 1")
    assert read_jsonl(file) == [{"finish_reason": "stop", "engine": "mlx-lm 1"}, {"finish_reason": None}]


class Words:
    """In place of a generator and its runtime's process: each letter is a token, for the runtime each word is."""

    def __init__(self, *, bos: int | None, said: Any = None) -> None:
        self.name, self.said, self.bos = "onnx", said, bos
        self.process: Any = SimpleNamespace(name="onnx", tokenize=lambda text: said or list(map(len, text.split())))
        self.model: Any = SimpleNamespace(bos=bos)

    def tokenize(self, text: str) -> list[int]:
        first = [] if self.bos is None else [self.bos]
        return [*first, *(len(letter) for letter in text if letter != " ")]


@pytest.mark.parametrize("bos", [None, 7])
def test_rows_that_the_runtime_reads_as_other_tokens_are_counted_and_one_is_named(caplog, bos):
    words: Any = Words(bos=bos)
    assert compare_token_ids(words, ["a b", "a b c"]) == {"rows": 2, "differing": 0}
    assert caplog.text == ""
    assert compare_token_ids(words, ["a b", "two words", "a"]) == {"rows": 3, "differing": 1}
    assert "reads 1 of 3 held-out rows as other tokens than in training" in caplog.text
    assert "'two words'" in caplog.text


def test_a_runtime_without_a_tokenizer_of_the_model_is_said(caplog):
    words: Any = Words(bos=None, said="RuntimeError: no such tokenizer")
    found = compare_token_ids(words, ["a", "b"])
    assert found == {"rows": 0, "differing": 0, "reason": "RuntimeError: no such tokenizer"}
    assert "cannot tokenize with the files in models/exported/onnx" in caplog.text


def test_the_disk_that_a_format_takes_is_known_before_the_training():
    assert set(disk_space.SHARES) == set(FORMATS)


def test_the_best_file_is_a_gguf_whatever_a_format_scores():
    report = {**REPORT, "onnx": {**REPORT["Q8_0"], "exact_match": 1.0, "kl": 1e-6}}
    assert list_gguf_types(report) == ["Q8_0", "Q2_K"]
    summary = summarize(report, list_gguf_types(report), "exact_match", passed=True)
    assert summary["best"]["file"] == "Q8_0"
    assert summary["exact_match"]["onnx"] == 1.0
    assert summary["kl"] == {"Q8_0": 0.00012, "Q2_K": 0.2, "onnx": 1e-6}


def test_the_card_has_a_format_with_its_size_score_divergence_and_runtime():
    report = {**REPORT, "mlx_4bit": {**REPORT["Q8_0"], "kl": 0.02, "engine": "mlx-lm 0.32.2"}}
    facts = dataclasses.replace(
        FACTS, test=report, validation=report, quantized={**FACTS.quantized, "mlx_4bit": {"bits_per_weight": 4.5}}
    )
    chosen = changed(TOY, {"evaluate.metrics": ["exact_match"], "generate.max_rows": None})
    card = render_model_card(facts, chosen, "Q8_0")
    assert "| `mlx_4bit/` | 2.00 MB | 4.50 | 0.9 (0.88 – 0.91) | 1.234 | 0.02 |" in card
    assert "Answers of `mlx_4bit` are by mlx-lm 0.32.2; of the others by llama.cpp, in process." in card


def test_the_card_of_a_release_without_a_gguf_says_how_its_runtime_is_used():
    chosen = changed(TOY, {"evaluate.metrics": ["exact_match"], "generate.max_rows": None})
    card = render_model_card(FACTS, chosen, "Q8_0")
    section = format_card.describe_formats({"fp8": format_card.TOP}, ["fp8"], "me/small-fp8")
    text = format_card.replace_use(card, section)
    assert "vllm serve me/small-fp8" in text
    assert "llama-cli" not in text
    assert "Modelfile" not in text
    assert "## Training" in text
    assert "## Files" in text
    data = ModelCardData(tags=["gguf", "llama.cpp", "lathe", "sft"])
    format_card.set_metadata(data, ["fp8"])
    assert data.library_name == "transformers"
    assert data.tags == ["fp8", "transformers", "lathe", "sft"]


def test_a_format_beside_gguf_files_is_used_from_its_folder():
    section = format_card.describe_formats({"onnx": "onnx/", "mlx": "mlx/"}, ["onnx", "mlx"], "me/small")
    assert "hf download me/small --local-dir model --include 'onnx/*'" in section
    assert "og.Model('model/onnx')" in section
    assert "mlx_lm.chat --model model/mlx" in section
