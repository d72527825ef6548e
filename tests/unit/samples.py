"""Texts and conversations like those people have: many languages, code, emoji, odd white space; the same every time."""

import random
from typing import Any

SENTENCES = (
    "What is the capital of Australia?",
    "Die Straße ist länger, als man denkt – „fast“ zehn Kilometer.",
    "Сколько будет 2 + 2? Ответ: четыре, разумеется!",
    "¿Dónde está el baño? ¡Mañana será otro día!",
    "敏捷的棕色狐狸跳过了懒狗。价格：123元",
    "いろはにほへと ちりぬるを。カタカナ、漢字とABC",
    "다람쥐 헌 쳇바퀴에 타고파",
    "السَّلامُ عَلَيْكُمْ ١٢٣",
    "שלום עולם",
    "नमस्ते दुनिया, कैसे हो?",
    "สวัสดีชาวโลก",
    "🙂 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ done ✨🚀",
    "def f(x: int = 0) -> list[int]:\n    return [i ** 2 for i in range(x)]  # squares\n\n\tif a != b:\n\t\tpass",
    '```json\n{"action": "on", "value": null, "list": [1, 2.5, -3e-7], "s": "a\\"b\\\\c"}\n```',
    "<p class='x'>a &amp; b</p> SELECT * FROM t WHERE id = 1; -- {{ not jinja }} {% raw %}",
    "| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n- one\n- two\n\n1. x",
    "user: assistant: system: [INST] quoted [/INST] <<SYS>> ### Response:",
    "no\u00a0break, zero\u200bwidth, thin\u2009space, ideographic\u3000space\u2028line separator",
    "e\u0301 is not \u00e9; \ufb01 is not fi; \u00bd \u00b2 \u2122",
    "I'M SHOUTING, y'ALL'VE don't. 0 1 12 123 1234 123456789 3.14159 0x1F 1e-10",
    "C:\\Users\\x https://example.com/a/b?c=d&e=%20f#g user@example.com",
    "two  spaces,\ttabs\t\tand\r\nwindows lines\n\n\n\nfour newlines",
)

AROUND = ("", "", "", " ", "\n", "\n\n", "  ", "\t")  # what people leave before and after a text


def texts(count: int, seed: int) -> list[str]:
    """Return so many texts of one to three sentences, no two alike."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        sentences = chance.choices(SENTENCES, k=chance.randint(1, 3))
        whole = chance.choice([" ", "\n", "\n\n"]).join([*sentences, f"({number})"])
        made.append(chance.choice(AROUND) + whole + chance.choice(AROUND))
    return made


def conversations(count: int, seed: int, *, system: bool = True) -> list[list[dict[str, Any]]]:
    """Return so many conversations of one to four turns, some with a system message."""
    chance = random.Random(seed)
    source = iter(texts(count * 9, seed))
    made = []
    for _ in range(count):
        chat = [{"role": "system", "content": next(source)}] if system and chance.random() < 0.3 else []
        for _ in range(chance.randint(1, 4)):
            chat += [{"role": "user", "content": next(source)}, {"role": "assistant", "content": next(source)}]
        made.append(chat)
    return made


def tool_conversations(count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Return so many conversations in which the assistant calls a tool, reads its answer and replies; some end with a
    call.
    """
    chance = random.Random(seed)
    source = iter(texts(count * 6, seed))
    made = []
    for number in range(count):
        arguments = {"city": next(source), "days": number, "metric": True, "hours": [6, 12]}
        call = {"type": "function", "id": f"call{number:05}", "function": {"name": "weather", "arguments": arguments}}
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": next(source)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        if chance.random() < 0.8:
            chat += [
                {"role": "tool", "content": next(source), "name": "weather", "tool_call_id": f"call{number:05}"},
                {"role": "assistant", "content": next(source)},
                {"role": "user", "content": next(source)},
                {"role": "assistant", "content": next(source)},
            ]
        made.append(chat)
    return made
