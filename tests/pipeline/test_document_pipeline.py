"""Continued pretraining on documents: the whole pipeline, measured by perplexity where nothing is answered."""

import json
import re

import pytest
from conftest import Checkout
from ruamel.yaml import YAML

from lathe.common.jsonl import read_jsonl

SETTINGS = {
    "dataset": "texts",
    "sft.packing": True,
    "training.max_length": 64,
    "training.max_steps": 12,
    "training.eval_steps": 6,
    "evaluate.primary_metric": "perplexity",
    "evaluate.gates": ["merged.perplexity < base.perplexity", "quantized.kl < 5"],
    "quantize.types": ["Q8_0"],
    "quantize.imatrix_rows": 4,
    "generate.n_ctx": "auto",
}
COLOURS, ROOMS = ("red", "green", "blue", "white"), ("attic", "kitchen", "hall", "garage", "office")
TEXTS = [
    f"The lamp of the {room} is {colour}.\n"
    + f"Whoever enters the {room} sees a {colour} light at once. " * (1 + number % 4)
    for number, (room, colour) in enumerate((room, colour) for room in ROOMS for colour in COLOURS)
]


def select_texts(checkout: Checkout) -> None:
    folder = checkout.root / "data/local/texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_text(text)
    presets = checkout.root / "presets.yaml"
    tree = YAML().load(presets)
    tree["datasets"]["texts"] = {"source": "local", "path": "data/local/texts", "format": "text"}
    YAML().dump(tree, presets)
    checkout.run("dvc", "add", "--quiet", "data/local/texts")
    checkout.set(SETTINGS)
    checkout.commit()


def test_documents_go_through_every_stage_and_their_perplexity_falls(small_checkout: Checkout):
    checkout = small_checkout
    select_texts(checkout)
    checkout.run("dvc", "repro")
    assert checkout.json("metrics/fetch/dataset.json")["origin"][0]["files"] == len(TEXTS)
    for split in ("validation", "test"):
        report = checkout.json(f"metrics/evaluate/{split}.json")
        base, merged, quantized = (report[name] for name in ("base", "merged", "Q8_0"))
        assert merged["perplexity"] < 0.8 * base["perplexity"]
        assert quantized["perplexity"] == pytest.approx(merged["perplexity"], rel=0.1)
        assert quantized["kl"] > 0
        intervals = {interval["metric"]: interval for interval in merged["intervals"]}
        assert intervals["perplexity"]["low"] <= merged["perplexity"] <= intervals["perplexity"]["high"]
        for score in ("exact_match", "json_fields", "rouge_l", "stop_rate"):
            assert base[score] is merged[score] is quantized[score] is None
        assert report["base_few_shot"]["perplexity"] == base["perplexity"]
    assert checkout.json("metrics/evaluate/gates.json")["passed"] is True
    summary = json.loads((checkout.root / "metrics/evaluate/summary.json").read_text())
    assert summary["best"]["file"] == "Q8_0"
    rows = read_jsonl(checkout.root / "data/generated/merged/validation.jsonl")
    assert {(row["prompt"], row["completion"], row["finish_reason"]) for row in rows} == {("", "", None)}
    curve = (checkout.root / "metrics/train/plots/metrics/eval/loss.tsv").read_text().splitlines()[1:]
    losses = [float(line.split("\t")[1]) for line in curve]
    assert losses[-1] < losses[0]
    lathe = ("python3", "-m", "lathe")
    shown = checkout.run(*lathe, "inspect", "--rows", "1", env={"PYTHONPATH": str(checkout.root / "src")}).stdout
    assert "«The lamp of the" in shown
    checkout.run(*lathe, "report", "--out", "page.html", env={"PYTHONPATH": str(checkout.root / "src")})
    gates = checkout.run(*lathe, "gate", env={"PYTHONPATH": str(checkout.root / "src")}).stdout
    assert "merged.perplexity < base.perplexity" in gates


