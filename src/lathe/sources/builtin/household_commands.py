"""The `commands` dataset: spoken household commands and the compact JSON that a smart home would act on.

A request is put together from a small grammar: a target (device and room), an action, perhaps a value, perhaps a
delay or a time of day, phrased plainly, politely or clumsily. The answer names what was understood, keys always in the
same order, or says why the request cannot be carried out:

    Would you kindly set the light in the loft to 40 percent at half past nine?
    {"action":"set","device":"lamp","room":"attic","value":40,"time":"9:30"}

    lock up the kitchen's radio pls
    {"error":"impossible"}

Some pairs of a device and a room are kept out of everything that a model may learn from and appear in the test split
alone, so that a model which only remembers pairs is found out. `delay` is in minutes, `time` on the 24-hour clock.

Each answer comes with one to reject, wrong as one who listens badly is wrong: another room, value or time, an error
where there is none, or something done that cannot be.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

CommandAnswer = dict[str, str | int]
DeviceInRoom = tuple["Device", str]  # a device and the name of a room

TRAIN_ROWS = 2_400
VALIDATION_ROWS = 500
TEST_ROWS = 500
TEST_ROWS_OF_UNSEEN_PAIRS = 150
UNSEEN_ROOMS_PER_DEVICE = 1
ERROR_SHARE = 0.18
TEST_ERROR_SHARE = 0.25  # of the rows whose pairs training has seen
# How often each error is asked for, relative to the others: what depends on two words at once is the hardest to learn.
ERRORS = {
    "unknown device": 1,
    "unknown room": 1,
    "missing device": 1,
    "missing room": 1,
    "missing value": 1,
    "contradictory": 1,
    "out of range": 4,
    "impossible": 4,
}
ARROW = "->"  # in a document, what follows it is what the request before it means
RECORD_SHARE = 0.06  # of the documents, those that are lines of an inventory
MOMENT_SHARE = 0.15  # of the documents, those that say nothing but what a time of day means


@dataclass(frozen=True)
class Device:
    """What a device is called, what it can do, and which values it can be set to (none: it cannot be set)."""

    name: str
    aliases: tuple[str, ...]
    actions: tuple[str, ...]
    values: tuple[int, ...] = ()
    values_out_of_range: tuple[int, ...] = ()
    value_phrases: tuple[str, ...] = ()


class Command(NamedTuple):
    """A request, its answer, and, where that is an error, what one would answer who does not notice."""

    request: str
    answer: CommandAnswer
    unnoticed: CommandAnswer | None = None


_PERCENT = tuple(range(5, 100, 5))
_BEYOND_PERCENT = tuple(range(110, 310, 10))

DEVICES = (
    Device("lamp", ("lamp", "light"), ("on", "off", "set"), _PERCENT, _BEYOND_PERCENT, ("{} percent", "{}%")),
    Device("fan", ("fan", "ventilator"), ("on", "off", "set"), (1, 2, 3, 4, 5), (7, 8, 9), ("level {}", "speed {}")),
    Device(
        "heater",
        ("heater", "radiator"),
        ("on", "off", "set"),
        tuple(range(10, 30)),
        tuple(range(50, 100)),
        ("{} degrees",),
    ),
    Device("radio", ("radio",), ("on", "off", "set"), _PERCENT, _BEYOND_PERCENT, ("volume {}", "{} percent")),
    Device("tv", ("tv", "television"), ("on", "off", "set"), _PERCENT, _BEYOND_PERCENT, ("volume {}",)),
    Device("blinds", ("blinds", "shades"), ("open", "close", "set"), _PERCENT, _BEYOND_PERCENT, ("{} percent", "{}%")),
    Device("curtains", ("curtains",), ("open", "close")),
    Device("window", ("window",), ("open", "close", "lock", "unlock")),
    Device("door", ("door",), ("open", "close", "lock", "unlock")),
    Device("camera", ("camera",), ("on", "off")),
)

ROOMS = {
    "kitchen": ("kitchen",),
    "bedroom": ("bedroom",),
    "bathroom": ("bathroom", "bath"),
    "attic": ("attic", "loft"),
    "cellar": ("cellar", "basement"),
    "garage": ("garage",),
    "hallway": ("hallway", "hall"),
    "nursery": ("nursery",),
    "office": ("office", "study"),
    "pantry": ("pantry",),
    "library": ("library",),
    "lounge": ("lounge", "living room"),
}

UNKNOWN_DEVICES = ("toaster", "dishwasher", "printer", "piano", "bicycle", "fridge", "blender", "doorbell", "sprinkler")
UNKNOWN_ROOMS = ("dungeon", "greenhouse", "sauna", "ballroom", "stable", "chapel", "tower", "barn", "treehouse")

OPPOSITES = {"on": "off", "off": "on", "open": "close", "close": "open", "lock": "unlock", "unlock": "lock"}

# {} is the target. A full phrase can be wrapped politely; a phrase of few words cannot.
SPOKEN = {
    "on": ("turn on {}", "switch on {}", "turn {} on", "switch {} on", "start {}", "put {} on"),
    "off": ("turn off {}", "switch off {}", "turn {} off", "switch {} off", "stop {}", "shut off {}"),
    "open": ("open {}", "open up {}", "get {} open"),
    "close": ("close {}", "shut {}", "get {} closed"),
    "lock": ("lock {}", "lock up {}", "get {} locked"),
    "unlock": ("unlock {}", "get {} unlocked"),
    "set": ("set {} to {value}", "put {} at {value}", "bring {} to {value}", "adjust {} to {value}"),
}
SPOKEN_SHORT = {
    "on": ("{} on", "on {}"),
    "off": ("{} off", "off {}"),
    "open": ("{} open", "open {}"),
    "close": ("{} closed", "close {}"),
    "lock": ("{} locked", "lock {}"),
    "unlock": ("{} unlocked", "unlock {}"),
    "set": ("{} {value}", "{} to {value}", "{value} {}"),
}
SPOKEN_WITHOUT_VALUE = ("set {}", "adjust {}", "set {} to", "bring {} to")

TARGETS = ("the {room} {device}", "the {device} in the {room}", "the {room}'s {device}")
TARGETS_SHORT = ("{room} {device}", "{device} {room}", "{device} in {room}", "{device}, {room},")

PLAIN = ("{}", "{}.", "{}!")
POLITE = (
    "please {}",
    "{}, please",
    "could you {}?",
    "would you kindly {}?",
    "can you please {}?",
    "i would like you to {}.",
    "be so kind and {}.",
    "may I ask you to {}?",
    "{}, thank you",
    "{}, if you would.",
)
CLUMSY = (
    "{}",
    "uh {}",
    "{} pls",
    "erm, {}",
    "ok so {}",
    "{} thx",
    "hey {}",
    "{} or whatever",
    "um {} i guess",
    "yo, {}",
)

HOURS = ("twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
DELAYS_IN_WORDS = {
    "five minutes": 5,
    "ten minutes": 10,
    "a quarter of an hour": 15,
    "twenty minutes": 20,
    "half an hour": 30,
    "an hour": 60,
    "two hours": 120,
    "three hours": 180,
}


def make_rows(seed: int, *, errors: bool = True) -> dict[str, list[dict]]:
    """Return `train`, `validation` and `test`, each a list of `{"messages": [user, assistant], "rejected": [wrong]}`.

    `wrong` is a message of the assistant too. No two rows of any split ask the same thing, even when case and
    punctuation are ignored. Without `errors` every request can be carried out.
    """
    error_share, test_error_share = (ERROR_SHARE, TEST_ERROR_SHARE) if errors else (0.0, 0.0)
    rng = Random(f"commands rows {seed}")
    known, unseen = split_pairs(seed)
    taken: set[str] = set()
    test = _draw_distinct(rng, unseen, TEST_ROWS_OF_UNSEEN_PAIRS, taken, error_share=0.0)
    test += _draw_distinct(rng, known, TEST_ROWS - TEST_ROWS_OF_UNSEEN_PAIRS, taken, error_share=test_error_share)
    validation = _draw_distinct(rng, known, VALIDATION_ROWS, taken, error_share)
    train = _draw_distinct(rng, known, TRAIN_ROWS, taken, error_share)
    rng.shuffle(test)
    listens_badly = Random(f"commands rejected {seed}")
    return {
        name: [_make_row(command, _make_rejected(listens_badly, command, known)) for command in split]
        for name, split in (("train", train), ("validation", validation), ("test", test))
    }


def make_documents(seed: int, count: int) -> list[str]:
    """Return `count` one-line texts that teach the words and what they mean, in a notation that is not the answers'.

    Most read `request -> (key=value;...)`; some only say what a time of day means, some are lines of an inventory.
    None repeats a request of any split or mentions a pair of device and room that is kept for the test.
    """
    rng = Random(f"commands documents {seed}")
    known, _ = split_pairs(seed)
    taken = {normalize(row["messages"][0]["content"]) for split in make_rows(seed).values() for row in split}
    moments = [_draw_clock_time(rng) for _ in range(int(count * MOMENT_SHARE))]
    records = [_make_inventory_line(rng, *rng.choice(known)) for _ in range(int(count * RECORD_SHARE))]
    requests = _draw_distinct(rng, known, count - len(moments) - len(records), taken, error_share=0.35)
    texts = records + [_write_document(request, answer) for request, answer in moments]
    texts += [_write_document(command.request, command.answer) for command in requests]
    rng.shuffle(texts)
    return texts


def split_pairs(seed: int) -> tuple[list[DeviceInRoom], list[DeviceInRoom]]:
    """Split all pairs of a device and a room: what may be learned from, and what appears in the test alone."""
    rng = Random(f"commands pairs {seed}")
    rooms = rng.sample(list(ROOMS), len(DEVICES) * UNSEEN_ROOMS_PER_DEVICE)
    unseen = {(device.name, room) for device, room in zip(DEVICES, rooms, strict=True)}
    pairs = [(device, room) for device in DEVICES for room in ROOMS]
    return (
        [pair for pair in pairs if (pair[0].name, pair[1]) not in unseen],
        [pair for pair in pairs if (pair[0].name, pair[1]) in unseen],
    )


def normalize(request: str) -> str:
    """Return the request without case and punctuation: two that are equal in this form ask in the same words."""
    kept = "".join(c if c.isalnum() or c in "%:" else " " for c in request.casefold())
    return " ".join(kept.split())


def encode_answer(answer: CommandAnswer) -> str:
    """Return the answer as the dataset writes it: no spaces, keys in the order given."""
    return json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


def _make_row(command: Command, rejected: CommandAnswer) -> dict:
    return {
        "messages": [
            {"role": "user", "content": command.request},
            {"role": "assistant", "content": encode_answer(command.answer)},
        ],
        "rejected": [{"role": "assistant", "content": encode_answer(rejected)}],
    }


def _make_rejected(rng: Random, command: Command, known: Sequence[DeviceInRoom]) -> CommandAnswer:
    """Return an answer in which one thing is wrong; a pair that it names wrongly is one of those `known`."""
    answer = command.answer
    if command.unnoticed and rng.random() < 0.5:
        return command.unnoticed
    wrong = "error" if command.unnoticed else rng.choice((*answer, "error"))
    if wrong == "error":
        return {"error": rng.choice([error for error in ERRORS if error != answer.get("error")])}
    device = next(device for device in DEVICES if device.name == answer["device"])
    others: Sequence[str | int]
    match wrong:
        case "action":
            answer = {key: value for key, value in answer.items() if key != "value"}
            others = [action for action in device.actions if action != "set"]
        case "device":
            others = [other.name for other, room in known if room == answer["room"]]
        case "room":
            others = [room for other, room in known if other is device]
        case "value":
            others = device.values
        case "delay":
            others = range(2, 60)
        case _:
            hour, minute = str(answer["time"]).split(":")
            # Half a day off is what am and pm are for.
            others = [f"{other}:{minute}" for other in (*range(24), *[(int(hour) + 12) % 24] * 12)]
    return answer | {wrong: rng.choice([other for other in others if other != answer[wrong]])}


def _write_document(request: str, answer: CommandAnswer) -> str:
    return f"{request} {ARROW} (" + ";".join(f"{key}={value}" for key, value in answer.items()) + ")"


def _make_inventory_line(rng: Random, device: Device, room: str) -> str:
    """Return a line of a household's inventory: the marks of JSON, in records that answer nothing."""
    facts: list[tuple[str, str | int]] = [("item", device.name), ("place", room), ("age", rng.randrange(60))]
    if rng.random() < 0.5:
        facts.append(("checked", _draw_clock_time(rng)[1]["time"]))
    rng.shuffle(facts)
    return json.dumps(dict(facts), separators=(",", ":"))


