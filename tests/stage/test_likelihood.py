# ruff: noqa: F811 - fixtures are imported, then named as arguments
import itertools
import math

import pytest
from gguf_models import Made, convert, countdown, learnt, make_llama, qwen, tiny  # noqa: F401 - fixtures
from refusals import refused

from lathe.gguf.quantize import quantize
from lathe.inference import generate, likelihood
from lathe.inference.generate import Generator
from lathe.models.answer_split import split_answer
from lathe.sources.builtin import household_commands

END = 4  # `<|im_end|>`


def open_generator(path, n_parallel=8, n_ctx=512, threads=1):
    return Generator(path, n_parallel=n_parallel, n_ctx=n_ctx, threads=threads)


def requests(generator, count):
    """What the household commands ask, and what is to be answered, as the model's template writes them."""
    rows = household_commands.make_rows(1)["validation"][:count]
    return [split_answer(generator.chat_template, row["messages"])[:2] for row in rows]


def score_references(generator, pairs, **options):
    return [likely for _, likely in sorted(likelihood.score_references(generator, lambda: pairs, **options))]


def total(likelihoods):
    return sum(each.nll for each in likelihoods), sum(each.tokens for each in likelihoods)


@pytest.mark.parametrize("made", ["learnt", "tiny", "qwen"])
def test_the_perplexity_of_the_f16_file_is_that_of_transformers(made, request):
    import torch
    from transformers import AutoModelForCausalLM

    made = request.getfixturevalue(made)
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    expected, count = 0.0, 0
    with open_generator(made.gguf) as generator:
        pairs = requests(generator, 12)
        for prompt, reference in pairs:
            begin = len(generator.tokenize(prompt))
            tokens = torch.tensor([[*generator.tokenize(prompt + reference), generator.model.eos]])
            with torch.no_grad():
                logits = model(tokens).logits[0, begin - 1 : -1]
            expected += float(torch.nn.functional.cross_entropy(logits, tokens[0, begin:], reduction="sum"))
            count += tokens.shape[1] - begin
        nll, scored = total(score_references(generator, pairs))
    assert scored == count > 100
    assert math.exp(nll / scored) == pytest.approx(math.exp(expected / count), rel=5e-3)


def test_a_file_does_not_diverge_from_itself_and_the_more_from_it_the_fewer_bits_are_left(learnt: Made, tmp_path):
    divergences = [0.0]
    with open_generator(learnt.gguf) as original:
        pairs = requests(original, 12)
        same = score_references(original, pairs, against=original)
        assert {each.kl for each in same} == {0.0}
        assert same == score_references(original, pairs, against=original)
        for quant in ("Q8_0", "Q4_K_M", "Q2_K"):
            path = tmp_path / f"{quant}.gguf"
            quantize(learnt.gguf, path, type=quant, threads=2)
            with open_generator(path) as generator:
                rows = score_references(generator, pairs, against=original)
                assert [(row.nll, row.tokens) for row in rows] == [
                    (row.nll, row.tokens) for row in score_references(generator, pairs)
                ]
            divergences.append(sum(row.kl * row.tokens for row in rows) / sum(row.tokens for row in rows))
    assert divergences == sorted(divergences)
    assert all(one < other / 2 for one, other in itertools.pairwise(divergences)), divergences


def test_divergence_is_the_sum_over_the_whole_vocabulary(learnt: Made, tmp_path):
    import torch

    path = tmp_path / "Q2_K.gguf"
    quantize(learnt.gguf, path, type="Q2_K", threads=2)
    with open_generator(path) as generator, open_generator(learnt.gguf) as original:
        [(prompt, reference)] = requests(original, 1)
        [row] = score_references(generator, [(prompt, reference)], against=original)
        tokens = [*original.tokenize(prompt + reference), END]
        begin = len(original.tokenize(prompt))
        p, q = (
            torch.from_numpy(logits_of(each, tokens[:-1], begin - 1)).double().log_softmax(-1)
            for each in (original, generator)
        )
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / len(p)
    assert row.kl == pytest.approx(float(expected), rel=1e-6)
    assert row.tokens == len(p) > 10


