"""A template given to a base model becomes its only one, and its end of turn the end token everywhere."""

import json
import re

import numpy
import pytest
from refusals import refused
from safetensors.numpy import save_file

from lathe.common import paths
from lathe.config.presets import LocalModel
from lathe.models.loss_mask import encode
from lathe.models.template_error import TemplateError
from lathe.models.templates import builtin_templates
from lathe.models.templates.install_template import install_template
from lathe.sources import fetch

MARKERS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "chatml-tools": ["<|im_start|>", "<|im_end|>"],
    "llama-3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "plain": [],
}
ENDS = {
    "chatml": "<|im_end|>",
    "chatml-tools": "<|im_end|>",
    "llama-3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "plain": "</s>",
}

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "пять"},
]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Return a function that makes a base model's folder, without weights, whose vocabulary has these markers."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "MODELS_LOCAL", tmp_path / "models/local")

    def make(*markers, eos="</s>", special=True, **config):
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
        tokenizer.add_tokens([AddedToken(marker, special=special, normalized=False) for marker in markers])
        folder = tmp_path / "models/local/base"
        tokenizer.save_pretrained(folder)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **ids, **config}))
        (folder / "generation_config.json").write_text(json.dumps(ids))
        return folder

    return make


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", builtin_templates.BUILTIN)
def test_a_built_in_template_learns_every_answer_and_ends_with_the_models_end_token(base, name):
    folder = base(*MARKERS[name])
    assert install_template(name, folder) == ENDS[name]
    tokenizer = load(folder)
    assert tokenizer.chat_template == builtin_templates.read_template(name)
    assert tokenizer.eos_token == ENDS[name]
    (sequence,) = encode(tokenizer, [CHAT], supervise="all")
    learnt = "".join(
        tokenizer.decode([token]) if kept else "\0"
        for token, kept in zip(sequence.input_ids, sequence.supervised, strict=True)
    )
    first, last = [run.strip() for run in re.split(r"\0+", learnt) if run]
    assert first == f"Four.{ENDS[name]}"
    assert last.endswith(ENDS[name])
    whole = tokenizer.decode(sequence.input_ids)
    assert whole.endswith(f"пять{ENDS[name]}")
    assert "Be brief." in whole
    assert sequence.input_ids.index(tokenizer.bos_token_id) == 0
    assert sequence.input_ids.count(tokenizer.bos_token_id) == 1


def test_the_end_token_is_the_same_in_every_file_and_former_ones_still_stop(base):
    folder = base(*MARKERS["chatml"], text_config={"eos_token_id": 256, "hidden_size": 8})
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    former = load(folder).eos_token_id
    install_template("chatml", folder)
    end = load(folder).convert_tokens_to_ids("<|im_end|>")
    written = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    assert written["tokenizer_config.json"]["eos_token"] == "<|im_end|>"
    assert written["special_tokens_map.json"] == {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    assert written["config.json"]["eos_token_id"] == end
    assert written["config.json"]["text_config"] == {"eos_token_id": end, "hidden_size": 8}
    assert written["generation_config.json"]["eos_token_id"] == [end, former]


def test_a_former_template_is_gone_wherever_it_stood(base):
    folder = base()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "old"}))
    (folder / "chat_template.json").write_text('{"chat_template": "older"}')
    install_template("plain", folder)
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert not (folder / "chat_template.json").exists()
    assert (folder / "chat_template.jinja").read_text() == builtin_templates.read_template("plain")


def test_the_users_own_files_stay_as_they_are(base, tmp_path):
    folder = base(*MARKERS["chatml"])
    (folder / "chat_template.jinja").write_text("{{ 'the user\\'s' }}")
    save_file({"a": numpy.zeros(1)}, folder / "model.safetensors")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "out").mkdir()
    preset = LocalModel(source="local", path="models/local/base", template="chatml")
    fetch.fetch_model(preset, tmp_path / "out", seed=1)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert load(tmp_path / "out").eos_token == "<|im_end|>"
    assert (tmp_path / "out/model.safetensors").samefile(folder / "model.safetensors")


def test_a_marker_that_is_no_special_token_becomes_one_as_the_end(base):
    folder = base(*MARKERS["chatml"], special=False)
    install_template("chatml", folder)
    tokenizer = load(folder)
    (sequence,) = encode(tokenizer, [CHAT], supervise="last")
    learnt = [token for token, kept in zip(sequence.input_ids, sequence.supervised, strict=True) if kept]
    assert tokenizer.decode(learnt) == "пять<|im_end|>"


def test_a_file_of_the_users_own_is_taken(base):
    folder = base()
    file = paths.MODELS_LOCAL / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}")
    assert install_template("models/local/mine.jinja", folder) == "</s>"
    assert load(folder).chat_template == file.read_text()


@pytest.mark.parametrize(
    ("template", "code", "part"),
    [
        ("chatml", "marker-not-in-vocabulary", "template chatml: '<|im_start|>'"),
        ("llama-3", "marker-not-in-vocabulary", "template llama-3: '<|start_header_id|>'"),
        ("gemma", "marker-not-in-vocabulary", "template gemma: '<start_of_turn>'"),
        ("chatlm", "unknown-template", "presets.yaml: template 'chatlm' is not built in; did you mean 'chatml'?"),
        ("docs/mine.jinja", "template-outside", "presets.yaml: template 'docs/mine.jinja' is not under models/local/"),
        ("models/local/none.jinja", "missing-file", "models/local/none.jinja: "),
        ("models/local/latin.jinja", "not-utf-8", "models/local/latin.jinja: byte 3"),
        ("models/local/broken.jinja", "template-syntax", "template models/local/broken.jinja: line 2"),
        ("models/local/silent.jinja", "answer-not-written", "template models/local/silent.jinja: "),
        (
            "models/local/endless.jinja",
            "answer-without-end",
            "template models/local/endless.jinja: ends an answer with",
        ),
        ("models/local/refusing.jinja", "template-refuses", "template models/local/refusing.jinja: "),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(base, template, code, part):
    folder = base()
    for name, text in {
        "latin": b"caf\xe9",
        "broken": b"{% for m in messages %}\n{{ m.content }}",
        "silent": b"{% for m in messages %}{{ m.role }}{% endfor %}",
        "endless": b"{% for m in messages %}{{ m.content }}###\n{% endfor %}",
        "refusing": b"{{ raise_exception('never') }}",
    }.items():
        (paths.MODELS_LOCAL / f"{name}.jinja").write_bytes(text)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with refused(code, part) as caught:
        install_template(template, folder)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["mistral", "gemma", "plain"])
def test_a_template_without_tools_refuses_a_tool_call(base, name):
    folder = base(*MARKERS[name])
    install_template(name, folder)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chat = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with refused("template-refuses", f"the {name} template writes no tool calls", error=TemplateError):
        encode(load(folder), [chat], supervise="all")


def test_a_template_that_drops_tool_calls_or_their_answers_in_silence_is_refused(base):
    folder = base()
    tokenizer = load(folder)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asks = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with refused("tool-not-written", "row 1: ", "tool call 'weather'", error=TemplateError):
        encode(tokenizer, [asks], supervise="all")
    told = [CHAT[1], CHAT[2], {"role": "tool", "content": "-3 °C"}, CHAT[4]]
    assert len(encode(tokenizer, [told], supervise="all")) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace("m in messages", "m in messages if m.role != 'tool'")
    with refused("tool-not-written", "row 1: ", "tool message '-3 °C'", error=TemplateError):
        encode(tokenizer, [told], supervise="all")
