"""Safetensors to GGUF with llama.cpp's own converter, proof that the vocabulary survived, and what is in a GGUF."""

import difflib
import json
import logging
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

from lathe import paths
from lathe.errors import InputError
from lathe.llama import Model, ggml_types

logger = logging.getLogger(__name__)

# What the converter's --outtype takes.
OUT_TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")

# Texts on which tokenizers like to disagree. All are composed (Unicode NFC): Qwen's tokenizer composes,
# llama.cpp takes text as it is, so that a decomposed "e\u0301" never agrees there.
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Switch on the attic lamp at 9 o'clock, don't wait; I'll be there at 21:30!",
    "Größe, Straße, Übermut – „Anführungszeichen“ und ‚einfache‘",
    "L'été dernier, j'ai mangé où ? Ça coûte 3,50 €.",
    "¿Dónde está el baño? ¡Mañana será otro día!",
    "Съешь ещё этих мягких французских булок, да выпей чаю. 2024 год",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "敏捷的棕色狐狸跳过了懒狗。价格：１２３元",
    "いろはにほへと ちりぬるを。カタカナ、漢字とABC",
    "다람쥐 헌 쳇바퀴에 타고파",
    "السَّلامُ عَلَيْكُمْ ١٢٣",
    "שָׁלוֹם עוֹלָם",
    "नमस्ते दुनिया, कैसे हो?",
    "สวัสดีชาวโลก",
    "def f(x: int = 0) -> list[int]:\n    return [i ** 2 for i in range(x)]  # comment\n\n\tif a != b: pass",
    '{"action": "on", "device": "light", "value": null, "list": [1, 2.5, -3e-7]}',
    "<p class='x'>a &amp; b</p> SELECT * FROM t WHERE id=1; -- x",
    "https://example.com/a/b?c=d&e=%20f#g user@example.com C:\\Users\\x",
    "0 1 12 123 1234 12345 123456789 3.14159 1,000,000 0x1F 1e-10",
    "🙂 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ✨🚀",
    " one leading space",
    "  two leading, two  inside, two trailing  ",
    "tab\there\t\ttwo\nnewline\n\ntwo newlines\n\n\nthree\r\nwindows",
    "no\u00a0break, zero\u200bwidth, thin\u2009space, ideographic\u3000space",
    "é, ﬁ is not fi; ½ ² ™",
    "I'M SHOUTING, y'ALL'VE don't DON'T",
    "a",
    " ",
    "\n",
)


class AdapterError(InputError):
    """An adapter that llama.cpp cannot add to a model; the message says why."""


def convert(model: Path, out: Path, *, outtype: str, llama_cpp: Path, metadata: dict[str, str]) -> None:
    """Write the safetensors model in the folder `model` to the GGUF file `out`, with llama.cpp's own converter.

    `llama_cpp` is a folder with convert_hf_to_gguf.py; `outtype` one of `OUT_TYPES`. Every key of `metadata`
    (`lathe.dataset_digest`, `general.name`, …) is added as text, in place of the converter's own if it has
    one. The bytes depend on the files, the arguments and the last part of `model` (the default of
    `general.name`) alone. Nothing is fetched and no code of the model is run. The caller makes the file
    appear whole or not at all.

    Raises InputError in one line if the converter is missing or refuses the model; all it said is logged at
    debug level.
    """
    if outtype not in OUT_TYPES:
        raise InputError(_unknown("output type", outtype, OUT_TYPES))
    if not (llama_cpp / "convert_hf_to_gguf.py").is_file():
        raise InputError(
            f"{llama_cpp}: no convert_hf_to_gguf.py; run `make setup`, or name a llama.cpp checkout in "
            f"convert.llama_cpp_dir"
        )
    if not (model / "config.json").is_file():
        raise InputError(f"{model}: no config.json; the folder must hold a model in Hugging Face format")
    # The converter would make a file without tensors, or read a pickle.
    if not any(model.glob("model*.safetensors")) and not (model / "model.safetensors.index.json").is_file():
        raise InputError(f"{model}: no model*.safetensors; the folder must hold the weights, as safetensors")
    arguments = [str(model.absolute()), "--outfile", str(out.absolute()), "--outtype", outtype]
    if refusal := _run(llama_cpp, "convert_hf_to_gguf.py", metadata, arguments, out):
        raise InputError(
            f"{model}: llama.cpp's converter refuses it: {refusal} (LATHE_LOG_LEVEL=debug shows all it said)"
        )


