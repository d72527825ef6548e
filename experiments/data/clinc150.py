"""Write CLINC150's data_full.json as three files of questions and JSON answers, for the preset `clinc150-local`.

    python experiments/data/clinc150.py PATH/data_full.json

An answer is `{"intent": "translate"}`, or `{"intent": null}` for a question that is none of the 150: the model learns
to refuse what is out of scope. The file is one JSON object, six lists of [question, intent].
From https://github.com/clinc/oos-eval (CC BY 3.0).
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"train": ("train", "oos_train"), "validation": ("val", "oos_val"), "test": ("test", "oos_test")}
OUT_OF_SCOPE = "oos"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="data_full.json")
    parser.add_argument("--out", type=Path, default=ROOT / "data/local/clinc150", help="folder to write")
    arguments = parser.parse_args()
    try:
        lists = json.loads(arguments.file.read_text(encoding="utf-8"))
        splits = {split: [row for part in parts for row in lists[part]] for split, parts in PARTS.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{arguments.file}: is not CLINC150's data_full.json ({error}); download it again")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps({"question": question, "answer": write_answer(intent)}) for question, intent in rows]
        (arguments.out / f"{split}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    print({split: len(rows) for split, rows in splits.items()})


def write_answer(intent: str) -> str:
    """Return the JSON that the model is to answer with."""
    return json.dumps({"intent": None if intent == OUT_OF_SCOPE else intent})


if __name__ == "__main__":
    main()
