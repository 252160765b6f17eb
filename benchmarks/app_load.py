"""How fast the demo answers, and what many clients at once do to it.

    python benchmarks/app_load.py [--clients 30] [--seconds 120] [--collection 20] [--rounds 5]

Starts the demo in a process of its own and prints, with the goal beside each figure: from click to picture for a pair
of 12-megapixel photographs (warm, in headless Chromium where there is one, else through the API), redrawing after the
threshold moved, one point transfer (time in the server, and the round trip), a collection, and a load of clients that
match, transfer points and compare what they get with their own photographs. The photographs are gradio's own, enlarged.
Ends with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from gradio.media import get_image
from gradio_client import Client, handle_file
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [get_image(name) for name in ("cheetah1.jpg", "lion.jpg", "cheetah.jpg", "tower.jpg")]

missed: list[str] = []


def report(what: str, value: float, goal: float, unit: str, note: str = "") -> None:
    if value > goal:
        missed.append(what)
    print(f"| {what} | {value:.2f} {unit} | < {goal:g} {unit} | {note} |", flush=True)


def enlarge(source: str, size: tuple[int, int], target: Path) -> Path:
    with Image.open(source) as photo:
        photo.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(target, quality=90)
    return target


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": str(folder / "served")},
    )
    first = process.stdout.readline()
    found = re.match(r"Open (http://127\.0\.0\.1:\d+)/ ", first)
    if not found:
        process.kill()
        raise SystemExit(first + process.communicate()[0])
    threading.Thread(target=process.stdout.read, daemon=True).start()
    return process, found[1]


def match(client: Client, source: Path, target: Path) -> tuple:
    return client.predict(handle_file(str(source)), handle_file(str(target)), api_name="/match")


def in_the_browser(address: str, pair: list[Path], rounds: int) -> bool:
    """Click to picture, and redraw; False where there is no browser."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return False
    if chromium is None:
        return False
    clicks, redraws = [], []
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.goto(address)
        page.locator("#viewer svg").wait_for(timeout=120_000)
        for place, path in zip(("source", "target"), pair, strict=True):
            page.locator(f"#{place} button[aria-label='Remove Image']").click()
            page.locator(f"#{place} input[type=file]").set_input_files(str(path))
            page.locator(f"#{place} img[src*='{path.name}']").wait_for(timeout=60_000)
        field = page.locator("#threshold input[type=number]")
        for _ in range(rounds + 1):  # the first one warms up
            page.evaluate("document.querySelector('#viewer .match').dataset.old = 1")
            began = time.perf_counter()
            page.locator("#match").click()
            page.wait_for_function("!document.querySelector('#viewer [data-old]')", timeout=60_000, polling=20)
            clicks.append(time.perf_counter() - began)
            page.wait_for_timeout(500)
        for number in range(rounds + 1):
            page.evaluate("document.querySelector('#viewer .match').dataset.old = 1")
            began = time.perf_counter()
            field.fill(("0.5", "0.3")[number % 2])
            page.wait_for_function("!document.querySelector('#viewer [data-old]')", timeout=10_000, polling=10)
            redraws.append(time.perf_counter() - began)
            page.wait_for_timeout(100)
    report("click to picture, 2 x 12 megapixels", statistics.median(clicks[1:]), 2.5, "s", "in Chromium, median")
    report("threshold moved to redrawn", statistics.median(redraws[1:]), 0.3, "s", "in Chromium, median")
    return True


