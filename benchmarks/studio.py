"""How long the studio's overview takes with many experiments, in Chromium, and what a live page costs a training.

python benchmarks/studio.py [--experiments 500] [--repeats 5]
python benchmarks/studio.py --live [--pairs 12] [--seconds 20]

Clones this checkout's last commit, makes experiments on it as `benchmarks/experiments.py` does, starts the studio there
and loads the overview: until the last row of the table is in the page, with a fresh studio (the page is there at once,
and the rows come as they have been read) and then with one that has read them. Prints a Markdown table.

With --live it starts a training of the toy from the studio, and opens and closes the page of the command beside it, in
turn for so many seconds: what is compared are the steps per second within each pair, of which every other one begins
with the open page. Studio, browser and training share the machine.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import machine
import psutil
from playwright.sync_api import sync_playwright

import experiments

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

LOSS = "metrics/train/plots/metrics/train/loss.tsv"  # the curve whose points are counted
STEP_COLUMN = 0
SECONDS_TO_SETTLE = 4  # after a page has been opened or closed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--repeats", type=int, default=5, help="loads of the warm page (default: 5)")
    parser.add_argument("--live", action="store_true", help="measure what a live page costs a training")
    parser.add_argument("--pairs", type=int, default=12, help="of open and closed page (default: 12)")
    parser.add_argument("--seconds", type=float, default=20, help="with the page open, and closed (default: 20)")
    arguments = parser.parse_args()
    if arguments.live:
        compare_live(arguments.pairs, arguments.seconds)
        return
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


def compare_live(pairs: int, seconds: float) -> None:
    """Print what an open live page costs a training."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="bench-studio-") as name:
        clone = Path(name) / "lathe"
        subprocess.run(["git", "clone", "--quiet", str(experiments.ROOT), str(clone)], check=True)
        subprocess.run(
            [sys.executable, "-m", "dvc", "cache", "dir", "--local", str(Path(name) / "cache")], cwd=clone, check=True
        )
        studio = subprocess.Popen(
            [sys.executable, "-m", "lathe", "studio", "--port", "0", "--no-browser"],
            cwd=clone,
            env={**os.environ, "PYTHONPATH": str(clone / "src"), "LATHE_STUDIO_TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert studio.stdout
        link = studio.stdout.readline().strip()
        api = StudioApi(re.sub("/open.*", "", link), token)
        # Nothing but steps: no evaluation or checkpoint, and no end before that of the measurement.
        values = {"training.max_steps": 1_000_000, "training.eval_steps": 500_000, "training.save_steps": 500_000}
        command = api.ask("POST", "/api/runs", {"recipe": "tiny", "name": "live", "values": values, "mode": "now"})
        try:
            file = wait_for_steps(api, command["identifier"])
            rates, shares = measure_rates(link, command["identifier"], file, psutil.Process(studio.pid), pairs, seconds)
        finally:
            api.ask("POST", f"/api/commands/{command['identifier']}/cancel")
            while api.ask("GET", f"/api/commands/{command['identifier']}")["state"] == "running":
                time.sleep(1)
            studio.kill()
            studio.wait()
    slowdowns = [1 - opened / closed for opened, closed in rates]
    error = statistics.stdev(slowdowns) / len(slowdowns) ** 0.5
    sys.stdout.write(f"{machine.describe()}\n\n| {pairs} pairs of {seconds:g} s | page open | page closed |\n")
    sys.stdout.write("| --- | ---: | ---: |\n")
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    sys.stdout.write(f"| steps per second, median | {medians[0]:.2f} | {medians[1]:.2f} |\n")
    sys.stdout.write(f"| studio, share of one core | {shares[0]:.1%} | {shares[1]:.1%} |\n\n")
    sys.stdout.write(
        f"slowdown within a pair: median {statistics.median(slowdowns):.1%}, mean {statistics.mean(slowdowns):.1%} "
        f"± {error:.1%} (standard error), from {min(slowdowns):.1%} to {max(slowdowns):.1%}\n"
    )


class StudioApi:
    """Requests to the studio as a program sends them."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self.token = address, token

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """Return the answer to a request. Raises HTTPError for a refusal."""
        request = urllib.request.Request(
            self.address + path,
            None if content is None else json.dumps(content).encode(),
            {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def wait_for_steps(api: StudioApi, identifier: str) -> Path:
    """Return the file of the training's loss once it has twenty points."""
    while True:
        state = api.ask("GET", f"/api/commands/{identifier}")
        if state["state"] != "running":
            log = api.ask("GET", f"/api/commands/{identifier}/log?lines=20")
            raise RuntimeError("\n".join(log))
        work = next(iter(api.ask("GET", "/api/running")), {})
        if work.get("stage") == "train" and (work.get("step") or 0) >= 100:
            return Path(work["root"]) / LOSS
        time.sleep(1)


def measure_rates(
    link: str, identifier: str, file: Path, studio: psutil.Process, pairs: int, seconds: float
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Return steps per second with the page open and closed, pair by pair, and the studio's share of a core in both."""
    address = re.sub("/open.*", "", link)
    rates: list[tuple[float, float]] = []
    used: dict[bool, list[float]] = {True: [], False: []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(link, wait_until="commit")
        page.wait_for_url(f"{address}/", wait_until="commit")
        for number in range(pairs):
            pair: dict[bool, float] = {}
            for is_open in (True, False) if number % 2 == 0 else (False, True):
                page.goto(f"{address}/commands/{identifier}" if is_open else "about:blank", wait_until="load")
                page.wait_for_timeout(SECONDS_TO_SETTLE * 1000)
                before = sum(studio.cpu_times()[:2])
                pair[is_open], lasted = measure_rate(file, seconds, page)
                used[is_open].append((sum(studio.cpu_times()[:2]) - before) / lasted)
            rates.append((pair[True], pair[False]))
        browser.close()
    return rates, (statistics.mean(used[True]), statistics.mean(used[False]))


def measure_rate(file: Path, seconds: float, page: Any) -> tuple[float, float]:
    """Return the steps per second between two points of a curve that are at least so many seconds apart, and these."""
    (first, begun), (last, ended) = (wait_for_point(file, page), (0, 0.0))
    while ended - begun < seconds:
        last, ended = wait_for_point(file, page)
    return (last - first) / (ended - begun), ended - begun


def wait_for_point(file: Path, page: Any) -> tuple[int, float]:
    """Return the step of the next point of a curve, and when it came."""
    known = file.stat().st_size
    while (size := file.stat().st_size) <= known:
        page.wait_for_timeout(10)  # the browser's messages are read meanwhile
    now = time.perf_counter()
    with file.open("rb") as lines:
        lines.seek(max(0, size - 200))
        return int(lines.read().splitlines()[-1].split(b"\t")[STEP_COLUMN]), now


if __name__ == "__main__":
    main()
