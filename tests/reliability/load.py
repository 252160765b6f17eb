"""The demo under many clients at once, with good and bad requests, and what it refuses.

    python tests/reliability/load.py [--clients 50] [--seconds 300]

A real server process, clients of gradio_client in threads. Each client has images of sizes and names that nobody
else has, and asks once while it is quiet; under load every answer must be that one again, to the last digit and pixel.
Between good requests it sends what nobody should send (damaged, empty and oversized files, unknown keys and options,
too many points), each of which must end in its own sentence, and walks away in the middle of a request. Every tenth
client asks for collections. Then the queue is filled beyond its limit.

Prints the figures with their goals; ends with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError, ValidationError
from gradio_client.utils import QueueError
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from served_demo import PHOTOS, ROOT, ServedDemo, enlarge, match, served_demo

sys.path.insert(0, str(ROOT))
from macosnet_hf.demo.limits import MAX_WAITING

# Seconds in which the server must begin to answer. The client's own limit is 5, in which a busy machine may run neither
# clients nor server; how long answers take is a figure of its own.
PATIENCE = {"timeout": 60}

# ---------------------------------------------------------------------------------------------------------------------
# What one client sends
# ---------------------------------------------------------------------------------------------------------------------


def image_hash(path: str) -> str:
    """Of the pixels, whatever the file is called."""
    with Image.open(path) as image:
        return hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).hexdigest()


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no images, and what has to be said of each."""
    stream = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(stream, "PNG")  # 200 megapixels in some kilobytes
    contents = {
        "empty": (b"", "is empty"),
        "letter": (b"This is a letter, not an image. " * 20, "is not an image"),
        "torn": (Path(PHOTOS[1]).read_bytes()[:4000], "is damaged"),
        "bomb": (stream.getvalue(), "megapixels"),
    }
    files = {}
    for name, (content, sentence) in contents.items():
        path = folder / f"{name}.jpg"
        path.write_bytes(content)
        files[name] = (path, sentence)
    return files


class Visitor:
    """One client with images of its own.

    Args:
        number: no two visitors have the same, nor images of the same size.
    """

    def __init__(self, address: str, number: int, folder: Path, damaged: dict[str, tuple[Path, str]]) -> None:
        self.number = number
        self.size = (800 + 3 * number, 600 + 2 * number)
        downloads = str(folder / f"client{number}")
        self.client = Client(address, verbose=False, download_files=downloads, httpx_kwargs=PATIENCE)
        self.own = enlarge(PHOTOS[number % 3], self.size, folder / f"own-{number}.jpg")
        self.other = enlarge(PHOTOS[(number + 1) % 3], self.size[::-1], folder / f"other-{number}.jpg")
        self.damaged = damaged
        self.collects = number % 10 == 9
        self.expected = self.ask()

    def ask(self) -> Any:
        """A good request; what matters of its answer."""
        return self.ask_collection() if self.collects else self.ask_pair()

    def ask_pair(self) -> Any:
        report, _, mask, other_mask, _ = match(self.client, self.own, self.other)
        # The last pixel: outside of the images of all visitors before this one.
        corner = [[self.size[0] - 1, self.size[1] - 1]]
        moved = self.client.predict(report.pop("result"), corner, api_name="/transfer_points")
        sizes = [(report[role]["width"], report[role]["height"]) for role in ("source", "target")]
        names = [report[role]["file"] for role in ("source", "target")]
        if sizes != [self.size, self.size[::-1]] or names != [self.own.name, self.other.name]:
            raise WrongAnswerError(f"{self.own.name}: an answer about {names}, {sizes}")
        return report, moved, image_hash(mask), image_hash(other_mask)

    def ask_collection(self) -> Any:
        files = [handle_file(str(path)) for path in (self.own, self.other)]
        report, *_ = self.client.predict(files, "none", api_name="/segment_collection")
        return report

    def good(self) -> None:
        if self.ask() != self.expected:
            raise WrongAnswerError(f"{self.own.name}: the answer is not the one that came while it was quiet")

    def bad(self, turn: int) -> None:
        """What nobody should send; raises if it is answered, or refused in other words than its own."""
        kinds: list[tuple[Callable[[], Any], str]] = [
            *(
                (lambda path=path: match(self.client, path, self.own), rf"^Source: '{path.name}' .*{sentence}")
                for path, sentence in self.damaged.values()
            ),
            (lambda: match(self.client, self.own, None), r"^Choose two photos first\.$"),
            (lambda: match(self.client, self.own, self.other, refine="magic"), "magic"),
            (
                lambda: self.client.predict("no such key", [[1, 1]], api_name="/transfer_points"),
                "no longer available",
            ),
            (
                lambda: self.client.predict("no such key", [[1, 1]] * 2000, api_name="/transfer_points"),
                "at most 1000",
            ),
            (
                lambda: self.client.predict([handle_file(str(self.own))], api_name="/segment_collection"),
                r"(?i)two|2",
            ),
        ]
        send, sentence = kinds[turn % len(kinds)]
        try:
            send()
        except (AppError, ValidationError) as error:
            if not re.search(sentence, str(error)) or "Traceback" in str(error):
                raise WrongAnswerError(f"refused in other words than {sentence!r}: {error}") from error
        else:
            raise WrongAnswerError(f"a request that should end in {sentence!r} was answered")

    def walk_away(self) -> None:
        """Asks and does not wait for the answer."""
        job = self.client.submit(handle_file(str(self.own)), handle_file(str(self.other)), api_name="/match")
        time.sleep(0.05)
        job.cancel()


