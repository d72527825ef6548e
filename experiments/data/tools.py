"""Write requests to an assistant with tools, and the calls that answer them, for the preset `tools`.

    python experiments/data/tools.py

Each row has two or three of twelve tools, in the form of OpenAI's fine-tuning files. Most requests need one call, some
two, and some none, as no tool of the row can do what is asked:

    Text Priya that dinner is ready, and set a timer for 12 minutes.
    send_message(to="Priya", text="dinner is ready"), set_timer(minutes=12)

No two rows of any split ask the same thing. The same `--seed` gives the same files.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from lathe.common.jsonl import write_jsonl

ROOT = Path(__file__).resolve().parents[2]
ROWS = {"train": 2_000, "validation": 200, "test": 300}
TWO_CALLS, NO_CALL = 0.14, 0.12  # shares of the rows
NO_TOOL = "I have no tool for that."

CITIES = (
    *("Oslo", "Lima", "Cairo", "Porto", "Kyoto", "Boston", "Nairobi", "Prague", "Madrid", "Dublin", "Seoul", "Turin"),
    *("Quito", "Bergen", "Geneva", "Austin", "Hanoi", "Zagreb", "Tunis", "Perth", "Denver", "Gdansk", "Havana", "Riga"),
)
PEOPLE = ("Anna", "Priya", "Tom", "Mei", "Omar", "Lucia", "Sven", "Grace", "Ivan", "Fatima", "Noah", "Elena", "Kofi")
ROOMS = ("kitchen", "bedroom", "bathroom", "office", "hallway", "garage")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
CURRENCIES = {"USD": "dollars", "EUR": "euros", "GBP": "pounds", "JPY": "yen", "CHF": "francs", "INR": "rupees"}
LANGUAGES = ("french", "german", "spanish", "italian", "polish", "turkish")
PHRASES = ("good morning", "where is the station", "I am hungry", "see you soon", "thank you", "how much is it")
TEXTS = ("I am late", "dinner is ready", "call me back", "the meeting moved", "bring the keys", "happy birthday")
ARTISTS = ("Miles Davis", "Adele", "Daft Punk", "Nina Simone", "Bach", "Björk", "Queen", "Fela Kuti")
ITEMS = ("eggs", "apples", "batteries", "candles", "lemons", "envelopes", "tomatoes", "onions")
PLACES = ("Bella Napoli", "The Golden Wok", "Chez Marie", "Taj Palace", "Green Fork", "Harbour Grill")
EVENTS = ("dentist", "team lunch", "piano lesson", "yoga class", "budget review", "parents' evening")
OTHER = (
    "How tall is the Eiffel Tower?",
    "Tell me a joke about cats.",
    "Who wrote Don Quixote?",
    "What is the square root of 144?",
    "Write a haiku about rain.",
    "Why is the sky blue?",
)


def text(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)} if values else {"type": "string"}


NUMBER, INTEGER = {"type": "number"}, {"type": "integer"}


class Tool(NamedTuple):
    """A tool with what it does, its parameters, and a way to draw a request for it: (wording, arguments)."""

    name: str
    description: str
    parameters: dict[str, dict[str, Any]]
    draw: Callable[[Random], tuple[str, dict[str, Any]]]

    def define(self) -> dict[str, Any]:
        """Return the definition of the function in OpenAI's form."""
        schema = {"type": "object", "properties": self.parameters, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


def draw_weather(rng: Random) -> tuple[str, dict[str, Any]]:
    city, unit = rng.choice(CITIES), rng.choice(("celsius", "fahrenheit"))
    wording = rng.choice(
        ("what is the weather in {} in {}", "tell me how warm it is in {} in {}", "give me {} weather in {}")
    )
    return wording.format(city, unit), {"city": city, "unit": unit}


def draw_timer(rng: Random) -> tuple[str, dict[str, Any]]:
    minutes = rng.randrange(1, 91)
    wording = rng.choice(("set a timer for {} minutes", "remind me in {} minutes", "start a countdown of {} minutes"))
    return wording.format(minutes), {"minutes": minutes}


def draw_currency(rng: Random) -> tuple[str, dict[str, Any]]:
    amount = rng.choice((rng.randrange(5, 2000), rng.randrange(100, 9999) / 100))
    source, target = rng.sample(list(CURRENCIES), 2)
    wording = rng.choice(("convert {} {} to {}", "how much is {} {} in {}", "change {} {} into {}"))
    spoken = wording.format(amount, CURRENCIES[source], CURRENCIES[target])
    return spoken, {"amount": amount, "source": source, "target": target}


def draw_message(rng: Random) -> tuple[str, dict[str, Any]]:
    to, said = rng.choice(PEOPLE), rng.choice(TEXTS)
    wording = rng.choice(("text {} that {}", "let {} know that {}", "send {} a message: {}"))
    return wording.format(to, said), {"to": to, "text": said}


def draw_music(rng: Random) -> tuple[str, dict[str, Any]]:
    artist, volume = rng.choice(ARTISTS), rng.randrange(5, 101, 5)
    wording = rng.choice(
        ("play {} at volume {}", "put on some {} with the volume at {}", "I want to hear {} at {} percent")
    )
    return wording.format(artist, volume), {"artist": artist, "volume": volume}


def draw_thermostat(rng: Random) -> tuple[str, dict[str, Any]]:
    room, degrees = rng.choice(ROOMS), rng.randrange(30, 50) / 2
    spoken = rng.choice(("heat the {} to {} degrees", "make it {1} degrees in the {0}", "set the {} to {} degrees"))
    return spoken.format(room, degrees), {"room": room, "degrees": degrees}


def draw_event(rng: Random) -> tuple[str, dict[str, Any]]:
    title, day, hour = rng.choice(EVENTS), rng.choice(DAYS), rng.randrange(7, 22)
    wording = rng.choice(
        ("put {} in my calendar on {} at {}", "schedule {} for {} at {}", "add {} on {} at {} to my calendar")
    )
    return wording.format(title, day.capitalize(), f"{hour}:00"), {"title": title, "day": day, "hour": hour}


def draw_flight(rng: Random) -> tuple[str, dict[str, Any]]:
    (origin, destination), day = rng.sample(CITIES, 2), rng.choice(DAYS)
    wording = rng.choice(
        ("find flights from {} to {} on {}", "I need to fly from {} to {} on {}", "any flights {} to {} on {}")
    )
    spoken = wording.format(origin, destination, day.capitalize())
    return spoken, {"origin": origin, "destination": destination, "day": day}


def draw_translation(rng: Random) -> tuple[str, dict[str, Any]]:
    said, language = rng.choice(PHRASES), rng.choice(LANGUAGES)
    wording = rng.choice(('translate "{}" into {}', 'how do you say "{}" in {}', 'what is "{}" in {}'))
    return wording.format(said, language.capitalize()), {"text": said, "language": language}


def draw_shopping(rng: Random) -> tuple[str, dict[str, Any]]:
    item, quantity = rng.choice(ITEMS), rng.randrange(2, 25)
    wording = rng.choice(("put {} {} on the shopping list", "add {} {} to my list", "we need {} {}, write it down"))
    return wording.format(quantity, item), {"item": item, "quantity": quantity}


def draw_table(rng: Random) -> tuple[str, dict[str, Any]]:
    place, people, hour = rng.choice(PLACES), rng.randrange(2, 11), rng.randrange(17, 23)
    wording = rng.choice(
        ("book a table for {1} at {0} at {2}", "reserve {0} for {1} people at {2}", "get us {1} seats at {0} at {2}")
    )
    return wording.format(place, people, f"{hour}:00"), {"restaurant": place, "people": people, "hour": hour}


def draw_light(rng: Random) -> tuple[str, dict[str, Any]]:
    room, state = rng.choice(ROOMS), rng.choice(("on", "off"))
    wording = rng.choice(("turn {1} the light in the {0}", "switch the {} light {}", "lights {1} in the {0}"))
    return wording.format(room, state), {"room": room, "state": state}


TOOLS = (
    Tool("get_weather", "Weather of a city.", {"city": text(), "unit": text("celsius", "fahrenheit")}, draw_weather),
    Tool("set_timer", "Start a timer.", {"minutes": INTEGER}, draw_timer),
    Tool(
        "convert_currency",
        "Convert money.",
        {"amount": NUMBER, "source": text(*CURRENCIES), "target": text(*CURRENCIES)},
        draw_currency,
    ),
    Tool("send_message", "Send a text message.", {"to": text(), "text": text()}, draw_message),
    Tool("play_music", "Play an artist.", {"artist": text(), "volume": INTEGER}, draw_music),
    Tool("set_thermostat", "Heat a room.", {"room": text(*ROOMS), "degrees": NUMBER}, draw_thermostat),
    Tool("create_event", "Add to the calendar.", {"title": text(), "day": text(*DAYS), "hour": INTEGER}, draw_event),
    Tool("find_flights", "Search flights.", {"origin": text(), "destination": text(), "day": text(*DAYS)}, draw_flight),
    Tool("translate", "Translate a text.", {"text": text(), "language": text(*LANGUAGES)}, draw_translation),
    Tool("add_to_list", "Add to the shopping list.", {"item": text(), "quantity": INTEGER}, draw_shopping),
    Tool("book_table", "Book a restaurant.", {"restaurant": text(), "people": INTEGER, "hour": INTEGER}, draw_table),
    Tool("switch_light", "Switch a light.", {"room": text(*ROOMS), "state": text("on", "off")}, draw_light),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data/local/tools", help="folder to write")
    parser.add_argument("--seed", type=int, default=42, help="of the random choices")
    arguments = parser.parse_args()
    rng, taken = Random(f"tools {arguments.seed}"), set[str]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        write_jsonl(draw_rows(rng, count, taken), arguments.out / f"{split}.jsonl")
    print(ROWS)


def draw_rows(rng: Random, count: int, taken: set[str]) -> list[dict[str, Any]]:
    """Draw `count` requests that are not in `taken`, with their answers, and add them to it."""
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        row = draw_row(rng)
        request = row["messages"][0]["content"].casefold().strip(".!? ")
        if request not in taken or row["messages"][1]["content"] == NO_TOOL:
            taken.add(request)
            rows.append(row)
    return rows


def draw_row(rng: Random) -> dict[str, Any]:
    kind = rng.random()
    asked = rng.sample(TOOLS, 2 if kind < TWO_CALLS else 1)
    wordings, calls = [], []
    for number, tool in enumerate(asked, start=1):
        wording, arguments = tool.draw(rng)
        wordings.append(wording)
        function = {"name": tool.name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{number}", "type": "function", "function": function})
    others = rng.sample([tool for tool in TOOLS if tool not in asked], 2)
    given = [*asked, *others][: rng.choice((2, 3))]
    answer: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": calls}
    request = rng.choice((", and ", " and then ", ", then ")).join(wordings)
    if kind > 1 - NO_CALL:
        given, answer = others, {"role": "assistant", "content": NO_TOOL}
        request = rng.choice((request, rng.choice(OTHER)))
    rng.shuffle(given)
    messages = [{"role": "user", "content": phrase(rng, request)}, answer]
    return {"messages": messages, "tools": [tool.define() for tool in given], "parallel_tool_calls": True}


def phrase(rng: Random, request: str) -> str:
    """Return a request as people write it: with a greeting, a please, a full stop, or none of them."""
    wrapped = rng.choice(("{}", "{}", "please {}", "{}, please", "hey, {}", "can you {}", "{} for me")).format(request)
    if request.endswith(("?", ".")):
        wrapped = request
    ended = wrapped if wrapped[-1] in ".?!" else wrapped + rng.choice(("", ".", "!"))
    return ended[0].upper() + ended[1:] if rng.random() < 0.7 else ended


if __name__ == "__main__":
    main()
