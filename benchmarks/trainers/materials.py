"""Makes the model, its tokenizer and the rows of a case: python -m trainers.materials CASE.

The model is random with a tokenizer of one word per id, and the rows are of random words; or it is a real one of
ChatML with rows of its own. Whatever a trainer does with text (its chat template, its tokenising, its packing), the
same ids come of it.
"""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from trainers.work import SEED

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message.content }}{{ ' </s>' if message.role == 'assistant' else ' ' }}"
    "{% endfor %}"
)
SYSTEM_PROMPT = "Name the intent of the question that a customer asks the bank."
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}"
    "{{ '' if message.role == 'assistant' else '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def main() -> None:
    """Read {folder, shape, shortest, longest, rows, base, rows_file} from the file named, and fill the folder."""
    case = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(case["folder"])
    if case["base"]:
        copy_model(Path(case["base"]), folder / "model")
        write_real_rows(case, folder)
        return
    make_model(case["shape"], folder / "model")
    write_rows(case, folder / "rows")


def make_model(shape: dict[str, Any], folder: Path) -> None:
    """Save a random model and its tokenizer; `shape` is of its config.json, of Qwen3's type if it names none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {"model_type": "qwen3", **shape, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(**values)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    _make_tokenizer(shape["vocab_size"]).save_pretrained(folder)


def _make_tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, BOS, EOS, *(f"w{number}" for number in range(3, size))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    fast.chat_template = TEMPLATE
    return fast


def write_rows(case: dict[str, Any], folder: Path) -> None:
    """Write rows of lengths evenly spread from the shortest to the longest; the last third of each is the answer."""
    chance = random.Random(SEED)
    forms: dict[str, list[Any]] = {"messages": [], "prompt_completion": [], "sharegpt": []}
    for _ in range(case["rows"]):
        length = chance.randint(case["shortest"], case["longest"])
        words = [f"w{chance.randrange(3, case['shape']['vocab_size'])}" for _ in range(length - 1)]
        start = length - length // 3
        ask = {"role": "user", "content": " ".join(words[:start])}
        reply = {"role": "assistant", "content": " ".join(words[start:])}
        forms["messages"].append({"messages": [ask, reply]})
        forms["prompt_completion"].append({"prompt": [ask], "completion": [reply]})
        # Read without a chat template, so the end is written out.
        ended = {**reply, "content": f"{reply['content']} {EOS}"}
        forms["sharegpt"].append({"messages": [ask, ended]})
    write_forms(forms, folder)


def copy_model(base: Path, folder: Path) -> None:
    """Copy a model of ChatML, with a template in which nothing follows the end of an answer."""
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def write_real_rows(case: dict[str, Any], folder: Path) -> None:
    """Write questions of banking77 with their subjects as answers, again and again, none over the longest length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    forms: dict[str, list[Any]] = {"messages": [], "prompt_completion": [], "sharegpt": []}
    for line in Path(case["rows_file"]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": row["text"]}]
        reply = {"role": "assistant", "content": row["subject"]}
        if len(tokenizer.apply_chat_template([*asked, reply], return_dict=False)) > case["longest"]:
            continue
        forms["messages"].append({"messages": [*asked, reply]})
        forms["prompt_completion"].append({"prompt": asked, "completion": [reply]})
        # Read without a chat template, so the prompt is written out.
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ended = {**reply, "content": f"{reply['content']}<|im_end|>"}
        forms["sharegpt"].append({"messages": [{"role": "user", "content": prompt}, ended]})
    write_forms({form: (rows * case["rows"])[: case["rows"]] for form, rows in forms.items()}, folder / "rows")


def write_forms(forms: dict[str, list[Any]], folder: Path) -> None:
    """Write the rows as each trainer reads them, into a new folder."""
    folder.mkdir()
    for form, rows in forms.items():
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # LLaMA-Factory's list of datasets.
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    listed = {
        "rows": {
            "file_name": "sharegpt.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": tags,
        }
    }
    (folder / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8")


if __name__ == "__main__":
    main()