def test_a_score_of_answers_is_refused_before_the_training(small_checkout: Checkout):
    select_texts(small_checkout)
    small_checkout.set({"evaluate.primary_metric": "exact_match", "evaluate.gates": None})
    done = small_checkout.run("dvc", "repro", "train", check=False)
    assert done.returncode != 0
    message = done.stdout + done.stderr
    assert "all held-out rows are documents (format text)" in message
    assert "evaluate.primary_metric needs exact_match" in message
    assert not (small_checkout.root / "models/adapter").exists()


def test_a_mixture_is_fetched_mixed_and_scored_dataset_by_dataset(small_checkout: Checkout):
    from lathe.gguf.description import describe_gguf

    checkout = small_checkout
    select_texts(checkout)
    presets = checkout.root / "presets.yaml"
    tree = YAML().load(presets)
    few = dict(tree["datasets"]["few"])
    texts = dict(tree["datasets"]["texts"])
    tree["datasets"]["mixed"] = {
        "source": "mixture",
        "datasets": {"few": {**few, "weight": 0.8}, "texts": {**texts, "weight": 0.2}},
    }
    YAML().dump(tree, presets)
    primary = {"evaluate.primary_metric": "exact_match", "evaluate.gates": None, "generate.max_rows": None}
    checkout.set({"dataset": "mixed", "training.max_length": 256, "training.max_steps": 4, **primary})
    checkout.commit()
    checkout.run("dvc", "repro")

    [origin] = json.loads((checkout.root / "metrics/fetch/dataset.json").read_text())["origin"]
    assert [(part["name"], part["source"]) for part in origin["datasets"]] == [("few", "local"), ("texts", "local")]
    listed = json.loads((checkout.root / "metrics/local_files/dataset.json").read_text())["files"]
    assert len(listed) == 1 + len(TEXTS)
    report = json.loads((checkout.root / "metrics/preprocess/report.json").read_text())
    shares = {part["dataset"]: part["share_of_train"] for part in report["datasets"]}
    assert shares["texts"] == pytest.approx(0.2, abs=0.02)
    by_dataset = checkout.json("metrics/evaluate/datasets.json")
    scores = by_dataset["validation"]
    assert set(scores) == {"few", "texts"}
    assert scores["few"]["merged"]["exact_match"] is not None
    assert scores["texts"]["merged"]["exact_match"] is None
    assert scores["texts"]["merged"]["perplexity"] > 1
    whole = checkout.json("metrics/evaluate/validation.json")
    assert whole["merged"]["exact_match"] == scores["few"]["merged"]["exact_match"]
    keys = describe_gguf(checkout.root / "models/gguf/Q8_0.gguf")["metadata"]
    assert keys["lathe.dataset.texts.source"] == "local"
    assert keys["lathe.dataset.few.sha256"] == origin["datasets"][0]["sha256"]
    card = (checkout.root / "models/gguf/README.md").read_text()
    assert "`few` (local)" in card

    # What is not in the mixture re-runs nothing but the look at the files; a part's own key does.
    tree = YAML().load(presets)
    tree["datasets"]["few"]["limits"] = {"train": 9}
    YAML().dump(tree, presets)
    looked = {"local_files@dataset", "local_files@model"}
    assert set(re.findall("Running stage '(.*)'", checkout.run("dvc", "repro", "preprocess").stdout)) == looked
    tree["datasets"]["mixed"]["datasets"]["texts"]["rows"] = 3
    del tree["datasets"]["mixed"]["datasets"]["texts"]["weight"], tree["datasets"]["mixed"]["datasets"]["few"]["weight"]
    YAML().dump(tree, presets)
    assert "Running stage 'preprocess'" in checkout.run("dvc", "repro", "preprocess").stdout
    report = json.loads((checkout.root / "metrics/preprocess/report.json").read_text())
    assert {part["dataset"]: part["train"] for part in report["datasets"]}["texts"] == 3