def _draw_distinct(
    rng: Random, pairs: Sequence[DeviceInRoom], count: int, taken: set[str], error_share: float
) -> list[Command]:
    """Draw `count` requests, none of which is in `taken`, with their answers; add them to `taken`."""
    drawn: list[Command] = []
    while len(drawn) < count:
        command = _draw_faulty(rng, pairs) if rng.random() < error_share else _draw_valid(rng, pairs)
        key = normalize(command.request)
        if key not in taken:
            taken.add(key)
            drawn.append(command)
    return drawn


def _draw_valid(rng: Random, pairs: Sequence[DeviceInRoom]) -> Command:
    device, room = rng.choice(pairs)
    action = _choose_action(rng, device)
    answer: CommandAnswer = {"action": action, "device": device.name, "room": room}
    phrase = ""
    if action == "set":
        value = rng.choice(device.values)
        answer["value"] = value
        phrase = _phrase_value(rng, device, value)
    when, timing = _draw_time(rng)
    wording = _phrase(rng, action, rng.choice(device.aliases), rng.choice(ROOMS[room]), phrase, when)
    return Command(wording, answer | timing)


def _draw_faulty(rng: Random, pairs: Sequence[DeviceInRoom]) -> Command:
    """Return a request with exactly one thing wrong, and the error that names it."""
    device, room_name = rng.choice(pairs)
    name, room = rng.choice(device.aliases), rng.choice(ROOMS[room_name])
    action = _choose_action(rng, device)
    value = rng.choice(device.values) if device.values else 0
    phrase = _phrase_value(rng, device, value) if device.values else ""
    when, timing = _draw_time(rng)
    error = rng.choices(list(ERRORS), weights=list(ERRORS.values()))[0]
    match error:
        case "unknown device":
            action = rng.choice(("on", "off", "open", "close"))
            wording = _phrase(rng, action, rng.choice(UNKNOWN_DEVICES), room, "", when)
        case "unknown room":
            wording = _phrase(rng, action, name, rng.choice(UNKNOWN_ROOMS), phrase, when)
        case "impossible":
            action = rng.choice([a for a in OPPOSITES if a not in device.actions])
            wording = _phrase(rng, action, name, room, "", when)
        case "contradictory":
            action = rng.choice([a for a in device.actions if a in OPPOSITES])
            wording, timing = _phrase_contradiction(rng, action, name, room), {}
        case "out of range":
            device, room_name = rng.choice([pair for pair in pairs if pair[0].values])
            action, value = "set", rng.choice(device.values_out_of_range)
            phrase = _phrase_value(rng, device, value)
            wording = _phrase(rng, action, rng.choice(device.aliases), rng.choice(ROOMS[room_name]), phrase, when)
        case "missing value":
            device, room_name = rng.choice([pair for pair in pairs if pair[0].values])
            action, value, timing = "set", device.values[0], {}
            target = _phrase_target(rng, TARGETS, rng.choice(device.aliases), rng.choice(ROOMS[room_name]))
            wording = _wrap(rng, PLAIN + POLITE, rng.choice(SPOKEN_WITHOUT_VALUE).format(target), "")
        case "missing device":
            action = rng.choice(list(OPPOSITES))
            target = rng.choice(("it in the {}", "that thing in the {}", "something in the {}")).format(room)
            wording = _wrap(rng, PLAIN + POLITE, rng.choice(SPOKEN[action]).format(target), when)
        case _:
            target = rng.choice(("the {}", "my {}")).format(name)
            spoken = rng.choice(SPOKEN[action]).format(target, value=phrase)
            wording = _wrap(rng, PLAIN + POLITE, spoken, when)
    unnoticed: CommandAnswer = {"action": action, "device": device.name, "room": room_name}
    if action == "set":
        unnoticed["value"] = value
    return Command(wording, {"error": error}, unnoticed | timing)


