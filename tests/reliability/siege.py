"""The demo under files that cost much: each of them alone, and many at once with good clients beside them.

    python tests/reliability/siege.py [--bad 40] [--good 10] [--side 7100] [--only NAME ...]

A real server process. First every file of bombs.py is matched with a good photo, and the processor time and the memory
that the server and its processes take for it are measured. Then good clients ask at once, alone, and again while so
many bad ones send the costliest files, each its own. Last the server is told to end, and what it left is counted.

Prints the figures with their goals; ends with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from gradio_client import Client

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bombs
from load import PATIENCE, Visitor, tracebacks
from served_demo import PHOTOS, ServedDemo, match, served_demo

MOST_SECONDS, MOST_GIGABYTES, MOST_TIMES, PEAK_GIGABYTES = 5, 1, 3, 3


def processor_time(demo: ServedDemo) -> float:
    """Seconds of the server, of the processes that it waited for, and of those that run."""
    server = psutil.Process(demo.process.pid)
    total = sum(server.cpu_times()[:4])
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:4])
    return total


@contextlib.contextmanager
def watched(demo: ServedDemo) -> Iterator[list[float]]:
    """The memory of all processes, in GB, sampled while something goes on."""
    samples, finished = [demo.memory()], threading.Event()

    def watch() -> None:
        while not finished.wait(0.02):
            samples.append(demo.memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        finished.set()
        thread.join()


def client_of(demo: ServedDemo, folder: Path) -> Client:
    return Client(demo.address, verbose=False, download_files=str(folder / "downloads"), httpx_kwargs=PATIENCE)


@dataclass
class Cost:
    """What one file cost the server."""

    name: str
    seconds: float
    gigabytes: float
    said: str


def cost(demo: ServedDemo, client: Client, path: Path) -> Cost:
    """Of a pair with a good photo, or of its refusal."""
    before = processor_time(demo)
    with watched(demo) as memory:
        said = send(client, path)
    time.sleep(0.2)
    return Cost(path.name, processor_time(demo) - before, max(memory) - memory[0], said)


def send(client: Client, path: Path) -> str:
    try:
        match(client, path, Path(PHOTOS[0]), refine="none")
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else repr(error)
    return "answered"


def ask(visitor: Visitor) -> float:
    """Seconds until a good request is answered rightly."""
    began = time.monotonic()
    visitor.good()
    return time.monotonic() - began


def copies(paths: list[Path], count: int, folder: Path) -> list[Path]:
    """So many files, each different by a byte behind its end, so that the server knows none from before."""
    made = []
    for number in range(count):
        path = folder / f"bad-{number}-{paths[number % len(paths)].name}"
        path.write_bytes(paths[number % len(paths)].read_bytes() + number.to_bytes(2, "big"))
        made.append(path)
    return made


def siege(
    demo: ServedDemo, folder: Path, files: list[Path], good: int
) -> tuple[list[float], list[float], float, list[str]]:
    """Seconds of good clients without and with the bad ones, the largest memory, and what the bad ones were told."""
    visitors = [Visitor(demo.address, number, folder, {}) for number in range(good)]
    bad = [client_of(demo, folder) for _ in files]
    with ThreadPoolExecutor(good + len(files)) as pool:
        alone = list(pool.map(ask, visitors))
        with watched(demo) as memory:
            told = [pool.submit(send, client, path) for client, path in zip(bad, files, strict=True)]
            time.sleep(1)  # the bad ones come first
            beside = list(pool.map(ask, visitors))
            said = [each.result() for each in told]
    return alone, beside, max(memory), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bad", type=int, default=40)
    parser.add_argument("--good", type=int, default=10)
    parser.add_argument("--side", type=int, default=7100, help="of square images; the demo takes up to 7,141")
    parser.add_argument("--only", nargs="*", help="names of files of bombs.py")
    args = parser.parse_args()
    missed = []

    def report(what: str, value: float, goal: float, note: str = "") -> None:
        if not value <= goal:
            missed.append(what)
        print(f"| {what} | {value:.3g} | <= {goal:g} | {note} |", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served_demo(folder / "server") as demo:
            client = client_of(demo, folder)
            send(client, Path(PHOTOS[1]))  # the model is loaded
            print("| file | MB | processor, s | memory, GB | |\n|---|---:|---:|---:|---|")
            costs = []
            makers = {**{key: functools.partial(make, args.side) for key, make in bombs.PIXELS.items()}, **bombs.PARTS}
            for key in args.only or makers:
                path = folder / key
                path.write_bytes(makers[key]())
                found = cost(demo, client, path)
                costs.append(found)
                size = path.stat().st_size / 1e6
                said = f"{found.seconds:.2f} | {found.gigabytes:.2f} | {found.said[:100]}"
                print(f"| {found.name} | {size:.2f} | {said} |", flush=True)
            costs.sort(key=lambda each: -each.seconds - each.gigabytes)
            worst = [folder / each.name for each in costs[:10]]
            alone, beside, peak, said = siege(demo, folder, copies(worst, args.bad, folder), args.good)
            traces = tracebacks(demo)
            print(f"alone {alone}\nbeside {beside}\npeak {peak}", file=sys.stderr, flush=True)
            began = time.monotonic()
            demo.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                demo.process.wait(120)
            status, took = demo.process.poll(), time.monotonic() - began
            left = [path for path in demo.uploads.rglob("*") if path.is_file()]
    print(f"\n{args.bad} bad and {args.good} good clients at once\n\n| what | measured | goal | |\n|---|---:|---:|---|")
    report("processor time of the costliest file, s", max(each.seconds for each in costs), MOST_SECONDS, costs[0].name)
    report("memory of the costliest file, GB", max(each.gigabytes for each in costs), MOST_GIGABYTES)
    note = f"medians {statistics.median(alone):.1f} s alone, {statistics.median(beside):.1f} s beside the bad ones"
    report("slowest good client, times the slowest alone", max(beside) / max(alone), MOST_TIMES, note)
    report("memory, largest, GB", peak, PEAK_GIGABYTES)
    report("tracebacks in the server's log", len(traces), 0)
    report("status after SIGTERM", 1 if status is None else abs(status), 0, f"ended after {took:.1f} s")
    report("files of visitors after SIGTERM", len(left), 0)
    answered = said.count("answered")
    busy = sum("busy" in each for each in said)
    print(f"bad ones: {answered} answered, {busy} told that the server is busy, {len(said) - answered - busy} refused")
    for text in [*sorted({each[:150] for each in said}), *traces[:5]]:
        print("  ", text, file=sys.stderr)
    if missed:
        print("missed: " + "; ".join(missed), file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
