"""The model card says what the stages measured, in a form that the hub reads."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import changed
from toy import load_toy

from lathe.config import params
from lathe.reports.model_card import CardFacts, read_license, render_model_card

COMMIT = "6b2f" * 10


def measured(exact_match: float, size: int, kl: float | None) -> dict[str, Any]:
    return {
        "exact_match": exact_match,
        "perplexity": 1.2345,
        "kl": kl,
        "bytes": size,
        "intervals": [{"metric": "exact_match", "low": exact_match - 0.02, "high": exact_match + 0.01}],
    }


REPORT = {
    "base": measured(0.1, 4_000_000, None),
    "merged": measured(0.9, 4_000_000, None),
    "Q8_0": measured(0.9, 2_000_000, 0.00012),
    "Q2_K": measured(0.5, 1_000_000, 0.2),
}
COUNTS = {"kept": 1200, "scripts": {"Latin": 1000, "Cyrillic": 200}, "supervised_tokens": 34567}
FACTS = CardFacts(
    model={"name": "qwen3-600m", "source": "hub", "id": "Qwen/Qwen3-0.6B", "revision": "main", "commit": COMMIT},
    dataset={"name": "gsm8k", "source": "hub", "id": "openai/gsm8k", "commit": COMMIT},
    rows={
        "rows": {"read": 3700, "kept": 3600, "dropped": 100},
        "splits": [{"split": name, **COUNTS} for name in ("train", "validation", "test")],
    },
    validation=REPORT,
    test=REPORT,
    quantized={"Q8_0": {"bits_per_weight": 8.5}, "Q2_K": {"bits_per_weight": 2.9}},
    lineage={
        "version": "0.1.0",
        "base.digest": "b1.dir",
        "dataset.digest": "d2.dir",
        "adapter.digest": "a3.dir",
        "parameters.digest": "p4",
    },
    license={"license": "apache-2.0"},
    tasks={},
    n_ctx=2048,
)
TASK_SCORES = {"documents": 40, "bytes": 1, "lower_is_better": [], "acc": 0.75}
TASKS = {
    "mmlu": {
        "base": {**TASK_SCORES, "intervals": [{"metric": "acc", "low": 0.6, "high": 0.85}], "deltas": []},
        "Q8_0": {
            **TASK_SCORES,
            "acc": 0.7,
            "intervals": [],
            "deltas": [
                {"to": "base", "metric": "acc", "delta": -0.05, "low": -0.1, "high": 0.01},
                {"to": "merged", "metric": "acc", "delta": 0.0, "low": 0.0, "high": 0.0},
            ],
        },
    }
}


@pytest.fixture
def chosen() -> params.Params:
    return changed(load_toy().params, {"evaluate.metrics": ["exact_match"], "generate.max_rows": None})


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_front_matter_names_base_data_and_licence_as_the_hub_reads_them(chosen):
    front = front_matter(render_model_card(FACTS, chosen, "Q8_0"))
    assert front["base_model"] == "Qwen/Qwen3-0.6B"
    assert front["base_model_relation"] == "quantized"
    assert front["datasets"] == ["openai/gsm8k"]
    assert front["license"] == "apache-2.0"
    assert {"gguf", "lathe", "sft", "qlora"} <= set(front["tags"])


def test_a_base_that_is_not_on_the_hub_has_no_name_there_and_a_missing_licence_is_said(chosen):
    facts = dataclasses.replace(FACTS, model={"name": "mine", "source": "local"}, license={})
    card = render_model_card(facts, chosen, "Q8_0")
    assert "base_model" not in front_matter(card)
    assert "license" not in front_matter(card)
    assert "No licence of the base model is known" in card


def test_every_file_has_its_size_score_interval_and_divergence(chosen):
    lines = render_model_card(FACTS, chosen, "Q8_0").splitlines()
    header = "| file | size | bits per weight | exact_match | perplexity | KL to f16 |"
    table = lines[lines.index(header) : lines.index(header) + 6]
    assert table[2:] == [
        "| (base) | 4.00 MB | 16 | 0.1 (0.08 – 0.11) | 1.234 | – |",
        "| (merged) | 4.00 MB | 16 | 0.9 (0.88 – 0.91) | 1.234 | – |",
        "| `Q8_0.gguf` | 2.00 MB | 8.50 | 0.9 (0.88 – 0.91) | 1.234 | 0.00012 |",
        "| `Q2_K.gguf` | 1.00 MB | 2.90 | 0.5 (0.48 – 0.51) | 1.234 | 0.2 |",
    ]


def test_it_names_the_engines_that_answered_where_one_is_not_llama_cpp(chosen):
    plain = render_model_card(FACTS, chosen, "Q8_0")
    assert "Answers of" not in plain
    marked = {
        name: {**scores, **({"engine": "vllm"} if name in ("base", "merged") else {})}
        for name, scores in REPORT.items()
    }
    lines = render_model_card(dataclasses.replace(FACTS, test=marked), chosen, "Q8_0").splitlines()
    [line] = [line for line in lines if line.startswith("Answers of")]
    by = "`base` are by vllm; of `merged` are by vllm; of the others by llama.cpp, in process"
    assert (
        line == f"Answers of {by}. Perplexity and KL divergence are by llama.cpp for `base`, `merged` and every GGUF."
    )
    lines.remove(line)
    assert "\n".join(lines) + "\n" == plain


def test_it_says_how_to_run_the_best_file_and_where_it_comes_from(chosen):
    card = render_model_card(FACTS, chosen, "Q8_0")
    assert "llama-cli -m Q8_0.gguf" in card
    assert f"Qwen/Qwen3-0.6B, commit {COMMIT}, digest b1.dir" in card
    for digest in ("d2.dir", "a3.dir", "p4"):
        assert digest in card
    assert "1,200 rows for training" in card
    assert "in Latin and Cyrillic script" in card


def test_rows_that_were_not_answered_are_not_counted_as_scored(chosen):
    assert "Scores of 1,200 held-out rows" in render_model_card(FACTS, chosen, "Q8_0")
    assert "Scores of 7 held-out rows" in render_model_card(FACTS, changed(chosen, {"generate.max_rows": 7}), "Q8_0")


@pytest.mark.parametrize(
    ("method", "length"),
    [("dpo", "1 supervised epochs, then 2 epochs of pairs"), ("grpo", "1.25 supervised epochs, then 100 steps")],
)
def test_a_method_with_two_phases_is_told_as_two(chosen, method, length):
    card = render_model_card(FACTS, changed(chosen, {"method": method, "lora.target_modules": r".*(q|v)_proj"}), "Q8_0")
    assert f"| length | {length} |" in card
    assert r"| target_modules | .*(q\|v)_proj |" in card


def test_it_holds_no_secret_and_no_path_of_this_machine(chosen, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "LATHE_API_KEY"):
        monkeypatch.setenv(name, "secret-of-the-environment")
    card = render_model_card(FACTS, changed(chosen, {"judge.base_url": "https://user:secret@judge.invalid"}), "Q8_0")
    assert "secret" not in card
    assert os.getcwd() not in card


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"README.md": "---\nlicense: mit\n---\n# A model"}, {"license": "mit"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\ntags: [a]\n---\n"},
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ({"README.md": "# no front matter", "LICENSE.txt": "…"}, {"license": "other"}),
        ({"README.md": "---\n[not: closed\n---\n", "LICENSE": "…"}, {"license": "other"}),
    ],
)
def test_the_licence_is_what_the_model_s_own_card_says(tmp_path: Path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_license(tmp_path) == expected


def test_tasks_are_shown_with_their_difference_to_the_base(chosen):
    lines = render_model_card(dataclasses.replace(FACTS, tasks=TASKS), chosen, "Q8_0").splitlines()
    table = lines[lines.index("### mmlu (40 documents)") + 2 :][:5]
    assert table == [
        "| file | acc | difference |",
        "| --- | ---: | ---: |",
        "| (base) | 0.75 (0.6 – 0.85) | – |",
        "| `Q8_0.gguf` | 0.7 | -0.05 (-0.1 – 0.01) |",
        "",
    ]
    assert any("it was measured on the tasks above and on nothing else" in line for line in lines)
    assert "## Tasks" not in render_model_card(FACTS, chosen, "Q8_0")