def logits_of(generator, tokens, first_output):
    with generator.make_cache(slots=1, length=len(tokens), min_rows=1) as cache:
        return cache.feed(0, tokens, first_output=first_output).copy()


def test_a_reference_scored_in_pieces_has_the_same_likelihood(learnt: Made, tmp_path, monkeypatch):
    path = tmp_path / "Q2_K.gguf"
    quantize(learnt.gguf, path, type="Q2_K", threads=2)
    with open_generator(path) as generator, open_generator(learnt.gguf) as original:
        pairs = [(prompt, reference * 5) for prompt, reference in requests(original, 3)]
        whole = score_references(generator, pairs, against=original)
        monkeypatch.setattr(generate, "MAX_LOGITS", 9 * generator.model.n_vocab)
        monkeypatch.setattr(likelihood, "_BLOCK", 4 * generator.model.n_vocab)
        in_pieces = score_references(generator, pairs, against=original)
    for one, other in zip(whole, in_pieces, strict=True):
        assert one.tokens == other.tokens > 50
        assert one.nll == pytest.approx(other.nll, rel=1e-3)  # fewer than eight rows at a time: other kernels
        assert one.kl == pytest.approx(other.kl, rel=1e-2)


def test_likelihood_does_not_depend_on_which_rows_were_done_before(learnt: Made):
    with open_generator(learnt.gguf) as generator:
        pairs = requests(generator, 12)
        whole = score_references(generator, pairs, against=generator)
        rest = dict(likelihood.score_references(generator, lambda: pairs, against=generator, finished={0, 1, 5}))
        assert rest == {number: each for number, each in enumerate(whole) if number not in {0, 1, 5}}


def test_a_certain_reference_has_almost_no_loss_and_a_wrong_one_has_much(countdown: Made):
    with open_generator(countdown.gguf) as generator:
        # After `<pad>` (5) the end token (4) is certain; a reference is followed by it, so the empty one is right.
        [certain, wrong] = score_references(generator, [("<s><pad>", ""), ("<s><pad>", "<pad>")])
    assert (certain.tokens, wrong.tokens) == (1, 2)
    assert certain.nll < 1e-3
    assert wrong.nll > math.log(400)


def test_a_reference_that_fills_the_context_is_refused_by_its_row_and_none_gives_nothing(tiny: Made):
    with open_generator(tiny.gguf, n_ctx=32) as generator:
        with refused("prompt-too-long", "row 1: ", "context of 32"):
            score_references(generator, [("lamp", "on"), ("lamp", "please switch on the lamp " * 20)])
        assert score_references(generator, []) == []


