"""Convert safetensors to a 16-bit GGUF with llama.cpp's own converter, and prove that token ids agree.

reads   models/{base,merged}/, data/processed/validation.jsonl, params.yaml: convert,
        preprocess.chat_template_kwargs; for the digests in the file all
        else that it comes from: metrics/fetch/, data/processed/, models/adapter/, params.yaml, presets.yaml
writes  models/gguf/{base,merged}-f16.gguf, metrics/convert/{base,merged}.json
items   base, merged
"""

import _path  # noqa: F401

from lathe import stage
from lathe.common import json_files, paths
from lathe.config.load import Config


def main(config: Config, item: str) -> None:
    from lathe.common.jsonl import read_jsonl
    from lathe.gguf import tokenizer_parity
    from lathe.gguf.convert import convert
    from lathe.models.chat_template import ChatTemplate
    from lathe.models.tokenizer import load_tokenizer
    from lathe.provenance import lineage

    model = paths.ROOT / "models" / item
    target = paths.GGUF / f"{item}-f16.gguf"
    chosen = config.params.convert.llama_cpp_dir
    # The merged model has the template of training already.
    options = config.params.preprocess.chat_template_kwargs if item == "base" else {}
    template = ChatTemplate.of_tokenizer(load_tokenizer(model, options))
    rows = read_jsonl(paths.DATA_PROCESSED / "validation.jsonl")
    chats = [template.render(row["messages"], tools=row.get("tools")) for row in rows]
    with paths.replace_file(target) as partial:
        convert(
            model,
            partial,
            outtype="f16",
            llama_cpp=paths.ROOT / chosen if chosen else paths.LLAMA_CPP,
            metadata=lineage.build_metadata(item) | ({"tokenizer.chat_template": template.text} if options else {}),
        )
        texts = [*tokenizer_parity.SAMPLE_TEXTS, *chats]
        compared = tokenizer_parity.check_tokens(model, partial, texts, chat_template=template.text)
    json_files.write_json(paths.METRICS / f"convert/{item}.json", {"tokens_compared": compared})


if __name__ == "__main__":
    stage.run_items(main, lambda _: ["base", "merged"])
