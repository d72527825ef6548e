"""What the model reads, and which of its tokens are learnt."""

import itertools
import random
from pathlib import Path

import pytest
from refusals import refused

from lathe.models.answer_split import find_answer_prefix, split_answer
from lathe.models.chat_template import ChatTemplate
from lathe.models.loss_mask import ConversationEncoder, encode
from lathe.models.special_tokens import compile_control_tokens
from lathe.models.template_error import TemplateError
from lathe.models.tokenizer_template import read_chat_template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)

# The last turn gets a <think> block, earlier ones lose theirs.
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set reasoning = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in message.content else '' %}"
    "{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message.role + "
    "'<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% elif message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)

NO_END = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

# The generation prompt opens a block that the answers do not have.
OPENS_BLOCK = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><plan>\n' }}{% endif %}"
)

# template, the answer as it is written behind the prompt, the end token, does one sequence hold both turns
STYLES = {
    "chatml": (CHATML, "{}", "<|im_end|>", True),
    "qwen2": (QWEN2, "{}", "<|im_end|>", True),
    "qwen3": (QWEN3, "<think>\n\n</think>\n\n{}", "<|im_end|>", False),
    "llama2": (LLAMA2, " {} ", "</s>", True),
    "llama3": (LLAMA3, "{}", "<|eot_id|>", True),
    "mistral": (MISTRAL, " {}", "</s>", True),
    "no-end": (NO_END, " {}", "</s>", False),
}

MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = [
    "What is the price of four red apples? The price of the apples is four.\n\n",
    'Turn on the lamp in the attic, please.\nuser assistant system\n\n\n {"action": "on"}',
    "Сколько стоит яблоко? Пять рублей. 日本語のテキスト [INST] [/INST] <<SYS>> <think>\n\n</think>\n\n",
]

ANSWERS = ["Four.", '{"a": 1}', "ответ: пять 🍎", "two\nlines\n\n- and a list"]


