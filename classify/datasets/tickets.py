"""Write support tickets in Russian and English as CSV, for the preset `tickets-local`: unequal classes and noise.

    python classify/datasets/tickets.py

2,600 rows, one of eight topics each, from 900 of the most frequent to 22 of the rarest. An eighth of the words is
misspelt, 4 % of the rows have the label of another topic, and 40 tickets come twice with different labels: what labels
look like that several people gave in a hurry. The same seed writes the same file.
"""

import argparse
import csv
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]

ROWS = {
    "delivery": 900,
    "payment": 620,
    "account": 450,
    "return": 300,
    "warranty": 160,
    "invoice": 90,
    "partnership": 58,
    "complaint": 22,
}
SUBJECTS = {
    "delivery": (
        (
            "where is my {item}",
            "the courier did not bring the {item}",
            "when will the {item} arrive",
            "track my {item}",
        ),
        ("где мой {item}", "курьер не привез {item}", "когда приедет {item}", "отследить {item}"),
    ),
    "payment": (
        ("the card was charged twice for the {item}", "payment for the {item} failed", "I cannot pay for the {item}"),
        ("деньги за {item} списали дважды", "не прошла оплата за {item}", "не могу оплатить {item}"),
    ),
    "account": (
        ("I forgot my password", "change the phone number of my account", "cannot sign in to order the {item}"),
        ("забыл пароль", "поменять номер телефона в профиле", "не могу войти чтобы заказать {item}"),
    ),
    "return": (
        ("I want to send the {item} back", "how do I return the {item}", "the {item} does not fit me"),
        ("хочу вернуть {item}", "как сдать {item} обратно", "{item} мне не подходит"),
    ),
    "warranty": (
        ("the {item} broke after a month", "repair of the {item} under warranty", "the {item} does not switch on"),
        ("{item} сломался через месяц", "ремонт {item} по гарантии", "{item} не включается"),
    ),
    "invoice": (
        (
            "send me an invoice for the {item}",
            "I need closing documents for the {item}",
            "wrong tax number in the invoice",
        ),
        ("пришлите счет на {item}", "нужны закрывающие документы на {item}", "неверный инн в счете"),
    ),
    "partnership": (
        ("we sell {item} and look for a partner", "wholesale price of the {item}", "become your dealer for {item}"),
        ("мы продаем {item} и ищем партнера", "оптовая цена на {item}", "стать вашим дилером {item}"),
    ),
    "complaint": (
        ("your manager was rude about the {item}", "I complain about the service with the {item}"),
        ("менеджер нагрубил из-за {item}", "жалоба на обслуживание по {item}"),
    ),
}
ITEMS = (
    ("kettle", "headphones", "jacket", "vacuum cleaner", "monitor", "bicycle", "tent", "lamp", "router", "chair"),
    ("чайник", "наушники", "куртка", "пылесос", "монитор", "велосипед", "палатка", "лампа", "роутер", "кресло"),
)
OPENINGS = (
    ("", "hello, ", "good day! ", "please help: ", "urgent! ", "hi there, "),
    ("", "здравствуйте, ", "добрый день! ", "помогите: ", "срочно! ", "привет, "),
)
ENDINGS = (
    ("", ", order {number}", ", thanks", ". I wait for an answer", ", it has been {days} days"),
    ("", ", заказ {number}", ", спасибо", ". жду ответа", ", прошло {days} дней"),
)
MISSPELT = 0.12  # of the words
WRONG = 0.04  # of the labels
TWICE = 40  # tickets that come again with another label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data/local/tickets.csv", help="file to write")
    parser.add_argument("--seed", type=int, default=1, help="of what is random (default: 1)")
    arguments = parser.parse_args()
    rows = make_rows(Random(f"tickets {arguments.seed}"))
    with arguments.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("text", "topic"), *rows])
    print(f"{arguments.out}: {len(rows)} rows")


def make_rows(random: Random) -> list[tuple[str, str]]:
    """Return texts and topics, shuffled; no text comes twice with the same topic."""
    rows: list[tuple[str, str]] = []
    seen: set[str] = set()
    for topic, count in ROWS.items():
        made = 0
        while made < count:
            text = _misspell(_write_text(topic, random), random)
            if text in seen:
                continue
            seen.add(text)
            made += 1
            others = [other for other in ROWS if other != topic]
            rows.append((text, random.choice(others) if random.random() < WRONG else topic))
    for text, topic in random.sample(rows, TWICE):
        other = random.choice([other for other in ROWS if other != topic])
        rows.append((text.replace(",", " ,") if random.random() < 0.5 else text.upper(), other))
    random.shuffle(rows)
    return rows


def _write_text(topic: str, random: Random) -> str:
    language = random.randrange(2)
    parts = (OPENINGS, SUBJECTS[topic], ENDINGS)
    opening, subject, ending = (random.choice(part[language]) for part in parts)
    values = {
        "item": random.choice(ITEMS[language]),
        "number": random.randrange(1000, 9999),
        "days": random.randrange(2, 30),
    }
    return f"{opening}{subject}{ending}".format(**values)


def _misspell(text: str, random: Random) -> str:
    words = []
    for word in text.split(" "):
        if len(word) > 3 and random.random() < MISSPELT:
            place = random.randrange(1, len(word) - 1)
            word = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        words.append(word)
    return " ".join(words)


if __name__ == "__main__":
    main()