def convert_adapter(
    adapter: Path, base: Path, out: Path, *, outtype: str, llama_cpp: Path, metadata: dict[str, str]
) -> None:
    """Write the LoRA adapter in the folder `adapter` to the GGUF file `out`, with llama.cpp's own converter.

    `base` is the folder of the model it was trained on; all else is as for `convert`. llama.cpp adds it to a GGUF of
    that model as it loads it. Raises AdapterError where the adapter is more than llama.cpp can add: trained magnitudes
    (DoRA), layers trained whole, updates of embeddings that are the output head too, or what its converter refuses.
    """
    if not (llama_cpp / "convert_lora_to_gguf.py").is_file():
        raise InputError(
            f"{llama_cpp}: no convert_lora_to_gguf.py; run `make setup`, or name a llama.cpp checkout in "
            f"convert.llama_cpp_dir"
        )
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    _check_adapter(config, adapter, base)
    # llama.cpp scales by alpha / r, whatever the configuration says of rank-stabilised LoRA.
    if config["use_rslora"]:
        config["lora_alpha"] *= math.sqrt(config["r"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter_model.safetensors").symlink_to((adapter / "adapter_model.safetensors").absolute())
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        arguments = [name, "--base", str(base.absolute()), "--outfile", str(out.absolute()), "--outtype", outtype]
        refusal = _run(llama_cpp, "convert_lora_to_gguf.py", {"general.name": "adapter", **metadata}, arguments, out)
    if refusal:
        raise AdapterError(f"llama.cpp's converter refuses it: {refusal}")


def _check_adapter(config: dict[str, Any], adapter: Path, base: Path) -> None:
    from safetensors import safe_open

    if config["use_dora"]:
        raise AdapterError("it holds magnitudes (lora.use_dora), which llama.cpp does not know")
    with safe_open(adapter / "adapter_model.safetensors", "numpy") as weights:
        names = list(weights.keys())
    # PEFT may save the base's embeddings beside their update, unchanged.
    trained = [name.removeprefix("base_model.model.") for name in names if ".base_layer." not in name]
    whole = sorted(name for name in trained if ".lora_" not in name)
    if whole:
        # Its converter refuses some of them, and llama.cpp leaves out what the others have learnt, without a word.
        raise AdapterError(f"it holds layers trained whole (lora.modules_to_save): {', '.join(whole)}")
    tied = json.loads((base / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings")
    if tied and any(".lora_embedding_" in name for name in names):
        raise AdapterError("it updates embeddings that are the output head too, which llama.cpp keeps as one tensor")


def _run(llama_cpp: Path, script: str, metadata: dict[str, str], arguments: list[str], out: Path) -> str | None:
    """Run one of llama.cpp's converters; return why it refused, or None, and leave no half of `out`."""
    command = [sys.executable, "-m", "lathe.converter_run", str(llama_cpp.absolute()), script, json.dumps(metadata)]
    command += arguments
    done = subprocess.run(
        command,
        env=_converter_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    logger.debug("%s\n%s%s", " ".join(command), done.stdout, done.stderr)
    if done.returncode == 0:
        return None
    raise_disk_fault(done.stderr, out)
    out.unlink(missing_ok=True)
    return last_line(done.stderr)


def check_tokens(model: Path, gguf: Path, texts: list[str]) -> int:
    """Hold the tokenizer in the folder `model` (transformers) and the vocabulary in `gguf` (llama.cpp) equal.

    Compared are the ids of every text, special tokens in it recognised by both, and the prompt of a small
    chat rendered with the tokenizer's template: as training sees it, and as llama.cpp does, which adds a BOS
    where the vocabulary asks for one and the template has not written it. Both must carry the same template,
    and the tokenizer's end-of-turn token (`eos_token`) must end a generation. Returns the number of tokens
    compared; raises InputError with the first difference.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    compared = 0
    with Model(gguf, vocab_only=True) as vocabulary:
        for text in texts:
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            compared += _equal_ids(gguf, text, expected, vocabulary.tokenize(text))
        if not vocabulary.is_end(tokenizer.eos_token_id):
            raise InputError(
                f"{gguf}: {tokenizer.eos_token!r}, the tokenizer's eos_token, does not end a generation in llama.cpp; "
                f"mark it as a special token in the tokenizer of {model}"
            )
        if tokenizer.chat_template:
            if vocabulary.template != tokenizer.chat_template:
                raise InputError(f"{gguf}: its chat template is not the one in {model}; convert again from this folder")
            prompt = _chat_prompt(tokenizer)
            expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            bos = tokenizer.bos_token_id
            if bos is not None and expected[:1] != [bos] and tokenizer("text")["input_ids"][0] == bos:
                expected = [bos, *expected]
            if expected[:2] == [bos] * 2:
                raise InputError(
                    f"{model}: its chat template begins a prompt with two {tokenizer.bos_token!r}; remove one"
                )
            compared += _equal_ids(gguf, prompt, expected, vocabulary.prompt_tokens(prompt))
    return compared


class Tensor(NamedTuple):
    """A tensor in a GGUF file: its extents, columns first, its type's number, and where its bytes begin."""

    name: str
    extents: tuple[int, ...]
    kind: int
    offset: int


def tensors(path: Path) -> list[Tensor]:
    """Every tensor of a GGUF file, in file order; raises InputError if the file is not GGUF."""
    return _read_header(path)[1]


def describe(path: Path) -> dict[str, Any]:
    """What a GGUF file is, from its header alone.

    `bytes`; `parameters`; `bits_per_weight` (of the tensors); `tensor_types`, type name -> number of tensors;
    `metadata` without arrays; `chat_template` or None. Raises InputError if the file is not GGUF, damaged or cut short.
    """
    names = {kind.number: name for name, kind in ggml_types().items()}
    metadata, found = _read_header(path)
    parameters = tensor_bytes = 0
    for tensor in found:
        if tensor.kind not in names:
            raise InputError(f"{path}: its GGUF header is damaged (tensor type {tensor.kind}); make the file again")
        count, stored = math.prod(tensor.extents), ggml_types()[names[tensor.kind]]
        parameters += count
        tensor_bytes += count // stored.block_values * stored.block_bytes
    if tensor_bytes > path.stat().st_size:
        raise InputError(
            f"{path}: cut short: {path.stat().st_size:,} bytes, and its tensors alone take {tensor_bytes:,}; "
            "copy the file again"
        )
    return {
        "bytes": path.stat().st_size,
        "parameters": parameters,
        "bits_per_weight": round(8 * tensor_bytes / parameters, 4) if parameters else 0.0,
        "tensor_types": dict(sorted(Counter(names[tensor.kind] for tensor in found).items())),
        "chat_template": metadata.pop("tokenizer.chat_template", None),
        "metadata": metadata,
    }


def raise_disk_fault(said: str, out: Path) -> None:
    """Raise the OSError behind a failed write to `out`, if that is what the converter or llama.cpp reports."""
    if match := re.search(r"\[Errno (\d+)\]", said):
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(out))
    # All that a C++ stream and numpy tell; writing some more ourselves gives the reason.
    if "iostream error" in said or re.search(r"\d+ requested and \d+ written", said):
        with out.open("ab", buffering=0) as file:
            file.write(bytes(1 << 20))


def _converter_environment() -> dict[str, str]:
    # PYTHONPATH: this checkout's own lathe, not the installed one. NO_LOCAL_GGUF would make it use another
    # gguf-py.
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_LOCAL_GGUF", "HF_TOKEN")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**kept, **offline, "PYTHONPATH": str(paths.ROOT / "src"), "PYTHONUTF8": "1"}


def last_line(output: str) -> str:
    """The reason in what the converter or the quantizer printed before it failed."""
    # A traceback ends with its error, and the converter's own refusals are its last log line.
    lines = [line.strip() for line in output.splitlines() if line.strip(" ^~") and not re.search(r"\d%\|", line)]
    if not lines:
        return "it gives no reason"
    if lines[-1] == "AssertionError" and len(lines) > 1:  # which of them stands one line above
        return lines[-2].partition("  #")[0]
    return re.sub(r"^(?:\w+:)?(?:ERROR|Error)[:\w-]*:\s*", "", lines[-1])


def _equal_ids(gguf: Path, text: str, expected: list[int], found: list[int]) -> int:
    if expected != found:
        raise InputError(
            f"{gguf}: the token ids of {text!r} differ: transformers {expected}, llama.cpp {found}; "
            f"llama.cpp does not know this tokenizer well enough to run the model"
        )
    return len(found)


def _chat_prompt(tokenizer: Any) -> str:
    messages = [{"role": "user", "content": "Hello, 世界!"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _unknown(what: str, name: str, known: tuple[str, ...]) -> str:
    # Case does not count: `Q4_k_m` is nearest to Q4_K_M.
    by_lower_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    hint = f"did you mean {by_lower_case[near[0]]!r}? " if near else ""
    return f"{name!r} is no {what}; {hint}known: {', '.join(known)}"


# The GGUF header, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; gguf-py's reader takes 7 s where
# the vocabulary has 150,000 tokens.
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


def _read_header(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """Metadata without arrays, and every tensor."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a GGUF file")
    with path.open("rb") as file:
        if (begin := file.read(4)) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file; it begins with {begin!r}")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            try:
                return _Header(data).read()
            except (struct.error, KeyError, OverflowError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: its GGUF header is damaged ({error}); make the file again") from error


class _Header:
    def __init__(self, data: mmap) -> None:
        self.data, self.at = data, 4

    def read(self) -> tuple[dict[str, Any], list[Tensor]]:
        version, tensor_count, key_count = self._take("<IQQ")
        if version not in (2, 3):
            raise KeyError(f"version {version}")
        pairs = [(self._string(), self._value(self._take("<I")[0])) for _ in range(key_count)]
        metadata = {key: value for key, value in pairs if value is not None}
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        begin = -(-self.at // alignment) * alignment
        return metadata, [tensor._replace(offset=begin + tensor.offset) for tensor in found]

    def _tensor(self) -> Tensor:
        name = self._string()
        extents = self._take(f"<{self._take('<I')[0]}Q")
        kind, offset = self._take("<IQ")
        return Tensor(name, extents, kind, offset)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])[0]
        kind, count = self._take("<IQ")
        if kind == _STRING:
            for _ in range(count):
                (size,) = self._take("<Q")
                self.at += size
        else:
            self.at += count * struct.calcsize(_SCALARS[kind])
        return None

    def _string(self) -> str:
        (size,) = self._take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values