def transfer_in_the_server(pair: list[Path], rounds: int) -> float:
    """Median seconds of one point's transfer, in this process: what the server's function does, without the network."""
    sys.path.insert(0, str(ROOT))
    import app

    work = app.Matcher().pair(str(pair[0]), str(pair[1]), "none")
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work.transfer([[100, 100]], "source_to_target")
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def load(address: str, process: subprocess.Popen, folder: Path, clients: int, seconds: float) -> None:
    """Clients with photographs of sizes that nobody else has."""
    failures, strangers, latencies = [], [], []
    memory = [0.0]
    end = time.monotonic() + seconds

    def watch() -> None:
        server = psutil.Process(process.pid)
        while time.monotonic() < end + 60 and not finished.is_set():
            family = [server, *server.children(recursive=True)]
            memory[0] = max(memory[0], sum(one.memory_info().rss for one in family) / 1e9)
            finished.wait(0.5)

    def work(number: int) -> None:
        size = (800 + 3 * number, 600 + 2 * number)
        try:
            client = Client(address, verbose=False, download_files=str(folder / f"client{number}"))
            own = enlarge(SOURCES[number % 3], size, folder / f"own-{number}.jpg")
            other = enlarge(SOURCES[(number + 1) % 3], size[::-1], folder / f"other-{number}.jpg")
        except Exception as error:
            failures.append(repr(error))
            return
        while time.monotonic() < end:
            began = time.perf_counter()
            try:
                answer, _, mask, other_mask, _ = match(client, own, other)
                sizes = [Image.open(path).size for path in (mask, other_mask)]
                told = [
                    (answer[role]["file"], answer[role]["width"], answer[role]["height"])
                    for role in ("source", "target")
                ]
                if sizes != [size, size[::-1]] or told != [(own.name, *size), (other.name, *size[::-1])]:
                    strangers.append(f"client {number}: {told}, {sizes}")
                # The last pixel: outside of the photographs of all clients before this one.
                client.predict(answer["result"], [[size[0] - 1, size[1] - 1]], api_name="/transfer_points")
                latencies.append(time.perf_counter() - began)
            except Exception as error:
                failures.append(f"client {number}: {error!r}")

    finished = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finished.set()
    watcher.join()
    what = f"{clients} clients, {seconds:g} s"
    done = len(latencies)
    note = f"{done} pairs, median {statistics.median(latencies) if done else float('nan'):.1f} s each"
    report(f"{what}: failed requests", len(failures), 0.5, "", note)
    report(f"{what}: results of somebody else", len(strangers), 0.5, "")
    report(f"{what}: memory", memory[0], 2.5, "GB", "largest sum over the server's processes")
    for text in (failures + strangers)[:5]:
        print("  ", text[:300], file=sys.stderr)
    if not done:
        missed.append("load: nothing was done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--collection", type=int, default=20, help="photographs of the collection")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = [enlarge(SOURCES[index], (4000, 3000), folder / f"large{index}.jpg") for index in (0, 1)]
        process, address = start(folder)
        try:
            client = Client(address, verbose=False, download_files=str(folder / "mine"))
            result = match(client, *pair)[0]["result"]
            print("| what | measured | goal | |\n|---|---:|---:|---|")
            if not in_the_browser(address, pair, args.rounds):
                print("no Chromium with playwright: the API instead, with masks in full size", file=sys.stderr)
                seconds = []
                for _ in range(args.rounds):
                    began = time.perf_counter()
                    result = match(client, *pair)[0]["result"]
                    seconds.append(time.perf_counter() - began)
                report("/match, 2 x 12 megapixels", statistics.median(seconds), 2.5, "s", "through the API, median")
            report("point transfer", transfer_in_the_server(pair, args.rounds), 0.1, "s", "time in the server, median")
            seconds = []
            for _ in range(args.rounds):
                began = time.perf_counter()
                client.predict(result, [[100, 100]], api_name="/transfer_points")
                seconds.append(time.perf_counter() - began)
            print(f"| the same, round trip of gradio_client | {statistics.median(seconds):.2f} s | | |")
            photographs = [
                enlarge(SOURCES[index % len(SOURCES)], (1600 + 8 * index, 1200), folder / f"photo{index:02}.jpg")
                for index in range(args.collection)
            ]
            began = time.perf_counter()
            client.predict([handle_file(str(path)) for path in photographs], api_name="/segment_collection")
            report(
                f"collection of {args.collection}, 2 megapixels each",
                time.perf_counter() - began,
                25,
                "s",
                "upload, zip in full size and download included",
            )
            load(address, process, folder, args.clients, args.seconds)
        finally:
            process.terminate()
            process.wait(30)
    if missed:
        print("missed: " + "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