def _phrase_contradiction(rng: Random, action: str, device: str, room: str) -> str:
    target = _phrase_target(rng, TARGETS, device, room)
    opposite = rng.choice(SPOKEN[OPPOSITES[action]]).format("them" if device.endswith("s") else "it")
    joined = rng.choice(("{} and {}", "{} and also {}", "{} but {}")).format(
        rng.choice(SPOKEN[action]).format(target), opposite
    )
    return _wrap(rng, PLAIN + POLITE, joined, "")


def _phrase(rng: Random, action: str, device: str, room: str, value: str, when: str) -> str:
    if rng.random() < 0.25:
        spoken = rng.choice(SPOKEN_SHORT[action])
        return _wrap(rng, CLUMSY, spoken.format(_phrase_target(rng, TARGETS_SHORT, device, room), value=value), when)
    spoken = rng.choice(SPOKEN[action])
    wrappers = rng.choice((PLAIN, POLITE, POLITE, CLUMSY))
    return _wrap(rng, wrappers, spoken.format(_phrase_target(rng, TARGETS, device, room), value=value), when)


def _phrase_target(rng: Random, forms: Sequence[str], device: str, room: str) -> str:
    return rng.choice(forms).format(device=device, room=room)


def _choose_action(rng: Random, device: Device) -> str:
    # Setting is half of what is asked of a device that can be set: it has the most to say.
    return rng.choice((*device.actions, "set") if device.values else device.actions)


