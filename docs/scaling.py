"""Write the tables of docs/scaling.md: what trainings take on paper, from `lathe doctor --for`.

python docs/scaling.py
"""

import re
from pathlib import Path

from lathe.common.text import readable_bytes, readable_seconds
from lathe.doctor.scaling import ModelNeeds, list_models, measure_needs, parse_gpus

PAGE = Path(__file__).with_name("scaling.md")
GPUS = ("H100", "8xH100")
ROWS = 10_000
START, END = "<!-- trainings -->", "<!-- end of trainings -->"


def main() -> None:
    """Put the tables between the marks of the page."""
    lines = []
    for gpus in GPUS:
        needs = [measure_needs(model, parse_gpus(gpus), ROWS, []) for model in list_models()]
        lines += ["", *write_table(needs)]
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join([START, *lines, "", END])
    PAGE.write_text(re.sub(f"{START}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


def write_table(models: list[ModelNeeds]) -> list[str]:
    """Return a Markdown table with a line for each training of each model on the same GPUs."""
    gpus = models[0].gpus
    lines = [
        f"| {gpus.count} x {gpus.name} | training | memory on one | GPUs a copy | tokens/s | {ROWS:,} rows | "
        "between GPUs | disk |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in models:
        for number, needs in enumerate(model.trainings):
            cells = [model.model if number == 0 else "", needs.training, readable_bytes(needs.bytes_on_one)]
            if needs.shards is None:
                cells += ["does not fit", "", "", ""]
            else:
                network = f"{needs.gigabytes_per_second:,.0f} GB/s" if needs.gigabytes_per_second else ""
                cells += [str(needs.shards), f"{needs.tokens_per_second:,.0f}", readable_seconds(needs.seconds or 0)]
                cells.append(network)
            lines.append(f"| {' | '.join([*cells, readable_bytes(needs.disk_bytes)])} |")
    return lines


if __name__ == "__main__":
    main()
