"""Write the documents of the three example tasks in experiments/benchmark, which were made by it.

    python experiments/data/benchmark_tasks.py --banking77 test.csv --gsm8k test.jsonl

banking77.jsonl    questions of a bank's customers, each with the right one of four subjects (banking77, CC BY 4.0)
gsm8k.jsonl        word problems with their solutions (GSM8K, MIT)
paragraphs.jsonl   the paragraphs of data/general.txt

`*_examples.jsonl` are the examples that stand in a prompt.
"""

import argparse
import csv
import json
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments/benchmark"
GENERAL_TEXT = ROOT / "data/general.txt"
DOCUMENTS, EXAMPLES, CHOICES, SEED = 200, 4, 4, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banking77", type=Path, required=True, help="test.csv with the columns text and category")
    parser.add_argument("--gsm8k", type=Path, required=True, help="test.jsonl with the keys question and answer")
    arguments = parser.parse_args()
    try:
        with arguments.banking77.open(encoding="utf-8", newline="") as file:
            questions = [(row["text"].strip(), row["category"].replace("_", " ")) for row in csv.DictReader(file)]
        problems = [json.loads(line) for line in arguments.gsm8k.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{error}: a file is missing, or is not the one that is asked for; download it again")
    drawn = random.Random(SEED)
    subjects = sorted({subject for _, subject in questions})
    asked = drawn.sample(questions, DOCUMENTS + EXAMPLES)
    write_with_examples("banking77", [make_question(text, subject, subjects, drawn) for text, subject in asked])
    kept = problems[: DOCUMENTS + EXAMPLES]
    write_with_examples("gsm8k", [{key: row[key] for key in ("question", "answer")} for row in kept])
    paragraphs = GENERAL_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    write("paragraphs", [{"text": paragraph} for paragraph in paragraphs])


def make_question(text: str, subject: str, subjects: list[str], drawn: random.Random) -> dict[str, object]:
    """Return a question with four subjects, of which one is right."""
    choices = [subject, *drawn.sample([other for other in subjects if other != subject], CHOICES - 1)]
    drawn.shuffle(choices)
    return {"text": text, "choices": choices, "label": choices.index(subject), "subject": subject}


def write_with_examples(name: str, rows: list[dict[str, object]]) -> None:
    """Write the first documents as examples, the others to be asked."""
    write(f"{name}_examples", rows[:EXAMPLES])
    write(name, rows[EXAMPLES:])


def write(name: str, rows: list[dict[str, object]]) -> None:
    """Write a file of documents."""
    with (FOLDER / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{name}: {len(rows)}")


if __name__ == "__main__":
    main()