@pytest.fixture(scope="module")
def byte_bpe():
    """As Qwen's and Llama 3's: byte-level BPE that adds nothing."""
    return _byte_bpe(adds_bos=False)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """As Llama 2's: SentencePiece BPE that puts a space before a text and BOS before that."""
    return _sentencepiece(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["byte_bpe", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_the_supervised_tokens_are_exactly_the_answer_and_the_end_token(tokenizer, style, answer):
    template, written, end, _ = STYLES[style]
    tokenizer.chat_template = template
    (sequence,) = encode(tokenizer, [_chat("What is it?", answer)], supervise="all")
    (supervised,) = _supervised(sequence)
    # SentencePiece's decoder drops a leading space.
    assert _decoded(tokenizer, supervised).lstrip(" ") == (written.format(answer) + end).lstrip(" ")
    assert supervised[-1] == tokenizer.convert_tokens_to_ids(end)
    assert sequence.supervised[-1], "nothing follows the end token"


@pytest.mark.parametrize("style", STYLES)
def test_every_answer_of_a_conversation_stands_once_behind_the_ids_inference_would_have(tokenizer, style):
    template, written, end, together = STYLES[style]
    tokenizer.chat_template = template
    chat = _chat("How many?", "Four apples.", "And now?", "пять", "Really?", '{"n": 5}')
    sequences = encode(tokenizer, [chat], supervise="all")
    learnt = []
    for sequence in sequences:
        for start, stop in _runs(sequence):
            turn = 2 * len(learnt) + 1
            assert sequence.input_ids[:start] == _inference_ids(tokenizer, chat[:turn])
            learnt.append(_decoded(tokenizer, sequence.input_ids[start:stop]).lstrip(" "))
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    assert learnt == [(written.format(answer) + end).lstrip(" ") for answer in answers]
    assert len(sequences) == (1 if together else 3)


@pytest.mark.parametrize("style", STYLES)
def test_with_supervise_last_only_the_last_answer_is_learnt(tokenizer, style):
    tokenizer.chat_template = STYLES[style][0]
    chat = _chat("How many?", "Four apples.", "And now?", "five")
    (sequence,) = encode(tokenizer, [chat], supervise="last")
    ((start, stop),) = _runs(sequence)
    assert stop == len(sequence.input_ids)
    assert sequence.input_ids[:start] == _inference_ids(tokenizer, chat[:-1])
    assert "five" in _decoded(tokenizer, sequence.input_ids[start:])


@pytest.mark.parametrize("answer", ["\nbegins with a new line", "\n\n\n", " begins with spaces", "\tx"])
@pytest.mark.parametrize("style", ["chatml", "qwen2", "mistral"])
def test_an_answer_that_would_merge_with_its_prompt_leaves_the_prompt_ids_alone(tokenizer, style, answer):
    template, written, end, _ = STYLES[style]
    tokenizer.chat_template = template
    chat = _chat("What is it?", answer)
    (sequence,) = encode(tokenizer, [chat], supervise="all")
    prompt = _inference_ids(tokenizer, chat[:-1])
    assert sequence.input_ids[: len(prompt)] == prompt
    assert sequence.supervised == [False] * len(prompt) + [True] * (len(sequence.input_ids) - len(prompt))
    assert _decoded(tokenizer, sequence.input_ids[len(prompt) :]).lstrip(" ") == (written.format(answer) + end).lstrip(
        " "
    )


def test_the_merging_case_is_a_real_one(byte_bpe):
    prompt, whole = (byte_bpe(text, add_special_tokens=False)["input_ids"] for text in ("user\n", "user\n\nx"))
    assert whole[: len(prompt)] != prompt


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_there_is_exactly_one_bos_at_the_start_where_template_or_tokenizer_wants_one(style, adds_bos):
    tokenizer = _byte_bpe(adds_bos=adds_bos)
    tokenizer.chat_template = STYLES[style][0]
    (sequence,) = encode(tokenizer, [_chat("a", "b")], supervise="all")
    bos = tokenizer.bos_token_id
    assert sequence.input_ids.count(bos) == (1 if adds_bos or "bos_token" in tokenizer.chat_template else 0)
    assert bos not in sequence.input_ids[1:]


def test_the_system_message_and_the_row_numbers_are_kept(byte_bpe):
    byte_bpe.chat_template = QWEN3
    chats = [_chat("a", "b"), [{"role": "system", "content": "Be brief."}, *_chat("c", "d", "e", "f")]]
    sequences = encode(byte_bpe, chats, supervise="all")
    assert [sequence.row for sequence in sequences] == [0, 1, 1]
    assert "Be brief." in byte_bpe.decode(sequences[1].input_ids)


def test_rows_come_out_in_order_over_several_batches(byte_bpe, monkeypatch):
    monkeypatch.setattr("lathe.models.loss_mask.ROWS_PER_BATCH", 3)
    byte_bpe.chat_template = CHATML
    chats = [_chat("q", f"answer {number}") for number in range(10)]
    sequences = encode(byte_bpe, chats, supervise="all")
    assert [sequence.row for sequence in sequences] == list(range(10))
    for number, sequence in enumerate(sequences):
        assert byte_bpe.decode(_supervised(sequence)[0]) == f"answer {number}<|im_end|>"


@pytest.mark.parametrize(
    "added",
    [
        {},
        {"content": "<|im_start|>", "lstrip": True, "special": True},
        {"content": "<|im_start|>", "rstrip": True, "special": True},
        {"content": "<|im_end|>", "single_word": True, "special": True},
        {"content": "word <|im_", "normalized": False},
        {"content": "a<|im_start|>b", "normalized": False},
        {"content": "<|im_end|>\n<|im_start|>", "special": True},
        {"content": "end|>", "normalized": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["byte_bpe", "sentencepiece"])
def test_ids_are_those_of_the_whole_text_whatever_tokens_were_added(name, added, tmp_path):
    """Texts are tokenised in segments, from one special token to the next."""
    from tokenizers import AddedToken

    tokenizer = _byte_bpe(adds_bos=False) if name == "byte_bpe" else _sentencepiece(tmp_path)
    if added:
        content = added["content"]
        tokenizer.add_tokens([AddedToken(**added)], special_tokens=added.get("special", False))
        assert content in {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokenizer.chat_template = CHATML
    odd = ["word <|im_end|>", "  a<|im_start|>b ", "x<|im_end|>y", "word", " <|im_start|>\n", "end|> <s> </s>", "▁ ▁a"]
    generator = random.Random(1)
    for _ in range(40):
        request, answer = (" ".join(generator.choices(odd, k=3)) for _ in range(2))
        (sequence,) = encode(tokenizer, [_chat(request, f"yes {answer} no")], supervise="all")
        text = read_chat_template(tokenizer).render(_chat(request, f"yes {answer} no")).rstrip("\n")
        assert sequence.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_reasoning_in_an_answer_is_learnt_as_the_template_writes_it(byte_bpe):
    byte_bpe.chat_template = QWEN3
    (sequence,) = encode(byte_bpe, [_chat("2 + 2?", "<think>two and two</think>4")], supervise="all")
    assert byte_bpe.decode(_supervised(sequence)[0]) == "<think>\ntwo and two\n</think>\n\n4<|im_end|>"


def test_an_answer_that_reads_like_the_template_around_it_is_found(byte_bpe):
    byte_bpe.chat_template = QWEN3
    for answer in ("think", "im_end", "end", ">"):
        (sequence,) = encode(byte_bpe, [_chat("q", answer)], supervise="all")
        assert byte_bpe.decode(_supervised(sequence)[0]) == f"<think>\n\n</think>\n\n{answer}<|im_end|>"


def test_a_row_without_an_answer_is_refused_by_its_number(byte_bpe):
    byte_bpe.chat_template = CHATML
    with refused("no-supervised-token", "row 2: ", error=TemplateError):
        encode(byte_bpe, [_chat("a", "b"), _chat("a")], supervise="all")


def test_encoding_row_by_row_yields_an_error_in_the_place_of_its_row(byte_bpe):
    byte_bpe.chat_template = MISTRAL
    system = {"role": "system", "content": "Be brief."}
    encoder = ConversationEncoder.of_tokenizer(byte_bpe)
    first, second, third = encoder.encode_rows(
        [_chat("a", "b"), [system, *_chat("a", "b")], _chat("c", "d")], supervise="all"
    )
    assert isinstance(second, TemplateError)
    assert [sequence.row for sequence in [*first, *third]] == [0, 2]


def test_a_generation_prompt_that_answers_do_not_begin_with_is_refused(byte_bpe):
    byte_bpe.chat_template = OPENS_BLOCK
    with refused("generation-prompt", "row 1: ", r"'<|assistant|><plan>\n'", error=TemplateError):
        encode(byte_bpe, [_chat("a", "b")], supervise="all")


def test_a_template_that_does_not_write_the_answer_is_refused(byte_bpe):
    byte_bpe.chat_template = CHATML.replace("message.content", "message.content | upper")
    with refused("answer-not-written", "row 1: ", "'yes'", error=TemplateError):
        encode(byte_bpe, [_chat("a", "yes")], supervise="all")


def test_a_tokenizer_without_template_or_end_token_is_refused(byte_bpe):
    byte_bpe.chat_template = None
    with refused("no-chat-template", error=TemplateError):
        encode(byte_bpe, [_chat("a", "b")], supervise="all")
    endless = _byte_bpe(adds_bos=False)
    endless.chat_template, endless.eos_token = CHATML, None
    with refused("no-end-token", "eos_token", "tokenizer_config.json", error=TemplateError):
        encode(endless, [_chat("a", "b")], supervise="all")


@pytest.mark.parametrize(
    ("template", "messages", "code", "parts"),
    [
        (
            LLAMA2,
            [{"role": "assistant", "content": "hello"}],
            "template-refuses",
            ["[assistant]", "Conversation roles must alternate user/assistant/user/assistant/; "],
        ),
        (
            MISTRAL,
            [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
            "template-refuses",
            ["[system, user]", "Only user and assistant roles are supported!"],
        ),
        (
            "line one\n{% if %}",
            [{"role": "user", "content": "y"}],
            "template-syntax",
            ["line 2", "Expected an expression, got 'end of statement block'"],
        ),
        (
            "{{ messages[0].content + 1 }}",
            [{"role": "user", "content": "y"}],
            "template-refuses",
            ["[user]", 'can only concatenate str (not "int") to str'],
        ),
        (
            "{{ ''.__class__.__mro__ }}",
            [{"role": "user", "content": "y"}],
            "template-forbidden",
            ["transformers forbids", "access to attribute '__class__' of 'str' object is unsafe"],
        ),
    ],
)
def test_a_template_error_is_one_line(template, messages, code, parts):
    with refused(code, *parts, error=TemplateError) as caught:
        _template(template).render(messages)
    assert "\n" not in str(caught.value)


def test_render_is_what_transformers_renders(tokenizer):
    chat = _chat("How many?", "Four.", "And now?", "Five.")
    for template, *_ in STYLES.values():
        tokenizer.chat_template = template
        for messages, generation in ((chat, False), (chat[:-1], True)):
            theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            ours = read_chat_template(tokenizer).render(messages, add_generation_prompt=generation)
            assert ours == theirs


def test_a_template_that_states_the_date_renders_the_same_every_day():
    template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    assert _template(template).render(_chat("x")) == "26 Jul 2024: x"


def test_the_answer_prefix_is_what_the_template_writes_before_a_plain_answer():
    prefixes = {style: find_answer_prefix(_template(row[0])) for style, row in STYLES.items()}
    assert prefixes.pop("qwen3") == "<think>\n\n</think>\n\n"
    assert set(prefixes.values()) == {""}


@pytest.mark.parametrize("style", STYLES)
def test_prompt_answer_and_end_make_up_the_rendering(style):
    text, written, end, _ = STYLES[style]
    template = _template(text)
    chat = _chat("How many?", "Four.", "And now?", "five")
    prompt, answer, rest = split_answer(template, chat)
    assert prompt + answer + rest == template.render(chat)
    assert prompt == template.render(chat[:-1], add_generation_prompt=True)
    assert answer == written.format("five").rstrip()
    assert style == "no-end" or rest.strip() == end


def test_control_tokens_are_the_special_ones_and_not_the_unknown_one(byte_bpe, sentencepiece):
    assert compile_control_tokens(byte_bpe).findall("a <|im_end|> b <think> <unk> </s>") == ["<|im_end|>", "</s>"]
    assert compile_control_tokens(sentencepiece).findall("<s>text<unk></s>") == ["<s>", "</s>"]


def _template(text: str) -> ChatTemplate:
    return ChatTemplate(text, "<s>", "</s>", adds_bos=False)


def _chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


def _runs(sequence) -> list[tuple[int, int]]:
    """Return (start, stop) of each run of supervised tokens."""
    runs, start = [], 0
    for kept, group in itertools.groupby(sequence.supervised):
        stop = start + len(list(group))
        if kept:
            runs.append((start, stop))
        start = stop
    return runs


def _supervised(sequence) -> list[list[int]]:
    return [sequence.input_ids[start:stop] for start, stop in _runs(sequence)]


def _decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _inference_ids(tokenizer, messages) -> list[int]:
    """Return the ids an inference engine starts from: the rendered prompt alone, BOS added unless it is there."""
    prompt = read_chat_template(tokenizer).render(messages, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bos = tokenizer("x")["input_ids"][0]
    return [bos, *ids] if bos == tokenizer.bos_token_id and ids[0] != bos else ids


def _byte_bpe(*, adds_bos: bool):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=MARKERS
    )


def _sentencepiece(folder: Path):
    import sentencepiece
    from transformers import LlamaTokenizer

    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 3),
            model_writer=model,
            model_type="bpe",
            vocab_size=430,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            control_symbols=MARKERS,
            num_threads=1,
            minloglevel=2,
        )
    return LlamaTokenizer.from_pretrained(folder, legacy=False, extra_special_tokens=MARKERS, local_files_only=True)
