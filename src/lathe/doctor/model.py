"""Doctor's check of the base model: whether training, merge and conversion take it, before anything is run."""

from pathlib import Path
from typing import TYPE_CHECKING

from lathe.common.json_files import read_json_object
from lathe.config.presets import GGUF_SUFFIX, LocalModel
from lathe.doctor.checks import Finding, Findings

if TYPE_CHECKING:
    from lathe.config.load import Config


def check_base_model(config: "Config", root: Path) -> Findings:
    """Ask what `fetch` and `train` would ask of the base, if it is there; no weight is read."""
    from lathe.gguf import install_converter, tokenizer_parity
    from lathe.gguf.check_template import check_template
    from lathe.gguf.vocabulary import get_vocabulary
    from lathe.models.adapter import check_adapter
    from lathe.models.check_base import check_base
    from lathe.models.tokenizer import load_tokenizer
    from lathe.models.tokenizer_template import read_chat_template

    params = config.params
    folder, shown = _find_folder(config, root), f"model {params.model}"
    if folder is None:
        yield Finding("base", "ok", f"{shown} is checked when it is fetched")
        return
    check_base(folder, shown)
    if params.training.tuning == "lora":
        check_adapter(folder, params.lora)
    llama_cpp, state = install_converter.find_converter(root, params.convert.llama_cpp_dir)
    asked = "transformers takes it"
    if state != "missing":
        vocabulary = get_vocabulary(folder, llama_cpp=llama_cpp, shown=shown)
        tokenizer_parity.compare_tokenizers(
            folder, vocabulary, [], samples=params.convert.tokenizer_parity, shown=shown
        )
        template = read_chat_template(load_tokenizer(folder))
        is_run = check_template(template, llama_cpp=llama_cpp, shown=shown)
        engine = "its tokenizer and its Jinja engine" if is_run else "and its tokenizer"
        asked = f"transformers, llama.cpp's converter{', ' if is_run else ' '}{engine} take it"
    yield Finding("base", "ok", f"{shown}: {asked}")


def _find_folder(config: "Config", root: Path) -> Path | None:
    """Return the folder of the base as it would be trained; None where `fetch` has yet to bring or to change it."""
    preset, fetched = config.model, root / "metrics/fetch/model.json"
    if (root / "models/base/config.json").is_file() and fetched.is_file():
        [origin] = read_json_object(fetched)["origin"]
        if origin["name"] == config.params.model:
            return root / "models/base"
    if not isinstance(preset, LocalModel) or preset.path.endswith(GGUF_SUFFIX):
        return None
    folder = root / preset.path
    is_changed = preset.template or preset.adapter or config.params.preprocess.added_tokens
    is_whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))  # not config.json alone
    return folder if is_whole and not is_changed else None