class WrongAnswerError(Exception):
    """An answer to somebody else, or none of the promised ones."""


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What was seen.

    Attributes:
        answered: (when, how long) of each good request, in seconds.
        refused: how many bad ones were refused in their own words.
        wrong: answers that were not the promised ones.
        failed: requests that ended in anything else.
        memory: (when, GB) of the server's processes.
    """

    answered: list[tuple[float, float]] = field(default_factory=list)
    collections: int = 0
    refused: int = 0
    abandoned: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    files: list[tuple[int, float]] = field(default_factory=list)

    def latency(self, part: int, parts: int) -> float:
        """Median seconds of the good requests that ended in a part of the time."""
        if not self.answered:
            return float("nan")
        begin, end = self.answered[0][0], max(when for when, _ in self.answered)
        step = max(end - begin, 1e-9) / parts
        took = [took for when, took in self.answered if begin + part * step <= when <= begin + (part + 1) * step]
        return statistics.median(took) if took else float("nan")


def hammer(demo: ServedDemo, folder: Path, clients: int, seconds: float) -> Figures:
    """Lets so many clients loose on a demo for so long."""
    figures = Figures()
    damaged = damaged_files(folder)
    visitors = [Visitor(demo.address, number, folder, damaged) for number in range(clients)]
    figures.files.append(demo.files())
    lock, finished = threading.Lock(), threading.Event()
    start = time.monotonic()
    end = start + seconds

    def watch() -> None:
        while not finished.is_set():
            figures.memory.append((time.monotonic() - start, demo.memory()))
            finished.wait(0.5)

    def work(visitor: Visitor) -> None:
        # Of ten requests six are good, three bad, and one is abandoned. Each visitor starts at another one.
        for turn in itertools.count(visitor.number):
            if time.monotonic() >= end:
                return
            began = time.monotonic()
            try:
                if turn % 10 in (1, 4, 7):
                    visitor.bad(turn // 3)
                elif turn % 10 == 9:
                    visitor.walk_away()
                else:
                    visitor.good()
            except WrongAnswerError as error:
                figures.wrong.append(f"client {visitor.number}: {error}")
            except Exception as error:
                figures.failed.append(f"client {visitor.number}: {error!r}")
            else:
                with lock:
                    now = time.monotonic()
                    if turn % 10 in (1, 4, 7):
                        figures.refused += 1
                    elif turn % 10 == 9:
                        figures.abandoned += 1
                    elif visitor.collects:
                        figures.collections += 1
                    else:
                        figures.answered.append((now - start, now - began))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, visitors))
    finished.set()
    watcher.join()
    figures.files.append(demo.files())
    return figures


def crowd(demo: ServedDemo, folder: Path, requests: int) -> Counter[str]:
    """So many requests at once: how many were answered, refused because the queue is full, or went wrong."""
    downloads = str(folder / "crowd")
    client = Client(demo.address, verbose=False, download_files=downloads, max_workers=requests, httpx_kwargs=PATIENCE)
    photos = [enlarge(PHOTOS[index], (120, 90), folder / f"small-{index}.jpg") for index in (0, 1)]
    ends: Counter[str] = Counter()

    def one(_: int) -> str:
        try:
            match(client, *photos, refine="none")
        except QueueError as error:
            return "refused" if "full" in str(error) else repr(error)
        except Exception as error:
            return repr(error)
        return "answered"

    with ThreadPoolExecutor(requests) as pool:
        ends.update(pool.map(one, range(requests)))
    return ends


def left_behind(demo: ServedDemo, seconds: float = 20) -> list[str]:
    """Temporary files that are still there when the server has had time to finish what clients abandoned."""
    end = time.monotonic() + seconds
    while (left := [path.name for path in demo.scratch.rglob("*") if path.is_file()]) and time.monotonic() < end:
        time.sleep(0.5)
    return left


def tracebacks(demo: ServedDemo) -> list[str]:
    """What the server's log says went wrong: the last line of each traceback."""
    ends, inside = [], False
    for line in demo.log:
        if line.startswith("Traceback"):
            inside = True
        elif inside and line.strip() and not line.startswith((" ", "|", "+")):
            ends.append(line.strip())
            inside = False
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--waiting", type=int, default=MAX_WAITING, help=f"limit of the queue ({MAX_WAITING})")
    parser.add_argument("--log", type=Path, help="file for what the server printed")
    args = parser.parse_args()
    requests = args.waiting + max(10, args.waiting // 2)
    missed = []

    def report(what: str, value: float, goal: float, unit: str = "", note: str = "") -> None:
        if not value <= goal:  # also where it is not a number, because there was nothing to measure
            missed.append(what)
        print(f"| {what} | {value:.4g} {unit} | <= {goal:g} {unit} | {note} |", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served_demo(folder / "server", max_waiting=args.waiting) as demo:
            figures = hammer(demo, folder, args.clients, args.seconds)
            ends = crowd(demo, folder, requests)
            left = left_behind(demo)
            alive = demo.process.poll() is None
            if args.log:
                args.log.write_text("".join(demo.log), encoding="utf-8")
            traces = tracebacks(demo)
    print(f"{args.clients} clients, {args.seconds:g} s\n")
    print("| what | measured | goal | |\n|---|---:|---:|---|")
    print(
        f"| good requests answered | {len(figures.answered)} pairs, {figures.collections} collections | | "
        f"{figures.refused} bad ones refused in their own words, {figures.abandoned} abandoned |"
    )
    report("wrong answers", len(figures.wrong), 0)
    report("failed requests", len(figures.failed), 0)
    report("tracebacks in the server's log", len(traces), 0)
    report("the server has ended", 0 if alive else 1, 0)
    first, last = figures.latency(0, 3), figures.latency(2, 3)
    report("median latency, last third to first", last / first, 1.5, "", f"{first:.1f} s, then {last:.1f} s")
    memory = [gigabytes for _, gigabytes in figures.memory]
    third = max(1, len(memory) // 3)
    report("memory, largest", max(memory), 3, "GB", "sum over the server's processes")
    growth = statistics.median(memory[-third:]) - statistics.median(memory[third : 2 * third] or memory)
    report("memory, median of the last third less that of the middle one", growth, 0.1, "GB")
    (files, megabytes), (files_later, megabytes_later) = figures.files
    note = f"{files} files, {megabytes:.0f} MB before; {files_later} files, {megabytes_later:.0f} MB after"
    report("files stored, growth", megabytes_later - megabytes, 20 + 0.2 * megabytes, "MB", note)
    report("temporary files left behind", len(left), 0)
    strange = sum(count for kind, count in ends.items() if kind not in ("answered", "refused"))
    note = f"{requests} at once, {args.waiting} may wait: {ends['answered']} answered, {ends['refused']} refused"
    report("full queue, neither answered nor refused", strange, 0, "", note)
    report("full queue, nobody was refused", 0 if ends["refused"] else 1, 0)
    strangers = [kind for kind in ends if kind not in ("answered", "refused")]
    for text in [*figures.wrong[:5], *figures.failed[:5], *Counter(traces), *left[:5], *strangers]:
        print("  ", text[:400], file=sys.stderr)
    if missed:
        print("missed: " + "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
