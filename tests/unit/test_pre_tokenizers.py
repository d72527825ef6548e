import list_pre_tokenizers

from lathe.common import paths
from lathe.gguf import pre_tokenizers

SOURCE = (paths.LLAMA_CPP / "src/llama-vocab.cpp").read_text(encoding="utf-8")


def test_the_table_is_what_the_installed_llama_cpp_says():
    written = (paths.ROOT / "src/lathe/gguf/pre_tokenizers.py").read_text(encoding="utf-8")
    namespace = {}
    exec(list_pre_tokenizers.write_module(SOURCE), namespace)
    expected = {name: tuple(entry) for name, entry in namespace["PRE_TOKENIZERS"].items()}
    assert {name: tuple(entry) for name, entry in pre_tokenizers.PRE_TOKENIZERS.items()} == expected
    assert written.startswith(list_pre_tokenizers.HEAD)


def test_every_name_that_llama_cpp_splits_by_patterns_is_in_it():
    named = list_pre_tokenizers.read_names(SOURCE)
    assert len(named) > 60
    left_out = {entry.name for entry in named} - set(pre_tokenizers.PRE_TOKENIZERS)
    kinds = {entry.kind for entry in named if entry.name in left_out}
    assert kinds <= list_pre_tokenizers.SPLIT_BY_CODE | (kinds - set(list_pre_tokenizers.read_patterns(SOURCE)))
    assert pre_tokenizers.PRE_TOKENIZERS["llama-bpe"].ignore_merges
    assert not pre_tokenizers.PRE_TOKENIZERS["qwen2"].ignore_merges
