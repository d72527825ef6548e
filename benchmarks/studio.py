"""How long the studio's overview takes with many experiments, in Chromium.

python benchmarks/studio.py [--experiments 500] [--repeats 5]

Clones this checkout's last commit, makes experiments on it as `benchmarks/experiments.py` does, starts the studio there
and loads the overview: until the last row of the table is in the page, with a fresh studio (the page is there at once,
and the rows come as they have been read) and then with one that has read them. Prints a Markdown table.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
from playwright.sync_api import sync_playwright

import experiments

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--repeats", type=int, default=5, help="loads of the warm page (default: 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-studio-") as name:
        clone = Path(name) / "lathe"
        subprocess.run(["git", "clone", "--quiet", str(experiments.ROOT), str(clone)], check=True)
        for number in range(arguments.experiments):
            experiments.make_experiment(clone, number)
        studio = subprocess.Popen(
            [sys.executable, "-m", "lathe", "studio", "--port", "0", "--no-browser"],
            cwd=clone,
            env={**os.environ, "PYTHONPATH": str(clone / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert studio.stdout
            cold, warm = load_pages(studio.stdout.readline().strip(), arguments.experiments, arguments.repeats)
        finally:
            studio.kill()
            studio.wait()
    sys.stdout.write(
        f"{machine.describe()}\n\n| overview, {arguments.experiments} experiments | seconds |\n| --- | ---: |\n"
    )
    sys.stdout.write(f"| page without rows, cold | {cold[0]:.2f} |\n| all rows, cold | {cold[1]:.2f} |\n")
    sys.stdout.write(f"| all rows, warm, median of {len(warm)} | {statistics.median(warm):.2f} |\n")
    sys.stdout.write(f"| all rows, warm, slowest | {max(warm):.2f} |\n")


def load_pages(link: str, count: int, repeats: int) -> tuple[tuple[float, float], list[float]]:
    """Return the seconds of the cold page without and with rows, and of the warm ones."""
    address = re.sub("/open.*", "", link)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        row = page.locator(f"table.runs tbody tr >> nth={count}")  # the last commit is one more
        begun = time.perf_counter()
        page.goto(link, wait_until="commit")
        page.wait_for_url(f"{address}/", wait_until="commit")
        page.wait_for_selector("#table")
        empty = time.perf_counter() - begun
        row.wait_for(state="attached", timeout=120_000)
        full = time.perf_counter() - begun
        warm = []
        for _ in range(repeats):
            begun = time.perf_counter()
            page.goto(f"{address}/", wait_until="commit")
            row.wait_for(state="attached", timeout=120_000)
            warm.append(time.perf_counter() - begun)
        browser.close()
    return (empty, full), warm


if __name__ == "__main__":
    main()