def test_a_text_longer_than_the_context_is_scored_in_pieces_token_by_token(learnt: Made):
    text = "switch on the attic lamp at 9 o'clock. " * 30
    with open_generator(learnt.gguf, n_ctx=64) as generator:
        tokens = generator.tokenize(text)
        lead = 1 if tokens[0] == generator.model.bos else 0
        pieces = -(-(len(tokens) - lead) // (64 - lead))
        [(_, cut)] = likelihood.score_texts(generator, lambda: [text])
        # Of each piece the first token has nothing before it, but where a BOS is.
        assert cut.tokens == len(tokens) - (1 if lead else pieces)
    with open_generator(learnt.gguf, n_ctx=512) as generator:
        [(_, whole)] = likelihood.score_texts(generator, lambda: [text[: len(text) // 30]])
        assert whole.tokens == len(generator.tokenize(text[: len(text) // 30])) - 1
        assert whole.kl is None
        assert math.isfinite(whole.nll)
        assert whole.nll < whole.tokens * math.log(generator.model.n_vocab)
    assert pieces > 3


def test_greedy_answers_of_the_f16_file_are_those_of_transformers(learnt: Made):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(learnt.folder, dtype=torch.float32).eval()
    with open_generator(learnt.gguf, n_parallel=32) as generator:
        ends = [token for token in range(generator.model.n_vocab) if generator.model.is_end(token)]
        prompts = [prompt for prompt, _ in requests(generator, 150)]
        answers = generator.complete(prompts, max_new_tokens=16)
        differing = []
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = generator.tokenize(prompt)
            with torch.inference_mode():
                written = model.generate(
                    torch.tensor([tokens]), max_new_tokens=16, do_sample=False, eos_token_id=ends, pad_token_id=END
                )[0, len(tokens) :].tolist()
            text = b"".join(map(generator.model.get_token_bytes, written)).decode("utf-8", "replace")
            if (text, len(written)) != (answer.text, answer.tokens):
                differing.append((prompt, text, answer.text))
    print(*differing, sep="\n")
    assert len({answer.text for answer in answers}) > 20
    assert len(differing) <= len(prompts) // 100


@pytest.mark.parametrize("made", ["learnt", "tiny", "qwen"])
def test_answers_and_likelihoods_from_one_decoding_of_the_prompts_are_those_of_two(made, request, tmp_path):
    made = request.getfixturevalue(made)
    path = tmp_path / "Q8_0.gguf"
    quantize(made.gguf, path, type="Q8_0", threads=2)
    with open_generator(path) as generator, open_generator(made.gguf) as original:
        pairs = requests(generator, 20)
        likelihoods = dict(enumerate(score_references(generator, pairs, against=original)))
        prompts = [prompt for prompt, _ in pairs]
        answers = dict(enumerate(generator.complete(prompts, max_new_tokens=16)))

        def measure(**options):
            found = likelihood.answer_and_score(
                generator, lambda: pairs, max_new_tokens=16, against=original, **options
            )
            seen, likely, answered = [], {}, {}
            for number, result in found:
                (answered if isinstance(result, generate.Completion) else likely)[number] = result
                seen.append((number, type(result)))
            for number in likely.keys() & answered.keys():
                assert seen.index((number, likelihood.Likelihood)) < seen.index((number, generate.Completion))
            return likely, answered

        assert measure() == (likelihoods, answers)
        # As an interrupted run goes on: of rows 0 to 4 all is known, of 5 to 9 the likelihood.
        likely, answered = measure(answered=range(5), scored=range(10))
        assert likely == {number: each for number, each in likelihoods.items() if number >= 10}
        assert answered == {number: each for number, each in answers.items() if number >= 5}


def test_a_prompt_whose_last_token_is_another_with_the_reference_is_answered_as_it_is(learnt: Made):
    with open_generator(learnt.gguf) as generator:

        def is_spanning(prompt: str, reference: str) -> bool:
            tokens = generator.tokenize(prompt)
            return generator.tokenize(prompt + reference)[: len(tokens)] != tokens

        # Cut within a word, of which the tokenizer makes other tokens than of its halves.
        cuts = [
            (prompt + reference[:at], reference[at:])
            for prompt, reference in requests(generator, 12)
            for at in range(1, 12)
        ]
        pairs = [pair for pair in cuts if is_spanning(*pair)] + cuts[:5]
        assert len(pairs) > 10
        results = list(likelihood.answer_and_score(generator, lambda: pairs, max_new_tokens=8))
        answers = [result for _, result in sorted(pair for pair in results if isinstance(pair[1], generate.Completion))]
        assert answers == generator.complete([prompt for prompt, _ in pairs], max_new_tokens=8)
        likely = [result for _, result in results if isinstance(result, likelihood.Likelihood)]
        assert likely == score_references(generator, pairs)


@pytest.mark.parametrize("weight", [math.nan, 1e4])
def test_a_model_that_diverged_is_told_in_a_line(tmp_path, weight):
    make_llama(tmp_path / "model", lambda model: model.lm_head.weight.fill_(0).fill_diagonal_(weight))
    gguf = convert(tmp_path / "model", tmp_path / "model.gguf")
    with open_generator(gguf) as generator, refused("no-likelihood", "nats per token", "training.learning_rate"):
        score_references(generator, [("a question", "an answer")])
