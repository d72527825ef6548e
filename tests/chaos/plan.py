"""Plan: which faults are injected where, from a seed; each has a random generator of its own."""

from dataclasses import dataclass
from random import Random

from chaos.processes import VICTIMS

ITEMS = (
    *("local_files@model", "local_files@dataset", "local_files_encoder", "fetch@model", "fetch@dataset"),
    *("fetch_encoder", "preprocess", "estimate", "train", "merge", "convert_base", "convert_merged", "convert_adapter"),
    *("check_converted_base", "check_converted_merged", "imatrix", "quantize@Q8_0", "quantize@Q4_K_M"),
    *("generate@base", "generate@merged", "generate_few_shot", "generate_quantized@Q8_0"),
    *("generate_quantized@Q4_K_M", "judge", "evaluate", "card"),
)
# Those that write files which DVC caches, larger than a page.
LARGE = (
    *("fetch@model", "fetch@dataset", "preprocess", "train", "merge", "convert_base", "convert_merged"),
    *("quantize@Q8_0", "generate@merged", "evaluate"),
)
# Kinds of faults of an item, the items that they are injected into in turn, and how often.
OF_ITEMS = (
    *((f"SIGKILL of {victim}", ITEMS, 11) for victim in VICTIMS),
    ("three kills in a row", LARGE, 3),
    ("full disk", LARGE, 7),
    ("file size limit", LARGE, 5),
    ("memory limit", LARGE, 5),
    ("read-only folder", LARGE, 5),
    ("two at once", LARGE, 5),
    ("damaged cache object", LARGE[:-1], 5),
    ("lost cache object", LARGE[:-1], 2),
    ("truncated output", LARGE, 5),
    ("files from the future", LARGE, 3),
    ("clock set back", LARGE, 3),
)
OF_COMMANDS = {
    "lathe run": 4,
    "lathe run --temp": 2,
    "lathe search": 2,
    "lathe mirror": 3,
    "dvc push": 2,
    "lathe push-runs": 2,
    "dvc pull": 2,
    "studio": 2,
    "queue": 2,
    "make setup": 1,
    "merge of two branches": 2,
}


@dataclass(frozen=True)
class Injection:
    """A fault of a kind, into an item of the pipeline or a command; `seed` is that of its random generator."""

    number: int
    kind: str
    subject: str
    seed: str

    @property
    def of_item(self) -> bool:
        """Whether it is of an item of the pipeline."""
        return self.subject in ITEMS

    @property
    def random(self) -> Random:
        """A new random generator, the same each time."""
        return Random(self.seed)


def make_plan(seed: int) -> list[Injection]:
    """Return all injections in order, the kinds mixed, so that a part of them has some of each."""
    rng = Random(seed)
    chosen: list[tuple[str, str]] = []
    begin = 0
    for kind, items, count in OF_ITEMS:
        if kind.startswith("SIGKILL"):  # one kind goes on where the other has ended: every item is killed
            turn = [items[(begin + number) % len(items)] for number in range(count)]
            begin += count
        else:
            turn = rng.sample(items, min(count, len(items)))
        chosen += [(kind, item) for item in turn]
    chosen += [("SIGKILL", subject) for subject, count in OF_COMMANDS.items() for _ in range(count)]
    chosen = [("dvc.lock conflict" if subject.startswith("merge of") else kind, subject) for kind, subject in chosen]
    rng.shuffle(chosen)
    plan: list[Injection] = []
    for number, (kind, subject) in enumerate(chosen, 1):
        time = chosen[: number - 1].count((kind, subject)) + 1
        plan.append(Injection(number, kind, subject, f"{seed} {kind} {subject} {time}"))  # another order changes none
    return plan
