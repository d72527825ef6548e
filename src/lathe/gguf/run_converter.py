"""Runner of llama.cpp's converters, which adds metadata keys to the file that they write.

`python -m lathe.gguf.run_converter LLAMA_CPP SCRIPT METADATA_JSON [ARGUMENT …]`, a process of its own because the
converter brings its own `gguf` and sets up logging. The converter's `--metadata` knows a fixed list of
`general.*` keys only; the keys are therefore given to its writer at the last moment, which costs nothing: no
second pass over gigabytes.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

ADD_END_TOKEN = "tokenizer.ggml.add_eos_token"


def main() -> None:
    """Patch the writer and the tokenizer loader, then run the script as the main program."""
    folder, name, metadata, *arguments = sys.argv[1:]
    script = Path(folder) / name
    # As Python sets it for a script: the converter finds its files through sys.path[0].
    sys.path[:0] = [folder, str(Path(folder) / "gguf-py")]
    _add_metadata(json.loads(metadata))
    _refuse_remote_code()
    _name_layers_as_the_converter_does()
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _add_metadata(metadata: dict[str, str]) -> None:
    from gguf import GGUFWriter

    write_header = GGUFWriter.write_header_to_file

    def write_header_with_metadata(self: Any, path: Path | None = None) -> None:
        for key, value in metadata.items():
            self.remove_key(key)
            self.add_string(key, value)
        # Programs that add the end token where the vocabulary asks for it would end a prompt with it.
        if any(ADD_END_TOKEN in kept for kept in self.kv_data):
            self.remove_key(ADD_END_TOKEN)
            self.add_bool(ADD_END_TOKEN, False)
        write_header(self, path)

    GGUFWriter.write_header_to_file = write_header_with_metadata


def _refuse_remote_code() -> None:
    # The converter asks for `trust_remote_code=True`; code that comes with a model is never run here.
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained

    def load_without_remote_code(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "trust_remote_code": False})

    AutoTokenizer.from_pretrained = load_without_remote_code


def _name_layers_as_the_converter_does() -> None:
    # transformers 5 saves other names for the types of layers than it did; the converter looks for those of before, and
    # would take every layer of Granite 4 H for one of a state space.
    from conversion.granite import GraniteHybridModel

    find = GraniteHybridModel.get_attn_layers

    def find_by_either_name(self: Any) -> Any:
        if kinds := self.hparams.get("layer_types"):
            self.hparams["layer_types"] = ["attention" if kind == "full_attention" else kind for kind in kinds]
        return find(self)

    GraniteHybridModel.get_attn_layers = find_by_either_name


if __name__ == "__main__":
    main()
