# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""A template put on a base model at fetch is the GGUF's too, and its end token stops llama.cpp."""

import json
import shutil

from gguf_models import Made, convert, qwen, tiny  # noqa: F401 - fixtures
from refusals import refused

from lathe.gguf import tokenizer_parity
from lathe.gguf.description import describe_gguf
from lathe.gguf.llama_model import LlamaModel
from lathe.models.templates import builtin_templates
from lathe.models.templates.install_template import install_template
from lathe.models.tokenizer_template import read_chat_template


def as_base(made: Made, folder, eos_token: str, eos_token_id: int):
    """Copy the model as a base model has it: no chat template, and the end of a text as its end token."""
    shutil.copytree(made.folder, folder)
    (folder / "chat_template.jinja").unlink()
    for name, changes in (
        ("tokenizer_config.json", {"eos_token": eos_token}),
        ("config.json", {"eos_token_id": eos_token_id}),
        ("generation_config.json", {"eos_token_id": eos_token_id}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))
    return folder


def test_a_base_model_with_the_real_qwen_vocabulary_takes_chatml(qwen: Made, tmp_path):
    from transformers import AutoTokenizer

    folder = as_base(qwen, tmp_path / "base", "<|endoftext|>", 151643)
    assert install_template("chatml", folder) == "<|im_end|>"
    made = convert(folder, tmp_path / "base.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hallo"}, {"role": "assistant", "content": "Привет 🙂"}]
    assert tokenizer_parity.check_tokens(folder, made, [read_chat_template(tokenizer).render(chat)]) > 10
    metadata = describe_gguf(made)["metadata"]
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    with LlamaModel(made, vocab_only=True) as vocabulary:
        assert vocabulary.chat_template.text == builtin_templates.read_template("chatml")
        assert vocabulary.is_end(tokenizer.eos_token_id)
        assert vocabulary.get_token_text(vocabulary.eos) == "<|im_end|>"
        assert vocabulary.chat_template == read_chat_template(tokenizer)


def test_a_sentencepiece_vocabulary_takes_what_its_pieces_allow(tiny: Made, tmp_path):
    folder = as_base(tiny, tmp_path / "base", "</s>", 2)
    with refused("marker-not-in-vocabulary", "template llama-3: '<|start_header_id|>'"):
        install_template("llama-3", folder)
    assert install_template("plain", folder) == "</s>"
    made = convert(folder, tmp_path / "base.gguf")
    assert tokenizer_parity.check_tokens(folder, made, ["User:\nHallo\n\nAssistant:\nПривет</s>"]) > 10
    assert describe_gguf(made)["metadata"]["tokenizer.ggml.eos_token_id"] == 2
    assert describe_gguf(made)["chat_template"] == builtin_templates.read_template("plain")
    assert install_template("chatml", folder) == "<|im_end|>"
    assert tokenizer_parity.check_tokens(folder, convert(folder, made), []) > 10


def test_a_bos_that_the_tokenizer_adds_and_the_template_does_not_write_is_compared_too(tiny: Made, tmp_path):
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = as_base(tiny, tmp_path / "base", "</s>", 2)
    install_template("plain", folder)
    template = (folder / "chat_template.jinja").read_text().replace("{{- bos_token }}", "")
    (folder / "chat_template.jinja").write_text(template)
    made = convert(folder, tmp_path / "base.gguf")
    with refused("token-ids-differ", "the token ids of 'User:", "transformers", "llama.cpp"):
        tokenizer_parity.check_tokens(folder, made, [])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adds_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds_bos
    tokenizer.save_pretrained(folder)
    assert tokenizer_parity.check_tokens(folder, made, []) > 10
