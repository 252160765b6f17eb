"""How fast the demo answers, and what many clients at once do to it.

    python benchmarks/app_load.py [--clients 30] [--seconds 120] [--collection 20] [--rounds 5]

Starts the demo in a process of its own and prints, with the goal beside each figure: from click to image for a pair
of 12-megapixel images (warm, in headless Chromium where there is one, else through the API), redrawing after the
threshold moved, one point transfer (time in the server, and the round trip), a collection, and a short form of
tests/reliability/load.py. The images are gradio's own, enlarged.
Ends with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from gradio_client import Client, handle_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "reliability"))
from load import hammer
from served_demo import PHOTOS, ROOT, ServedDemo, enlarge, match, served_demo

missed: list[str] = []


def report(what: str, value: float, goal: float, unit: str, note: str = "") -> None:
    if value > goal:
        missed.append(what)
    print(f"| {what} | {value:.2f} {unit} | < {goal:g} {unit} | {note} |", flush=True)


def in_the_browser(address: str, pair: list[Path], rounds: int) -> bool:
    """Click to image, and redraw; False where there is no browser."""
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
    report("click to image, 2 x 12 megapixels", statistics.median(clicks[1:]), 2.5, "s", "in Chromium, median")
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


def load(demo: ServedDemo, folder: Path, clients: int, seconds: float) -> None:
    """Clients with images of sizes that nobody else has; `tests/reliability/load.py` is the long form."""
    figures = hammer(demo, folder, clients, seconds)
    what, done = f"{clients} clients, {seconds:g} s", len(figures.answered)
    note = f"{done} pairs, median {figures.latency(0, 1):.1f} s each; {figures.refused} bad ones refused"
    report(f"{what}: failed requests", len(figures.failed), 0.5, "", note)
    report(f"{what}: wrong answers", len(figures.wrong), 0.5, "")
    report(f"{what}: memory", max(gigabytes for _, gigabytes in figures.memory), 2.5, "GB", "of all server processes")
    for text in (figures.failed + figures.wrong)[:5]:
        print("  ", text[:300], file=sys.stderr)
    if not done:
        missed.append("load: nothing was done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--collection", type=int, default=20, help="images of the collection")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = [enlarge(PHOTOS[index], (4000, 3000), folder / f"large{index}.jpg") for index in (0, 1)]
        with served_demo(folder / "server") as demo:
            client = Client(demo.address, verbose=False, download_files=str(folder / "mine"))
            result = match(client, *pair)[0]["result"]
            print("| what | measured | goal | |\n|---|---:|---:|---|")
            if not in_the_browser(demo.address, pair, args.rounds):
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
            images = [
                enlarge(PHOTOS[index % len(PHOTOS)], (1600 + 8 * index, 1200), folder / f"image{index:02}.jpg")
                for index in range(args.collection)
            ]
            began = time.perf_counter()
            client.predict([handle_file(str(path)) for path in images], api_name="/segment_collection")
            report(
                f"collection of {args.collection}, 2 megapixels each",
                time.perf_counter() - began,
                25,
                "s",
                "upload, zip in full size and download included",
            )
            load(demo, folder, args.clients, args.seconds)
    if missed:
        print("missed: " + "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
