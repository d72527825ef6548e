"""BERTScore with a small random encoder that the test makes, against its definition computed one pair at a time."""

import random
import shutil

import pytest
import torch
from encoders import LETTERS, make_encoder
from refusals import refused
from torchmetrics.functional.text.bert import bert_score as torchmetrics_bert_score
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2Model

from lathe.common.errors import InputError
from lathe.evaluation import bert_score

pytestmark = pytest.mark.heavy

CLS_AND_SEP = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def encoder(folder, num_layers=None, max_length=64):
    return bert_score.Encoder(folder, num_layers=num_layers, max_length=max_length)


def defined(folder, completion, reference, layer=-1, max_length=64):
    """BERTScore's F1 by its definition, of one pair, without batch or padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    units = []
    for text in (completion, reference):
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states[layer][0, 1:-1]
        units.append(states / states.norm(dim=-1, keepdim=True))
    similarity = units[0] @ units[1].T
    precision, recall = similarity.max(dim=1).values.mean(), similarity.max(dim=0).values.mean()
    return float(2 * precision * recall / (precision + recall))


def some_pairs(count=40):
    generator = random.Random(0)

    def text():
        return " ".join(
            "".join(generator.choices(LETTERS, k=generator.randint(1, 6))) for _ in range(generator.randint(1, 9))
        )

    references = [text() for _ in range(count // 2)]
    return [(text(), generator.choice(references)) for _ in range(count)]


def test_it_is_the_f1_of_tokens_matched_by_embedding(folder, tmp_path):
    pairs = some_pairs()
    scored = bert_score.compute_scores(pairs, encoder(folder), batch_size=7, cache=tmp_path)
    for pair in pairs:
        assert scored[pair] == pytest.approx(defined(folder, *pair), abs=2e-5)
    assert len({round(f1, 3) for f1 in scored.values()}) > 20


def test_it_does_not_depend_on_what_stands_in_the_same_batch(folder, tmp_path):
    pairs = some_pairs()
    by_size = [
        bert_score.compute_scores(pairs, encoder(folder), batch_size=size, cache=tmp_path / str(size))
        for size in (1, 2, 7, 64)
    ]
    for others in by_size[1:]:
        assert others == pytest.approx(by_size[0], abs=1.5e-5)
    backwards = bert_score.compute_scores(pairs[::-1], encoder(folder), batch_size=7, cache=tmp_path / "backwards")
    assert backwards == by_size[2]


def test_torchmetrics_gives_the_same_for_a_pair_and_mixes_up_several(folder, tmp_path):
    """Why pairs are put to it one by one: when this fails, it can be given batches."""
    pairs = [("a b c d e f", "a b c"), ("a", "b b b b b b b"), ("k l m", "k l m n"), ("x y", "z"), ("q", "q r s t u v")]
    ours = bert_score.compute_scores(pairs, encoder(folder), batch_size=8, cache=tmp_path)
    arguments = {"model_name_or_path": str(folder), "num_layers": 3, "max_length": 64, "truncation": True}
    for completion, reference in pairs:
        theirs = torchmetrics_bert_score([completion], [reference], **arguments)["f1"]
        assert ours[completion, reference] == pytest.approx(float(theirs), abs=2e-5)
    together = torchmetrics_bert_score(*map(list, zip(*pairs, strict=True)), **arguments)["f1"]
    assert together.tolist() != pytest.approx([ours[pair] for pair in pairs], abs=1e-3)


def test_the_layer_is_chosen_and_long_texts_are_cut(folder, tmp_path):
    pair = ("a b c d e f g h", "h g f e d c b a")
    of_layer = {
        layer: bert_score.compute_scores([pair], encoder(folder, layer), batch_size=1, cache=tmp_path)[pair]
        for layer in (1, 2, 3, None)
    }
    assert of_layer[None] == of_layer[3]
    assert len(set(of_layer.values())) == 3
    assert of_layer[1] == pytest.approx(defined(folder, *pair, layer=1), abs=2e-5)
    cut = bert_score.compute_scores([pair], encoder(folder, max_length=CLS_AND_SEP + 3), batch_size=1, cache=tmp_path)
    assert cut[pair] == pytest.approx(defined(folder, *pair, max_length=CLS_AND_SEP + 3), abs=2e-5)
    long = ("a " * 500, "b " * 500)
    assert 0 < bert_score.compute_scores([long], encoder(folder), batch_size=1, cache=tmp_path)[long] < 1


def test_equal_texts_score_1_and_no_text_0(folder, tmp_path):
    pairs = [("a b", "a b"), ("", ""), ("", "a"), ("a", ""), ("  ", "a"), ("\u200b", "a")]
    scored = bert_score.compute_scores(pairs, encoder(folder), batch_size=4, cache=tmp_path)
    assert [scored[pair] for pair in pairs] == [1, 1, 0, 0, 0, 0]


def test_a_second_run_computes_nothing_and_another_encoder_everything(folder, tmp_path, monkeypatch):
    pairs, first = some_pairs(), encoder(folder)
    scored = bert_score.compute_scores(pairs, first, batch_size=8, cache=tmp_path / "cache")

    def refuse(self):
        raise AssertionError("the encoder is loaded")

    monkeypatch.setattr(bert_score.Encoder, "load", refuse)
    assert bert_score.compute_scores(pairs, encoder(folder), batch_size=3, cache=tmp_path / "cache") == scored
    assert bert_score.compute_scores([("a", "a")], encoder(folder), batch_size=3, cache=tmp_path / "none") == {
        ("a", "a"): 1
    }
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert bert_score.compute_scores(pairs, encoder(moved), batch_size=8, cache=tmp_path / "cache") == scored
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(moved)
    for second in (encoder(moved), encoder(folder, num_layers=1), encoder(folder, max_length=8)):
        with pytest.raises(AssertionError, match="the encoder is loaded"):
            bert_score.compute_scores(pairs, second, batch_size=8, cache=tmp_path / "cache")


def test_an_interrupted_run_goes_on_with_the_batches_that_are_missing(folder, tmp_path, monkeypatch):
    pairs = some_pairs()
    embedded = []
    load = bert_score.Encoder.load

    def counting(self, until):
        embed = load(self)

        def embed_some(texts):
            if len(embedded) == until:
                raise KeyboardInterrupt
            embedded.append(texts)
            return embed(texts)

        return embed_some

    monkeypatch.setattr(bert_score.Encoder, "load", lambda self: counting(self, 6))
    with pytest.raises(KeyboardInterrupt):
        bert_score.compute_scores(pairs, encoder(folder), batch_size=4, cache=tmp_path)
    monkeypatch.setattr(bert_score.Encoder, "load", lambda self: counting(self, None))
    embedded.clear()
    scored = bert_score.compute_scores(pairs, encoder(folder), batch_size=4, cache=tmp_path)
    resumed = len(embedded)
    embedded.clear()
    assert scored == bert_score.compute_scores(pairs, encoder(folder), batch_size=4, cache=tmp_path / "anew")
    assert 0 < resumed < len(embedded)


def test_pairs_that_share_texts_embed_them_once_per_batch(folder, tmp_path, monkeypatch):
    embedded = []
    load = bert_score.Encoder.load
    monkeypatch.setattr(
        bert_score.Encoder, "load", lambda self: lambda texts: (embedded.extend(texts), load(self)(texts))[1]
    )
    bert_score.compute_scores([("a", "z"), ("b", "z"), ("c", "z")] * 5, encoder(folder), batch_size=16, cache=tmp_path)
    assert sorted(embedded) == ["a", "b", "c", "z"]


def test_an_encoder_without_cls_and_sep_has_all_its_tokens_matched(folder, tmp_path):
    """torchmetrics alone would leave out the first and the last word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, **{letter: 1 + i for i, letter in enumerate(LETTERS)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>").save_pretrained(tmp_path)
    GPT2Model(GPT2Config(vocab_size=27, n_positions=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    embed = encoder(tmp_path).load()
    assert [len(states) for states in embed(["a b c", "a", "b c d e f"])] == [3, 1, 5]
    scored = bert_score.compute_scores(
        [("a", "b"), ("a b", "b a")], encoder(tmp_path), batch_size=2, cache=tmp_path / "cache"
    )
    assert all(-1 <= f1 < 1 and f1 != 0 for f1 in scored.values())


def test_rescaling_puts_unrelated_texts_at_0_and_equal_ones_at_1():
    assert bert_score.rescale(0.85, 0.85) == 0
    assert bert_score.rescale(1.0, 0.85) == 1
    assert bert_score.rescale(0.925, 0.85) == pytest.approx(0.5)


def test_shuffled_pairs_are_of_different_references_and_the_same_for_a_seed():
    references = [f"text {number % 5}" for number in range(50)]
    pairs = bert_score.draw_unrelated_pairs(references, 1)
    assert len(pairs) > 500
    assert all(first != second for first, second in pairs)
    assert pairs == bert_score.draw_unrelated_pairs(references, 1)
    with refused("equal-references", "bert_score.baseline is shuffled"):
        bert_score.draw_unrelated_pairs(["yes"] * 9, 1)


def test_a_file_of_bert_scores_gives_the_baseline_of_its_layer(tmp_path):
    file = tmp_path / "baseline.tsv"
    file.write_text("LAYER,P,R,F\n0,0.1,0.2,0.3\n1,0.4,0.5,0.6\n")
    assert bert_score.read_baseline(file, 1) == 0.6
    with refused("missing-layer", "baseline.tsv", "layer 2", "bert_score.num_layers"):
        bert_score.read_baseline(file, 2)
    file.write_text("nothing of the kind\nat all\n")
    with refused("invalid-baseline", "baseline.tsv", "LAYER,P,R,F"):
        bert_score.read_baseline(file, 1)
    with refused("missing-file", "bert_score.baseline: ", "none: "):
        bert_score.read_baseline(tmp_path / "none", 1)


def test_what_does_not_fit_the_encoder_is_refused(folder, tmp_path):
    with refused("too-many-layers", "bert_score.num_layers is 4", "has 3"):
        encoder(folder, num_layers=4)
    with refused("max-length-too-long", "bert_score.max_length is 512", "takes 64 tokens"):
        encoder(folder, max_length=512).load()
    (tmp_path / "config.json").write_text("{}")
    with refused("invalid-encoder", "bert_score.model: ", kept=False) as caught:
        encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_are_read_from_safetensors_alone(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    model = BertModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        encoder(tmp_path).load()
