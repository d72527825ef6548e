"""Safetensors to GGUF and GGUF to fewer bits, with llama.cpp's own converter and quantizer, and proof that
the vocabulary survived.
"""

import difflib
import json
import logging
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from lathe import paths, stage
from lathe.errors import InputError
from lathe.llama import Model, library, listening

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
    command = [sys.executable, "-m", "lathe.converter_run", str(llama_cpp.absolute()), json.dumps(metadata)]
    command += [str(model.absolute()), "--outfile", str(out.absolute()), "--outtype", outtype]
    done = subprocess.run(
        command,
        env=_converter_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    logger.debug("%s\n%s%s", " ".join(command), done.stdout, done.stderr)
    if done.returncode != 0:
        _raise_disk_fault(done.stderr, out)
        out.unlink(missing_ok=True)
        raise InputError(
            f"{model}: llama.cpp's converter refuses it: {_last_line(done.stderr)} "
            f"(LATHE_LOG_LEVEL=debug shows all it said)"
        )


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


def quantize(
    source: Path,
    out: Path,
    *,
    type: str,  # noqa: A002 - the field's own word
    threads: int,
    binary: Path | None = None,
) -> None:
    """Write the 16- or 32-bit GGUF `source` to `out` in a type of `quant_types()`, with llama.cpp's own
    quantizer: the installed library, or the `llama-quantize` program `binary`.

    A tensor whose rows do not divide into the type's blocks (256 values for the K and most I types) gets a larger
    type from llama.cpp; that is logged as a warning with the number of such tensors. Metadata is kept. The
    caller makes the file appear whole or not at all. Raises InputError if the type is unknown or llama.cpp
    refuses (some I types need an importance matrix).
    """
    types = quant_types()
    if type not in types:
        raise InputError(_unknown("quant type", type, tuple(types)))
    if not source.is_file():
        raise InputError(f"{source}: no such GGUF file; quantizing starts from a 16-bit one")
    if binary:
        said = _quantize_with_program(binary, source, out, type, threads)
    else:
        said = _quantize_with_library(source, out, type, types[type], threads)
    _warn_of_fallbacks(type, said)


@cache
def quant_types() -> dict[str, int]:
    """Every type that the installed llama.cpp can quantize to, by its usual name: `Q4_K_M` -> its llama_ftype."""
    prefix = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)")
    library_types = vars(library()).items()
    return {match[1]: value for name, value in library_types if (match := prefix.fullmatch(name))}


def describe(path: Path) -> dict[str, Any]:
    """What a GGUF file is, from its header alone.

    `bytes`; `parameters`; `bits_per_weight` (of the tensors); `tensor_types`, type name -> number of tensors;
    `metadata` without arrays; `chat_template` or None. Raises InputError if the file is not GGUF, damaged or cut short.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    metadata, tensors = _read_header(path)
    parameters = sum(count for count, _ in tensors)
    try:
        sizes = {kind: GGML_QUANT_SIZES[GGMLQuantizationType(kind)] for _, kind in tensors}
    except ValueError as error:
        raise InputError(f"{path}: its GGUF header is damaged ({error}); make the file again") from error
    tensor_bytes = sum(count // sizes[kind][0] * sizes[kind][1] for count, kind in tensors)
    if tensor_bytes > path.stat().st_size:
        raise InputError(
            f"{path}: cut short: {path.stat().st_size:,} bytes, and its tensors alone take {tensor_bytes:,}; "
            "copy the file again"
        )
    types = Counter(GGMLQuantizationType(kind).name for _, kind in tensors)
    return {
        "bytes": path.stat().st_size,
        "parameters": parameters,
        "bits_per_weight": round(8 * tensor_bytes / parameters, 4) if parameters else 0.0,
        "tensor_types": dict(sorted(types.items())),
        "chat_template": metadata.pop("tokenizer.chat_template", None),
        "metadata": metadata,
    }


def _quantize_with_library(source: Path, out: Path, name: str, ftype: int, threads: int) -> list[str]:
    llama_cpp = library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    params.nthread = threads
    with listening() as log:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    if failed:
        _raise_disk_fault(log.reason, out)
        out.unlink(missing_ok=True)
        raise InputError(f"{source}: llama.cpp cannot make {name} of it: {log.reason}")
    return log.lines


def _quantize_with_program(binary: Path, source: Path, out: Path, name: str, threads: int) -> list[str]:
    command = [str(binary), str(source), str(out), name, str(threads)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=stage.end_with_parent,
        )
    except OSError as error:
        raise InputError(
            f"quantize.binary: {binary} cannot be run ({error.strerror}); name llama.cpp's llama-quantize, or null"
        ) from None
    logger.debug("%s\n%s", " ".join(command), done.stdout)
    if done.returncode != 0 or not out.is_file():
        _raise_disk_fault(done.stdout, out)
        out.unlink(missing_ok=True)
        raise InputError(
            f"{source}: {binary} cannot make {name} of it: {_last_line(done.stdout)} "
            f"(LATHE_LOG_LEVEL=debug shows all it said)"
        )
    return done.stdout.splitlines()


def _raise_disk_fault(said: str, out: Path) -> None:
    """Raise the OSError behind a failed write to `out`, if that is what the converter or llama.cpp reports."""
    if match := re.search(r"\[Errno (\d+)\]", said):
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(out))
    # All that a C++ stream and numpy tell; writing some more ourselves gives the reason.
    if "iostream error" in said or re.search(r"\d+ requested and \d+ written", said):
        with out.open("ab", buffering=0) as file:
            file.write(bytes(1 << 20))


def _warn_of_fallbacks(name: str, said: list[str]) -> None:
    for line in said:
        if match := re.search(r"(\d+) of (\d+) tensor\(s\) required fallback quantization", line):
            fallbacks = Counter(re.findall(r"falling back to +(\w+)", "\n".join(said)))
            logger.warning(
                "%s: rows of %s of %s tensors do not divide into its blocks; stored in larger types: %s",
                name,
                match[1],
                match[2],
                ", ".join(f"{kind.upper()} × {n}" for kind, n in sorted(fallbacks.items())),
            )


def _converter_environment() -> dict[str, str]:
    # PYTHONPATH: this checkout's own lathe, not the installed one. NO_LOCAL_GGUF would make it use another
    # gguf-py.
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_LOCAL_GGUF", "HF_TOKEN")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**kept, **offline, "PYTHONPATH": str(paths.ROOT / "src"), "PYTHONUTF8": "1"}


def _last_line(output: str) -> str:
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


def _read_header(path: Path) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Metadata without arrays, and (number of values, ggml type) of every tensor."""
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

    def read(self) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        version, tensor_count, key_count = self._take("<IQQ")
        if version not in (2, 3):
            raise KeyError(f"version {version}")
        pairs = [(self._string(), self._value(self._take("<I")[0])) for _ in range(key_count)]
        tensors = [self._tensor() for _ in range(tensor_count)]
        return {key: value for key, value in pairs if value is not None}, tensors

    def _tensor(self) -> tuple[int, int]:
        self._string()  # its name
        count = 1
        for extent in self._take(f"<{self._take('<I')[0]}Q"):
            count *= extent
        kind, _offset = self._take("<IQ")
        return count, kind

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
