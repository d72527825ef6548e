"""Write Russian household commands with JSON answers, for the preset `commands-ru`.

    python experiments/data/commands_ru.py

A command is put together from a small grammar, as those of the built-in dataset `commands` are in English:

    Будь добра, поставь свет на кухне на 40 процентов через 5 минут.
    {"action":"set","device":"lamp","room":"kitchen","value":40,"delay":5}

No two rows of any split ask the same thing. The same `--seed` gives the same files.
"""

import argparse
from pathlib import Path
from random import Random
from typing import NamedTuple

from lathe.common.jsonl import write_jsonl
from lathe.sources.builtin.household_commands import CommandAnswer, encode_answer, normalize

ROOT = Path(__file__).resolve().parents[2]
ROWS = {"train": 2_400, "validation": 300, "test": 300}


class Device(NamedTuple):
    """What a device is called, in the accusative, what it can do, and the values that it can be set to."""

    name: str
    words: tuple[str, ...]
    actions: tuple[str, ...]
    values: tuple[int, ...] = ()
    unit: str = ""


DEVICES = (
    Device("lamp", ("свет", "лампу", "освещение"), ("on", "off", "set"), tuple(range(5, 100, 5)), "процентов"),
    Device("fan", ("вентилятор",), ("on", "off")),
    Device("heater", ("обогреватель", "батарею", "отопление"), ("on", "off", "set"), tuple(range(15, 30)), "градусов"),
    Device("radio", ("радио", "приёмник"), ("on", "off", "set"), tuple(range(5, 100, 5)), "процентов"),
    Device("tv", ("телевизор",), ("on", "off")),
    Device("blinds", ("жалюзи",), ("open", "close")),
    Device("curtains", ("шторы", "занавески"), ("open", "close")),
    Device("window", ("окно",), ("open", "close")),
    Device("door", ("дверь",), ("open", "close", "lock", "unlock")),
)

ROOMS = {
    "kitchen": ("на кухне",),
    "bedroom": ("в спальне",),
    "bathroom": ("в ванной", "в ванной комнате"),
    "attic": ("на чердаке",),
    "cellar": ("в подвале", "в погребе"),
    "garage": ("в гараже",),
    "hallway": ("в прихожей", "в коридоре"),
    "nursery": ("в детской",),
    "office": ("в кабинете",),
    "lounge": ("в гостиной", "в зале"),
}

# {} is the device, {room} where it is.
PHRASES = {
    "on": ("включи {} {room}", "{room} включи {}", "запусти {} {room}"),
    "off": ("выключи {} {room}", "{room} выключи {}", "отключи {} {room}"),
    "open": ("открой {} {room}", "{room} открой {}", "распахни {} {room}"),
    "close": ("закрой {} {room}", "{room} закрой {}", "прикрой {} {room}"),
    "lock": ("запри {} {room}", "закрой {} {room} на замок"),
    "unlock": ("отопри {} {room}", "сними замок, открой {} {room}"),
    "set": ("поставь {} {room} на {value}", "сделай {} {room} на {value}", "настрой {} {room} на {value}"),
}
WRAPPERS = (
    "{}",
    "{}.",
    "{}!",
    "пожалуйста, {}",
    "{}, пожалуйста",
    "будь добра, {}.",
    "эй, {}",
    "слушай, {}",
    "ну {}",
    "{}, спасибо",
)
DELAYS = {"через четверть часа": 15, "через полчаса": 30, "через час": 60, "через два часа": 120}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data/local/commands-ru", help="folder to write")
    parser.add_argument("--seed", type=int, default=42, help="of the random choices")
    arguments = parser.parse_args()
    rng, taken = Random(f"commands-ru {arguments.seed}"), set[str]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        write_jsonl(draw_rows(rng, count, taken), arguments.out / f"{split}.jsonl")
    print(ROWS)


def draw_rows(rng: Random, count: int, taken: set[str]) -> list[dict[str, str]]:
    """Draw `count` commands that are not in `taken`, with their answers, and add them to it."""
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        command, answer = draw_command(rng)
        key = normalize(command)
        if key not in taken:
            taken.add(key)
            rows.append({"command": command, "answer": encode_answer(answer)})
    return rows


def draw_command(rng: Random) -> tuple[str, CommandAnswer]:
    device, room = rng.choice(DEVICES), rng.choice(list(ROOMS))
    action = rng.choice(device.actions)
    answer: CommandAnswer = {"action": action, "device": device.name, "room": room}
    value = ""
    if action == "set":
        answer["value"] = rng.choice(device.values)
        value = f"{answer['value']} {device.unit}"
    spoken = rng.choice(PHRASES[action]).format(rng.choice(device.words), room=rng.choice(ROOMS[room]), value=value)
    when, timing = draw_time(rng)
    if when:
        spoken = f"{when} {spoken}" if rng.random() < 0.4 else f"{spoken} {when}"
    text = rng.choice(WRAPPERS).format(spoken)
    return (text[0].upper() + text[1:] if rng.random() < 0.6 else text), answer | timing


def draw_time(rng: Random) -> tuple[str, CommandAnswer]:
    """Return the wording of a moment and its meaning; four in ten commands name none."""
    kind = rng.random()
    if kind < 0.4:
        return "", {}
    if kind < 0.6:
        minutes = rng.randrange(5, 60)
        return f"через {minutes} {inflect(minutes, 'минуту', 'минуты', 'минут')}", {"delay": minutes}
    if kind < 0.7:
        words, minutes = rng.choice(list(DELAYS.items()))
        return words, {"delay": minutes}
    if kind < 0.75:
        word, time = rng.choice((("в полдень", "12:00"), ("в полночь", "0:00")))
        return word, {"time": time}
    time = f"{rng.randrange(24)}:{rng.choice((0, 10, 15, 20, 30, 40, 45, 50)):02}"
    return f"в {time}", {"time": time}


def inflect(count: int, one: str, few: str, many: str) -> str:
    """Return the form of a Russian noun that goes with a number."""
    if 11 <= count % 100 <= 14:
        return many
    return one if count % 10 == 1 else few if 2 <= count % 10 <= 4 else many


if __name__ == "__main__":
    main()