def _phrase_value(rng: Random, device: Device, value: int) -> str:
    return rng.choice(device.value_phrases).format(value)


def _wrap(rng: Random, wrappers: Sequence[str], spoken: str, when: str) -> str:
    first = bool(when) and rng.random() < 0.25
    text = rng.choice(wrappers).format(f"{spoken} {when}" if when and not first else spoken.rstrip(","))
    if first:
        text = f"{when}, {text}"
    # People in a hurry use no capitals.
    return text[0].upper() + text[1:] if wrappers is not CLUMSY and rng.random() < 0.5 else text


def _draw_time(rng: Random) -> tuple[str, CommandAnswer]:
    """Return the wording of a moment and its meaning; three in ten requests name none."""
    kind = rng.random()
    if kind < 0.3:
        return "", {}
    if kind < 0.5:
        minutes = rng.randrange(2, 60)
        form = rng.choice(("in {} minutes", "after {} minutes", "{} minutes from now"))
        return form.format(minutes), {"delay": minutes}
    if kind < 0.6:
        words, minutes = rng.choice(list(DELAYS_IN_WORDS.items()))
        return f"in {words}", {"delay": minutes}
    return _draw_clock_time(rng)


def _draw_clock_time(rng: Random) -> tuple[str, CommandAnswer]:
    hour, minute = rng.randrange(24), rng.choice((0, 0, 5, 10, 15, 20, 25, 30, 30, 35, 40, 45, 50, 55))
    kind = rng.random()
    if kind < 0.05:
        word, time = rng.choice((("noon", "12:00"), ("midnight", "0:00")))
        return f"at {word}", {"time": time}
    if kind < 0.25:
        # In words, twelve hours are all there are: they are taken for the morning's.
        past = rng.randrange(1, 12)
        words, minute = rng.choice((("half past {}", 30), ("quarter past {}", 15), ("{} o'clock", 0)))
        return "at " + words.format(HOURS[past]), {"time": f"{past}:{minute:02}"}
    time = f"{hour}:{minute:02}"
    if kind < 0.6 and hour % 12:  # nobody agrees on what 12 am is
        half = "am" if hour < 12 else "pm"
        wording = f"{hour % 12}:{minute:02} {half}" if minute else f"{hour % 12} {half}"
        return f"at {wording}", {"time": time}
    return (f"at {time}" if minute else f"at {hour} o'clock"), {"time": time}
